package enforce

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/policy"
)

// The world's pods: web is the one that policies isolate, and others are its neighbours on the node.
var (
	webAddrs = []netip.Addr{netip.MustParseAddr("10.244.1.10"), netip.MustParseAddr("fd00:244:1::10")}
	aAddrs   = []netip.Addr{netip.MustParseAddr("10.244.1.11"), netip.MustParseAddr("fd00:244:1::11")}
	bAddrs   = []netip.Addr{netip.MustParseAddr("10.244.1.12"), netip.MustParseAddr("fd00:244:1::12")}
)

// world is a node with three pods.
type world struct {
	*node
	web, a, b *nstest.NS
	used      []uint16 // ports of floods
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{node: newNode(t), web: nstest.New(t), a: nstest.New(t), b: nstest.New(t)}
	w.ns.Run(t, "sh", "-ec", `echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
		echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad`)
	w.pod(w.web, "hca", webAddrs)
	w.pod(w.a, "hcb", aAddrs)
	w.pod(w.b, "hcc", bAddrs)
	return w
}

// pod gives a namespace a link to the node, with the group of pods whose policies are known.
func (w *world) pod(ns *nstest.NS, link string, addrs []netip.Addr) {
	w.Helper()
	w.ns.Run(w, "sh", "-ec", fmt.Sprintf(`ip link add %[1]s group %[2]d type veth peer name eth0 netns /run/netns/%[3]s
		ip link set %[1]s up; ip addr add fe80::1/64 dev %[1]s nodad; ip route add %[4]s dev %[1]s; ip route add %[5]s dev %[1]s`,
		link, names.PolicyLinkGroup, ns.Name, addrs[0], addrs[1]))
	l, err := w.ns.Handle.LinkByName(link)
	if err != nil {
		w.Fatal(err)
	}
	ns.Run(w, "sh", "-ec", fmt.Sprintf(`echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
		ip link set eth0 up; ip addr add %[1]s/32 dev eth0; ip addr add %[2]s/128 dev eth0 nodad
		ip neigh add 169.254.1.1 lladdr %[3]s nud permanent dev eth0; ip neigh add fe80::1 lladdr %[3]s nud permanent dev eth0
		ip route add 169.254.1.1 dev eth0; ip route add default via 169.254.1.1; ip route add default via fe80::1 dev eth0`,
		addrs[0], addrs[1], l.Attrs().HardwareAddr))
	for _, a := range addrs {
		w.ns.Run(w, "ip", "neigh", "replace", a.String(), "lladdr", w.mac(ns), "nud", "permanent", "dev", link)
	}
}

func (w *world) mac(ns *nstest.NS) string {
	w.Helper()
	l, err := ns.Handle.LinkByName("eth0")
	if err != nil {
		w.Fatal(err)
	}
	return l.Attrs().HardwareAddr.String()
}

// connect opens a UDP socket in a namespace that hears one other only.
func (w *world) connect(ns *nstest.NS, own, other netip.AddrPort) (c *net.UDPConn) {
	w.Helper()
	ns.Do(w, func() (err error) {
		reuse := func(_, _ string, raw syscall.RawConn) (err error) {
			err2 := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
			return errors.Join(err, err2)
		}
		d := net.Dialer{Control: reuse, LocalAddr: net.UDPAddrFromAddrPort(own)}
		conn, err := d.Dial("udp", other.String())
		if err == nil {
			c = conn.(*net.UDPConn)
		}
		return err
	})
	w.Cleanup(func() { _ = c.Close() }) // a test may have closed it
	return c
}

// rules isolate web in one direction or both: of its peers it may hear, or reach, some by UDP at a port, and no others. tag names a
// class apart that is otherwise the same.
type rules struct {
	port  uint16
	peers []netip.Addr
	tag   string
	out   bool
	only  policy.Direction // where out is not set
}

func (r rules) ruleset() *policy.Ruleset {
	out := &policy.Ruleset{
		Sets: map[string]*policy.Set{}, Maps: map[string]*policy.PortMap{}, Chains: map[string]*policy.Chain{},
		In: map[netip.Addr]string{}, Out: map[netip.Addr]string{},
	}
	for _, ipv6 := range []bool{false, true} {
		name := map[bool]string{false: "s4-peers", true: "s6-peers"}[ipv6]
		s := &policy.Set{Name: name, IPv6: ipv6}
		for _, a := range slices.SortedFunc(slices.Values(r.peers), netip.Addr.Compare) {
			if a.Is6() == ipv6 {
				s.Members = append(s.Members, policy.Member{Addr: a})
			}
		}
		out.Sets[name] = s
	}
	for _, dir := range []policy.Direction{policy.Ingress, policy.Egress} {
		if !r.out && dir != r.only {
			continue
		}
		group := &policy.Chain{Name: "g" + dir.String() + "-peers", Dir: dir, Rules: []policy.Rule{
			{Kind: policy.PeerIn, Ref: "s4-peers"}, {Kind: policy.PeerIn, Ref: "s6-peers", IPv6: true},
		}}
		m := &policy.PortMap{Name: fmt.Sprintf("p%s-%d%s", dir, r.port, r.tag), Elements: []policy.PortElement{
			{Protocol: policy.UDP, First: r.port, Last: r.port, Jump: group.Name},
		}}
		class := &policy.Chain{Name: fmt.Sprintf("c%s-%d%s", dir, r.port, r.tag), Dir: dir, Class: true,
			Rules: []policy.Rule{{Kind: policy.PortsOf, Ref: m.Name}}}
		out.Maps[m.Name], out.Chains[group.Name], out.Chains[class.Name] = m, group, class
		for _, a := range webAddrs {
			map[policy.Direction]map[netip.Addr]string{policy.Ingress: out.In, policy.Egress: out.Out}[dir][a] = class.Name
		}
	}
	return out
}

// elements lists a set of the kernel.
func (n *node) elements(name string) (out []nfnl.Element) {
	n.Helper()
	n.ns.Do(n, func() (err error) {
		out, err = nfnl.Elements(set(name))
		return err
	})
	return out
}
