package policy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/policy"
)

const (
	// patience is for what must happen, and moment is how long what must not happen is waited for.
	patience = 10 * time.Second
	moment   = 300 * time.Millisecond
)

// cluster has the pods local-0 to local-3 here and remote-0 to remote-8 elsewhere, all in namespace shop, with the label app=NAME.
func cluster(t testing.TB, specs ...string) *policy.Snapshot {
	t.Helper()
	s := &policy.Snapshot{
		Node: "one", Nodes: policytest.Nodes(), Namespaces: []policy.Namespace{{Name: "shop"}},
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")},
	}
	add := func(name, node string, ips []netip.Addr) {
		s.Pods = append(s.Pods, &policy.Pod{Namespace: "shop", Name: name, Node: node, Labels: map[string]string{"app": name}, IPs: ips})
	}
	for i := range policytest.LocalPods {
		add(fmt.Sprint("local-", i), "one", policytest.Local(i))
	}
	for i := range policytest.RemotePods {
		add(fmt.Sprint("remote-", i), "two", policytest.Remote(i))
	}
	for i, spec := range specs {
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprint("policy-", i)}}
		if err := yaml.UnmarshalStrict([]byte(spec), &p.Spec); err != nil {
			t.Fatal(err)
		}
		s.Policies = append(s.Policies, p)
	}
	return s
}

const (
	forLocal0 = "podSelector: {matchLabels: {app: local-0}}\n"
	denyAll   = forLocal0 + "policyTypes: [Ingress, Egress]\n"
)

func (w *world) policies(specs ...string) {
	w.t.Helper()
	w.apply(policy.Compile(cluster(w.t, specs...)))
}

// ns is the place of an address.
func (w *world) ns(a netip.Addr) *nstest.NS { return w.places[w.at[a]] }

// echo serves TCP and UDP at an address until the test ends: it sends back what it hears.
func (w *world) echo(ns *nstest.NS, at netip.AddrPort) {
	w.t.Helper()
	var tcp net.Listener
	var udp *net.UDPConn
	ns.Do(w.t, func() (err error) {
		if tcp, err = net.Listen("tcp", at.String()); err != nil {
			return err
		}
		udp, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	})
	w.t.Cleanup(func() { _ = tcp.Close(); _ = udp.Close() })
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	go func() {
		b := make([]byte, 8192)
		for {
			n, from, err := udp.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = udp.WriteToUDPAddrPort(b[:n], from)
		}
	}()
}

// dial opens a connection from an address. UDP always succeeds.
func (w *world) dial(network string, ns *nstest.NS, src netip.Addr, dst netip.AddrPort, wait time.Duration) (c net.Conn, err error) {
	w.t.Helper()
	ns.Do(w.t, func() error {
		d := net.Dialer{Timeout: wait, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(src, 0))}
		if network == "udp" {
			d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(src, 0))
		}
		c, err = d.Dial(network, dst.String())
		return nil
	})
	if err == nil {
		w.t.Cleanup(func() { _ = c.Close() })
	}
	return c, err
}

// says sends a text and reads it back.
func says(c net.Conn, text string, wait time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, []byte(text)) {
		return fmt.Errorf("heard %q", got)
	}
	return nil
}

// reaches holds that a new connection passes, or that it does not.
func (w *world) reaches(want bool, network string, ns *nstest.NS, src netip.Addr, dst netip.AddrPort, text string) {
	w.t.Helper()
	wait := moment
	if want {
		wait = patience
	}
	c, err := w.dial(network, ns, src, dst, wait)
	if err == nil {
		err = says(c, text, wait)
	}
	if (err == nil) != want {
		w.t.Errorf("%s from %s to %s: passes: %t, want %t: %v", network, src, dst, err == nil, want, err)
	}
}

// both runs a test for each family, with the families' addresses at index i.
func both(t *testing.T, test func(t *testing.T, i int)) {
	for i, family := range []string{"IPv4", "IPv6"} {
		t.Run(family, func(t *testing.T) { test(t, i) })
	}
}

// pair opens a TCP connection and returns both ends.
func (w *world) pair(src netip.Addr, dst netip.AddrPort) (client, server net.Conn) {
	w.t.Helper()
	var l net.Listener
	w.ns(dst.Addr()).Do(w.t, func() (err error) { l, err = net.Listen("tcp", dst.String()); return err })
	defer l.Close()
	client, err := w.dial("tcp", w.ns(src), src, dst, patience)
	if err == nil {
		server, err = l.Accept()
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = server.Close() })
	return client, server
}

// passes sends a word from one end to the other.
func passes(from, to net.Conn, wait time.Duration) error {
	if err := errors.Join(from.SetDeadline(time.Now().Add(wait)), to.SetDeadline(time.Now().Add(wait))); err != nil {
		return err
	}
	if _, err := io.WriteString(from, "word"); err != nil {
		return err
	}
	_, err := io.ReadFull(to, make([]byte, 4))
	return err
}

// ended holds that an end learns that its connection is over when it sends.
func ended(t *testing.T, name string, c net.Conn) {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(patience))
	_, err := io.WriteString(c, "still there?")
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s does not learn that its connection is over: %v", name, err)
	}
}

// TestCut: a flow that a change forbids ends both ways with it, and no other loses anything.
func TestCut(t *testing.T) {
	const before, after = `policyTypes: [Egress]
egress: [{to: [{podSelector: {matchExpressions: [{key: app, operator: In, values: [remote-0, remote-1, local-1]}]}}]}]`, `policyTypes: [Egress]
egress: [{to: [{podSelector: {matchLabels: {app: remote-1}}}], ports: [{port: 1005}]}]`
	both(t, func(t *testing.T, i int) {
		w := newWorld(t)
		w.policies(forLocal0 + before)
		own := policytest.Local(0)[i]
		at := func(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
		remote, near := policytest.Remote(0)[i], policytest.Local(1)[i]
		ends := map[string][2]net.Conn{}
		open := func(name string, dst netip.AddrPort) {
			c, s := w.pair(own, dst)
			if err := errors.Join(passes(c, s, patience), passes(s, c, patience)); err != nil {
				t.Fatal(name, err)
			}
			ends[name] = [2]net.Conn{c, s}
		}
		open("the client of a remote server", at(remote, 1001))
		open("a remote server with an idle client", at(remote, 1002))
		open("the client of a local server", at(near, 1003))
		open("a local server with an idle client", at(near, 1004))
		open("allowed", at(policytest.Remote(1)[i], 1005))
		w.echo(w.ns(remote), at(remote, 1006))
		udp, err := w.dial("udp", w.ns(own), own, at(remote, 1006), patience)
		if err == nil {
			err = says(udp, "hello", patience)
		}
		if err != nil {
			t.Fatal(err)
		}
		w.policies(forLocal0 + after)
		for name, e := range ends {
			switch name {
			case "allowed":
				if err := errors.Join(passes(e[0], e[1], patience), passes(e[1], e[0], patience)); err != nil {
					t.Errorf("the allowed flow ended: %v", err)
				}
			case "the client of a remote server", "the client of a local server":
				ended(t, name, e[0])
			default:
				ended(t, name, e[1])
			}
		}
		if err := says(udp, "still there?", moment); err == nil {
			t.Error("the UDP flow goes on")
		}
		w.policies()
		if err := says(udp, "again", patience); err != nil {
			t.Errorf("UDP, allowed again: %v", err)
		}
	})
}

// TestOneWay: a flow that nobody answers goes the short way from its second packet on, and ends with the change that forbids it,
// whichever end may no longer.
func TestOneWay(t *testing.T) {
	both(t, func(t *testing.T, i int) {
		w := newWorld(t)
		own, remote := policytest.Local(0)[i], policytest.Remote(0)[i]
		// short is how many packets went the short way while do ran.
		short := func(do func()) (packets int) {
			const table, counted = policy.Table, "judged ct status confirmed counter"
			w.node.Run(t, "nft", "insert rule inet "+table+" "+counted)
			do()
			_, after, _ := strings.Cut(w.node.Run(t, "nft", "list chain inet "+table+" judged"), "packets ")
			_, _ = fmt.Sscan(after, &packets)
			w.node.Run(t, "nft", "flush chain inet "+table+" judged; add rule inet "+table+" judged ct status confirmed accept")
			return packets
		}
		recheck := func(allowed bool) (left int) {
			w.node.Do(t, func() (err error) {
				left, err = w.table.Recheck(t.Context(), func(policy.Flow) (egress, ingress bool) { return allowed, allowed })
				return err
			})
			return left
		}
		for _, f := range []policy.Flow{
			{Src: own, Dst: remote, Protocol: policy.UDP, Port: 9},
			{Src: remote, Dst: own, Protocol: policy.UDP, Port: 9},
		} {
			w.policies(forLocal0 + "policyTypes: [Ingress, Egress]\ningress: [{}]\negress: [{}]")
			if left := recheck(true); left != 0 {
				t.Fatalf("%d addresses are under recheck", left)
			}
			id := w.send(f)
			w.waitFor(id, "the first packet")
			if n := short(func() {
				w.forget(id)
				w.sendAs(id, f)
				w.waitFor(id, "the second packet")
			}); n != 2 {
				t.Errorf("%d base chains let the second packet go the short way, want 2", n)
			}
			w.policies(forLocal0 + "policyTypes: [Ingress, Egress]")
			for range 2 {
				w.forget(id)
				w.sendAs(id, f)
				w.waitFor(w.send(policy.Flow{Src: policytest.Local(1)[i], Dst: remote, Protocol: policy.UDP, Port: 9}), "another pod's packet")
				if w.has(id) {
					t.Fatalf("%+v is forbidden and goes on", f)
				}
				// With its flow there, the pod stays under recheck.
				if recheck(false) == 0 {
					t.Fatal("no address is under recheck")
				}
			}
		}
	})
}

// TestForgottenConnection: once the kernel has forgotten a forbidden connection, its server cannot bring it back to life.
func TestForgottenConnection(t *testing.T) {
	both(t, func(t *testing.T, i int) {
		w := newWorld(t)
		w.policies()
		own, remote := policytest.Local(0)[i], policytest.Remote(0)[i]
		c, s := w.pair(own, netip.AddrPortFrom(remote, 1001))
		if err := passes(c, s, patience); err != nil {
			t.Fatal(err)
		}
		w.policies(denyAll)
		if err := w.node.Handle.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
			t.Fatal(err)
		}
		if err := passes(s, c, moment); err == nil {
			t.Error("the server's word passed")
		}
		if err := passes(c, s, moment); err == nil {
			t.Error("the client's word passed")
		}
	})
}

// TestOwnNodeAndItself: with all denied, a pod still reaches its own node, is reached by it, and reaches itself by a service.
func TestOwnNodeAndItself(t *testing.T) {
	both(t, func(t *testing.T, i int) {
		w := newWorld(t)
		own := policytest.Local(0)[i]
		node, service := policytest.Nodes()[0].Addrs[0], netip.MustParseAddr("10.96.0.10")
		if i == 1 {
			node, service = policytest.Nodes()[0].Addrs[2], netip.MustParseAddr("fd00:96::10")
		}
		w.node.Run(t, "ip", "addr", "add", netip.PrefixFrom(node, node.BitLen()).String(), "dev", "lo")
		w.dnat(service, own, 8080)
		w.policies(denyAll)
		w.echo(w.ns(own), netip.AddrPortFrom(own, 8080))
		w.echo(w.node, netip.AddrPortFrom(node, 10250))
		for _, network := range []string{"tcp", "udp"} {
			w.reaches(true, network, w.node, node, netip.AddrPortFrom(own, 8080), "probe")
			w.reaches(true, network, w.ns(own), own, netip.AddrPortFrom(node, 10250), "kubelet")
			w.reaches(true, network, w.ns(own), own, netip.AddrPortFrom(service, 80), "myself")
			w.reaches(false, network, w.ns(policytest.Local(1)[i]), policytest.Local(1)[i], netip.AddrPortFrom(own, 8080), "other")
		}
	})
}

// dnat is kube-proxy: a service's port 80 is a pod's port. Whoever would be answered by itself is masqueraded.
func (w *world) dnat(service, pod netip.Addr, port uint16) {
	w.t.Helper()
	family := "ip"
	if pod.Is6() {
		family = "ip6"
	}
	w.node.Run(w.t, "nft", fmt.Sprintf(`table %[1]s proxy {
		chain pre { type nat hook prerouting priority -100; %[1]s daddr %[2]s meta l4proto { tcp, udp } th dport 80 dnat to %[3]s; }
		chain post { type nat hook postrouting priority 100; %[1]s saddr %[4]s %[1]s daddr %[4]s masquerade; }
	}`, family, service, netip.AddrPortFrom(pod, port), pod))
	w.node.Run(w.t, "ip", "route", "replace", netip.PrefixFrom(service, service.BitLen()).String(), "dev", "wan")
}

// TestService: policies see the pod behind a service, and its port.
func TestService(t *testing.T) {
	both(t, func(t *testing.T, i int) {
		w := newWorld(t)
		own, backend := policytest.Local(0)[i], policytest.Local(1)[i]
		service := []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::10")}[i]
		w.dnat(service, backend, 8080)
		w.echo(w.ns(backend), netip.AddrPortFrom(backend, 8080))
		to := func(port int) string {
			return fmt.Sprintf("%spolicyTypes: [Egress]\negress: [{to: [{podSelector: {matchLabels: {app: local-1}}}], ports: [{port: %d}, {port: %[2]d, protocol: UDP}]}]", forLocal0, port)
		}
		for _, network := range []string{"tcp", "udp"} {
			w.policies(to(8080))
			w.reaches(true, network, w.ns(own), own, netip.AddrPortFrom(service, 80), "pod's port")
			w.policies(to(80))
			w.reaches(false, network, w.ns(own), own, netip.AddrPortFrom(service, 80), "service's port")
		}
	})
}

// TestNodePort: the client is who began, although the node sends in its place.
func TestNodePort(t *testing.T) {
	w := newWorld(t)
	pod, client := policytest.Local(0)[0], policytest.External(1)[0]
	w.node.Run(t, "nft", fmt.Sprintf(`table ip proxy {
		chain pre { type nat hook prerouting priority -100; ip daddr 192.168.50.1 tcp dport 30080 dnat to %s:8080; }
		chain post { type nat hook postrouting priority 100; ip saddr 203.0.113.0/24 oifname "hc*" masquerade; }
	}`, pod))
	w.node.Run(t, "ip", "addr", "add", "192.168.50.1/32", "dev", "lo")
	w.echo(w.ns(pod), netip.AddrPortFrom(pod, 8080))
	node := netip.MustParseAddrPort("192.168.50.1:30080")
	w.policies(forLocal0 + "ingress: [{from: [{ipBlock: {cidr: " + client.String() + "/32}}]}]")
	w.reaches(true, "tcp", w.ns(client), client, node, "client")
	w.reaches(false, "tcp", w.ns(client), policytest.External(0)[0], node, "another")
	w.policies(forLocal0 + "ingress: [{from: [{ipBlock: {cidr: 192.168.50.1/32}}]}]")
	w.reaches(false, "tcp", w.ns(client), client, node, "client")
}

// TestLarge: fragments are one packet.
func TestLarge(t *testing.T) {
	both(t, func(t *testing.T, i int) {
		w := newWorld(t)
		own, remote := policytest.Local(0)[i], policytest.Remote(0)[i]
		w.policies(forLocal0 + "policyTypes: [Egress]\negress: [{ports: [{port: 53, protocol: UDP}]}]")
		w.echo(w.ns(remote), netip.AddrPortFrom(remote, 53))
		w.echo(w.ns(remote), netip.AddrPortFrom(remote, 54))
		w.reaches(true, "udp", w.ns(own), own, netip.AddrPortFrom(remote, 53), strings.Repeat("x", 6000))
		w.reaches(false, "udp", w.ns(own), own, netip.AddrPortFrom(remote, 54), strings.Repeat("x", 6000))
	})
}

// TestErrors: an ICMP error about a flow that is allowed passes, although no rule allows who sends it.
func TestErrors(t *testing.T) {
	both(t, func(t *testing.T, i int) {
		w := newWorld(t)
		own, remote := policytest.Local(0)[i], policytest.Remote(0)[i]
		w.policies(denyAll, forLocal0+"policyTypes: [Egress]\negress: [{ports: [{port: 53, protocol: UDP}]}]")
		for port, want := range map[uint16]bool{53: true, 54: false} {
			c, err := w.dial("udp", w.ns(own), own, netip.AddrPortFrom(remote, port), patience)
			if err != nil {
				t.Fatal(err)
			}
			err = says(c, "nobody listens", map[bool]time.Duration{true: patience, false: moment}[want])
			if refused := errors.Is(err, unix.ECONNREFUSED); refused != want {
				t.Errorf("port %d: %v, want an answer: %t", port, err, want)
			}
		}
	})
}

// TestUnknownPod: while a pod's policies are not known it reaches its own node and nobody else, nor is it reached.
func TestUnknownPod(t *testing.T) {
	both(t, func(t *testing.T, i int) {
		w := newWorld(t)
		own, near, remote := policytest.Local(0)[i], policytest.Local(1)[i], policytest.Remote(0)[i]
		node := []netip.Addr{policytest.Nodes()[0].Addrs[0], policytest.Nodes()[0].Addrs[2]}[i]
		w.node.Run(t, "ip", "addr", "add", netip.PrefixFrom(node, node.BitLen()).String(), "dev", "lo")
		w.policies()
		for _, a := range []netip.Addr{own, near, remote} {
			w.echo(w.ns(a), netip.AddrPortFrom(a, 8080))
		}
		w.echo(w.node, netip.AddrPortFrom(node, 10250))
		for _, known := range []bool{false, true} {
			group := map[bool]string{false: "0", true: fmt.Sprint(names.PolicyLinkGroup)}[known]
			w.node.Run(t, "ip", "link", "set", "hc0", "group", group)
			alone := w.send(policy.Flow{Src: own, Dst: remote, Protocol: policy.UDP, Port: 9})
			for _, network := range []string{"tcp", "udp"} {
				w.reaches(known, network, w.ns(own), own, netip.AddrPortFrom(near, 8080), "out")
				w.reaches(known, network, w.ns(own), own, netip.AddrPortFrom(remote, 8080), "out")
				w.reaches(known, network, w.ns(near), near, netip.AddrPortFrom(own, 8080), "in")
				w.reaches(known, network, w.ns(remote), remote, netip.AddrPortFrom(own, 8080), "in")
				w.reaches(true, network, w.ns(own), own, netip.AddrPortFrom(node, 10250), "own node")
				w.reaches(true, network, w.node, node, netip.AddrPortFrom(own, 8080), "own node")
			}
			if known {
				w.waitFor(alone, "a pod's packet that wants no answer")
			} else if w.has(alone) {
				t.Error("a packet that wants no answer passed")
			}
		}
	})
}

// TestNoConnection: what belongs to no connection does not reach an isolated pod nor leave it, and others are let alone.
func TestNoConnection(t *testing.T) {
	both(t, func(t *testing.T, i int) {
		w := newWorld(t)
		w.policies(forLocal0 + "ingress: [{}]\npolicyTypes: [Ingress, Egress]")
		isolated, free, remote := policytest.Local(0)[i], policytest.Local(1)[i], policytest.Remote(0)[i]
		shape := "SYN+FIN"
		send := func(src, dst netip.Addr) uint16 {
			w.next += 200 // Shapes numbers from a port on
			packets := nstest.Shapes(src, dst, w.next)
			w.ns(src).Do(t, func() error { return nstest.Send(packets[shape]) })
			return binary.BigEndian.Uint16(packets[shape][map[int]int{0: 20, 1: 40}[i]:])
		}
		out, in := send(isolated, remote), send(remote, free)
		w.waitFor(in, "what is for a pod without policies")
		if w.has(out) {
			t.Error("an isolated pod sent it")
		}
	})
}
