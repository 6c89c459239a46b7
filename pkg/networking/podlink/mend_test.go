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
		"RAs are taken":       "echo 2 >/proc/sys/net/ipv6/conf/LINK/accept_ra",
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.host.Run(t, "sh", "-c", "ip link set lo up; ip addr add 192.0.2.1/32 dev lo; ip addr add 2001:db8::1/128 dev lo nodad")
			l := n.mustAttach(t, addr4, addr6)
			spec := n.spec(addr4, addr6)
			pods := []Leased{{spec.Network, "c1", "eth0", []netip.Addr{addr4, addr6}}, {spec.Network, "ended", "eth0", []netip.Addr{netip.MustParseAddr("10.244.1.9")}}}
			state := func() string {
				return n.host.Run(t, "sh", "-c", "ip -4 route show dev "+l.HostName+"; ip -6 route show dev "+l.HostName+" proto static; ip neigh show dev "+l.HostName+
					" nud permanent; ip -6 -o addr show dev "+l.HostName+" to fe80::1 | tr -s ' '; ip -o link show up dev "+l.HostName+" | cut -d' ' -f2; cat /proc/sys/net/ipv4/conf/"+l.HostName+"/arp_ignore /proc/sys/net/ipv6/conf/"+l.HostName+"/accept_ra")
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

// TestMendTooLate: what a lease had is not put on a link that is gone, or is another's.
func TestMendTooLate(t *testing.T) {
	n := newNode(t)
	n.mustAttach(t, addr4)
	spec := n.spec(addr4)
	n.host.Run(t, "ip", "route", "del", "10.244.1.2")
	other := []Leased{{"another", "c1", "eth0", []netip.Addr{addr4}}, {spec.Network, "c2", "eth0", []netip.Addr{addr4}}}
	pods := append(other, Leased{spec.Network, "c1", "eth0", []netip.Addr{addr4}})
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
