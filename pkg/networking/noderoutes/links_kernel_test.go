package noderoutes

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/nstest"
)

// A tun that was down has its addresses again, links of ours forward, and others' are named.
func TestLinksComeBack(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "sh", "-c", `ip tuntap add dev tun mode tun; ip link set tun up; ip link add hc0123456789 type veth peer name up0
		ip address add 192.0.2.2/24 dev up0; ip link set up0 up; ip link set hc0123456789 up; ip route add default via 192.0.2.1
		echo 1 > /proc/sys/net/ipv4/ip_forward`)
	tun := Tun{Name: "tun", Addrs: []netip.Addr{netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("fd7a:115c:a1e0::1")}}
	var links Links
	sync := func(want ...string) {
		t.Helper()
		ns.Do(t, func() error {
			_, err := links.Sync(tun)
			if len(want) == 0 && err != nil {
				t.Error(err)
			}
			for _, w := range want {
				if err == nil || !strings.Contains(err.Error(), w) {
					t.Errorf("error %v, want %q", err, w)
				}
			}
			return nil
		})
	}
	wants := func(what, command, want string) {
		t.Helper()
		if got := ns.Run(t, "sh", "-c", command); !strings.Contains(got, want) {
			t.Errorf("%s: %q is not in:\n%s", what, want, got)
		}
	}
	sync("by IPv4: tun has lost its address 100.64.0.1", "by IPv6: tun has lost its address fd7a:115c:a1e0::1")
	time.Sleep(routeGrace)
	sync()
	sync()
	ns.Run(t, "sh", "-c", "ip link set tun down; ip link set tun up")
	sync("by IPv6: tun has lost its address")
	time.Sleep(routeGrace)
	sync()
	wants("after down and up", "ip -6 address show dev tun", "fd7a:115c:a1e0::1/128")
	ns.Run(t, "ip", "link", "set", "tun", "down")
	sync("tun is down")
	time.Sleep(routeGrace)
	sync()
	wants("after down", "ip address show dev tun", "fd7a:115c:a1e0::1/128")
	ns.Run(t, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/tun/disable_ipv6")
	sync("disable_ipv6=0")
	ns.Run(t, "sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/tun/disable_ipv6")
	sync("by IPv6")
	time.Sleep(routeGrace)
	sync()

	all := func(value string) {
		t.Helper()
		ns.Run(t, "sh", "-c", "echo "+value+" > /proc/sys/net/ipv6/conf/all/disable_ipv6")
	}
	all("1")
	sync() // nobody's pods have it
	tun.IPv6 = true
	sync("switched off on this node", "sysctl -w net/ipv6/conf/all/disable_ipv6=0")
	all("0")
	sync("by IPv6: tun has lost its address")
	time.Sleep(routeGrace)
	sync()
	// Hardened hosts have it off for new links alone.
	ns.Run(t, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6; ip address flush dev tun")
	sync("by IPv6: tun has lost its address")
	time.Sleep(routeGrace)
	sync()
	wants("where new links have none", "ip -6 address show dev tun", "fd7a:115c:a1e0::1/128")
	ns.Run(t, "sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/default/disable_ipv6")

	ns.Run(t, "ip", "link", "set", "tun", "mtu", "1200")
	sync("the MTU of tun is 1200", "ip link set tun mtu 1280")
	ns.Run(t, "ip", "link", "set", "tun", "mtu", "1280")
	sync("by IPv6")
	time.Sleep(routeGrace)
	sync()
	wants("after a small MTU", "ip -6 address show dev tun", "fd7a:115c:a1e0::1/128")

	ns.Run(t, "sh", "-c", "for i in tun hc0123456789 up0; do echo 0 > /proc/sys/net/ipv4/conf/$i/forwarding; done")
	sync("up0 does not forward", "sysctl -w net/ipv4/conf/up0/forwarding=1")
	wants("pods' and the tun's switches", "cat /proc/sys/net/ipv4/conf/tun/forwarding /proc/sys/net/ipv4/conf/hc0123456789/forwarding", "1\n1")
	wants("another's switch", "cat /proc/sys/net/ipv4/conf/up0/forwarding", "0")
	ns.Run(t, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/up0/forwarding")
	sync()
}
