package ipvs

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/nft"
)

const tun = "headcni01"

// TestDevicesReachServices: where no policies are to hold, a device of the tailnet reaches services of IPVS over a node that leads there, whose
// pods see the device, and other nodes' pods the node; and over one that does not lead nothing.
func TestDevicesReachServices(t *testing.T) {
	for i, family := range []string{"IPv4", "IPv6"} {
		t.Run(family, func(t *testing.T) {
			addr := func(four, six string) netip.Addr { return netip.MustParseAddr([]string{four, six}[i]) }
			leader, device := addr("100.64.0.1", "fd7a:115c:a1e0::1"), addr("100.64.0.9", "fd7a:115c:a1e0::9")
			near, far := policytest.Local(0)[i], policytest.Remote(0)[i]
			nearby, afar := netip.AddrPortFrom(addr("10.96.0.10", "fd00:96::10"), 80), netip.AddrPortFrom(addr("10.96.0.11", "fd00:96::11"), 80)
			services := netip.MustParsePrefix([]string{"10.96.0.0/16", "fd00:96::/112"}[i])

			node := nstest.New(t)
			node.Run(t, "sh", "-ec", "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding; ip link set lo up")
			tailnet := behindTun(t, node, leader, device, far)
			listen(t, pod(t, node, "0", near), netip.AddrPortFrom(near, 8080), source)
			listen(t, tailnet, netip.AddrPortFrom(far, 8080), source)
			serve(t, node, nearby, netip.AddrPortFrom(near, 8080))
			serve(t, node, afar, netip.AddrPortFrom(far, 8080))

			tables := nft.New()
			cfg := nft.Config{
				Own: []netip.Prefix{netip.PrefixFrom(near, near.BitLen())}, Cluster: []netip.Prefix{netip.MustParsePrefix([]string{"10.244.0.0/16", "fd00:244::/32"}[i])}, KeepSource: []netip.Prefix{services},
				TunName: tun, Masquerade: true,
			}
			sync := func() {
				t.Helper()
				node.Do(t, func() error {
					_, err := tables.Sync(t.Context(), cfg)
					for tries := 1; err != nil && tries < 5; tries++ { // as in TestServicesGoRound
						_, err = tables.Sync(t.Context(), cfg)
					}
					return err
				})
			}
			sync()
			for _, to := range []netip.AddrPort{nearby, afar} {
				if seen, err := seenBy(t, tailnet, device, to, moment); err == nil {
					t.Errorf("a node that does not lead to services leads to %s, whose pod sees %s", to, seen)
				}
			}
			cfg.Served = cfg.KeepSource
			sync()
			for _, c := range []struct {
				what string
				to   netip.AddrPort
				sees netip.Addr
			}{{"a pod of the node", nearby, device}, {"another node's pod", afar, leader}} {
				if seen, err := seenBy(t, tailnet, device, c.to, patience); err != nil || seen != c.sees {
					t.Errorf("%s sees %s, want %s: %v", c.what, seen, c.sees, err)
				}
			}
		})
	}
}

// behindTun is what is at the other end of the node's tun: a device, and a pod of another node. Neither takes a packet from an address of its own,
// nor has it a way to anybody's but the node's.
func behindTun(t *testing.T, node *nstest.NS, leader netip.Addr, there ...netip.Addr) *nstest.NS {
	t.Helper()
	ns := nstest.New(t)
	node.Run(t, "sh", "-ec", fmt.Sprintf(`ip link add %[1]s address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02 netns /run/netns/%[2]s
		ip addr add %[3]s dev %[1]s nodad; ip link set %[1]s up`, tun, ns.Name, netip.PrefixFrom(leader, leader.BitLen())))
	ns.Run(t, "sh", "-ec", fmt.Sprintf(`ip link set lo up; ip link set eth0 up
		ip neigh add %[1]s lladdr 02:00:00:00:00:01 nud permanent dev eth0; ip route replace %[1]s dev eth0; ip route add default via %[1]s dev eth0 onlink`, leader))
	for _, a := range there {
		ns.Run(t, "ip", "addr", "add", netip.PrefixFrom(a, a.BitLen()).String(), "dev", "eth0", "nodad")
		node.Run(t, "sh", "-ec", fmt.Sprintf("ip neigh add %[1]s lladdr 02:00:00:00:00:02 nud permanent dev %[2]s; ip route add %[1]s dev %[2]s", a, tun))
	}
	return ns
}

// seenBy is the address that the server of a service sees of one.
func seenBy(t *testing.T, ns *nstest.NS, from netip.Addr, to netip.AddrPort, wait time.Duration) (seen netip.Addr, err error) {
	t.Helper()
	ns.Do(t, func() error {
		dialer := net.Dialer{Timeout: wait, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
		var c net.Conn
		if c, err = dialer.Dial("tcp", to.String()); err != nil {
			return nil
		}
		defer c.Close()
		var b []byte
		if b, err = io.ReadAll(c); err == nil {
			var a netip.AddrPort
			a, err = netip.ParseAddrPort(strings.TrimSpace(string(b)))
			seen = a.Addr().Unmap()
		}
		return nil
	})
	return seen, err
}

// source says which address is seen of whoever connects.
func source(c net.Conn) string { return c.RemoteAddr().String() }
