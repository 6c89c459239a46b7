package noderoutes

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/headcni/headcni/pkg/reconcile"
)

// routeGrace is how long tailscaled may take to add a route that its status names.
const routeGrace = 500 * time.Millisecond

// Table52 puts back what somebody else has taken out of tailscaled's routing table (`ip route flush table 52`, programs
// that clean routes up): tailscaled makes its routes once. Having it drop and accept its peers' routes again would bring
// back those to pods, but neither the tailnet's addresses nor MagicDNS, and would be a change of the user's prefs.
type Table52 struct {
	missing map[netip.Prefix]time.Time // since when
	kernel  table
	widened bool // there may be routes with an MTU: in the beginning an earlier process's
}

// Accepted are the routes that tailscaled accepts from its peers, by its status.
type Accepted struct {
	// TunName is tailscaled's interface.
	TunName string
	// Routes are none while tailscaled does not run or accepts none.
	Routes []netip.Prefix
	// MTUs are how many bytes go to ranges of peers' pods where that is more than the tun's MTU; nil where nothing larger is wanted.
	MTUs map[netip.Prefix]int
}

// table is tailscaled's routing table in the kernel.
type table interface {
	missing(tun string, prefixes []netip.Prefix) ([]netip.Prefix, error)
	add(tun string, prefixes []netip.Prefix) ([]string, error)
	widen(Accepted) ([]string, error)
}

// NewTable52 returns a Table52 that has looked at nothing yet.
func NewTable52() *Table52 { return &Table52{kernel: kernelTable{}, widened: true} }

// Sync adds the routes that have been missing for longer than routeGrace, while tailscaled's status still names them, and has those to
// peers' pods carry what MTUs says.
func (t *Table52) Sync(a Accepted) ([]string, error) {
	if len(a.Routes) == 0 {
		t.missing = nil // the next look may be at other routes
		return nil, nil
	}
	missing, err := t.kernel.missing(a.TunName, a.Routes)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	since := map[netip.Prefix]time.Time{}
	var due []netip.Prefix
	next := routeGrace // until the first of the others is due
	for _, p := range missing {
		first, known := t.missing[p]
		switch {
		case !known:
			since[p] = now
		case now.Sub(first) < routeGrace:
			since[p] = first
			next = min(next, routeGrace-now.Sub(first))
		default:
			due = append(due, p)
		}
	}
	t.missing = since
	var done []string
	if len(due) > 0 {
		if done, err = t.kernel.add(a.TunName, due); err != nil {
			return done, fmt.Errorf("tailscaled's routes are gone from its table: %w", err)
		}
	}
	if a.MTUs != nil || t.widened {
		more, err := t.kernel.widen(a)
		if done = append(done, more...); err != nil {
			return done, err
		}
		t.widened = a.MTUs != nil
	}
	if len(since) > 0 {
		return done, reconcile.Soon{Waiting: errRoutesMissing, In: next}
	}
	return done, nil
}

const errRoutesMissing = reconcile.Waiting("tailscaled's table lacks routes to its peers")
