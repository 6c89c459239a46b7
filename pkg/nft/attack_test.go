package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
)

// eye sees the IP packets that arrive by a link.
type eye struct {
	file *os.File
	mu   sync.Mutex
	seen []sight
	end  chan struct{}
}

// sight is a packet's addresses, and its text where it is a datagram of ours.
type sight struct {
	src, dst netip.Addr
	rest     string
}

func (s sight) String() string { return fmt.Sprintf("%s > %s", s.src, s.dst) }

func look(t *testing.T, ns *nstest.NS, link string) *eye {
	t.Helper()
	e := &eye{end: make(chan struct{})}
	l, err := ns.Handle.LinkByName(link)
	if err != nil {
		t.Fatal(err)
	}
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8
	ns.Do(t, func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		e.file = os.NewFile(uintptr(fd), "eye")
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Attrs().Index})
	})
	go e.read()
	t.Cleanup(func() { e.file.Close(); <-e.end })
	return e
}

func (e *eye) read() {
	defer close(e.end)
	b := make([]byte, 2048)
	for {
		n, err := e.file.Read(b)
		if err != nil {
			return // closed
		}
		var s sight
		switch {
		case n >= 20 && b[0]>>4 == 4:
			s = sight{netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), string(b[20:n])}
		case n >= 40 && b[0]>>4 == 6:
			s = sight{netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40])), string(b[40:n])}
		default:
			continue
		}
		e.mu.Lock()
		e.seen = append(e.seen, s)
		e.mu.Unlock()
	}
}

// until is what was seen until something that says mark, sent again and again, which must come.
func (e *eye) until(t *testing.T, mark string, send func()) []sight {
	t.Helper()
	for range 100 {
		send()
		time.Sleep(20 * time.Millisecond)
		e.mu.Lock()
		seen := slices.Clone(e.seen)
		e.mu.Unlock()
		if i := slices.IndexFunc(seen, func(s sight) bool { return strings.Contains(s.rest, mark) }); i >= 0 {
			return seen[:i]
		}
	}
	t.Fatalf("%q never came: this eye is blind", mark)
	return nil
}

// raw sends packets from a namespace.
func raw(t *testing.T, from *nstest.NS, packets ...[]byte) {
	t.Helper()
	from.Do(t, func() error {
		for _, p := range packets {
			if err := nstest.Send(p); err != nil {
				return err
			}
		}
		return nil
	})
}

// ports makes each test's flows new ones.
var ports = uint16(20000)

// What has no conntrack entry has no NAT: a pod's packets of every shape go out as their node's or not at all, and so do those that
// somebody has taken from conntrack.
func TestNoPodSourceOutside(t *testing.T) {
	w := newWorld(t)
	for _, a := range worldAddrs {
		w.node.Run(t, "ip", "route", "add", "default", "via", a.lan.String())
	}
	with := func(change func(*Config)) Config { c := typical(); change(&c); return c }
	services := map[string]netip.Addr{"IPv4": netip.MustParseAddr("10.96.0.10"), "IPv6": netip.MustParseAddr("fd00:96::10")}
	for name, c := range map[string]struct {
		cfg     Config
		mute    bool // nothing at all to tailnet devices
		service bool // pods keep their source outside, but not towards services
	}{
		"masquerade":    {cfg: typical()},
		"LAN allowed":   {cfg: with(func(c *Config) { c.LANIngress = true })},
		"deny":          {cfg: with(func(c *Config) { c.TailnetEgress = config.EgressDeny }), mute: true},
		"no masquerade": {cfg: with(func(c *Config) { c.Masquerade = false }), service: true},
	} {
		for _, notrack := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, notrack %v", name, notrack), func(t *testing.T) {
				for _, f := range []string{"ip", "ip6"} {
					if notrack {
						w.node.Run(t, "nft", fmt.Sprintf(`table %s foreign { chain c { type filter hook prerouting priority -310; iifname "hca" notrack; }; }`, f))
						defer w.node.Run(t, "nft", "delete table "+f+" foreign")
					}
				}
				for family, a := range worldAddrs {
					w.sync(c.cfg)
					outside, tailnet := w.shapes(t, a, services[family])
					for _, s := range outside {
						if s.dst == services[family] || s.src == a.podA && !c.service {
							t.Errorf("on the LAN: %s", s)
						}
					}
					for _, s := range tailnet {
						if s.dst == services[family] || s.src == a.podA || c.mute && s.dst == a.device {
							t.Errorf("in the tunnel: %s", s)
						}
					}
					if name != "masquerade" {
						continue
					}
					w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
					outside, tailnet = w.shapes(t, a, services[family])
					for where, n := range map[string]int{"LAN": len(outside), "tunnel": len(tailnet)} {
						if n < 10 {
							t.Errorf("%s: %d packets by the %s without our tables: this test cannot fail", family, n, where)
						}
					}
				}
			})
		}
	}
}

// shapes sends packets of all shapes from a pod to the LAN, to a service that nobody has, and to a tailnet device.
func (w *world) shapes(t *testing.T, a addrs, service netip.Addr) (outside, tailnet []sight) {
	t.Helper()
	lan, tn := look(t, w.lan, "eth0"), look(t, w.tn, "tun")
	for _, dst := range []netip.Addr{a.lan, service, a.device} {
		ports += 100
		raw(t, w.podA, slices.Collect(maps.Values(nstest.Shapes(a.podA, dst, ports)))...)
	}
	ports += 100
	mark := func(dst netip.Addr) func() {
		return func() {
			raw(t, w.node, nstest.Packet(a.node, dst, unix.IPPROTO_UDP, nstest.UDP(a.node, dst, ports, 9, "the end")))
		}
	}
	return fromPod(lan.until(t, "the end", mark(a.lan)), a, service), fromPod(tn.until(t, "the end", mark(a.device)), a, service)
}

// fromPod leaves out what the receivers and the node say themselves.
func fromPod(all []sight, a addrs, service netip.Addr) []sight {
	return slices.DeleteFunc(all, func(s sight) bool {
		return s.src != a.podA && s.dst != service && (s.src == a.lan || s.src == a.device || s.dst == a.node || s.dst.IsMulticast())
	})
}

// A host beside the node reaches pods by ports of the node, whoever it claims to be, and not by a route over the node.
func TestLANIngress(t *testing.T) {
	w := newWorld(t)
	for family, a := range worldAddrs {
		service := map[string]netip.Addr{"IPv4": netip.MustParseAddr("10.96.0.10"), "IPv6": netip.MustParseAddr("fd00:96::10")}[family]
		port := map[string]netip.Addr{"IPv4": netip.MustParseAddr("192.0.2.100"), "IPv6": netip.MustParseAddr("2001:db8::100")}[family]
		far := map[string]netip.Addr{"IPv4": netip.MustParseAddr("192.0.2.101"), "IPv6": netip.MustParseAddr("2001:db8::101")}[family]
		w.own(w.node, "eth0", port, far)
		for dst, pod := range map[netip.Addr]netip.Addr{service: a.podA, port: a.podA, far: a.remote} {
			w.node.Run(t, "nft", fmt.Sprintf(`table %[1]s services { chain c { type nat hook prerouting priority -100; %[1]s daddr %[2]s udp dport 9 dnat to %[3]s; }; }`,
				nftFamily[family], dst, pod))
		}
		forged := map[string]netip.Addr{"a tailnet device": a.device, "the node's tailnet address": a.nodeTailnet, "a service": service,
			"the node": a.node, "the node's other address": a.docker, "a pod": a.podB, "another node's pod": a.remote2,
			"link-local": map[string]netip.Addr{"IPv4": netip.MustParseAddr("169.254.1.1"), "IPv6": netip.MustParseAddr("fe80::9")}[family]}
		ways := map[string]netip.Addr{"a pod": a.podA, "a pod of another node": a.remote, "a service": service, "a tailnet device": a.device,
			"a port": port, "a far pod's port": far}
		honest := map[string]netip.Addr{"itself": a.lan, "a host behind it": map[string]netip.Addr{"IPv4": netip.MustParseAddr("198.51.100.7"), "IPv6": netip.MustParseAddr("2001:db8:7::7")}[family]}
		arrives := func(src, dst netip.Addr) bool { t.Helper(); return w.arrives(t, a, src, dst) }
		for _, allow := range []bool{false, true} {
			cfg := typical()
			cfg.LANIngress = allow
			w.sync(cfg)
			w.mustSay(map[bool]string{false: DropLANIngress, true: ""}[allow], a.podA, a.lan, false)
			w.mustSay("", a.podA, a.lan, true)
			for to, dst := range ways {
				for as, src := range honest {
					if got, want := arrives(src, dst), allow || to == "a port" || to == "a far pod's port"; got != want {
						t.Errorf("%s, allow %v: from %s to %s: arrives %v", family, allow, as, to, got)
					}
				}
				for as, src := range forged {
					if arrives(src, dst) {
						t.Errorf("%s, allow %v: as %s to %s: arrives", family, allow, as, to)
					}
				}
			}
		}
		// Mid-flow, as long as conntrack knows it: a connection from before is none of ours.
		w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
		for to, dst := range ways {
			if !arrives(a.lan, dst) {
				t.Errorf("%s: to %s: nothing arrives without our tables: this test cannot fail", family, to)
			}
		}
		ports++
		again := nstest.Packet(a.lan, a.podA, unix.IPPROTO_UDP, nstest.UDP(a.lan, a.podA, ports, 9, "begun before"))
		raw(t, w.lan, again)
		w.sync(typical())
		pod := look(t, w.podA, "eth0")
		raw(t, w.lan, again)
		if got := pod.until(t, "the end", func() { w.end(t, a) }); len(got) > 0 {
			t.Errorf("%s: a flow that began before is still there: %v", family, got)
		}
	}
}

// end sends something to all who listen.
func (w *world) end(t *testing.T, a addrs) {
	t.Helper()
	for _, dst := range []netip.Addr{a.podA, a.remote} {
		raw(t, w.node, nstest.Packet(a.node, dst, unix.IPPROTO_UDP, nstest.UDP(a.node, dst, ports, 7, "the end")))
	}
}

// arrives tells whether a datagram of the LAN's comes to a pod, or into the tunnel.
func (w *world) arrives(t *testing.T, a addrs, src, dst netip.Addr) bool {
	t.Helper()
	pod, tn := look(t, w.podA, "eth0"), look(t, w.tn, "tun")
	ports++
	raw(t, w.lan, nstest.Packet(src, dst, unix.IPPROTO_UDP, nstest.UDP(src, dst, ports, 9, "hello")))
	seen := slices.Concat(pod.until(t, "the end", func() { w.end(t, a) }), tn.until(t, "the end", func() { w.end(t, a) }))
	return slices.ContainsFunc(seen, func(s sight) bool { return strings.Contains(s.rest, "hello") })
}

// The kernel believes an ICMP error that quotes a datagram of one of its own sockets, whoever sends it. A pod speaks of what it got, and so
// does who is behind the tunnel: else one packet makes all paths between nodes too small for tailscaled, for ten minutes.
func TestFalseErrors(t *testing.T) {
	w := newWorld(t)
	type word struct {
		by          *nstest.NS
		src, to     netip.Addr
		about, sent netip.Addr // the packet that it quotes went from the latter to the former
	}
	var socket *net.UDPConn
	w.node.Do(t, func() (err error) {
		socket, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.IPv6Unspecified(), 4711)))
		return err
	})
	defer socket.Close()
	for family, a := range worldAddrs {
		mtu := map[string]uint16{"IPv4": 600, "IPv6": 1280}[family]
		far := a.forged
		w.node.Run(t, "ip", "route", "replace", "default", "via", a.lan.String())
		say := func(of word, text string) {
			about := nstest.Packet(of.sent, of.about, unix.IPPROTO_UDP, nstest.UDP(of.sent, of.about, 4711, 9, text))
			raw(t, of.by, nstest.TooBig(of.src, of.to, mtu, about))
		}
		believed := func(of word) bool {
			return strings.Contains(w.node.Run(t, "ip", "route", "get", of.about.String()), fmt.Sprintf(" mtu %d", mtu))
		}
		forget := func() {
			w.node.Run(t, "ip", "route", "flush", "cache")
			w.node.Run(t, "ip", "-6", "route", "flush", "cache")
		}
		wait := func(what string, of word) {
			t.Helper()
			for range 100 {
				if say(of, "true"); believed(of) {
					return
				}
				time.Sleep(20 * time.Millisecond)
			}
			t.Errorf("%s: %s is not believed", family, what)
		}
		lies := map[string]word{
			"a pod of the node's own":      {w.podA, a.podA, a.node, a.lan, a.node},
			"a device of the node's own":   {w.tn, a.device, a.nodeTailnet, a.lan, a.node},
			"a far pod of the node's own":  {w.tn, a.remote, a.nodeTailnet, far, a.node},
			"a pod of what a device got":   {w.podA, a.podA, a.node, a.device, a.nodeTailnet},
			"a pod of what a far pod gets": {w.podA, a.podA, a.nodeTailnet, a.remote, a.nodeTailnet},
		}
		truths := map[string]word{
			"a pod":                    {w.podA, a.podA, a.node, a.podA, a.node},
			"a device":                 {w.tn, a.device, a.nodeTailnet, a.device, a.nodeTailnet},
			"a far pod":                {w.tn, a.remote, a.nodeTailnet, a.remote, a.nodeTailnet},
			"a router beside the node": {w.lan, a.lan, a.node, far, a.node},
		}
		w.sync(typical())
		for what, lie := range lies {
			forget()
			say(lie, "false")
			wait("after "+what, truths["a pod"])
			if believed(lie) {
				t.Errorf("%s: %s is believed", family, what)
			}
		}
		for what, truth := range truths {
			forget()
			wait(what, truth)
		}
		// Pods hear as little of what they have sent to others.
		other := look(t, w.podB, "eth0")
		say(word{w.podA, a.podA, a.podB, a.remote, a.podB}, "a false word")
		if got := other.until(t, "a true word", func() { say(word{w.podA, a.podA, a.podB, a.podA, a.podB}, "a true word") }); slices.ContainsFunc(got,
			func(s sight) bool { return strings.Contains(s.rest, "a false word") }) {
			t.Errorf("%s: a pod hears an error about what another pod of this node got of it", family)
		}
		w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
		for what, lie := range lies {
			forget()
			wait(what+", without our tables, so that this test can fail", lie)
		}
		forget()
	}
}

// A pod's word about another pod's connection reaches neither of its ends, nor the node where that is one. Of a link that nobody has said
// anything of yet, nothing is known.
func TestFalseErrorsAboutAnotherPod(t *testing.T) {
	w := newWorld(t)
	w.sync(typical())
	for _, a := range worldAddrs {
		w.node.Run(t, "ip", "route", "add", a.hole.String(), "dev", "hcb")
	}
	socket := func() (l *net.UDPConn) {
		w.node.Do(t, func() (err error) {
			l, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.IPv6Unspecified(), 4711)))
			return err
		})
		return l
	}()
	defer socket.Close()
	for _, known := range []bool{false, true} {
		if known {
			sources := w.sources()
			for _, a := range worldAddrs {
				sources[w.index("hcb")] = append(sources[w.index("hcb")], a.hole)
			}
			w.say(w.tables, sources)
		}
		for family, a := range worldAddrs {
			flow := func(src, dst netip.Addr, text string) []byte {
				return nstest.Packet(src, dst, unix.IPPROTO_UDP, nstest.UDP(src, dst, 4711, 9, text))
			}
			// heard tells whether who began a connection hears of an error about it.
			heard := func(by *nstest.NS, says netip.Addr, end *nstest.NS, link string, src, dst netip.Addr) bool {
				raw(t, end, flow(src, dst, "begun"))
				e := look(t, end, link)
				got := e.until(t, "all is said", func() {
					raw(t, by, nstest.TooBig(says, src, 1280, flow(src, dst, "an error")), flow(says, src, "all is said"))
				})
				return slices.ContainsFunc(got, func(s sight) bool { return strings.Contains(s.rest, "an error") })
			}
			if got := heard(w.podA, a.podA, w.tn, "tun", a.remote, a.podB); got == known {
				t.Errorf("%s, known %v: a far pod hears it: %v", family, known, got)
			}
			if got := heard(w.podA, a.podA, w.podB, "eth0", a.podB, a.hole); got == known {
				t.Errorf("%s, known %v: a near pod hears it: %v", family, known, got)
			}
			if !heard(w.podB, a.podB, w.tn, "tun", a.remote, a.podB) {
				t.Errorf("%s, known %v: a pod's word about its own connection is dropped", family, known)
			}
			believes := func(by *nstest.NS, says netip.Addr) bool {
				w.node.Run(t, "sh", "-c", "ip route flush cache; ip -6 route flush cache")
				raw(t, w.node, flow(a.node, a.podB, "begun"))
				for range 5 {
					raw(t, by, nstest.TooBig(says, a.node, 1280, flow(a.node, a.podB, "an error")))
					time.Sleep(20 * time.Millisecond)
				}
				return strings.Contains(w.node.Run(t, "ip", "route", "get", a.podB.String()), " mtu 1280")
			}
			if got := believes(w.podA, a.podA); got == known {
				t.Errorf("%s, known %v: the node believes it: %v", family, known, got)
			}
			if !believes(w.podB, a.podB) {
				t.Errorf("%s, known %v: the node does not believe a pod about its own connection", family, known)
			}
		}
	}
}

// What the node has on its loopback is not for pods, also where portmap or kube-proxy had the kernel lead such addresses.
func TestPodsReachNoLoopback(t *testing.T) {
	w := newWorld(t)
	a, home := worldAddrs["IPv4"], netip.MustParseAddr("127.0.0.1")
	w.node.Run(t, "sh", "-ec", "echo 1 >/proc/sys/net/ipv4/conf/hca/route_localnet")
	pod, err := w.podA.Handle.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	node := w.mac("hca")
	var l *net.UDPConn
	w.node.Do(t, func() (err error) {
		l, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(home, testPort)))
		return err
	})
	defer l.Close()
	first := func() string {
		ports++
		frame := slices.Concat(node, pod.Attrs().HardwareAddr, []byte{8, 0}, nstest.Packet(a.podA, home, unix.IPPROTO_UDP, nstest.UDP(a.podA, home, ports, testPort, "pod")))
		w.podA.Do(t, func() error { return nstest.SendFrames(pod.Attrs().Index, frame) })
		w.send(packet{from: w.node, dst: home})
		b := make([]byte, 16)
		n, _, err := l.ReadFromUDP(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	w.sync(typical())
	if got := first(); got != "x" {
		t.Errorf("the loopback hears %q", got)
	}
	// A port of the node is asked at the loopback too.
	w.node.Run(t, "sh", "-ec", `echo 1 >/proc/sys/net/ipv4/conf/hca/route_localnet
		nft 'table ip ports { chain c { type nat hook output priority -100; ip daddr 127.0.0.1 udp dport 8080 dnat to `+a.podA.String()+`:8080; }; }'`)
	if got := w.asks(t, netip.AddrPortFrom(home, 8080), a.podA); got != "answer" {
		t.Errorf("a port of the node at its loopback: %q", got)
	}
	w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
	if got := first(); got != "pod" {
		t.Errorf("without our tables the loopback hears %q: this test cannot fail", got)
	}
}

// A connection of a pod's to the outside, or by a service, outlives a segment that conntrack takes for no part of it: neither the node nor
// the pod answers with a reset.
func TestStraySegments(t *testing.T) {
	w := newWorld(t)
	for family, a := range worldAddrs {
		service := map[string]netip.Addr{"IPv4": netip.MustParseAddr("10.96.0.10"), "IPv6": netip.MustParseAddr("fd00:96::10")}[family]
		survives := func(with *nstest.NS, of, asked netip.Addr) bool {
			t.Helper()
			sniff := look(t, with, "eth0")
			var l net.Listener
			with.Do(t, func() (err error) { l, err = net.Listen("tcp", netip.AddrPortFrom(of, testPort).String()); return err })
			defer l.Close()
			at := netip.MustParseAddrPort(l.Addr().String())
			var client net.Conn
			w.podA.Do(t, func() (err error) {
				client, err = net.DialTimeout("tcp", netip.AddrPortFrom(asked, at.Port()).String(), 10*time.Second)
				return err
			})
			defer client.Close()
			server, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			if _, err := client.Write([]byte("question")); err != nil {
				t.Fatal(err)
			}
			deadline := time.Now().Add(10 * time.Second)
			if err := errors.Join(server.SetDeadline(deadline), client.SetDeadline(deadline)); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 16)
			if _, err := server.Read(b); err != nil {
				t.Fatal(err)
			}
			peer := netip.MustParseAddrPort(server.RemoteAddr().String())
			said := func(s sight) bool { return s.src == peer.Addr() && strings.HasSuffix(s.rest, "question") }
			var seen []sight
			for len(seen) == 0 { // the server has read it, so it has come
				sniff.mu.Lock()
				seen = slices.DeleteFunc(slices.Clone(sniff.seen), func(s sight) bool { return !said(s) })
				sniff.mu.Unlock()
			}
			h := []byte(seen[0].rest)
			expected, acknowledged := binary.BigEndian.Uint32(h[8:]), binary.BigEndian.Uint32(h[4:])+uint32(len("question"))
			raw(t, with, nstest.Packet(of, peer.Addr(), unix.IPPROTO_TCP,
				nstest.Segment(of, peer.Addr(), at.Port(), peer.Port(), expected+50_000_000, acknowledged, "stray")))
			if _, err := server.Write([]byte("answer")); err != nil {
				return false
			}
			n, err := client.Read(b)
			return err == nil && string(b[:n]) == "answer"
		}
		w.node.Run(t, "nft", fmt.Sprintf(`table %[1]s foreign { chain c { type nat hook postrouting priority 100; oifname "eth0" masquerade; }
			chain d { type nat hook prerouting priority -100; %[1]s daddr %[2]s dnat to %[3]s; }; }`, nftFamily[family], service, a.podB))
		w.sync(typical())
		outside := func() bool { return survives(w.lan, a.lan, a.lan) }
		inside := func() bool { return survives(w.podB, a.podB, service) }
		if !outside() || !inside() {
			t.Errorf("%s: a stray segment ends a pod's connection", family)
		}
		w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
		if outside() || inside() {
			t.Errorf("%s: it outlives that without our tables too: this test cannot fail", family)
		}
		w.node.Run(t, "nft", "delete", "table", nftFamily[family], "foreign")
	}
}

// A connection of the node's own that conntrack does not know, as one that is older than the tables or that it has forgotten, goes on and
// hears of its end, whatever nf_conntrack_tcp_loose says, also where the kernel does not tell whose socket a packet is for.
func TestNodesOwnAreNoStrays(t *testing.T) {
	w := newWorld(t)
	for family, a := range worldAddrs {
		for _, loose := range []string{"0", "1"} {
			for _, takes := range []bool{true, false} {
				for _, what := range []string{"text", "FIN", "RST"} {
					w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
					w.node.Run(t, "sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_loose="+loose)
					client, server := connection(t, w.lan, w.node, a.node)
					w.tables.sockets = &takes
					w.sync(typical())
					var err error
					switch what {
					case "text":
						_, err = client.Write([]byte("x"))
					case "RST":
						err = errors.Join(client.SetLinger(0), client.Close())
					default:
						err = client.Close()
					}
					if err = errors.Join(err, server.SetDeadline(time.Now().Add(10*time.Second))); err != nil {
						t.Fatal(err)
					}
					if _, err := server.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
						t.Errorf("%s, tcp_loose=%s, nft_socket %v: the node does not hear %s", family, loose, takes, what)
					}
				}
			}
		}
	}
}

// connection is one of TCP.
func connection(t *testing.T, from, to *nstest.NS, at netip.Addr) (client, server *net.TCPConn) {
	t.Helper()
	var l net.Listener
	to.Do(t, func() (err error) { l, err = net.Listen("tcp", netip.AddrPortFrom(at, 0).String()); return err })
	defer l.Close()
	var c net.Conn
	from.Do(t, func() (err error) { c, err = net.DialTimeout("tcp", l.Addr().String(), 10*time.Second); return err })
	t.Cleanup(func() { c.Close() })
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// asks is what the node hears from its pod A, which answers on a port.
func (w *world) asks(t *testing.T, port netip.AddrPort, pod netip.Addr) string {
	t.Helper()
	var client, server *net.UDPConn
	w.podA.Do(t, func() (err error) {
		server, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(pod, port.Port())))
		return err
	})
	defer server.Close()
	w.node.Do(t, func() (err error) { client, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(port)); return err })
	defer client.Close()
	b := make([]byte, 16)
	for range 50 {
		deadline := time.Now().Add(60 * time.Millisecond)
		if err := errors.Join(client.SetReadDeadline(deadline), server.SetReadDeadline(deadline)); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Write([]byte("question")); err != nil {
			t.Fatal(err)
		}
		if _, from, err := server.ReadFromUDPAddrPort(b); err == nil {
			if _, err := server.WriteToUDPAddrPort([]byte("answer"), from); err != nil {
				t.Fatal(err)
			}
		}
		if n, err := client.Read(b); err == nil {
			return string(b[:n])
		}
	}
	return ""
}

// Counters say why, outlive a rewrite, and are not the daemon's alone.
func TestDrops(t *testing.T) {
	w := newWorld(t)
	a := worldAddrs["IPv4"]
	drops := func(tables *Tables) (d map[string]uint64) {
		t.Helper()
		w.node.Do(t, func() (err error) { d, err = tables.Drops(); return err })
		return d
	}
	w.sync(typical())
	first := drops(w.tables)
	delete(first, DropPodLinkLocal) // what kernels say by themselves
	if len(first) != len(reasons)-1 || slices.Max(slices.Collect(maps.Values(first))) != 0 {
		t.Errorf("at first: %v", first)
	}
	forge := func() {
		raw(t, w.podA, nstest.Packet(a.podB, a.remote, unix.IPPROTO_UDP, nstest.UDP(a.podB, a.remote, 1, 9, "x")))
	}
	want := func(what string, tables *Tables, n uint64) {
		t.Helper()
		if got := drops(tables)[DropPodForged]; got != n {
			t.Errorf("%s: %d, want %d", what, got, n)
		}
	}
	forge()
	want("one packet", w.tables, 1)
	if got := mustSync(t, w.node, w.tables, typical()); len(got) != 0 {
		t.Errorf("what is counted is a change: %v", got)
	}
	other := typical()
	other.LANIngress = true
	w.sync(other)
	forge()
	want("after a rewrite", w.tables, 2)
	w.node.Run(t, "nft", "add set ip headcni mine { type ipv4_addr ; }") // makes the table anew
	w.sync(other)
	forge()
	want("after a table that was made anew", w.tables, 3)
	fresh := New()
	mustSync(t, w.node, fresh, other)
	want("a daemon that has just begun", fresh, 1)
}

// A pod's link-local addresses are as many as it likes: the node learns none of them as a neighbour, and finds a pod that it must ask
// for all the same.
func TestPodFillsNoNeighbours(t *testing.T) {
	w := newWorld(t)
	a := worldAddrs["IPv6"]
	gateway := netip.MustParseAddr("fe80::1")
	pod, err := w.podA.Handle.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	node := w.mac("hca")
	mac := [6]byte(pod.Attrs().HardwareAddr)
	flood := func() int {
		var frames [][]byte
		for i := range 100 {
			from := netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 9: 9, 14: byte(i >> 8), 15: byte(i)})
			for _, p := range [][]byte{nstest.Solicitation(mac, from, gateway, gateway), nstest.Shapes(from, gateway, 1)["ICMP echo request"],
				nstest.Packet(a.podA, from, unix.IPPROTO_UDP, nstest.UDP(a.podA, from, 9, 9, "is anybody there?"))} {
				frames = append(frames, slices.Concat(node, mac[:], []byte{0x86, 0xdd}, p))
			}
		}
		w.podA.Do(t, func() error { return nstest.SendFrames(pod.Attrs().Index, frames...) })
		return strings.Count(w.node.Run(t, "ip", "-6", "neigh", "show", "dev", "hca"), "fe80::9:")
	}
	w.sync(typical())
	if got := flood(); got != 0 {
		t.Errorf("the node knows %d neighbours of the pod's making", got)
	}
	w.node.Run(t, "ip", "-6", "neigh", "flush", "dev", "hca")
	w.podA.Run(t, "ip", "-6", "neigh", "flush", "dev", "eth0", "nud", "permanent")
	if got := w.waitFor(packet{from: w.podA, src: a.podA, to: w.podB, dst: a.podB}); got != a.podA {
		t.Errorf("a pod that has to ask for its gateway is heard as %v", got)
	}
	w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
	if got := flood(); got < 50 {
		t.Errorf("%d neighbours without our tables: this test cannot fail", got)
	}
}

// A pod that goes through the addresses of the node's network, of which IPv6 has 2^64, leaves room in the node's table of neighbours, for
// the node and for other pods, and its own connections.
func TestPodScansNeighbours(t *testing.T) {
	w := newWorld(t)
	a := worldAddrs["IPv6"]
	scan := func() int {
		var packets [][]byte
		for i := range 500 {
			b := a.lan.As16()
			b[13], b[14], b[15] = 7, byte(i>>8), byte(i)
			dst := netip.AddrFrom16(b)
			packets = append(packets, nstest.Packet(a.podA, dst, unix.IPPROTO_UDP, nstest.UDP(a.podA, dst, 9, 9, "is anybody there?")))
		}
		raw(t, w.podA, packets...)
		return strings.Count(w.node.Run(t, "ip", "-6", "neigh", "show", "dev", "eth0"), "2001:db8::7:")
	}
	w.sync(typical())
	before := look(t, w.lan, "eth0")
	say := func() {
		raw(t, w.podA, nstest.Packet(a.podA, a.lan, unix.IPPROTO_UDP, nstest.UDP(a.podA, a.lan, 4711, 9, "a connection")))
	}
	before.until(t, "a connection", say)
	if got := scan(); got > 300 || got < askBurst/2 {
		t.Errorf("the node asks for %d neighbours, want some %d", got, askBurst)
	}
	var drops map[string]uint64
	w.node.Do(t, func() (err error) { drops, err = w.tables.Drops(); return err })
	if drops[DropPodScans] < 200 {
		t.Errorf("counted %d", drops[DropPodScans])
	}
	look(t, w.lan, "eth0").until(t, "a connection", say)
	if got := w.waitFor(packet{from: w.podB, src: a.podB, to: w.lan, dst: a.lan}); got != a.node {
		t.Errorf("another pod is heard as %v", got)
	}
	if got := mustSync(t, w.node, w.tables, typical()); len(got) != 0 {
		t.Errorf("what the kernel has noted is a change: %v", got)
	}
	w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
	if got := scan(); got < 400 {
		t.Errorf("%d neighbours without our tables: this test cannot fail", got)
	}
}
