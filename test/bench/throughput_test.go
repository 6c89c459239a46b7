package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
)

// BenchmarkThroughput compares one TCP stream between pods on two nodes with one between the nodes over tailscale, and
// with one over the bare underlay; and one between pods of one node with all that the daemon puts there with one between pods
// that ptp made on a host with nothing else, on one that tracks connections, as every host with kube-proxy does, and on a node that
// looks pods' sources up, by the nftables and by itself.
func BenchmarkThroughput(b *testing.B) {
	nstest.Require(b)
	if err := (lab.Options{}).Check(); err != nil {
		nstest.Skip(b, err.Error())
	}
	ctx, cancel := context.WithTimeout(b.Context(), 20*time.Minute)
	defer cancel()
	l, err := lab.New(ctx, lab.Options{Nodes: 3})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	var pods []*lab.Pod
	for i, n := range []*lab.Node{l.Nodes[0], l.Nodes[1], l.Nodes[1], l.Nodes[2], l.Nodes[2]} {
		p, err := n.AddPod(ctx, fmt.Sprintf("load-%d", i), lab.PodOptions{})
		if err != nil {
			b.Fatal(err)
		}
		pods = append(pods, p)
	}
	tailnet, err := l.Nodes[1].TailnetAddrs()
	if err != nil {
		b.Fatal(err)
	}
	if err := lookUp(ctx, l.Nodes[2]); err != nil {
		b.Fatal(err)
	}
	bare, bareAddr := barePods(b)
	paths := []struct {
		name     string
		from, to lab.Place
		addr     netip.Addr
		tracks   bool
	}{
		{"pod-pod", pods[0], pods[1], pods[1].Addr(false), false},
		{"node-node over tailscale", l.Nodes[0], l.Nodes[1], tailnet[0], false},
		{"node-node, underlay", l.Nodes[0], l.Nodes[1], l.Nodes[1].Underlay[0], false},
		{"pod-pod on a node", pods[2], pods[1], pods[1].Addr(false), false},
		{"pod-pod on a host, ptp", bare[0], bare[1], bareAddr, false},
		{"pod-pod on a host with connection tracking, ptp", bare[0], bare[1], bareAddr, true},
		{"pod-pod on a node that looks sources up", pods[3], pods[4], pods[4].Addr(false), false},
	}
	var ways []way
	for _, p := range paths {
		ways = append(ways, func(got samples) error {
			if p.tracks {
				end, err := track(ctx)
				if err != nil {
					return err
				}
				defer end()
			}
			bps, err := lab.Throughput(ctx, p.from, p.to, p.addr, time.Second)
			got["TCP "+p.name] = append(got["TCP "+p.name], bps/1e9)
			return err
		})
	}
	for _, p := range paths[:2] {
		ways = append(ways, func(got samples) error {
			bps, err := streams(ctx, 8, p.from, p.to, p.addr)
			got["TCP, 8 streams "+p.name] = append(got["TCP, 8 streams "+p.name], bps/1e9)
			return err
		})
	}
	got := interleave(b, 12, ways...)
	r := newComparison(b, "Throughput:")
	r.compare(got, row{"TCP", "1 stream, Gb/s", paths[0].name, paths[1].name, ratio, "at least 0.97"})
	r.compare(got, row{"TCP, 8 streams", "Gb/s", paths[0].name, paths[1].name, ratio, "at least 0.97"})
	r.compare(got, row{"TCP", "1 stream, Gb/s", paths[0].name, paths[2].name, ratio, ""})
	r.compare(got, row{"TCP", "1 stream, Gb/s", paths[3].name, paths[4].name, ratio, ""})
	r.compare(got, row{"TCP", "1 stream, Gb/s", paths[3].name, paths[5].name, ratio, "at least 0.95"})
	r.compare(got, row{"TCP", "1 stream, Gb/s", paths[3].name, paths[6].name, ratio, ""})
}

// streams are the sum of so many streams at once.
func streams(ctx context.Context, n int, from, to lab.Place, addr netip.Addr) (sum float64, err error) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	for range n {
		wg.Go(func() {
			bps, failed := lab.Throughput(ctx, from, to, addr, time.Second)
			mu.Lock()
			defer mu.Unlock()
			sum, err = sum+bps, errors.Join(err, failed)
		})
	}
	wg.Wait()
	return sum, err
}

// BenchmarkPeerMTU compares one TCP stream between pods of two nodes with network.peerMTU (auto) with one between pods of two without it, over
// an underlay that carries jumbo frames.
func BenchmarkPeerMTU(b *testing.B) {
	nstest.Require(b)
	if err := (lab.Options{}).Check(); err != nil {
		nstest.Skip(b, err.Error())
	}
	r := newComparison(b, "network.peerMTU:")
	const mtu = 9000
	ctx, cancel := context.WithTimeout(b.Context(), 20*time.Minute)
	defer cancel()
	l, err := lab.New(ctx, lab.Options{Nodes: 4, Modes: []string{config.ModeDaemon}, UnderlayMTU: mtu, Configure: func(n *lab.Node, c map[string]any) {
		if n.Name == "node-1" || n.Name == "node-2" {
			c["network"].(map[string]any)["peerMTU"] = string(config.Auto)
		}
	}})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	var pods []*lab.Pod
	for i, n := range l.Nodes {
		p, err := n.AddPod(ctx, fmt.Sprintf("load-%d", i), lab.PodOptions{})
		if err != nil {
			b.Fatal(err)
		}
		pods = append(pods, p)
	}
	if _, _, err := lab.Echo(ctx, pods[0], pods[1].Addr(false), 64); err != nil {
		b.Fatal(err)
	}
	for ctx.Err() == nil { // until the path is proven at both ends
		routes := 0
		for _, n := range l.Nodes[:2] {
			out, _ := n.Run(ctx, "ip", "route", "show", "table", "52")
			routes += min(1, strings.Count(out, "/25 "))
		}
		if routes == 2 {
			break
		}
		time.Sleep(time.Second)
	}
	const what = "TCP"
	var ways []way
	for i, name := range []string{"auto", "off"} {
		ways = append(ways, func(got samples) error {
			bps, err := lab.Throughput(ctx, pods[2*i], pods[2*i+1], pods[2*i+1].Addr(false), time.Second)
			got[what+" "+name] = append(got[what+" "+name], bps/1e9)
			return err
		})
	}
	r.compare(interleave(b, 12, ways...), row{what, "1 stream, underlay 9000 bytes, Gb/s", "auto", "off", ratio, "at least 1.6"})
}

// lookUp has a node look the source of every packet of its pods' up in the FIB, and once more.
func lookUp(ctx context.Context, n *lab.Node) error {
	if err := n.Daemon.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	_, err := n.Run(ctx, "sh", "-c", "nft 'flush set ip headcni sources; flush set ip6 headcni sources'; for f in /proc/sys/net/ipv4/conf/hc*/accept_local; do echo 0 > $f; done")
	return err
}

// track has this host track connections until end is called.
func track(ctx context.Context) (end func(), err error) {
	const table = "headcni-bench"
	rules := "add table ip " + table + "; add chain ip " + table + " f { type filter hook forward priority 0; }; add rule ip " + table + " f ct state established accept"
	if out, err := exec.CommandContext(ctx, "nft", rules).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("track connections: %w: %s", err, out)
	}
	return func() { _ = exec.Command("nft", "delete table ip "+table).Run() }, nil
}

// barePods makes two pods by ptp, with our MTU, and returns the address of the second.
func barePods(b *testing.B) (pods [2]*lab.Net, to netip.Addr) {
	p := newPrograms(b)
	for i, s := range newSandboxes(b, len(pods)) {
		if err := p.command(ptp, "ADD", s); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := p.command(ptp, "DEL", s); err != nil {
				b.Error(err)
			}
		})
		var result struct {
			IPs []struct{ Address netip.Prefix }
		}
		err := json.Unmarshal(s.result, &result)
		if err == nil && len(result.IPs) == 0 {
			err = errors.New("ptp gives no address")
		}
		if err == nil {
			pods[i], err = lab.NetAt(s.netns)
		}
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(pods[i].Close)
		to = result.IPs[0].Address.Addr()
	}
	return pods, to
}
