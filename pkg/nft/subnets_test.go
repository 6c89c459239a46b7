package nft

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
)

var (
	subnet4, subnet6 = netip.MustParsePrefix("192.168.50.0/24"), netip.MustParsePrefix("fd00:50::/64")
	behind           = map[string]netip.Addr{"IPv4": netip.MustParseAddr("192.168.50.7"), "IPv6": netip.MustParseAddr("fd00:50::7")}
)

func withSubnets(change func(*Config)) Config {
	c := typical()
	c.Subnets = Subnets{Known: []netip.Prefix{subnet4, subnet6}, Named: []netip.Prefix{subnet4, subnet6}}
	change(&c)
	return c
}

// subnetWorld is a world with a host behind a device of the tailnet, and a node that has a default route.
func subnetWorld(t *testing.T) *world {
	w := newWorld(t)
	for family, a := range worldAddrs {
		w.own(w.tn, "tun", behind[family])
		w.node.Run(t, "ip", "route", "add", map[string]string{"IPv4": subnet4.String(), "IPv6": subnet6.String()}[family], "dev", "headcni01")
		w.node.Run(t, "ip", "route", "add", "default", "via", a.lan.String())
	}
	return w
}

func (w *world) index(link string) int {
	w.t.Helper()
	l, err := w.node.Handle.LinkByName(link)
	if err != nil {
		w.t.Fatal(err)
	}
	return l.Attrs().Index
}

// mustSay holds what is said of a pod's connections against what real packets saw.
func (w *world) mustSay(want string, pod, other netip.Addr, begins bool) {
	w.t.Helper()
	w.node.Do(w.t, func() error {
		got, err := Beside("hca", w.index("hca"), pod, other, begins)
		if got != want {
			w.t.Errorf("%s and %s, the pod begins: %t: refused as %q, want %q", pod, other, begins, got, want)
		}
		return err
	})
}

func (w *world) consent(links ...string) {
	w.t.Helper()
	var indexes []int
	for _, l := range links {
		indexes = append(indexes, w.index(l))
	}
	w.node.Do(w.t, func() error {
		_, err := w.tables.Consent(map[netip.Prefix][]int{subnet4: indexes, subnet6: indexes})
		return err
	})
}

// listenTCP accepts one connection after the other.
func listenTCP(t *testing.T, ns *nstest.NS, at netip.Addr) <-chan net.Conn {
	t.Helper()
	var l net.Listener
	ns.Do(t, func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(at, testPort).String())
		return err
	})
	accepted := make(chan net.Conn, 16)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
			accepted <- c
		}
	}()
	return accepted
}

const soon = 20 * time.Second

func dial(t testing.TB, ns *nstest.NS, to netip.Addr) (c net.Conn, err error) {
	t.Helper()
	ns.Do(t, func() error {
		c, err = (&net.Dialer{Timeout: soon}).Dial("tcp", netip.AddrPortFrom(to, testPort).String())
		return nil
	})
	if err == nil {
		t.Cleanup(func() { c.Close() })
	}
	return c, err
}

// mustRefuse: a connection is reset, and a datagram answered with an error, both at once.
func (w *world) mustRefuse(pod *nstest.NS, to netip.Addr) {
	w.t.Helper()
	if _, err := dial(w.t, pod, to); !errors.Is(err, syscall.ECONNREFUSED) {
		w.t.Errorf("TCP to %s: %v, want it refused", to, err)
	}
	pod.Do(w.t, func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(to, testPort).String())
		if err != nil {
			return err
		}
		defer c.Close()
		// The kernel limits how many errors it sends to one host.
		for end := time.Now().Add(soon); ; {
			_, _ = c.Write([]byte("x")) // the answer counts
			if err := c.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
				return err
			}
			_, err := c.Read(make([]byte, 16))
			if errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EACCES) {
				return nil
			}
			if time.Now().After(end) {
				w.t.Errorf("UDP to %s: %v, want it refused", to, err)
				return nil
			}
		}
	})
}

func (w *world) drops() map[string]uint64 {
	w.t.Helper()
	var n map[string]uint64
	w.node.Do(w.t, func() (err error) { n, err = w.tables.Drops(); return err })
	return n
}

// Who may reach a network behind a device of the tailnet, in which configuration; all others are refused at once.
func TestSubnets(t *testing.T) {
	w := subnetWorld(t)
	for family, a := range worldAddrs {
		to := behind[family]
		listenTCP(t, w.tn, to)
		for _, c := range []struct {
			name    string
			cfg     Config
			consent []string
			want    netip.Addr // what the far end hears of pod A
		}{
			{"nobody has consent", withSubnets(func(*Config) {}), nil, netip.Addr{}},
			{"nobody names it", typical(), nil, netip.Addr{}},
			{"another pod has consent", withSubnets(func(*Config) {}), []string{"hcb"}, netip.Addr{}},
			{"consent", withSubnets(func(*Config) {}), []string{"hca"}, a.nodeTailnet},
			{"consent, and no exit", withSubnets(func(c *Config) { c.Subnets.Exit = true }), nil, netip.Addr{}},
			{"consent, no tailnet devices", withSubnets(func(c *Config) { c.TailnetEgress = config.EgressDeny }), []string{"hca"}, a.nodeTailnet},
			{"consent, the same without masquerade", withSubnets(func(c *Config) { c.TailnetEgress, c.Masquerade = config.EgressDeny, false }), []string{"hca"}, a.nodeTailnet},
			{"consent, own source", withSubnets(func(c *Config) { c.TailnetEgress = config.EgressPreserve }), []string{"hca"}, a.podA},
			{"open", withSubnets(func(c *Config) { c.Subnets.Open = true }), nil, a.nodeTailnet},
			{"an exit node, and the node is in that subnet itself", withSubnets(func(c *Config) {
				c.Subnets = Subnets{Exit: true, All: []netip.Prefix{subnet4, subnet6}}
			}), nil, netip.Addr{}},
			{"an exit node, and nobody knows it as a subnet", withSubnets(func(c *Config) { c.Subnets = Subnets{Exit: true} }), nil, a.nodeTailnet},
		} {
			t.Run(family+"/"+c.name, func(t *testing.T) {
				w.t = t
				w.sync(c.cfg)
				w.consent(c.consent...)
				if !c.want.IsValid() {
					w.mustSay(DropTailnetSubnet, a.podA, to, true)
					before := w.drops()[DropTailnetSubnet]
					w.mustRefuse(w.podA, to)
					if got := w.heard(packet{from: w.podA, src: a.podA, to: w.tn, dst: to}); got.IsValid() {
						t.Errorf("%s was heard", got)
					}
					if w.drops()[DropTailnetSubnet] == before {
						t.Error("nothing was counted")
					}
				} else {
					w.mustSay("", a.podA, to, true)
					if got := w.waitFor(packet{from: w.podA, src: a.podA, to: w.tn, dst: to}); got != c.want {
						t.Errorf("the far end hears %s, want %s", got, c.want)
					}
				}
				device := ""
				if c.cfg.TailnetEgress == config.EgressDeny {
					device = DropTailnetEgress
				}
				w.mustSay(device, a.podA, a.device, true)
				for _, free := range []netip.Addr{a.lan, a.podB, a.remote, a.node} {
					w.mustSay("", a.podA, free, true)
				}
				for _, free := range []netip.Addr{to, a.device, a.podB, a.remote, a.node} {
					w.mustSay("", a.podA, free, false)
				}
				if got := w.waitFor(packet{from: w.tn, src: to, to: w.podA, dst: a.podA}); got != to {
					t.Errorf("what a host there begins: the pod hears %s", got)
				}
				lan := a.node
				if !c.cfg.Masquerade {
					lan = a.podA
				}
				if got := w.waitFor(packet{from: w.podA, src: a.podA, to: w.lan, dst: a.lan}); got != lan {
					t.Errorf("the LAN hears %s, want %s", got, lan)
				}
			})
		}
	}
}

// A pod with consent gives it to nobody: not to one that forges its address, and not to one that gets it.
func TestSubnetConsentIsOfTheLink(t *testing.T) {
	w := subnetWorld(t)
	w.sync(withSubnets(func(*Config) {}))
	w.consent("hca")
	for family, a := range worldAddrs {
		w.own(w.podB, "eth0", a.podA)
		if got := w.heard(packet{from: w.podB, src: a.podA, to: w.tn, dst: behind[family]}); got.IsValid() {
			t.Errorf("%s: a forger is heard as %s", family, got)
		}
		w.disown(w.podB, "eth0", a.podA)
	}
	w.node.Run(t, "ip", "link", "del", "hca")
	next := nstest.New(t)
	v4, v6 := worldAddrs["IPv4"], worldAddrs["IPv6"]
	w.pod(next, "hca", v4.podA, v6.podA)
	for family, a := range worldAddrs {
		if got := w.heard(packet{from: next, src: a.podA, to: w.tn, dst: behind[family]}); got.IsValid() {
			t.Errorf("%s: who comes next is heard as %s", family, got)
		}
	}
}

// While the tunnel is away nothing takes the default route, but to the host's own networks inside.
func TestSubnetsNotInClear(t *testing.T) {
	w := subnetWorld(t)
	for _, open := range []bool{false, true} {
		for family, a := range worldAddrs {
			to := behind[family]
			bits := subnet4
			if to.Is6() {
				bits = subnet6
			}
			w.node.Run(t, "ip", "route", "del", bits.String(), "dev", "headcni01")
			w.sync(withSubnets(func(c *Config) { c.Subnets.Open = open }))
			w.consent("hca")
			e := look(t, w.lan, "eth0")
			w.mustRefuse(w.podA, to)
			w.mustRefuse(w.podB, to)
			var shapes [][]byte
			for _, p := range nstest.Shapes(a.podA, to, testPort) {
				shapes = append(shapes, p)
			}
			raw(t, w.podA, shapes...)
			for _, s := range e.until(t, "the end", func() { raw(t, w.podA, saying(a.podA, a.lan, "the end")) }) {
				if s.dst == to {
					t.Errorf("%s, open %v: %s in clear", family, open, s)
				}
			}
			if w.drops()[DropSubnetClear] == 0 {
				t.Error("nothing was counted")
			}
			w.own(w.lan, "eth0", to)
			w.sync(withSubnets(func(c *Config) { c.Subnets.Open = open; c.Subnets.Beside = []netip.Prefix{subnet4, subnet6} }))
			if got := w.waitFor(packet{from: w.podB, src: a.podB, to: w.lan, dst: to}); got != a.node {
				t.Errorf("%s: a network of the host's own hears %s, want %s", family, got, a.node)
			}
			w.disown(w.lan, "eth0", to)
			w.node.Run(t, "ip", "route", "add", bits.String(), "dev", "headcni01")
		}
	}
}

// Consent ends, and with it what flows: both ends are told, whoever sends next. What has no connection does not pass either way.
func TestSubnetFlowsEnd(t *testing.T) {
	w := subnetWorld(t)
	w.sync(withSubnets(func(*Config) {}))
	for family, a := range worldAddrs {
		to := behind[family]
		accepted := listenTCP(t, w.tn, to)
		for _, farSends := range []bool{false, true} {
			w.consent("hca", "hcb")
			pod, err := dial(t, w.podA, to)
			if err != nil {
				t.Fatalf("%s: with consent: %v", family, err)
			}
			far := <-accepted
			other, err := dial(t, w.podB, to)
			if err != nil {
				t.Fatal(err)
			}
			farOther := <-accepted
			talk(t, pod, far)
			w.consent("hcb")
			first, second := pod, far
			if farSends {
				first, second = far, pod
			}
			mustEnd(t, fmt.Sprintf("%s, far %v: the end that sends", family, farSends), first, true)
			if !farSends {
				mustEnd(t, family+": the other end", second, true)
			}
			talk(t, other, farOther)
		}
		w.consent("hca")
		e := look(t, w.tn, "tun")
		var shapes [][]byte
		for name, p := range nstest.Shapes(a.podA, to, testPort) {
			if strings.Contains(name, "wrong") || strings.Contains(name, "reply") || name == "SYN+FIN" || name == "no flags" {
				shapes = append(shapes, p)
			}
		}
		if len(shapes) == 0 {
			t.Fatal("no shape without a connection")
		}
		raw(t, w.podA, shapes...)
		for _, s := range e.until(t, "the end", func() { raw(t, w.podA, saying(a.podA, a.device, "the end")) }) {
			if s.dst == to {
				t.Errorf("%s: %s has no connection, and passes", family, s)
			}
		}
	}
}

func saying(from, to netip.Addr, text string) []byte {
	return nstest.Packet(from, to, unix.IPPROTO_UDP, nstest.UDP(from, to, testPort, testPort, text))
}

func talk(t *testing.T, a, b net.Conn) {
	t.Helper()
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		got := make([]byte, 5)
		if err := way[1].SetReadDeadline(time.Now().Add(soon)); err != nil {
			t.Fatal(err)
		}
		if _, err := way[0].Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(way[1], got); err != nil || !bytes.Equal(got, []byte("hello")) {
			t.Fatalf("%q, %v", got, err)
		}
	}
}

// mustEnd: the connection is reset soon, at the latest by what it sends.
func mustEnd(t *testing.T, who string, c net.Conn, sends bool) {
	t.Helper()
	for end := time.Now().Add(soon); time.Now().Before(end); {
		if sends {
			if _, err := c.Write([]byte("x")); err != nil {
				return
			}
		}
		if err := c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 16)); errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF) {
			return
		}
	}
	t.Errorf("%s: the connection goes on", who)
}

// Consent changes what differs, outlives the process, and is put back with the table by who knows it.
func TestConsent(t *testing.T) {
	w := newWorld(t)
	cfg := withSubnets(func(*Config) {})
	w.sync(cfg)
	a, b := w.index("hca"), w.index("hcb")
	say := func(tables *Tables, want map[netip.Prefix][]int) (changed int) {
		t.Helper()
		w.node.Do(t, func() (err error) { changed, err = tables.Consent(want); return err })
		return changed
	}
	holds := func(want string) {
		t.Helper()
		var got []string
		for _, f := range []string{"ip", "ip6"} {
			for _, line := range strings.Split(w.node.Run(t, "nft", "list", "table", f, "headcni"), "\n") {
				line = strings.TrimSpace(line)
				if name, ok := strings.CutPrefix(line, "set to_"); ok {
					got = append(got, strings.TrimSuffix(name, " {"))
				} else if strings.HasPrefix(line, `elements = { "hc`) {
					got = append(got, strings.TrimPrefix(line, "elements = "))
				}
			}
		}
		if text := strings.Join(got, " "); text != want {
			t.Errorf("the kernel holds %s, want %s", text, want)
		}
	}
	if n := say(w.tables, map[netip.Prefix][]int{subnet4: {a, b}, subnet6: {a}}); n != 3 {
		t.Errorf("%d changes, want 3", n)
	}
	both := `192.168.50.0/24 { "hca", "hcb" } fd00_50__/64 { "hca" }`
	holds(both)
	gen := func() (g uint32) {
		w.node.Do(t, func() (err error) { g, err = nfnl.Generation(); return })
		return g
	}
	before := gen()
	if n := say(w.tables, map[netip.Prefix][]int{subnet4: {b, a}, subnet6: {a}}); n != 0 || gen() != before {
		t.Errorf("the same again: %d changes, generation %d after %d", n, gen(), before)
	}
	if done := mustSync(t, w.node, w.tables, cfg); len(done) > 0 || gen() != before {
		t.Errorf("a sync after it: %q", done)
	}
	next := New()
	if done := mustSync(t, w.node, next, cfg); len(done) > 0 {
		t.Errorf("the next process changes %q", done)
	}
	holds(both)
	more := cfg
	more.Subnets.Named = append(slices.Clone(cfg.Subnets.Named), netip.MustParsePrefix("192.168.50.128/25"))
	mustSync(t, w.node, next, more)
	holds(`192.168.50.0/24 { "hca", "hcb" } 192.168.50.128/25 fd00_50__/64 { "hca" }`)
	if n := say(next, map[netip.Prefix][]int{subnet4: {b}, more.Subnets.Named[2]: {a}, subnet6: {a}}); n != 2 {
		t.Errorf("%d changes, want 2", n)
	}
	mustSync(t, w.node, next, cfg)
	holds(`192.168.50.0/24 { "hcb" } fd00_50__/64 { "hca" }`)
	for name, harm := range map[string]string{"an object of somebody's": "add set ip headcni odd { type mark; }", "a table flushed": "delete table ip headcni"} {
		w.node.Run(t, "nft", harm)
		mustSync(t, w.node, next, cfg)
		t.Log(name)
		holds(`192.168.50.0/24 { "hcb" } fd00_50__/64 { "hca" }`)
	}
	if n := say(next, nil); n != 0 {
		t.Errorf("nobody says anything: %d changes", n)
	}
	if n := say(next, map[netip.Prefix][]int{}); n != 2 {
		t.Errorf("nobody may: %d changes", n)
	}
	w.node.Do(t, func() error { return next.Remove(t.Context()) })
	if n := say(next, map[netip.Prefix][]int{subnet4: {a}}); n != 0 {
		t.Errorf("without a table: %d changes", n)
	}
}
