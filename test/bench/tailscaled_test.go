package bench

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
)

// BenchmarkTailscaled compares what could be set for tailscaled, and is not, with a tailscaled as it is: one TCP stream between pods of two nodes,
// and the processor time that both tailscaleds take for a gigabyte of it. Two pairs are as they are, which says what the machine's noise is.
func BenchmarkTailscaled(b *testing.B) {
	nstest.Require(b)
	if err := (lab.Options{}).Check(); err != nil {
		nstest.Skip(b, err.Error())
	}
	ctx, cancel := context.WithTimeout(b.Context(), 20*time.Minute)
	defer cancel()
	settings := []struct {
		name string
		env  []string
		link string // arguments of ip link set
	}{
		{"as it is", nil, ""},
		{"as it is, another pair", nil, ""},
		{"GOGC=400", []string{"GOGC=400"}, ""},
		{"GOMAXPROCS=1", []string{"GOMAXPROCS=1"}, ""},
		{"txqueuelen 5000", nil, "txqueuelen 5000"},
	}
	settingOf := func(n *lab.Node) int {
		i, err := strconv.Atoi(strings.TrimPrefix(n.Name, "node-"))
		if err != nil {
			b.Fatal(err)
		}
		return (i - 1) / 2
	}
	l, err := lab.New(ctx, lab.Options{Nodes: 2 * len(settings), Modes: []string{config.ModeDaemon}, Configure: func(n *lab.Node, _ map[string]any) {
		n.Env = settings[settingOf(n)].env
	}})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	var ways []way
	for nodes := range slices.Chunk(l.Nodes, 2) {
		s := settings[settingOf(nodes[0])]
		var pods []*lab.Pod
		for _, n := range nodes {
			if s.link != "" {
				if out, err := n.Run(ctx, "sh", "-c", "ip link set "+n.Tun+" "+s.link); err != nil {
					b.Fatal(out, err)
				}
			}
			p, err := n.AddPod(ctx, "load", lab.PodOptions{})
			if err != nil {
				b.Fatal(err)
			}
			pods = append(pods, p)
		}
		ways = append(ways, func(got samples) error {
			before, err := processorTime(nodes)
			if err != nil {
				return err
			}
			bps, err := lab.Throughput(ctx, pods[0], pods[1], pods[1].Addr(false), time.Second)
			if err != nil {
				return err
			}
			after, err := processorTime(nodes)
			got["TCP "+s.name] = append(got["TCP "+s.name], bps/1e9)
			got["both tailscaleds "+s.name] = append(got["both tailscaleds "+s.name], (after-before).Seconds()/(bps/8e9))
			return err
		})
	}
	got := interleave(b, 12, ways...)
	r := newComparison(b, "tailscaled:")
	for _, s := range settings[1:] {
		r.compare(got, row{"TCP", "1 stream, Gb/s", s.name, settings[0].name, ratio, ""})
		r.compare(got, row{"both tailscaleds", "s of CPU for each GB", s.name, settings[0].name, ratio, ""})
	}
}

// processorTime is what the nodes' tailscaleds have taken so far (proc_pid_stat(5)), in steps of 10 ms.
func processorTime(nodes []*lab.Node) (sum time.Duration, err error) {
	for _, n := range nodes {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n.Tailscaled.PID()))
		if err != nil {
			return 0, err
		}
		words := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		for _, ticks := range words[11:13] { // utime and stime
			t, err := strconv.Atoi(ticks)
			if err != nil {
				return 0, err
			}
			sum += time.Duration(t) * 10 * time.Millisecond
		}
	}
	return sum, nil
}
