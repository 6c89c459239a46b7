package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/nft/selftest"
)

// selfTestTimeout bounds the self-test. It takes a tenth of a second.
const selfTestTimeout = 30 * time.Second

// guardTest is the self-test of the guard: once a start, beside the passes, so that no pod waits for it.
type guardTest struct {
	running sync.WaitGroup

	mu    sync.Mutex
	begun bool
	text  string // for people, "" before it has ended
	err   error  // nil also where it could not run
}

// result begins the test at the first call, and returns what it found so far. ended is called once it has.
func (g *guardTest) result(ctx context.Context, cfg nft.Config, ended func(passed *bool)) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.begun {
		g.begun = true
		g.running.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, selfTestTimeout)
			defer cancel()
			done, err := selftest.Run(ctx, cfg)
			ended(g.take(done, err))
		})
	}
	return g.err
}

// take notes the outcome, and returns whether the test passed: nil where it did not run.
func (g *guardTest) take(done []selftest.Result, err error) *bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	passed := err == nil
	switch {
	case errors.Is(err, selftest.ErrNotRun):
		g.text = err.Error()
		return nil
	case err != nil:
		g.text = "self-test FAILED"
		g.err = fmt.Errorf("self-test in a network namespace of its own: %w; pods' packets may leave in clear where routing rules do not hold: "+
			"tell us the kernel's and nft's versions, and what `nft list ruleset` says", err)
	default:
		g.text = fmt.Sprintf("self-test passed, %d packets in clear stopped and counted", len(done))
	}
	return &passed
}

// said is what the test found, in words.
func (g *guardTest) said() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.text
}

// drops are for a scrape and for status. Without our tables there are none.
func (d *Daemon) drops() map[string]uint64 {
	n, err := d.tables.Drops()
	if err != nil {
		d.log.Warn("read what the guard has dropped", "err", err)
	}
	return n
}

// CheckGuard runs the self-test with the rules that c asks for, and says what was sent and stopped. It touches nothing of the node's.
func CheckGuard(ctx context.Context, c config.Config) ([]string, error) {
	saved, err := loadState()
	if err != nil {
		return nil, err
	}
	ranges := c.Network.Ranges()
	if k := saved.Kubernetes; len(k.PodCIDRs) > 0 {
		if ranges, err = rangesInForce(c, k); err != nil {
			return nil, err
		}
	}
	if len(ranges.Pods) == 0 {
		return nil, errNoPodCIDRs
	}
	p, err := makePlan(c, observation{tun: c.Tailscale.InterfaceName, ranges: ranges}, saved)
	if err != nil {
		return nil, err
	}
	done, err := selftest.Run(ctx, p.firewall)
	var out []string
	for _, r := range done {
		out = append(out, fmt.Sprintf("%s: stopped, counted as %s", r.What, r.Reason))
	}
	return slices.Compact(slices.Sorted(slices.Values(out))), err
}

// nonZero leaves out what nothing was dropped for.
func nonZero(drops map[string]uint64) map[string]uint64 {
	out := maps.Clone(drops)
	maps.DeleteFunc(out, func(_ string, n uint64) bool { return n == 0 })
	return out
}
