// Package rearm measures how long pods are dark to each other after a restart of a node's tailscaled, and holds that no
// session stays dark for as long as only WireGuard's timers explain (pkg/tailscale, Rearm).
//
// A few restarts run with the other tests. `make bench-rearm` runs many for each variant, with and without the cure in turn, and
// prints tables.
package rearm

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
)

var (
	trials = flag.Int("trials", 3, "restarts for each variant")
	nodes  = flag.Int("nodes", 4, "nodes of the lab; the first one's tailscaled is restarted")
)

const (
	// uncured is an excess that only a session left to WireGuard's timers explains: they are 5 and 15 s.
	uncured = 4 * time.Second
	// patience is how long a flow may be dark before it counts as dead.
	patience = 60 * time.Second
	// settled is how long sessions are left alone between two restarts.
	settled = 2 * time.Second
)

func TestMain(m *testing.M) {
	flag.Parse()
	nstest.Main(m)
}

// variants differ in what Headscale's policy lets nodes keep. Headscale gathers changes for its default time.
var variants = []struct {
	name  string
	cache bool
}{{"without cached maps", false}, {"cache-network-maps", true}}

func TestRestart(t *testing.T) {
	bin := labtest.Programs(t)
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			l, pods := world(t, bin, v.cache)
			var gaps, excess []float64
			dark := 0
			for i := range *trials {
				g := restart(t, l, pods, i)
				for _, d := range g {
					gaps = append(gaps, d.Seconds())
					excess = append(excess, (d - slices.Min(g)).Seconds())
				}
				if slices.Max(g)-slices.Min(g) > uncured {
					dark++
				}
			}
			report(v.name, gaps, excess)
			// One restart in fifty still meets a handshake that is lost on the way (docs/reliability.md); without the
			// cure it is nearly every one.
			if dark > 1+*trials/50 {
				t.Errorf("in %d of %d restarts a flow was dark for %v longer than the shortest", dark, *trials, uncured)
			}
			testQuiet(t, l, pods)
		})
	}
}

// world is a lab of daemon-mode nodes with a pod each.
func world(t *testing.T, bin string, cache bool) (*lab.Lab, []*lab.Pod) {
	t.Helper()
	l := labtest.New(t, lab.Options{
		Nodes: *nodes, Modes: []string{config.ModeDaemon}, Bin: bin, Batch: 500 * time.Millisecond,
		Policy: func(p map[string]any) {
			if cache {
				p["nodeAttrs"] = []map[string]any{{"target": []string{"tag:headcni"}, "attr": []string{"cache-network-maps"}}}
			}
		},
	})
	return l, addPods(t, l)
}

// addPods makes a pod on each node.
func addPods(t *testing.T, l *lab.Lab) (pods []*lab.Pod) {
	t.Helper()
	for _, n := range l.Nodes {
		p, err := n.AddPod(t.Context(), "probe", lab.PodOptions{Idle: true})
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, p)
	}
	return pods
}

// restart ends the first node's tailscaled and starts another, while one flow in one direction runs between that node
// and each other: from it and to it in turn, as are the signals. It returns how long each flow was dark.
func restart(t *testing.T, l *lab.Lab, pods []*lab.Pod, number int) []time.Duration {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	var flows []*lab.Stream
	for i, peer := range pods[1:] {
		from, to := pods[0], peer
		if (number/2+i)%2 == 1 {
			from, to = peer, pods[0]
		}
		s, err := lab.StartStream(ctx, from.Node.Name+" to "+to.Node.Name, from, to, to.Addr(i%2 == 1))
		if err != nil {
			t.Fatal(err)
		}
		flows = append(flows, s)
	}
	waitAll(ctx, t, flows, time.Time{})
	time.Sleep(settled)
	sig := syscall.SIGKILL
	if number%2 == 1 {
		sig = syscall.SIGTERM
	}
	n := l.Nodes[0]
	if err := errors.Join(n.Tailscaled.Signal(sig), n.StartTailscaled()); err != nil {
		t.Fatal(err)
	}
	waitAll(ctx, t, flows, time.Now())
	time.Sleep(settled)
	var gaps []time.Duration
	for _, s := range flows {
		r := s.Stop()
		t.Logf("restart %d by %v: %s was dark for %v", number, sig, s.Name, r.Longest.Round(time.Millisecond))
		gaps = append(gaps, r.Longest)
	}
	return gaps
}

func waitAll(ctx context.Context, t *testing.T, flows []*lab.Stream, since time.Time) {
	t.Helper()
	for _, s := range flows {
		if _, err := s.WaitBack(ctx, since); err != nil {
			t.Fatal(err)
		}
	}
}

// testQuiet holds that a restart of Headscale is no reason for a ping: with many nodes that would be a storm. Traffic renews
// all sessions, so that none is renewed for its age meanwhile.
func testQuiet(t *testing.T, l *lab.Lab, pods []*lab.Pod) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	var flows []*lab.Stream
	for i := range pods {
		for j := range i {
			flows = append(flows, pairFlows(ctx, t, pods[i], pods[j], bothWays)...)
		}
	}
	defer func() {
		for _, s := range flows {
			s.Stop()
		}
	}()
	time.Sleep(settled)
	sent := pings(t, l)
	if err := l.Control.Headscale.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := l.Control.StartHeadscale(t.Context()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * settled)
	if after := pings(t, l); !maps.Equal(sent, after) {
		t.Errorf("pings before and after a restart of Headscale: %v, %v", sent, after)
	}
}

// pings reads each daemon's counter.
func pings(t *testing.T, l *lab.Lab) map[string]int {
	t.Helper()
	got := map[string]int{}
	for _, n := range l.Nodes {
		client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: n.Dial, DisableKeepAlives: true}}
		resp, err := client.Get("http://127.0.0.1:9669/metrics")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		_, rest, ok := strings.Cut(string(body), "\nheadcni_rearm_pings_total ")
		value, _, _ := strings.Cut(rest, "\n")
		count, err := strconv.Atoi(value)
		if !ok || err != nil {
			t.Fatalf("no counter of pings on %s: %v", n.Name, err)
		}
		got[n.Name] = count
	}
	return got
}

// at is a quantile.
func at(v []float64, q float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[min(len(s)-1, int(q*float64(len(s))))]
}

// over counts what is larger than limit.
func over(v []float64, limit float64) (n int) {
	for _, e := range v {
		if e > limit {
			n++
		}
	}
	return n
}

// report prints one line of the table. Seconds.
func report(variant string, gaps, excess []float64) {
	fmt.Printf("| %s | %d restarts, %d flows | dark p50 %.2f s, p90 %.2f s, max %.2f s | excess p50 %.2f s, p99 %.2f s, max %.2f s | over 0.5 s: %d, over 4 s: %d |\n",
		variant, *trials, len(gaps), at(gaps, .5), at(gaps, .9), at(gaps, 1), at(excess, .5), at(excess, .99), at(excess, 1), over(excess, .5), over(excess, 4))
}
