package rearm

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/tailscale"
)

// TestBothRestart ends the tailscaleds of both nodes of a pair in the same moment and starts them again, under a stream one
// way, the other, and both ways.
func TestBothRestart(t *testing.T) {
	bin := labtest.Programs(t)
	found := map[string]*restarts{}
	for _, rtt := range roundTrips() {
		t.Run(fmt.Sprintf("%v", rtt), func(t *testing.T) {
			cured := newRestarts(t, bin, rtt, *nodes/2*2, true)
			found[kind("both restarted", rtt, true)] = cured
			worlds := []*restarts{cured}
			if *before > 0 {
				bare := newRestarts(t, bin, rtt, *before/2*2, false)
				found[kind("both restarted", rtt, false)] = bare
				worlds = append(worlds, bare)
			}
			for trial := 0; len(cured.all) < *trials && trial < *trials; trial++ {
				for _, w := range worlds {
					w.all = append(w.all, w.restart(t, trial)...)
				}
			}
			// What is not cured is measured in docs/reliability.md: one pair of 45, against 14 of 20 without the pings.
			if dark := cured.dark(); dark > max(1, len(cured.all)/10) {
				t.Errorf("%d of %d pairs were dark for %v longer than their tailscaleds", dark, len(cured.all), uncured)
			}
		})
	}
	for _, name := range slices.Sorted(maps.Keys(found)) {
		found[name].report(name)
	}
}

// restarts are those of the pairs of one lab.
type restarts struct {
	pods []*lab.Pod
	// patience is how long a flow is waited for: one that is dark for longer counts as that.
	patience time.Duration
	all      []restarted
}

func newRestarts(t *testing.T, bin string, rtt time.Duration, nodes int, cured bool) *restarts {
	t.Helper()
	l := labtest.New(t, lab.Options{
		Nodes: nodes, Modes: []string{config.ModeDaemon}, Bin: bin, Batch: 500 * time.Millisecond,
		Delays: []time.Duration{rtt / 4}, NoPings: !cured,
	})
	return &restarts{pods: addPods(t, l), patience: (&meeting{cured: cured}).patience()}
}

func (r *restarts) dark() (n int) {
	for _, one := range r.all {
		if one.gap-one.up > uncured {
			n++
		}
	}
	return n
}

// report prints one line of the table: how long pairs were dark, and how much longer than their tailscaleds.
func (r *restarts) report(name string) {
	var gaps, excess []float64
	for _, one := range r.all {
		gaps, excess = append(gaps, one.gap.Seconds()), append(excess, (one.gap-one.up).Seconds())
	}
	if len(gaps) > 0 {
		fmt.Printf("| %s | %d | %.2f s, %.2f s, %.2f s | %.2f s, %.2f s, %.2f s | %d | %d |\n", name, len(gaps),
			at(gaps, .5), at(gaps, .9), at(gaps, 1), at(excess, .5), at(excess, .9), at(excess, 1), over(excess, 1), r.dark())
	}
}

// restarted is how long a pair was dark, and how long until both its tailscaleds had their network map.
type restarted struct {
	gap, up time.Duration
	failed  bool // one of them did not end, or did not come back: nothing was measured
}

// restart restarts all pairs of pods at once: the first with the second, the third with the fourth and so on.
func (r *restarts) restart(t *testing.T, trial int) []restarted {
	t.Helper()
	pods := r.pods
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	out := make([]restarted, len(pods)/2)
	flows := make([][]*lab.Stream, len(out))
	for i := range flows {
		flows[i] = pairFlows(ctx, t, pods[2*i], pods[2*i+1], trial+i)
	}
	time.Sleep(settled)
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i, p := range pods {
		wg.Go(func() {
			up, err := restartTailscaled(ctx, p.Node, []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM}[trial%2])
			mu.Lock()
			defer mu.Unlock()
			if out[i/2].up = max(out[i/2].up, up); err != nil {
				t.Error(err)
				out[i/2].failed = true
			}
		})
	}
	wg.Wait()
	back := time.Now()
	for i, f := range flows {
		for _, s := range f {
			darkFor(ctx, s, back, r.patience)
		}
		time.Sleep(settled / time.Duration(len(flows)))
		for _, s := range f {
			out[i].gap = max(out[i].gap, s.Stop().Longest)
		}
		t.Logf("trial %d: %s was dark for %v, tailscaled for %v", trial, f[0].Name, out[i].gap.Round(time.Millisecond), out[i].up.Round(time.Millisecond))
	}
	return slices.DeleteFunc(out, func(r restarted) bool { return r.failed })
}

// bothWays is a kind of pairFlows.
const bothWays = 2

// pairFlows are streams between two pods: there, back, or both ways. Each begins when the one before arrives.
func pairFlows(ctx context.Context, t *testing.T, a, b *lab.Pod, kind int) (flows []*lab.Stream) {
	t.Helper()
	for way, p := range [][2]*lab.Pod{{a, b}, {b, a}} {
		if kind%3 == 1-way { // 0: there, 1: back
			continue
		}
		s, err := lab.StartStream(ctx, p[0].Node.Name+" to "+p[1].Node.Name, p[0], p[1], p[1].Addr(kind%2 == 1))
		if err != nil {
			t.Fatal(err)
		}
		waitAll(ctx, t, []*lab.Stream{s}, time.Time{})
		flows = append(flows, s)
	}
	return flows
}

// restartTailscaled returns how long it took until tailscaled had its network map again.
func restartTailscaled(ctx context.Context, n *lab.Node, sig syscall.Signal) (time.Duration, error) {
	since := time.Now()
	if err := errors.Join(n.Tailscaled.Signal(sig), n.StartTailscaled()); err != nil {
		return 0, err
	}
	for c := tailscale.New(n.Path(n.Socket())); ; time.Sleep(20 * time.Millisecond) {
		st, err := c.StatusWithoutPeers(ctx)
		if err == nil && st.State == tailscale.Running {
			return time.Since(since), nil
		}
		if ctx.Err() != nil {
			return 0, fmt.Errorf("tailscaled of %s is not back: %s, %w", n.Name, st.State, errors.Join(err, ctx.Err()))
		}
	}
}
