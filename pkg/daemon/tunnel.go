package daemon

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/headcni/headcni/pkg/reconcile"
)

// tunnelSettles is how long tailscaled may take to make a route that it speaks of.
const tunnelSettles = 500 * time.Millisecond

// tunnel puts back what somebody else has taken out of tailscaled's routing table (`ip route flush table 52`, programs
// that clean routes up): tailscaled makes its routes once. Having it drop and accept its peers' routes again would bring
// back those to pods, but neither the tailnet's addresses nor MagicDNS, and would be a change of the user's prefs.
type tunnel struct {
	missing map[netip.Prefix]time.Time // since when
}

// tunnelTable is tailscaled's routing table; see noderoutes.Routes.
type tunnelTable interface {
	Untunnelled(tun string, prefixes []netip.Prefix) ([]netip.Prefix, error)
	Tunnel(tun string, prefixes []netip.Prefix) ([]string, error)
}

// sync looks, and acts on what has been missing for a while in which tailscaled has still spoken of it.
func (t *tunnel) sync(table tunnelTable, o observation) ([]string, error) {
	if !o.Running() || o.prefs == nil || !o.prefs.RouteAll {
		t.missing = nil // the next look has what syncPrefs has just changed
		return nil, nil
	}
	missing, err := table.Untunnelled(o.tun, o.Tailnet.TunnelRoutes())
	if err != nil {
		return nil, err
	}
	now := time.Now()
	since := map[netip.Prefix]time.Time{}
	var due []netip.Prefix
	for _, p := range missing {
		first, known := t.missing[p]
		switch {
		case !known:
			since[p] = now
		case now.Sub(first) < tunnelSettles:
			since[p] = first
		default:
			due = append(due, p)
		}
	}
	t.missing = since
	var done []string
	if len(due) > 0 {
		if done, err = table.Tunnel(o.tun, due); err != nil {
			return done, fmt.Errorf("tailscaled's routes are gone from its table: %w", err)
		}
	}
	if len(since) > 0 {
		return done, errTunnel
	}
	return done, nil
}

const errTunnel = reconcile.Waiting("tailscaled's table lacks routes to its peers")
