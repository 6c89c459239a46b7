package daemon

import (
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/membership"
	"github.com/headcni/headcni/pkg/tailscale"
)

// fakeTable is a table without the routes in missing.
type fakeTable struct{ missing []netip.Prefix }

func (f *fakeTable) Untunnelled(string, []netip.Prefix) ([]netip.Prefix, error) {
	return f.missing, nil
}

func (f *fakeTable) Tunnel(tun string, prefixes []netip.Prefix) ([]string, error) {
	f.missing = netset.Without(f.missing, prefixes)
	return []string{fmt.Sprint(tun, prefixes)}, nil
}

// What tailscaled speaks of and is just about to make, or has just taken away, is not ours to add.
func TestTunnelWaitsForTailscaled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pods, other := netip.MustParsePrefix("10.244.2.0/24"), netip.MustParsePrefix("10.244.3.0/24")
		o := observation{tun: "tun", Seen: membership.Seen{Tailnet: &tailscale.Status{State: tailscale.Running}}, prefs: &tailscale.SavedPrefs{RouteAll: true}}
		table := &fakeTable{}
		var tun tunnel
		sync := func(want ...string) {
			t.Helper()
			done, err := tun.sync(table, o)
			if diff := cmp.Diff(want, done); diff != "" {
				t.Errorf("error %v, %s", err, diff)
			}
			if waits := err != nil; waits != (len(table.missing) > 0 && len(tun.missing) > 0) {
				t.Errorf("error %v while %v is missing", err, table.missing)
			}
		}
		sync()
		table.missing = []netip.Prefix{pods}
		sync()
		table.missing = nil
		time.Sleep(tunnelSettles)
		sync() // tailscaled was only slow
		table.missing = []netip.Prefix{pods}
		sync()
		time.Sleep(tunnelSettles - 1)
		table.missing = []netip.Prefix{pods, other}
		sync()
		time.Sleep(time.Nanosecond)
		sync("tun[10.244.2.0/24]")
		time.Sleep(tunnelSettles)
		sync("tun[10.244.3.0/24]")
		sync()

		table.missing = []netip.Prefix{pods}
		for _, o := range []observation{{}, {Seen: o.Seen}, {Seen: o.Seen, prefs: &tailscale.SavedPrefs{}}, {Seen: membership.Seen{Tailnet: &tailscale.Status{}}, prefs: o.prefs}} {
			time.Sleep(tunnelSettles)
			if done, err := tun.sync(table, o); done != nil || err != nil {
				t.Errorf("%+v: %v, %v", o, done, err)
			}
		}
	})
}
