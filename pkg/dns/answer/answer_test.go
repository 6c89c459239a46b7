package answer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/internal/nstest"
)

func addrs(texts ...string) (out []netip.Addr) {
	for _, s := range texts {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

var known = Names{Domain: "HC.internal.", Hosts: map[string][]netip.Addr{
	"node-one.hc.internal": addrs("100.64.0.1", "fd7a:115c:a1e0::1"), "four.hc.internal": addrs("100.64.0.4"), "laptop.me.hc.internal": addrs("100.127.255.9"),
	"web.hc.internal": addrs("10.96.3.4"), "x.shop.svc.clusterset.local": addrs("10.97.0.1"),
}}

func question(t testing.TB, name string, kind dnsmessage.Type, class dnsmessage.Class, edns bool) []byte {
	t.Helper()
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: 77, RecursionDesired: true})
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(b.StartQuestions())
	must(b.Question(dnsmessage.Question{Name: dnsmessage.MustNewName(name), Type: kind, Class: class}))
	if edns {
		must(b.StartAdditionals())
		var h dnsmessage.ResourceHeader
		must(h.SetEDNS0(4096, dnsmessage.RCodeSuccess, false))
		must(b.OPTResource(h, dnsmessage.OPTResource{}))
	}
	out, err := b.Finish()
	must(err)
	return out
}

// said is an answer in words: its code, aa or -, the answers, and the zone of a "no" behind a slash.
func said(t testing.TB, b []byte) string {
	t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil {
		t.Fatalf("%v: %x", err, b)
	}
	if m.ID != 77 || !m.Response || !m.RecursionDesired || m.RecursionAvailable {
		t.Errorf("header: %+v", m.Header)
	}
	words := []string{strings.TrimPrefix(m.RCode.String(), "RCode"), "-"}
	if m.Authoritative {
		words[1] = "aa"
	}
	for _, r := range m.Answers {
		switch b := r.Body.(type) {
		case *dnsmessage.AResource:
			words = append(words, netip.AddrFrom4(b.A).String())
		case *dnsmessage.AAAAResource:
			words = append(words, netip.AddrFrom16(b.AAAA).String())
		case *dnsmessage.PTRResource:
			words = append(words, b.PTR.String())
		case *dnsmessage.SOAResource:
			words = append(words, "SOA")
		}
		if r.Header.TTL != TTL || r.Header.Name.String() != m.Questions[0].Name.String() && r.Header.Type != dnsmessage.TypeSOA {
			t.Errorf("record: %+v", r.Header)
		}
	}
	for _, r := range m.Authorities {
		if soa, ok := r.Body.(*dnsmessage.SOAResource); !ok || soa.MinTTL != TTL || r.Header.TTL != TTL {
			t.Errorf("authority: %+v", r)
		}
		words = append(words, "/"+r.Header.Name.String())
	}
	return strings.Join(words, " ")
}

func TestRespond(t *testing.T) {
	x := newIndex(known)
	const v6 = "0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa."
	for _, c := range []struct {
		name string
		kind dnsmessage.Type
		want string
	}{
		{"node-one.hc.internal.", dnsmessage.TypeA, "Success aa 100.64.0.1"},
		{"NODE-one.Hc.Internal.", dnsmessage.TypeAAAA, "Success aa fd7a:115c:a1e0::1"},
		{"node-one.hc.internal.", dnsmessage.TypeALL, "Success aa 100.64.0.1 fd7a:115c:a1e0::1"},
		{"node-one.hc.internal.", dnsmessage.TypeMX, "Success aa /hc.internal."},
		{"four.hc.internal.", dnsmessage.TypeAAAA, "Success aa /hc.internal."},
		{"gone.hc.internal.", dnsmessage.TypeA, "NameError aa /hc.internal."},
		{"x.node-one.hc.internal.", dnsmessage.TypeA, "NameError aa /hc.internal."},
		{"me.hc.internal.", dnsmessage.TypeA, "Success aa /hc.internal."},
		{"laptop.me.hc.internal.", dnsmessage.TypeA, "Success aa 100.127.255.9"},
		{"hc.internal.", dnsmessage.TypeSOA, "Success aa SOA"},
		{"hc.internal.", dnsmessage.TypeNS, "Success aa /hc.internal."},
		{"web.hc.internal.", dnsmessage.TypeA, "Success aa 10.96.3.4"},
		{"x.shop.svc.clusterset.local.", dnsmessage.TypeA, "Success aa 10.97.0.1"},
		{"x.shop.svc.clusterset.local.", dnsmessage.TypeAAAA, "Success aa /x.shop.svc.clusterset.local."},
		{"y.shop.svc.clusterset.local.", dnsmessage.TypeA, "Refused -"},
		{"evilhc.internal.", dnsmessage.TypeA, "Refused -"},
		{"example.com.", dnsmessage.TypeA, "Refused -"},
		{".", dnsmessage.TypeNS, "Refused -"},
		{"1.0.64.100.in-addr.arpa.", dnsmessage.TypePTR, "Success aa node-one.hc.internal."},
		{"9.255.127.100.in-addr.arpa.", dnsmessage.TypePTR, "Success aa laptop.me.hc.internal."},
		{"8.0.64.100.in-addr.arpa.", dnsmessage.TypePTR, "NameError aa /64.100.in-addr.arpa."},
		{"64.100.in-addr.arpa.", dnsmessage.TypeSOA, "Success aa SOA"},
		{"0.64.100.in-addr.arpa.", dnsmessage.TypePTR, "Success aa /64.100.in-addr.arpa."},
		{"100.in-addr.arpa.", dnsmessage.TypePTR, "Refused -"},
		{"1.0.128.100.in-addr.arpa.", dnsmessage.TypePTR, "Refused -"},
		{"4.3.96.10.in-addr.arpa.", dnsmessage.TypePTR, "Refused -"},
		{"x.0.64.100.in-addr.arpa.", dnsmessage.TypePTR, "Refused -"},
		{"1." + v6[2:], dnsmessage.TypePTR, "Success aa /0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa."}, // one nibble is missing
		{"1.0." + v6[2:], dnsmessage.TypePTR, "Success aa node-one.hc.internal."},
		{"2.0." + v6[2:], dnsmessage.TypePTR, "NameError aa /0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa."},
		{"x.0." + v6[2:], dnsmessage.TypePTR, "NameError aa /0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa."},
		{"x.1.0." + v6[2:], dnsmessage.TypePTR, "NameError aa /0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa."},
		{"1.0.0.2.ip6.arpa.", dnsmessage.TypePTR, "Refused -"},
	} {
		for _, edns := range []bool{false, true} {
			if got := said(t, x.respond(question(t, c.name, c.kind, dnsmessage.ClassINET, edns), 0)); got != c.want {
				t.Errorf("%s %v: %s, want %s", c.name, c.kind, got, c.want)
			}
		}
	}
	if got := said(t, x.respond(question(t, "node-one.hc.internal.", dnsmessage.TypeA, dnsmessage.ClassCHAOS, false), 0)); got != "Refused -" {
		t.Errorf("class CHAOS: %s", got)
	}
}

// What is not known yet, or may be there all the same, nobody is told not to be.
func TestRespondNotKnowing(t *testing.T) {
	some := known
	some.Incomplete = true
	for name, c := range map[string]struct {
		x                *index
		question, answer string
	}{
		"nothing so far":           {nil, "node-one.hc.internal.", "ServerFailure -"},
		"no tailnet":               {newIndex(Names{}), "node-one.hc.internal.", "ServerFailure -"},
		"others may be there":      {newIndex(some), "gone.hc.internal.", "ServerFailure -"},
		"others, and this one is ": {newIndex(some), "node-one.hc.internal.", "Success aa 100.64.0.1"},
	} {
		if got := said(t, c.x.respond(question(t, c.question, dnsmessage.TypeA, dnsmessage.ClassINET, false), 0)); got != c.answer {
			t.Errorf("%s: %s, want %s", name, got, c.answer)
		}
	}
}

func TestRespondToOddMessages(t *testing.T) {
	x := newIndex(known)
	plain := question(t, "node-one.hc.internal.", dnsmessage.TypeA, dnsmessage.ClassINET, false)
	with := func(change func(b []byte)) []byte {
		b := slices.Clone(plain)
		change(b)
		return b
	}
	for name, b := range map[string][]byte{
		"empty": {}, "half a header": plain[:7], "an answer": with(func(b []byte) { b[2] |= 0x80 }),
	} {
		if out := x.respond(b, 0); out != nil {
			t.Errorf("%s: %x", name, out)
		}
	}
	for name, c := range map[string]struct {
		b    []byte
		want dnsmessage.RCode
	}{
		"half a question": {plain[:20], dnsmessage.RCodeFormatError},
		"no question":     {with(func(b []byte) { b[5] = 0 })[:12], dnsmessage.RCodeFormatError},
		"two questions":   {append(with(func(b []byte) { b[5] = 2 }), plain[12:]...), dnsmessage.RCodeFormatError},
		"a notification":  {with(func(b []byte) { b[2] |= 4 << 3 }), dnsmessage.RCodeNotImplemented},
	} {
		var p dnsmessage.Parser
		h, err := p.Start(x.respond(c.b, 0))
		if err != nil || h.RCode != c.want || h.ID != 77 {
			t.Errorf("%s: %+v, %v", name, h, err)
		}
	}
	// More than fits says so, and over TCP there is all of it.
	many := Names{Domain: "hc.internal", Hosts: map[string][]netip.Addr{}}
	for i := range 60 {
		many.Hosts["many.hc.internal"] = append(many.Hosts["many.hc.internal"], netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}))
	}
	q := question(t, "many.hc.internal.", dnsmessage.TypeA, dnsmessage.ClassINET, false)
	var m dnsmessage.Message
	if err := m.Unpack(newIndex(many).respond(q, 0)); err != nil || !m.Truncated || len(m.Answers) > 0 {
		t.Errorf("%+v, %v", m.Header, err)
	}
	if err := m.Unpack(newIndex(many).respond(q, 1<<16-1)); err != nil || m.Truncated || len(m.Answers) != 60 {
		t.Errorf("%+v, %v", m.Header, err)
	}
}

// FuzzRespond: whatever comes, an answer is one, to that question, and no longer than it may be.
func FuzzRespond(f *testing.F) {
	f.Add(question(f, "node-one.hc.internal.", dnsmessage.TypeALL, dnsmessage.ClassINET, true))
	f.Add(question(f, "1.0.64.100.in-addr.arpa.", dnsmessage.TypePTR, dnsmessage.ClassANY, false))
	x := newIndex(known)
	f.Fuzz(func(t *testing.T, b []byte) {
		out := x.respond(b, 0)
		if out == nil {
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(out); err != nil || !m.Response || len(out) > largest || m.ID != binary.BigEndian.Uint16(b) {
			t.Errorf("%d bytes, %+v, %v", len(out), m.Header, err)
		}
	})
}

// ownPod may ask.
var ownPod = netip.MustParseAddr("192.0.2.2")

// world is a server in a namespace of its own, and what it is told there is.
type world struct {
	ns    *nstest.NS
	names atomic.Pointer[Names]
	asked atomic.Int64
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{ns: nstest.New(t)}
	w.ns.Run(t, "ip", "link", "set", "lo", "up")
	w.names.Store(&known)
	s := &Server{May: func(a netip.Addr) bool { return a == ownPod }, Source: func(context.Context) (Names, error) {
		w.asked.Add(1)
		if n := w.names.Load(); n != nil {
			return *n, nil
		}
		return Names{}, errors.New("tailscaled is dead")
	}}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		w.ns.Do(t, func() error {
			ended <- s.Run(ctx, []netip.Addr{netset.AnswererIPv4, netset.AnswererIPv6}) // before the addresses are there
			return nil
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	w.ns.Do(t, func() error {
		done, err := EnsureAddrs([]netip.Addr{netset.AnswererIPv4, netset.AnswererIPv6})
		if again, err := EnsureAddrs([]netip.Addr{netset.AnswererIPv4, netset.AnswererIPv6}); err != nil || len(done) != 2 || len(again) != 0 {
			t.Errorf("%v, then %v, %v", done, again, err)
		}
		return err
	})
	return w
}

// ask sends one question and waits for the answer.
func (w *world) ask(t *testing.T, network string, at netip.Addr, name string) (out string, err error) {
	t.Helper()
	w.ns.Do(t, func() error {
		var c net.Conn
		if c, err = net.Dial(network, netip.AddrPortFrom(at, 53).String()); err != nil {
			return nil
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(2 * time.Second)) // it is open
		q := question(t, name, dnsmessage.TypeA, dnsmessage.ClassINET, true)
		if network == "tcp" {
			q = append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...)
		}
		if _, err = c.Write(q); err != nil {
			return nil
		}
		b := make([]byte, largest)
		n := 0
		if network == "tcp" {
			if _, err = io.ReadFull(c, b[:2]); err == nil {
				n, err = io.ReadFull(c, b[:binary.BigEndian.Uint16(b)])
			}
		} else {
			n, err = c.Read(b)
		}
		if err == nil {
			out = said(t, b[:n])
		}
		return nil
	})
	return out, err
}

func (w *world) want(t *testing.T, name, want string) {
	t.Helper()
	for _, network := range []string{"udp", "tcp"} {
		for _, at := range []netip.Addr{netset.AnswererIPv4, netset.AnswererIPv6} {
			var got string
			var err error
			for end := time.Now().Add(20 * time.Second); time.Now().Before(end) && got != want; time.Sleep(20 * time.Millisecond) {
				got, err = w.ask(t, network, at, name)
			}
			if got != want {
				t.Errorf("%s at %s, %s: %q, %v; want %q", network, at, name, got, err, want)
			}
		}
	}
}

// It answers at its addresses, over both transports; what changes is known soon; what was known stays while nobody says what there is.
func TestServer(t *testing.T) {
	w := newWorld(t)
	w.want(t, "node-one.hc.internal.", "Success aa 100.64.0.1")
	w.want(t, "late.hc.internal.", "NameError aa /hc.internal.")
	w.names.Store(&Names{Domain: "hc.internal", Hosts: map[string][]netip.Addr{"late.hc.internal": addrs("100.64.0.77")}})
	w.want(t, "late.hc.internal.", "Success aa 100.64.0.77")
	w.want(t, "node-one.hc.internal.", "NameError aa /hc.internal.")
	w.names.Store(nil)
	before := w.asked.Load()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end) && w.asked.Load() < before+2; time.Sleep(20 * time.Millisecond) {
		w.want(t, "late.hc.internal.", "Success aa 100.64.0.77")
	}
	if w.asked.Load() < before+2 {
		t.Error("nobody was asked")
	}
	w.ns.Do(t, func() error { return errors.Join(RemoveAddrs(), RemoveAddrs()) })
	if out := w.ns.Run(t, "ip", "addr", "show", "lo"); strings.Contains(out, netset.AnswererIPv4.String()) || strings.Contains(out, netset.AnswererIPv6.String()) {
		t.Errorf("left:\n%s", out)
	}
}

// The node takes neither address as its own, by a link without any, also where an older version of ours has added it.
func TestNodeTakesOtherAddresses(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "sh", "-ec", `ip link set lo up; ip link add other type veth peer name far0; ip link set far0 up; ip link set other up
		ip link add bare type veth peer name far1; ip link set far1 up; ip link set bare up; ip -6 addr add fd68:6561:6463:6e69::53/128 dev lo nodad
		ip addr add 192.0.2.1/24 dev other; ip addr add fd77::1/64 dev other nodad; ip route add 10.244.0.2 dev bare; ip route add fd00:244::2 dev bare`)
	ns.Do(t, func() error {
		done, err := EnsureAddrs([]netip.Addr{netset.AnswererIPv4, netset.AnswererIPv6})
		if again, err := EnsureAddrs([]netip.Addr{netset.AnswererIPv4, netset.AnswererIPv6}); err != nil || len(done) != 2 || len(again) != 0 {
			t.Errorf("%v, then %v, %v", done, again, err)
		}
		return err
	})
	for to, want := range map[string]string{"10.244.0.2": "192.0.2.1", "fd00:244::2": "fd77::1"} {
		if got := ns.Run(t, "ip", "route", "get", to); !strings.Contains(got, "src "+want+" ") {
			t.Errorf("want from %s: %s", want, got)
		}
	}
}

// A client that opens connections and says nothing keeps nobody else out, and one that may not ask hears nothing.
func TestServerIsNotWornOut(t *testing.T) {
	w := newWorld(t)
	w.want(t, "node-one.hc.internal.", "Success aa 100.64.0.1")
	w.ns.Run(t, "sh", "-ec", "ip addr add 192.0.2.1/32 dev lo; ip addr add 192.0.2.2/32 dev lo")
	// open opens connections and says nothing, and returns how many the server closes, once that are as many as want.
	open := func(from string, n, want int) int {
		var closed atomic.Int64
		w.ns.Do(t, func() error {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, FallbackDelay: -1}
			for range n {
				c, err := d.Dial("tcp", fmt.Sprintf("%s:53", netset.AnswererIPv4))
				if err != nil {
					return err
				}
				t.Cleanup(func() { c.Close() })
				go func() {
					_, _ = c.Read(make([]byte, 1)) // it says nothing either
					closed.Add(1)
				}()
			}
			return nil
		})
		for end := time.Now().Add(20 * time.Second); int(closed.Load()) < want && time.Now().Before(end); {
			time.Sleep(5 * time.Millisecond)
		}
		return int(closed.Load())
	}
	if closed := open("192.0.2.1", 2, 2); closed != 2 {
		t.Errorf("a stranger: %d of 2 connections closed", closed)
	}
	if closed := open(ownPod.String(), maxOfOne+4, 4); closed != 4 {
		t.Errorf("of %d connections %d were closed, want 4", maxOfOne+4, closed)
	}
	if got, err := w.ask(t, "udp", netset.AnswererIPv4, "node-one.hc.internal."); got != "Success aa 100.64.0.1" {
		t.Errorf("meanwhile: %q, %v", got, err)
	}
}

func BenchmarkRespond(b *testing.B) {
	x := newIndex(known)
	q := question(b, "node-one.hc.internal.", dnsmessage.TypeA, dnsmessage.ClassINET, true)
	for b.Loop() {
		if x.respond(q, 0) == nil {
			b.Fatal("no answer")
		}
	}
}
