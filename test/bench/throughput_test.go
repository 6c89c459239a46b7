package bench

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/nstest"
)

// BenchmarkThroughput compares one TCP stream between pods on two nodes with one between the nodes over tailscale, and
// with one over the bare underlay.
func BenchmarkThroughput(b *testing.B) {
	nstest.Require(b)
	if err := (lab.Options{}).Check(); err != nil {
		nstest.Skip(b, err.Error())
	}
	ctx, cancel := context.WithTimeout(b.Context(), 5*time.Minute)
	defer cancel()
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	var pods []*lab.Pod
	for _, n := range l.Nodes[:2] {
		p, err := n.AddPod(ctx, "load-"+n.Name, lab.PodOptions{})
		if err != nil {
			b.Fatal(err)
		}
		pods = append(pods, p)
	}
	tailnet, err := l.Nodes[1].TailnetAddrs()
	if err != nil {
		b.Fatal(err)
	}
	paths := []struct {
		name     string
		from, to lab.Place
		addr     netip.Addr
	}{
		{"pod-pod", pods[0], pods[1], pods[1].Addr(false)},
		{"node-node over tailscale", l.Nodes[0], l.Nodes[1], tailnet[0]},
		{"node-node, underlay", l.Nodes[0], l.Nodes[1], l.Nodes[1].Underlay[0]},
	}
	var ways []way
	for _, p := range paths {
		ways = append(ways, func(got samples) error {
			bps, err := lab.Throughput(ctx, p.from, p.to, p.addr, time.Second)
			got["TCP "+p.name] = append(got["TCP "+p.name], bps/1e9)
			return err
		})
	}
	got := interleave(b, 12, ways...)
	r := newComparison(b, "Throughput:")
	r.compare(got, row{"TCP", "1 stream, Gb/s", paths[0].name, paths[1].name, ratio, "at least 0.97"})
	r.compare(got, row{"TCP", "1 stream, Gb/s", paths[0].name, paths[2].name, ratio, ""})
}
