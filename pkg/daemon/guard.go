package daemon

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/nft/selftest"
)

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
