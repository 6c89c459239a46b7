package noderoutes

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/reconcile"
)

// fakeTable is a table without the routes in lacks.
type fakeTable struct{ lacks []netip.Prefix }

func (f *fakeTable) missing(string, []netip.Prefix) ([]netip.Prefix, error) { return f.lacks, nil }

func (f *fakeTable) add(tun string, prefixes []netip.Prefix) ([]string, error) {
	f.lacks = netset.Without(f.lacks, prefixes)
	return []string{fmt.Sprint(tun, prefixes)}, nil
}

func (f *fakeTable) widen(Accepted) ([]string, error) { return nil, nil }

// What tailscaled speaks of and is just about to make, or has just taken away, is not ours to add.
func TestTable52WaitsForTailscaled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pods, other := netip.MustParsePrefix("10.244.2.0/24"), netip.MustParsePrefix("10.244.3.0/24")
		accepted := Accepted{TunName: "tun", Routes: []netip.Prefix{pods, other}}
		kernel := &fakeTable{}
		table := Table52{kernel: kernel}
		sync := func(want ...string) {
			t.Helper()
			done, err := table.Sync(accepted)
			if diff := cmp.Diff(want, done); diff != "" {
				t.Errorf("error %v, %s", err, diff)
			}
			if soon := (reconcile.Soon{}); err != nil && (!errors.As(err, &soon) || soon.In <= 0 || soon.In > routeGrace) {
				t.Errorf("error %v does not say when the first route is due", err)
			}
			if waits := err != nil; waits != (len(kernel.lacks) > 0 && len(table.missing) > 0) {
				t.Errorf("error %v while %v is missing", err, kernel.lacks)
			}
		}
		sync()
		kernel.lacks = []netip.Prefix{pods}
		sync()
		kernel.lacks = nil
		time.Sleep(routeGrace)
		sync() // tailscaled was only slow
		kernel.lacks = []netip.Prefix{pods}
		sync()
		time.Sleep(routeGrace - 1)
		kernel.lacks = []netip.Prefix{pods, other}
		sync()
		time.Sleep(time.Nanosecond)
		sync("tun[10.244.2.0/24]")
		time.Sleep(routeGrace)
		sync("tun[10.244.3.0/24]")
		sync()

		// While tailscaled accepts none, nothing is missing, and no time counts.
		kernel.lacks = []netip.Prefix{pods}
		sync()
		time.Sleep(routeGrace)
		for range 2 {
			if done, err := table.Sync(Accepted{}); done != nil || err != nil {
				t.Errorf("nothing accepted: %v, %v", done, err)
			}
			time.Sleep(routeGrace)
		}
		sync()
	})
}
