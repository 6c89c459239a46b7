package nft

import (
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
	node, err := net.ParseMAC(w.mac("hca"))
	if err != nil {
		t.Fatal(err)
	}
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
