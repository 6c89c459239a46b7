package nft

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// world is a node with two pods, a LAN behind eth0 and a tailnet behind headcni01. A veth plays the tun: the rules know
// it by its name only.
type world struct {
	t                         testing.TB
	node, podA, podB, lan, tn *nstest.NS
	tables                    *Tables
}

// addrs are the world's addresses in one family.
type addrs struct {
	podA, podB, hole, remote, remote2, forged netip.Addr
	node, docker, lan, nodeTailnet, device    netip.Addr
}

func addrsOf(a ...string) (out addrs) {
	for i, p := range []*netip.Addr{&out.podA, &out.podB, &out.hole, &out.remote, &out.remote2, &out.forged,
		&out.node, &out.docker, &out.lan, &out.nodeTailnet, &out.device} {
		*p = netip.MustParseAddr(a[i])
	}
	return out
}

var worldAddrs = map[string]addrs{
	"IPv4": addrsOf("10.244.1.10", "10.244.1.11", "10.244.1.99", "10.244.2.20", "10.244.3.30", "198.51.100.9",
		"192.0.2.11", "172.17.0.1", "192.0.2.1", "100.64.0.1", "100.64.0.9"),
	"IPv6": addrsOf("fd00:244:1::10", "fd00:244:1::11", "fd00:244:1::99", "fd00:244:2::20", "fd00:244:3::30", "2001:db8:9::9",
		"2001:db8::11", "fd00:17::1", "2001:db8::1", "fd7a:115c:a1e0::1", "fd7a:115c:a1e0::9"),
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, node: nstest.New(t), podA: nstest.New(t), podB: nstest.New(t), lan: nstest.New(t), tn: nstest.New(t),
		tables: New()}
	sh := func(ns *nstest.NS, script string) { t.Helper(); ns.Run(t, "sh", "-ec", script) }
	for _, ns := range []*nstest.NS{w.node, w.podA, w.podB, w.lan, w.tn} {
		sh(ns, "echo 0 >/proc/sys/net/ipv6/conf/all/accept_dad; echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad; "+
			"for f in rp_filter accept_local; do for c in all default; do echo $([ $f = accept_local ] && echo 1 || echo 0) "+
			">/proc/sys/net/ipv4/conf/$c/$f; done; done")
	}
	v4, v6 := worldAddrs["IPv4"], worldAddrs["IPv6"]
	sh(w.node, fmt.Sprintf(`echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
		ip link add docker0 type bridge; ip link set docker0 up; ip addr add %s/16 dev docker0; ip addr add %s/64 dev docker0 nodad
		ip link add eth0 type veth peer name eth0 netns /run/netns/%s; ip link set eth0 up
		ip addr add %s/24 dev eth0; ip addr add %s/64 dev eth0 nodad
		ip link add headcni01 type veth peer name tun netns /run/netns/%s; ip link set headcni01 up
		ip addr add %s/32 dev headcni01; ip addr add %s/128 dev headcni01 nodad
		for r in 10.244.0.0/16 100.64.0.0/10 fd00:244::/32 fd7a:115c:a1e0::/48; do ip route add $r dev headcni01; done`,
		v4.docker, v6.docker, w.lan.Name, v4.node, v6.node, w.tn.Name, v4.nodeTailnet, v6.nodeTailnet))
	sh(w.lan, fmt.Sprintf(`ip link set eth0 up; ip addr add %s/24 dev eth0; ip addr add %s/64 dev eth0 nodad
		ip route add default via %s; ip route add default via %s`, v4.lan, v6.lan, v4.node, v6.node))
	sh(w.tn, fmt.Sprintf(`ip link set tun up; ip addr add %s/10 dev tun; ip addr add %s/48 dev tun nodad
		ip route add default via %s; ip route add default via %s`, v4.device, v6.device, v4.nodeTailnet, v6.nodeTailnet))
	for _, a := range []addrs{v4, v6} {
		// A forger knows the node's MAC: it must not fail for want of an answer to its forged question.
		w.lan.Run(t, "ip", "neigh", "replace", a.node.String(), "lladdr", w.mac("eth0").String(), "nud", "permanent", "dev", "eth0")
		w.own(w.tn, "tun", a.remote, a.remote2)
	}
	w.pod(w.podA, "hca", v4.podA, v6.podA)
	w.pod(w.podB, "hcb", v4.podB, v6.podB)
	return w
}

// pod gives a namespace a link to the node as ADD does.
func (w *world) pod(ns *nstest.NS, link string, a4, a6 netip.Addr) {
	w.t.Helper()
	w.node.Run(w.t, "sh", "-ec", fmt.Sprintf(`ip link add %[1]s type veth peer name eth0 netns /run/netns/%[2]s; ip link set %[1]s up
		ip addr add fe80::1/64 dev %[1]s nodad; ip route add %[3]s dev %[1]s; ip route add %[4]s dev %[1]s`, link, ns.Name, a4, a6))
	mac := w.mac(link).String()
	ns.Run(w.t, "sh", "-ec", fmt.Sprintf(`ip link set eth0 up; ip addr add %[1]s/32 dev eth0; ip addr add %[2]s/128 dev eth0 nodad
		ip neigh add 169.254.1.1 lladdr %[3]s nud permanent dev eth0; ip route add 169.254.1.1 dev eth0
		ip neigh add fe80::1 lladdr %[3]s nud permanent dev eth0
		ip route add default via 169.254.1.1; ip route add default via fe80::1 dev eth0`, a4, a6, mac))
}

// mac is that of a link of the node.
func (w *world) mac(link string) net.HardwareAddr {
	w.t.Helper()
	l, err := w.node.Handle.LinkByName(link)
	if err != nil {
		w.t.Fatal(err)
	}
	return l.Attrs().HardwareAddr
}

// own gives addresses to a link, so that its namespace may send from, and hears what is sent to, them.
func (w *world) own(ns *nstest.NS, link string, as ...netip.Addr) {
	w.t.Helper()
	for _, a := range as {
		ns.Run(w.t, "ip", "addr", "replace", netip.PrefixFrom(a, a.BitLen()).String(), "dev", link, "nodad")
	}
}

func (w *world) disown(ns *nstest.NS, link string, a netip.Addr) {
	w.t.Helper()
	ns.Run(w.t, "ip", "addr", "del", netip.PrefixFrom(a, a.BitLen()).String(), "dev", link)
}

func (w *world) sync(cfg Config) {
	w.t.Helper()
	mustSync(w.t, w.node, w.tables, cfg)
}

// packet is one UDP datagram.
type packet struct {
	from *nstest.NS
	src  netip.Addr // zero: the kernel's choice
	to   *nstest.NS // who should hear it
	dst  netip.Addr
	// asked is the address that it is sent to where that is not dst, as with a service's.
	asked netip.Addr
	port  uint16 // that it is sent to, 0 for testPort
	mark  int
}

const testPort = 7777

// heard sends p and returns the source that the receiver saw, or the zero Addr when it heard nothing for a while.
func (w *world) heard(p packet) netip.Addr { w.t.Helper(); return w.listen(p, 3) }

// waitFor is heard for what must arrive: it gives a busy machine time.
func (w *world) waitFor(p packet) netip.Addr { w.t.Helper(); return w.listen(p, 50) }

func (w *world) listen(p packet, tries int) netip.Addr {
	w.t.Helper()
	var in *net.UDPConn
	p.to.Do(w.t, func() (err error) {
		// The socket of the packet before is closed, but a program that a test beside this one starts has it until its exec.
		for range 100 {
			in, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.dst, testPort)))
			if !errors.Is(err, unix.EADDRINUSE) {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		return err
	})
	defer in.Close()
	// Several packets: the first one between two hosts may die while a neighbour is looked up.
	for range tries {
		w.send(p)
		if err := in.SetReadDeadline(time.Now().Add(60 * time.Millisecond)); err != nil {
			w.t.Fatal(err)
		}
		_, from, err := in.ReadFromUDPAddrPort(make([]byte, 16))
		if err == nil {
			return from.Addr().Unmap()
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			w.t.Fatal(err)
		}
	}
	return netip.Addr{}
}

func (w *world) send(p packet) {
	w.t.Helper()
	p.from.Do(w.t, func() error {
		d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
			err2 := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, p.mark) })
			return errors.Join(err, err2)
		}}
		if p.src.IsValid() {
			d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.src, 0))
		}
		to := p.dst
		if p.asked.IsValid() {
			to = p.asked
		}
		c, err := d.Dial("udp", netip.AddrPortFrom(to, cmp.Or(p.port, testPort)).String())
		if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
			return nil
		}
		if err != nil {
			return err
		}
		defer c.Close()
		_, _ = c.Write([]byte("x")) // the guard answers a local sender with EPERM
		return nil
	})
}
