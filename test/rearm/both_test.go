package rearm

import (
	"context"
	"errors"
	"fmt"
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
	for _, rtt := range roundTrips() {
		t.Run(fmt.Sprintf("%v", rtt), func(t *testing.T) {
			l := labtest.New(t, lab.Options{
				Nodes: *nodes / 2 * 2, Modes: []string{config.ModeDaemon}, Bin: bin, Batch: 500 * time.Millisecond,
				Delays: []time.Duration{rtt / 4},
			})
			pods := addPods(t, l)
			var gaps, excess []float64
			dark := 0
			for trial := 0; trial < *trials; trial += len(pods) / 2 {
				for _, r := range bothRestart(t, pods, trial) {
					gaps, excess = append(gaps, r.gap.Seconds()), append(excess, (r.gap-r.up).Seconds())
					if r.gap-r.up > uncured {
						dark++
					}
				}
			}
			fmt.Printf("| both restarted, %v | %d | %.2f s, %.2f s, %.2f s | %.2f s, %.2f s, %.2f s | %d | %d |\n", rtt, len(gaps),
				at(gaps, .5), at(gaps, .9), at(gaps, 1), at(excess, .5), at(excess, .9), at(excess, 1), over(excess, 1), dark)
			if dark > len(gaps)/50 {
				t.Errorf("%d of %d pairs were dark for %v longer than their tailscaleds", dark, len(gaps), uncured)
			}
		})
	}
}

// restarted is how long a pair was dark, and how long until both its tailscaleds had their network map.
type restarted struct{ gap, up time.Duration }

// bothRestart restarts all pairs of pods at once: the first with the second, the third with the fourth and so on.
func bothRestart(t *testing.T, pods []*lab.Pod, trial int) []restarted {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	out := make([]restarted, len(pods)/2)
	flows := make([][]*lab.Stream, len(out))
	for i := range flows {
		flows[i] = pairFlows(ctx, t, pods[2*i], pods[2*i+1], trial+i)
		waitAll(ctx, t, flows[i], time.Time{})
	}
	time.Sleep(settled)
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i, p := range pods {
		wg.Go(func() {
			up, err := restartTailscaled(ctx, p.Node, []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM}[trial%2])
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			out[i/2].up = max(out[i/2].up, up)
		})
	}
	wg.Wait()
	for i, f := range flows {
		waitAll(ctx, t, f, time.Now())
		time.Sleep(settled / time.Duration(len(flows)))
		for _, s := range f {
			out[i].gap = max(out[i].gap, s.Stop().Longest)
		}
		t.Logf("trial %d: %s was dark for %v, tailscaled for %v", trial, f[0].Name, out[i].gap.Round(time.Millisecond), out[i].up.Round(time.Millisecond))
	}
	return out
}

// bothWays is a kind of pairFlows.
const bothWays = 2

// pairFlows are streams between two pods: there, back, or both ways.
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
