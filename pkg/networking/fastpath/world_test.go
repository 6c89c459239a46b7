package fastpath

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/enforce"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// requireEnv is set where the kernel has flowtables: there a test that goes without proves nothing.
const requireEnv = "HEADCNI_TEST_FLOWTABLE"

// pod is one of the world's, with an address of each family.
type pod struct {
	ns    *nstest.NS
	name  string // of the host's end
	addrs []netip.Addr
}

// world is a node with pods, our own tables, those of policies, and the fast path.
type world struct {
	testing.TB
	node    *nstest.NS
	a, b, c *pod
	links   podlink.Handle
	tables  *nft.Tables
	table   *enforce.Table
	path    *Path
	log     strings.Builder
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{TB: t, node: nstest.New(t), tables: nft.New()}
	t.Cleanup(w.links.Close)
	w.node.Run(t, "sh", "-ec", `echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
		echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad; ip link set lo up`)
	w.a, w.b, w.c = w.newPod("a", 10), w.newPod("b", 11), w.newPod("c", 12)
	w.path = New(slog.New(slog.NewTextHandler(&w.log, nil)), &w.links, true)
	w.table = w.newTable()
	own := []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:244:1::/64")}
	w.node.Do(t, func() error {
		_, err := w.tables.Sync(t.Context(), nft.Config{Own: own, Cluster: own, Masquerade: true})
		return err
	})
	// A flow that is forgotten because the machine is slow may begin again from the other end.
	w.node.Run(t, "sh", "-ec", "for f in udp_timeout udp_timeout_stream; do echo 3600 >/proc/sys/net/netfilter/nf_conntrack_$f; done")
	return w
}

// newTable is what another process begins with.
func (w *world) newTable() *enforce.Table {
	t := enforce.New(filepath.Join(w.TempDir(), "rules.json"))
	t.Hold = w.path.Hold
	return t
}

func (w *world) newPod(id string, host int) *pod {
	w.Helper()
	p := &pod{ns: nstest.New(w), name: podlink.Name(id, "eth0"), addrs: []netip.Addr{
		netip.MustParseAddr(fmt.Sprint("10.244.1.", host)), netip.MustParseAddr(fmt.Sprintf("fd00:244:1::%d", host)),
	}}
	w.attach(p, id, "")
	return p
}

// attach makes a pod's link as ADD does, in the group of pods whose policies are known. options are for the host's end.
func (w *world) attach(p *pod, id, options string) {
	w.Helper()
	w.node.Run(w, "sh", "-ec", fmt.Sprintf(`ip link add %[1]s %[6]s group %[2]d type veth peer name eth0 netns /run/netns/%[3]s
		ip link set %[1]s alias 'net %[7]s/eth0 shop/%[7]s' up; ip addr add fe80::1/64 dev %[1]s nodad
		ip route add %[4]s dev %[1]s; ip route add %[5]s dev %[1]s`, p.name, names.PolicyLinkGroup, p.ns.Name, p.addrs[0], p.addrs[1], options, id))
	l, err := w.node.Handle.LinkByName(p.name)
	if err != nil {
		w.Fatal(err)
	}
	p.ns.Run(w, "sh", "-ec", fmt.Sprintf(`echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
		ip link set lo up; ip link set eth0 up; ip addr add %[1]s/32 dev eth0; ip addr add %[2]s/128 dev eth0 nodad
		ip neigh add 169.254.1.1 lladdr %[3]s nud permanent dev eth0; ip neigh add fe80::1 lladdr %[3]s nud permanent dev eth0
		ip route add 169.254.1.1 dev eth0; ip route add default via 169.254.1.1; ip route add default via fe80::1 dev eth0`,
		p.addrs[0], p.addrs[1], l.Attrs().HardwareAddr))
	own, err := p.ns.Handle.LinkByName("eth0")
	if err != nil {
		w.Fatal(err)
	}
	for _, a := range p.addrs {
		w.node.Run(w, "ip", "neigh", "replace", a.String(), "lladdr", own.Attrs().HardwareAddr.String(), "nud", "permanent", "dev", p.name)
	}
}

// has reports whether the kernel has flowtables, by nft alone.
func has(t testing.TB) bool {
	ns := nstest.New(t)
	err := ns.Command("nft", "-c", "add table inet x; add flowtable inet x f { hook ingress priority 0; devices = { lo } ; }").Run()
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	if err != nil && os.Getenv(requireEnv) != "" {
		t.Fatalf("%s is set, and the kernel has no flowtables", requireEnv)
	}
	return err == nil
}

// pass has the path look once.
func (w *world) pass() {
	w.Helper()
	w.node.Do(w, func() error { w.path.pass(w.Context()); return nil })
}

// up has the fast path stand. It reports whether the kernel can; where it cannot, everything is said and done without.
func (w *world) up() bool {
	w.Helper()
	able := has(w)
	w.pass()
	for range 5 { // nft is given up after some time, which the kernel may need where it loads modules on a slow machine
		if s := w.path.State(); s.Why == "" || s.Why == missing {
			break
		}
		w.log.Reset()
		w.pass()
	}
	_, there := w.devices()
	if there != able {
		w.Fatalf("the table is there: %v, the kernel has flowtables: %v; %+v\n%s", there, able, w.path.State(), w.log.String())
	}
	if !able && (w.path.State().Why != missing || w.log.Len() > 0) {
		w.Errorf("without flowtables: %+v\n%s", w.path.State(), w.log.String())
	}
	if able && *w.path.State() != (State{Links: 3}) {
		w.Errorf("with flowtables: %+v\n%s", w.path.State(), w.log.String())
	}
	return able
}

func (w *world) devices() (list []string, there bool) {
	w.Helper()
	w.node.Do(w, func() (err error) {
		list, there, err = devices()
		return err
	})
	return list, there
}

func (w *world) apply(want *policy.Ruleset) (c enforce.Change) {
	w.Helper()
	w.node.Do(w, func() (err error) {
		c, err = w.table.Apply(w.Context(), want, policy.Options{Strict: true})
		return err
	})
	return c
}

// recheck has who lost rights by Apply, and has no flow that is forbidden, take the short way again.
func (w *world) recheck(want *policy.Ruleset) {
	w.Helper()
	w.node.Do(w, func() error {
		_, err := w.table.Recheck(w.Context(), func(f policy.Flow) (egress, ingress bool) {
			egress, _ = want.Judge(want, policy.Egress, f)
			ingress, _ = want.Judge(want, policy.Ingress, f)
			return egress, ingress
		})
		return err
	})
}

// toB are policies by which b hears from some by a port of UDP and TCP, and from nobody else.
func (w *world) toB(peers ...*pod) *policy.Ruleset {
	out := &policy.Ruleset{
		Sets: map[string]*policy.Set{}, Maps: map[string]*policy.PortMap{}, Chains: map[string]*policy.Chain{},
		In: map[netip.Addr]string{}, Out: map[netip.Addr]string{},
	}
	for i, name := range []string{"s4-peers", "s6-peers"} {
		s := &policy.Set{Name: name, IPv6: i == 1}
		for _, p := range peers {
			s.Members = append(s.Members, policy.Member{Addr: p.addrs[i]})
		}
		out.Sets[name] = s
	}
	group := &policy.Chain{Name: "gin-peers", Dir: policy.Ingress, Rules: []policy.Rule{
		{Kind: policy.PeerIn, Ref: "s4-peers"}, {Kind: policy.PeerIn, Ref: "s6-peers", IPv6: true},
	}}
	m := &policy.PortMap{Name: "pin-ports"}
	for _, proto := range []policy.Protocol{policy.TCP, policy.UDP} {
		m.Elements = append(m.Elements, policy.PortElement{Protocol: proto, First: port, Last: port, Jump: group.Name})
	}
	class := &policy.Chain{Name: "cin-ports", Dir: policy.Ingress, Class: true, Rules: []policy.Rule{{Kind: policy.PortsOf, Ref: m.Name}}}
	out.Maps[m.Name], out.Chains[group.Name], out.Chains[class.Name] = m, group, class
	for _, a := range w.b.addrs {
		out.In[a] = class.Name
	}
	return out
}

// Ports of the flows: who begins them, and who answers.
const own, port = 9999, 7777

// flow has both ends of one.
type flow struct {
	*world
	from, to     *pod
	family       int
	client, serv net.Conn
	// network is udp or tcp.
	network string
}

// begin begins one from a pod to another.
func (w *world) begin(network string, family int, from, to *pod) *flow {
	w.Helper()
	return w.beginBy(netip.AddrPortFrom(to.addrs[family], port), network, family, from, to)
}

// beginBy begins one by an address for which the pod answers.
func (w *world) beginBy(by netip.AddrPort, network string, family int, from, to *pod) *flow {
	w.Helper()
	f := &flow{world: w, network: network, family: family, from: from, to: to}
	client, server := netip.AddrPortFrom(from.addrs[family], own), netip.AddrPortFrom(to.addrs[family], port)
	if network == "udp" {
		f.client, f.serv = w.connect(from.ns, client, by), w.connect(to.ns, server, client)
	} else {
		var l net.Listener
		to.ns.Do(w, func() (err error) {
			l, err = (&net.ListenConfig{Control: reuse, KeepAlive: -1}).Listen(w.Context(), "tcp", server.String())
			return err
		})
		defer l.Close()
		from.ns.Do(w, func() (err error) {
			d := net.Dialer{Control: reuse, LocalAddr: net.TCPAddrFromAddrPort(client), Timeout: 20 * time.Second, KeepAlive: -1}
			f.client, err = d.DialContext(w.Context(), "tcp", by.String())
			return err
		})
		var err error
		if f.serv, err = l.Accept(); err != nil {
			w.Fatal(err)
		}
	}
	w.Cleanup(func() { _, _ = f.client.Close(), f.serv.Close() }) // a test may have closed them
	return f
}

func (w *world) connect(ns *nstest.NS, own, other netip.AddrPort) (c net.Conn) {
	w.Helper()
	ns.Do(w, func() (err error) {
		d := net.Dialer{Control: reuse, LocalAddr: net.UDPAddrFromAddrPort(own)}
		c, err = d.Dial("udp", other.String())
		return err
	})
	return c
}

func reuse(_, _ string, raw syscall.RawConn) (err error) {
	err2 := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return errors.Join(err, err2)
}

// word is large enough for what a bucket of tc has room for.
var word = make([]byte, 500)

// says sends some words by one end, and counts those that the other hears. What must arrive has time.
func says(from, to net.Conn, n int, patience time.Duration) (heard int) {
	for range n {
		if _, err := from.Write(word); err != nil {
			continue // a reset, or of a packet before that was refused
		}
		_ = to.SetReadDeadline(time.Now().Add(patience)) // it is open, or reading fails
		b := make([]byte, len(word))
		got := 0
		for got < len(word) {
			n, err := to.Read(b)
			if err != nil {
				break
			}
			got += n
		}
		if got >= len(word) {
			heard++
		}
	}
	return heard
}

const (
	// long is for what must arrive, short for what must not.
	long, short = 10 * time.Second, 40 * time.Millisecond
	// some is how many packets a test sends to see whether they arrive.
	some = 10
)

// alive fails the test unless words arrive, or none do, both ways.
func (f *flow) alive(when string, want bool) {
	f.Helper()
	patience, n := short, 0
	if want {
		patience, n = long, some
	}
	there, back := says(f.client, f.serv, some, patience), says(f.serv, f.client, some, patience)
	if there != n || back != n {
		f.Errorf("%s: %s: there %d, back %d of %d: want %d", f, when, there, back, some, n)
	}
}

// count has the node count what of the flow meets the rules, by a table of the test's own. It returns how much that was since.
func (f *flow) count() (since func() int) {
	f.Helper()
	ip := []string{"ip", "ip6"}[f.family]
	f.node.Run(f, "nft", fmt.Sprintf(`add table inet seen; delete table inet seen; add table inet seen; add counter inet seen n
		add chain inet seen f { type filter hook forward priority -500; }
		add rule inet seen f %[1]s saddr { %[2]s, %[3]s } %[1]s daddr { %[2]s, %[3]s } counter name n`, ip, f.from.addrs[f.family], f.to.addrs[f.family]))
	return func() (n int) {
		f.Helper()
		out := f.node.Run(f, "nft", "list", "counter", "inet", "seen", "n")
		if _, err := fmt.Sscanf(out[strings.Index(out, "packets"):], "packets %d", &n); err != nil {
			f.Fatalf("%v: %s", err, out)
		}
		return n
	}
}

// fast talks until the flow goes past the rules, and fails the test where it does not.
func (f *flow) fast() {
	f.Helper()
	if !f.become(400) {
		f.Fatalf("%s meets the rules after 8000 packets", f)
	}
	f.Logf("%s goes past the rules", f) // a slow guest that says nothing for long is given up
}

// become reports whether in some rounds of 20 packets the flow comes to go past the rules.
func (f *flow) become(rounds int) bool {
	f.Helper()
	since := f.count()
	for range rounds {
		before := since()
		for range some {
			if says(f.client, f.serv, 1, long)+says(f.serv, f.client, 1, long) != 2 {
				f.Fatalf("%s is broken", f)
			}
		}
		if since() == before {
			return true
		}
	}
	return false
}

// beginAll begins one flow of each kind.
func (w *world) beginAll(from, to *pod) (all []*flow) {
	w.Helper()
	for _, network := range []string{"udp", "tcp"} {
		for family := range 2 {
			all = append(all, w.begin(network, family, from, to))
		}
	}
	return all
}

func (f *flow) String() string { return f.network + []string{"4", "6"}[f.family] }

// drops are what our tables dropped for a reason.
func (w *world) drops(reason string) (n uint64) {
	w.Helper()
	w.node.Do(w, func() error {
		all, err := w.tables.Drops()
		n = all[reason]
		return err
	})
	return n
}

func (w *world) denied() (n uint64) {
	w.Helper()
	w.node.Do(w, func() error {
		d, err := w.table.Denied(context.Background())
		for _, a := range w.b.addrs {
			n += d.In[a]
		}
		return err
	})
	return n
}
