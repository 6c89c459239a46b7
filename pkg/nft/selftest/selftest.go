// Package selftest sends packets in clear on purpose, in a network namespace of its own that nothing else is in, and sees whether the
// node's tables stop and count them there. The node's own network is not touched.
package selftest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/nft"
)

// ErrNotRun means that nothing was found out: the process may not make a namespace.
var ErrNotRun = errors.New("the guard's self-test could not run")

// Result is one packet that was sent.
type Result struct {
	// What it was, and the reason by which it must have been dropped and counted.
	What, Reason string
}

// The scratch namespace's world: documentation addresses (RFC 5737, RFC 3849) on a pair of links, one of which is the wire.
const uplink, wire = "eth0", "wire"

var hosts = []struct{ node, router, outside netip.Prefix }{
	{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("198.51.100.9/32")},
	{netip.MustParsePrefix("2001:db8::1/64"), netip.MustParsePrefix("2001:db8::2/64"), netip.MustParsePrefix("2001:db8:9::9/128")},
}

// Run makes the namespace with the tables that cfg asks for, and returns what was sent and stopped. An error says what was not.
func Run(ctx context.Context, cfg nft.Config) (done []Result, err error) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		// The thread is never unlocked: it ends with this function, and the namespace with it.
		runtime.LockOSThread()
		done, err = inScratch(ctx, cfg)
	}()
	<-ended
	return done, err
}

func inScratch(ctx context.Context, cfg nft.Config) ([]Result, error) {
	before, err := namespace()
	if err == nil {
		err = unix.Unshare(unix.CLONE_NEWNET)
	}
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("%w: this process may not make a network namespace (it lacks CAP_SYS_ADMIN, as in the chart's container); "+
			"`headcni-daemon check`, as root outside, tries the guard with the same kernel", ErrNotRun)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: make a network namespace: %w", ErrNotRun, err)
	}
	if now, err := namespace(); err != nil || now == before {
		return nil, fmt.Errorf("%w: this is still the node's network namespace (%w)", ErrNotRun, err)
	}
	v6, err := furnish()
	if err != nil {
		return nil, fmt.Errorf("%w: furnish a network namespace: %w", ErrNotRun, err)
	}
	cfg.NodeAddr4, cfg.NodeAddr6 = hosts[0].node.Addr(), hosts[1].node.Addr()
	tables := nft.New()
	if _, err := tables.Sync(ctx, cfg); err != nil {
		return nil, fmt.Errorf("write the node's rules into a namespace of its own: %w", err)
	}
	var done []Result
	for i, h := range hosts {
		if i == 1 && !v6 {
			continue
		}
		results, err := try(ctx, tables, cfg, h.node.Addr(), h.outside.Addr())
		done = append(done, results...)
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// namespace tells network namespaces apart.
func namespace() (string, error) { return os.Readlink("/proc/thread-self/ns/net") }

// furnish makes an uplink with a default route, whose other end is the wire. Neighbours are fixed: nobody is there to ask.
func furnish() (v6 bool, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return false, err
	}
	defer h.Close()
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 2}
	if err := h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: uplink}, PeerName: wire, PeerHardwareAddr: mac}); err != nil {
		return false, err
	}
	for _, name := range []string{"lo", wire, uplink} {
		l, err := h.LinkByName(name)
		if err == nil {
			err = h.LinkSetUp(l)
		}
		if err != nil {
			return false, err
		}
	}
	l, err := h.LinkByName(uplink)
	if err != nil {
		return false, err
	}
	for _, f := range hosts {
		addr := &netlink.Addr{IPNet: ipNet(f.node)}
		router := f.router.Addr()
		if router.Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		err := h.AddrAdd(l, addr)
		if router.Is6() && err != nil {
			return false, nil // a kernel without IPv6
		}
		err = errors.Join(err,
			h.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: router.AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT}),
			h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: router.AsSlice()}))
		if err != nil {
			return false, err
		}
	}
	return true, nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// try sends packets in clear in one family, and at the end one that may leave, which must be seen on the wire.
func try(ctx context.Context, tables *nft.Tables, cfg nft.Config, node, outside netip.Addr) ([]Result, error) {
	tap, err := listen()
	if err != nil {
		return nil, fmt.Errorf("%w: listen to the wire: %w", ErrNotRun, err)
	}
	defer unix.Close(tap)
	var done []Result
	for _, p := range packets(cfg, node, outside) {
		before, err := tables.Drops()
		if err != nil {
			return done, err
		}
		if err := send(p.bytes); err != nil && !errors.Is(err, unix.EPERM) { // EPERM is the guard's answer
			return done, fmt.Errorf("%w: send %s: %w", ErrNotRun, p.What, err)
		}
		after, err := tables.Drops()
		if err != nil {
			return done, err
		}
		if after[p.Reason] != before[p.Reason]+1 {
			return done, fmt.Errorf("%s: the guard did not count it as %s: its rules do not work with this kernel", p.What, p.Reason)
		}
		done = append(done, p.Result)
	}
	control := datagram(node, outside, "may leave")
	if err := send(control); err != nil {
		return done, fmt.Errorf("%w: send what may leave: %w", ErrNotRun, err)
	}
	return done, onlyControl(ctx, tap, node, outside)
}

// onlyControl reads the wire until the packet that may leave is there. Nothing else of the two may be before it.
func onlyControl(ctx context.Context, tap int, node, outside netip.Addr) error {
	b := make([]byte, 256)
	deadline := time.Now().Add(2 * time.Second)
	for ctx.Err() == nil && time.Now().Before(deadline) {
		n, _, err := unix.Recvfrom(tap, b, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%w: read the wire: %w", ErrNotRun, err)
		}
		src, dst := addresses(b[:n])
		switch {
		case src == node && dst == outside:
			return nil
		case src == node || dst == outside || !dst.IsMulticast() && dst.IsValid():
			return fmt.Errorf("a packet from %s to %s left in clear although it was counted as dropped", src, dst)
		}
	}
	return fmt.Errorf("%w: the packet that may leave was not seen", ErrNotRun)
}

func addresses(b []byte) (src, dst netip.Addr) {
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	case len(b) >= 40 && b[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	}
	return src, dst
}

type packet struct {
	Result
	bytes []byte
}

// packets are those that must not leave, of the node's family.
func packets(cfg nft.Config, node, outside netip.Addr) []packet {
	v6 := node.Is6()
	var out []packet
	add := func(what, reason string, b []byte) { out = append(out, packet{Result{what, reason}, b}) }
	own := netset.OfFamily(cfg.Own, v6)
	if len(own) > 0 {
		pod := own[0].Addr().Next()
		add("what a node sends to a pod, the tunnel being away", nft.DropClusterClear, datagram(node, pod, "in clear"))
		tailnet := netset.TailnetIPv4
		if v6 {
			tailnet = netset.TailnetIPv6
		}
		add("what a pod sends to a tailnet device, the tunnel being away", nft.DropTailnetClear, datagram(pod, tailnet.Addr().Next(), "in clear"))
		if cfg.Masquerade {
			// SYN and FIN together are of no connection, so that there is no NAT.
			add("what a pod sends outside and NAT leaves alone", nft.DropPodSource, segment(pod, outside, 0x03))
		}
	}
	if services := netset.OfFamily(cfg.KeepSource, v6); len(services) > 0 {
		add("what is for a service that is none", nft.DropServiceClear, datagram(node, services[0].Addr().Next(), "in clear"))
	}
	return out
}

// listen gives what arrives at the wire's end, IP headers first.
func listen() (int, error) {
	i, err := net.InterfaceByName(wire)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8
	err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: i.Index}))
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func send(b []byte) error {
	family, to := unix.AF_INET, unix.Sockaddr(nil)
	if _, dst := addresses(b); dst.Is6() {
		family, to = unix.AF_INET6, &unix.SockaddrInet6{Addr: dst.As16()}
	} else {
		to = &unix.SockaddrInet4{Addr: dst.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, b, 0, to)
}

const discard = 9 // the port

func datagram(src, dst netip.Addr, text string) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, discard, 0, discard}, uint16(8+len(text)))
	return ip(src, dst, unix.IPPROTO_UDP, append(append(b, 0, 0), text...))
}

func segment(src, dst netip.Addr, flags byte) []byte {
	return ip(src, dst, unix.IPPROTO_TCP, []byte{0, discard, 0, discard, 0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0})
}

// ip puts a header in front. Nobody is to take the packet, so that it has no checksums but the one that the kernel fills in.
func ip(src, dst netip.Addr, protocol byte, payload []byte) []byte {
	const hops = 64
	b := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, hops, protocol, 0, 0}
	if src.Is6() {
		b = append(binary.BigEndian.AppendUint16([]byte{0x60, 0, 0, 0}, uint16(len(payload))), protocol, hops)
	}
	return append(append(append(b, src.AsSlice()...), dst.AsSlice()...), payload...)
}
