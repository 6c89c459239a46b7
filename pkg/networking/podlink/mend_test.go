package podlink

import (
	"net/netip"
	"strings"
	"testing"
)

// TestMend: whatever is taken from the host's end of a pod's link is named, and put back as ADD had it.
func TestMend(t *testing.T) {
	for name, damage := range map[string]string{
		"routes flushed":      "ip route flush dev LINK; ip -6 route flush dev LINK",
		"v4 route deleted":    "ip route del 10.244.1.2",
		"v6 route deleted":    "ip -6 route del fd00:244:1::2",
		"link down and up":    "ip link set LINK down; ip link set LINK up",
		"link down":           "ip link set LINK down",
		"addresses flushed":   "ip addr flush dev LINK",
		"IPv6 off and on":     "echo 1 >/proc/sys/net/ipv6/conf/LINK/disable_ipv6; echo 0 >/proc/sys/net/ipv6/conf/LINK/disable_ipv6",
		"IPv6 off":            "echo 1 >/proc/sys/net/ipv6/conf/LINK/disable_ipv6",
		"neighbours flushed":  "ip neigh flush dev LINK nud permanent",
		"the gateway's moved": "ip -6 addr del fe80::1/64 dev LINK",
		"ARP is answered":     "echo 0 >/proc/sys/net/ipv4/conf/LINK/arp_ignore",
		"source routes":       "echo 1 >/proc/sys/net/ipv4/conf/LINK/accept_source_route",
		"RAs are taken":       "echo 2 >/proc/sys/net/ipv6/conf/LINK/accept_ra",

		"v4 neighbour's address changed":  "ip neigh replace 10.244.1.2 lladdr 02:00:00:00:00:77 nud permanent dev LINK",
		"v6 neighbour's address changed":  "ip neigh replace fd00:244:1::2 lladdr 02:00:00:00:00:77 nud permanent dev LINK",
		"neighbours no longer permanent":  "ip neigh replace 10.244.1.2 lladdr 02:00:00:00:00:77 nud reachable dev LINK",
		"v4 route to another link":        "ip route replace 10.244.1.2 dev lo",
		"v6 route to another link":        "ip -6 route replace fd00:244:1::2 dev lo",
		"v4 route another's, by its name": "ip route del 10.244.1.2; ip route add 10.244.1.2 dev lo proto static scope link",
		"v4 route with another metric":    "ip route del 10.244.1.2; ip route add 10.244.1.2 dev LINK proto static scope link metric 7",
		"v6 route with another metric":    "ip -6 route del fd00:244:1::2; ip -6 route add fd00:244:1::2 dev LINK proto static metric 2000",
		"v4 route with a source":          "ip route replace 10.244.1.2 dev LINK proto static scope link src 192.0.2.1",
		"v6 route with a source":          "ip -6 route replace fd00:244:1::2 dev LINK proto static src 2001:db8::1",
		"v4 route with an MTU":            "ip route replace 10.244.1.2 dev LINK proto static scope link mtu 700",
		"v6 route with an MTU":            "ip -6 route replace fd00:244:1::2 dev LINK proto static mtu 1300",
		"v4 route to nowhere":             "ip route replace blackhole 10.244.1.2",
		"v6 route to nowhere":             "ip -6 route replace unreachable fd00:244:1::2 metric 1024",
		"renamed":                         "ip link set LINK name other; ip link set other up",
		"renamed and down":                "ip link set LINK down; ip link set LINK name other",
		"in a bridge":                     "ip link add br0 type bridge; ip link set br0 up; ip link set LINK master br0",
		"alias changed":                   "ip link set LINK alias 'somebody else'",
		"alias of another pod":            "ip link set LINK alias 'net c2/eth0 ns/db'",
		"no alias":                        "ip link set LINK alias ''",
		"hardware address changed":        "ip link set LINK address 02:00:00:00:00:78",
		"MTU smaller":                     "ip link set LINK mtu 1300",
		"MTU too small for IPv6":          "ip link set LINK mtu 900",
		"MTU larger":                      "ip link set LINK mtu 9000",
		"all of it": "ip link set LINK down; ip link set LINK name other address 02:00:00:00:00:78 mtu 900; ip link set other alias x; " +
			"ip route add 10.244.1.2 dev lo; ip -6 route add fd00:244:1::2 dev lo",
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.host.Run(t, "sh", "-c", "ip link set lo up; ip addr add 192.0.2.1/32 dev lo; ip addr add 2001:db8::1/128 dev lo nodad")
			l := n.mustAttach(t, addr4, addr6)
			spec := n.spec(addr4, addr6)
			var made Made
			on(t, n.host, func(h *Handle) error {
				all, err := h.Attached()
				made = all[l.HostName].Made
				return err
			})
			pods := []Leased{
				{spec.Network, "c1", "eth0", []netip.Addr{addr4, addr6}, made},
				{spec.Network, "ended", "eth0", []netip.Addr{netip.MustParseAddr("10.244.1.9")}, Made{}},
			}
			state := func() string {
				return n.host.Run(t, "sh", "-ec", strings.ReplaceAll(`ip -4 route show 10.244.1.2 | head -n 1; ip -6 route show fd00:244:1::2 | head -n 1
ip neigh show dev LINK nud permanent; ip -6 -o addr show dev LINK to fe80::1 | tr -s ' '; ip -o link show up dev LINK
cat /proc/sys/net/ipv4/conf/LINK/arp_ignore /proc/sys/net/ipv4/conf/LINK/accept_source_route /proc/sys/net/ipv6/conf/LINK/accept_ra`, "LINK", l.HostName))
			}
			lacks := func() (found []Lack) {
				on(t, n.host, func(h *Handle) (err error) { found, err = h.Lacks(pods); return err })
				return found
			}
			want := state()
			if got := lacks(); len(got) != 0 {
				t.Fatalf("all is there, and yet: %v", got)
			}
			n.host.Run(t, "sh", "-c", strings.ReplaceAll(damage, "LINK", l.HostName))
			found := lacks()
			if len(found) != 1 || !strings.Contains(found[0].String(), l.HostName) {
				t.Fatalf("found %v", found)
			}
			t.Log(found[0])
			on(t, n.host, func(h *Handle) error { return h.Mend(found[0]) })
			if got := lacks(); len(got) != 0 {
				t.Errorf("still lacking: %v", got)
			}
			if got := state(); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			for _, a := range []netip.Addr{addr4, addr6} {
				n.host.Run(t, "ping", "-c1", "-W2", "-n", a.String())
			}
		})
	}
}

// TestMendBeaten: another's route that comes before the pod's own is named, and left to its owner.
func TestMendBeaten(t *testing.T) {
	n := newNode(t)
	n.mustAttach(t, addr4, addr6)
	n.host.Run(t, "sh", "-c", "ip link set lo up; ip -6 route add fd00:244:1::2 dev lo metric 5")
	pods := []Leased{{n.spec().Network, "c1", "eth0", []netip.Addr{addr4, addr6}, Made{}}}
	on(t, n.host, func(h *Handle) error {
		found, err := h.Lacks(pods)
		if err != nil || len(found) != 1 {
			t.Fatal(found, err)
		}
		if err := h.Mend(found[0]); err == nil || !strings.Contains(err.Error(), "delete the other route to fd00:244:1::2") {
			t.Errorf("error %v", err)
		}
		return nil
	})
	if got := n.host.Run(t, "ip", "-6", "route", "show", "fd00:244:1::2"); strings.Count(got, "\n") != 2 {
		t.Error(got)
	}
}

// TestMendTooLate: what a lease had is not put on a link that is gone, or is another's.
func TestMendTooLate(t *testing.T) {
	n := newNode(t)
	n.mustAttach(t, addr4)
	spec := n.spec(addr4)
	n.host.Run(t, "ip", "route", "del", "10.244.1.2")
	other := []Leased{{"another", "c1", "eth0", []netip.Addr{addr4}, Made{}}, {spec.Network, "c2", "eth0", []netip.Addr{addr4}, Made{}}}
	pods := append(other, Leased{spec.Network, "c1", "eth0", []netip.Addr{addr4}, Made{}})
	var found []Lack
	on(t, n.host, func(h *Handle) (err error) { found, err = h.Lacks(pods); return err })
	if len(found) != 1 {
		t.Fatalf("found %v", found)
	}
	if err := n.detach(t); err != nil {
		t.Fatal(err)
	}
	on(t, n.host, func(h *Handle) error { return h.Mend(found[0]) })
	n.empty(t)
}
