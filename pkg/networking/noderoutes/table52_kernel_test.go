package noderoutes

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/headcni/headcni/internal/nstest"
)

func TestTunnelRoutesComeBack(t *testing.T) {
	ns := nstest.New(t)
	n := New(Saved{}, nil)
	want := []netip.Prefix{
		netip.MustParsePrefix("10.244.2.0/24"), netip.MustParsePrefix("100.64.0.2/32"),
		netip.MustParsePrefix("fd00:244:2::/64"), netip.MustParsePrefix("fd7a:115c:a1e0::/48"), netip.MustParsePrefix("0.0.0.0/0"),
	}
	lacks := func(what string, want []netip.Prefix, of ...netip.Prefix) {
		t.Helper()
		ns.Do(t, func() error {
			got, err := kernelTable{}.missing("tun", of)
			if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("%s: %s", what, diff)
			}
			return err
		})
	}
	lacks("no tun", nil, want...)
	ns.Run(t, "ip", "link", "add", "tun", "type", "veth", "peer", "name", "other")
	lacks("down", nil, want...)
	ns.Run(t, "sh", "-c", "ip address add 100.64.0.1/32 dev tun; ip link set tun up; ip link set other up")
	lacks("no IPv6 address", []netip.Prefix{want[0], want[1], want[4]}, want...)
	ns.Run(t, "ip", "address", "add", "fd7a:115c:a1e0::1/128", "dev", "tun", "nodad")
	all := []netip.Prefix{want[0], want[1], want[4], want[2], want[3]}
	lacks("empty", all, want...)
	// As tailscaled makes them; others that do not count: elsewhere, into nothing, in another table.
	ns.Run(t, "sh", "-c", "ip route add 10.244.2.0/24 dev other table 52; ip route add throw 100.64.0.2/32 table 52; ip route add 0.0.0.0/0 dev tun table 53")
	lacks("others' routes", all, want...)
	ns.Run(t, "sh", "-c", "ip route flush table 52; for r in 10.244.2.0/24 100.64.0.2 default; do ip route add $r dev tun scope global table 52; done; "+
		"for r in fd00:244:2::/64 fd7a:115c:a1e0::/48; do ip -6 route add $r dev tun table 52; done")
	lacks("whole", nil, append(want, netip.MustParsePrefix("fd7a:115c:a1e0::53/128"))...)

	const show = "for f in -4 -6; do ip $f -d route show table 52; done"
	before := ns.Run(t, "sh", "-c", show)
	var events <-chan struct{}
	ns.Do(t, func() (err error) {
		events, err = n.Changes(t.Context())
		return err
	})
	ns.Run(t, "sh", "-c", "ip route flush table 52; ip -6 route flush table 52")
	select {
	case <-events:
	case <-time.After(10 * time.Second):
		t.Error("the flush gave no signal")
	}
	ns.Do(t, func() error {
		_, err := kernelTable{}.add("tun", want)
		return err
	})
	if diff := cmp.Diff(before, ns.Run(t, "sh", "-c", show)); diff != "" {
		t.Error(diff)
	}
}
