package noderoutes

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/nstest"
)

func TestPeerMTU(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "sh", "-ec", `ip link add tun type veth peer name other; ip address add 100.64.0.1/32 dev tun; ip address add fd7a:115c:a1e0::1/128 dev tun nodad
		ip link set other up; ip link set tun up; ip route add 192.0.2.0/24 dev other mtu 1400
		for r in 10.244.2.0/24 10.244.3.7 100.64.0.2; do ip route add $r dev tun table 52; done; ip -6 route add fd00:244:2::/64 dev tun table 52`)
	const show = "for f in -4 -6; do ip $f route show table 52; done; ip route"
	before := ns.Run(t, "sh", "-c", show)
	pods4, single, pods6, elsewhere := netip.MustParsePrefix("10.244.2.0/24"), netip.MustParsePrefix("10.244.3.7/32"), netip.MustParsePrefix("fd00:244:2::/64"), netip.MustParsePrefix("10.244.9.0/24")
	table := NewTable52()
	routes := []netip.Prefix{pods4, single, pods6, netip.MustParsePrefix("100.64.0.2/32")}
	sync := func(what string, changes int, mtus map[netip.Prefix]int) {
		t.Helper()
		ns.Do(t, func() error {
			done, err := table.Sync(Accepted{TunName: "tun", Routes: routes, MTUs: mtus})
			if len(done) != changes {
				t.Errorf("%s: done %q, want %d changes", what, done, changes)
			}
			return err
		})
	}
	// mtu is what the kernel says of a packet's way, "" for nothing of its own.
	mtu := func(way string) string {
		t.Helper()
		out := strings.Fields(ns.Run(t, "sh", "-c", "ip route get "+way))
		for i, f := range out {
			if f == "mtu" {
				return strings.Join(slices.DeleteFunc(out[i+1:min(i+3, len(out))], func(s string) bool { return strings.Trim(s, "0123456789") != "" }), " ")
			}
		}
		return ""
	}
	sync("nothing is wanted", 0, nil)
	wide := map[netip.Prefix]int{pods4: 8928, pods6: 8928, single: 8928, elsewhere: 8928}
	sync("wide", 4, wide)
	sync("again", 0, wide)
	ns.Run(t, "sh", "-c", "ip rule add pref 100 lookup 52; ip -6 rule add pref 100 lookup 52")
	for way, want := range map[string]string{
		"10.244.2.1": "8928", "10.244.2.200": "8928", "fd00:244:2::1": "8928", "fd00:244:2:0:ffff::1": "8928",
		"10.244.3.7": "", "100.64.0.2": "", "192.0.2.1": "1400",
	} {
		if got := mtu(way); got != want {
			t.Errorf("to %s: mtu %q, want %q", way, got, want)
		}
	}
	ns.Do(t, func() error {
		now, err := PeerMTU{}.Now()
		if diff := cmp.Diff(map[netip.Prefix]int{pods4: 8928, pods6: 8928}, now, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Error(diff)
		}
		return errors.Join(err, PeerMTU{}.AddProbe("tun", netip.MustParseAddr("100.64.0.2"), 4, 8928), PeerMTU{}.AddProbe("tun", netip.MustParseAddr("100.64.0.2"), 4, 8000))
	})
	if a, b := mtu("100.64.0.2"), mtu("100.64.0.2 tos 4"); a != "" || b != "8000" {
		t.Errorf("the way of all %q, of probes %q", a, b)
	}
	sync("a probe is not in the way", 0, wide)
	sync("another size", 2, map[netip.Prefix]int{pods4: 1440, pods6: 8928})
	// tailscaled's own route is missed although its halves are there, and comes back.
	ns.Run(t, "ip", "route", "del", "10.244.2.0/24", "dev", "tun", "table", "52")
	ns.Do(t, func() error {
		missing, err := kernelTable{}.missing("tun", routes)
		if len(missing) != 1 || missing[0] != pods4 {
			t.Errorf("missing %v", missing)
		}
		return err
	})
	ns.Run(t, "ip", "route", "add", "10.244.2.0/24", "dev", "tun", "table", "52")
	ns.Run(t, "sh", "-c", "ip rule del pref 100; ip -6 rule del pref 100")
	ns.Do(t, func() error {
		return errors.Join(PeerMTU{}.RemoveProbe("tun", netip.MustParseAddr("100.64.0.2"), 4), PeerMTU{}.RemoveProbe("tun", netip.MustParseAddr("100.64.0.2"), 4))
	})
	ns.Do(t, func() error { return PeerMTU{}.AddProbe("tun", netip.MustParseAddr("100.64.0.9"), 4, 8928) })
	sync("the probe of a peer that is gone, and the range of one that is not accepted any more", 5, map[netip.Prefix]int{elsewhere: 8928})
	if diff := cmp.Diff(before, ns.Run(t, "sh", "-c", show)); diff != "" {
		t.Error(diff)
	}
	probe := func() error { return PeerMTU{}.AddProbe("tun", netip.MustParseAddr("100.64.0.2"), 4, 8928) }
	sync("wide", 4, wide)
	ns.Do(t, func() error { return errors.Join(probe(), New(Saved{}, nil).Remove(t.Context())) })
	if diff := cmp.Diff(before, ns.Run(t, "sh", "-c", show)); diff != "" {
		t.Errorf("after removal: %s", diff)
	}
	// What an earlier process has left, which wanted it.
	sync("wide", 4, wide)
	ns.Do(t, probe)
	table = NewTable52()
	sync("nobody wants it any more", 0, nil)
	if diff := cmp.Diff(before, ns.Run(t, "sh", "-c", show)); diff != "" {
		t.Errorf("after nobody wants it: %s", diff)
	}
}

func TestHalves(t *testing.T) {
	for in, want := range map[string]string{
		"10.244.2.0/24": "10.244.2.0/25 10.244.2.128/25", "10.244.2.6/31": "", "10.244.2.4/30": "10.244.2.4/31 10.244.2.6/31", "10.0.0.0/8": "10.0.0.0/9 10.128.0.0/9",
		"fd00:244:2::/64": "fd00:244:2::/65 fd00:244:2:0:8000::/65", "10.244.2.1/32": "", "fd00::1/128": "", "10.0.0.0/7": "10.0.0.0/8 11.0.0.0/8",
	} {
		var got []string
		for _, p := range halves(netip.MustParsePrefix(in)) {
			got = append(got, p.String())
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %v, want %s", in, got, want)
		}
	}
}
