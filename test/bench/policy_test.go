package bench

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/enforce"
)

// policyNode is a node with two pods and our own tables.
type policyNode struct {
	node, a, b *nstest.NS
}

var policyPods = [2]netip.Addr{netip.MustParseAddr("10.244.1.10"), netip.MustParseAddr("10.244.1.11")}

const policyPort = 8000

func newPolicyNode(b *testing.B) *policyNode {
	n := &policyNode{nstest.New(b), nstest.New(b), nstest.New(b)}
	n.node.Run(b, "sh", "-ec", "echo 1 >/proc/sys/net/ipv4/ip_forward")
	for i, pod := range []*nstest.NS{n.a, n.b} {
		link := fmt.Sprint(names.PodLinkPrefix, i)
		n.node.Run(b, "sh", "-ec", fmt.Sprintf(`ip link add %[1]s address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02 netns /run/netns/%[2]s
			ip link set %[1]s group %[3]d up; ip route add %[4]s dev %[1]s; ip neigh add %[4]s lladdr 02:00:00:00:00:02 nud permanent dev %[1]s`,
			link, pod.Name, names.PolicyLinkGroup, policyPods[i]))
		pod.Run(b, "sh", "-ec", fmt.Sprintf(`ip link set eth0 up; ip addr add %s/32 dev eth0; ip neigh add 169.254.1.1 lladdr 02:00:00:00:00:01 nud permanent dev eth0
			ip route add 169.254.1.1 dev eth0; ip route add default via 169.254.1.1`, policyPods[i]))
	}
	ranges := []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}
	n.node.Do(b, func() error {
		_, err := nft.New().Sync(b.Context(), nft.Config{Own: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, Cluster: ranges, TunName: names.DaemonTun, Masquerade: true})
		return err
	})
	return n
}

// policiesForBoth are policies that all select both pods, in both directions. Each names pods of its own and one of a hundred ports; the
// first lets the two pods speak with each other.
func policiesForBoth(n int) *policy.Snapshot {
	s := &policy.Snapshot{Node: "one", Namespaces: []policy.Namespace{{Name: "shop"}}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}}
	for i, a := range policyPods {
		s.Pods = append(s.Pods, &policy.Pod{Namespace: "shop", Name: fmt.Sprint("local-", i), Node: "one", Labels: map[string]string{"app": "app-0"}, IPs: []netip.Addr{a}})
	}
	for i := range n {
		s.Pods = append(s.Pods, &policy.Pod{Namespace: "shop", Name: fmt.Sprint("remote-", i), Node: "two", Labels: map[string]string{"app": fmt.Sprint("app-", i+1)},
			IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(2 + i/200), byte(10 + i%200)})}})
		port, tcp, udp := intstr.FromInt(policyPort+i%100), corev1.ProtocolTCP, corev1.ProtocolUDP
		ports := []networkingv1.NetworkPolicyPort{{Port: &port, Protocol: &tcp}, {Port: &port, Protocol: &udp}}
		peers := []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint("app-", i)}}}}
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprint("policy-", i)}}
		p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
		p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: peers, Ports: ports}}
		p.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{To: peers, Ports: ports}}
		s.Policies = append(s.Policies, p)
	}
	return s
}

func (n *policyNode) apply(b *testing.B, s *policy.Snapshot) {
	n.node.Do(b, func() error {
		t := enforce.New(b.TempDir() + "/chains")
		rules := policy.Compile(s)
		if _, err := t.Apply(b.Context(), rules, policy.Options{Strict: true}); err != nil {
			return err
		}
		_, err := t.Recheck(b.Context(), func(policy.Flow) (egress, ingress bool) { return true, true })
		return err
	})
}

// threadTime is the processor time of this thread, with what the kernel does for its packets: what else runs does not count.
func threadTime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) // it cannot fail
	return time.Duration(t.Nano())
}

// An operation is done again and again by one thread that has both ends, so that it measures what packets cost and not how threads
// take turns.
type operation struct {
	name  string
	times int
	do    func(e *pathEnds) error
}

// pathEnds are sockets of both pods.
type pathEnds struct {
	udp, udpPeer, tcp, tcpPeer, listener int
	// client makes a socket in the first pod.
	client func() (int, error)
	buffer []byte
}

var policyOperations = []operation{
	{"UDP one way", 20000, func(e *pathEnds) error { return e.move(e.udp, e.udpPeer, 64) }},
	{"TCP there and back", 10000, func(e *pathEnds) error {
		if err := e.move(e.tcp, e.tcpPeer, 64); err != nil {
			return err
		}
		return e.move(e.tcpPeer, e.tcp, 64)
	}},
	{"TCP 64 kB", 2000, func(e *pathEnds) error { return e.move(e.tcp, e.tcpPeer, 64<<10) }},
	{"TCP connection", 1500, (*pathEnds).connection},
}

// move sends bytes and takes them at the other end.
func (e *pathEnds) move(from, to, size int) error {
	for sent := 0; sent < size; {
		n, err := unix.Write(from, e.buffer[:size-sent])
		if err != nil {
			return fmt.Errorf("send: %w", err)
		}
		sent += n
		for n > 0 {
			got, err := unix.Read(to, e.buffer)
			if err != nil {
				return fmt.Errorf("receive: %w", err)
			}
			n -= got
		}
	}
	return nil
}

// connection makes one, says a word and ends it.
func (e *pathEnds) connection() error {
	c, err := e.client()
	if err != nil {
		return err
	}
	if err := unix.Connect(c, sockaddr(1, policyPort)); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	s, _, err := unix.Accept4(e.listener, unix.SOCK_CLOEXEC)
	if err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	if err := e.move(c, s, 64); err != nil {
		return err
	}
	// A reset leaves no socket that waits, whose number nobody could use for a minute.
	_ = unix.SetsockoptLinger(c, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	_ = unix.Close(c)
	return unix.Close(s)
}

func sockaddr(pod, port int) unix.Sockaddr {
	return &unix.SockaddrInet4{Addr: policyPods[pod].As4(), Port: port}
}

// ends opens the sockets.
func (n *policyNode) ends(b *testing.B) *pathEnds {
	e := &pathEnds{buffer: make([]byte, 64<<10)}
	open := func(ns *nstest.NS, typ, pod, port int) (fd int, err error) {
		ns.Do(b, func() error {
			if fd, err = unix.Socket(unix.AF_INET, typ|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			b.Cleanup(func() { _ = unix.Close(fd) })
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10})
			err = unix.Bind(fd, sockaddr(pod, port))
			return err
		})
		return fd, err
	}
	must := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	var err error
	e.udp, err = open(n.a, unix.SOCK_DGRAM, 0, policyPort)
	must(err)
	e.udpPeer, err = open(n.b, unix.SOCK_DGRAM, 1, policyPort)
	must(err)
	must(unix.Connect(e.udp, sockaddr(1, policyPort)))
	e.listener, err = open(n.b, unix.SOCK_STREAM, 1, policyPort)
	must(err)
	must(unix.Listen(e.listener, 128))
	e.tcp, err = open(n.a, unix.SOCK_STREAM, 0, 0)
	must(err)
	must(unix.Connect(e.tcp, sockaddr(1, policyPort)))
	e.tcpPeer, _, err = unix.Accept4(e.listener, unix.SOCK_CLOEXEC)
	must(err)
	b.Cleanup(func() { _ = unix.Close(e.tcpPeer) })
	for _, fd := range []int{e.tcp, e.tcpPeer} {
		must(unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
		must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20))
	}
	// A thread of the pod's makes the sockets of new connections.
	ask, made := make(chan struct{}), make(chan int)
	go n.a.Do(b, func() error {
		for range ask {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				fd = -1
			}
			made <- fd
		}
		return nil
	})
	b.Cleanup(func() { close(ask) })
	e.client = func() (int, error) {
		ask <- struct{}{}
		if fd := <-made; fd >= 0 {
			return fd, nil
		}
		return 0, unix.EMFILE
	}
	return e
}

// BenchmarkPolicyPath shows what policies cost a packet between two pods of one node, where nothing else costs much: beside the same
// node without the table, with the table and no policy, and with 1 to 10,000 policies that all select both pods.
func BenchmarkPolicyPath(b *testing.B) {
	nstest.Require(b)
	const off = "off"
	sides := []string{off}
	nodes := map[string]*pathEnds{}
	for _, n := range []int{-1, 0, 1, 100, 1000, 10000} {
		node, name := newPolicyNode(b), off
		if n >= 0 {
			name = fmt.Sprint(n)
			sides = append(sides, name)
		}
		nodes[name] = node.ends(b)
		if n >= 0 {
			node.apply(b, policiesForBoth(n))
		}
	}
	if *kubeRouter != "" {
		for _, n := range []int{0, 100, 1000} {
			node, name := newPolicyNode(b), fmt.Sprintf("%d kube-router", n)
			sides = append(sides, name)
			nodes[name] = node.ends(b)
			node.applyRival(b, policiesForBoth(n))
		}
	}
	var ways []way
	for _, name := range sides {
		ways = append(ways, func(got samples) error {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			for _, op := range policyOperations {
				times := op.times
				if strings.HasSuffix(name, "kube-router") {
					times /= 100 // a packet that is judged alone takes it milliseconds
				}
				begin := threadTime()
				for range times {
					if err := op.do(nodes[name]); err != nil {
						return fmt.Errorf("%s, %s policies: %w", op.name, name, err)
					}
				}
				got.add(op.name+" "+name, (threadTime()-begin)/time.Duration(times)*1000)
			}
			return nil
		})
	}
	got := interleave(b, 13, ways...)
	r := newComparison(b, "What policies cost, in processor time, two pods on one node:")
	for _, op := range policyOperations {
		for _, name := range sides[1:] {
			r.compare(got, row{op.name, "us", name, off, ratio, ""})
		}
	}
}

// BenchmarkPolicyRules shows what the parts of the table cost a packet that is judged anew each time: one way by UDP.
func BenchmarkPolicyRules(b *testing.B) {
	nstest.Require(b)
	const off = "off"
	gate := "flush chain inet %[1]s egress; flush chain inet %[1]s ingress;"
	hooks := gate
	for _, c := range policy.FixedChains(policy.Options{Strict: true}) {
		for _, r := range c.Rules {
			if strings.Contains(r, " counter name "+policy.CounterUnknown) || strings.HasPrefix(r, "iifname != ") {
				gate += " add rule inet %[1]s " + c.Name + " " + r + ";"
			}
		}
	}
	var ways []way
	var names []string
	for _, v := range []struct {
		name     string
		policies int
		script   string
	}{{off, -1, ""}, {"the hooks alone", 0, hooks}, {"and the gate", 0, gate}, {"and the look-ups: no policy", 0, ""}, {"and a class in both directions: 1 policy", 1, ""}} {
		node := newPolicyNode(b)
		ends := node.ends(b)
		if v.policies >= 0 {
			node.apply(b, policiesForBoth(v.policies))
		}
		if v.script != "" {
			node.node.Run(b, "nft", fmt.Sprintf(v.script, policy.Table))
		}
		if v.name != off {
			names = append(names, v.name)
		}
		ways = append(ways, func(got samples) error {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			const times, tries = 500, 10
			best := time.Hour
			for range tries { // the least disturbed
				begin := threadTime()
				for range times {
					if err := ends.move(ends.udp, ends.udpPeer, 64); err != nil {
						return fmt.Errorf("%s: %w", v.name, err)
					}
				}
				best = min(best, (threadTime()-begin)/times)
			}
			got.add("UDP one way "+v.name, best*1000)
			return nil
		})
	}
	got := interleave(b, 100, ways...)
	r := newComparison(b, "What parts of the table cost a packet, in processor time:")
	for _, name := range names {
		r.compare(got, row{"UDP one way", "us", name, off, ratio, ""})
	}
}

// policySizes are clusters: pods and policies.
var policySizes = [][2]int{{1000, 100}, {10000, 1000}, {30000, 10000}}

// BenchmarkPolicyApply shows what it takes to compile a cluster's policies and bring them into an empty kernel, and then to do one
// change: another policy, or other labels of a pod.
func BenchmarkPolicyApply(b *testing.B) {
	nstest.Require(b)
	r := newReport(b, "Policies of a cluster, for a node of 110 pods:",
		"| pods, policies | sets | elements | chains | cold: compile, ms | cold: apply, ms | one change: compile, ms | one change: apply, ms | n |")
	for _, size := range policySizes {
		s := policytest.Large(size[0], size[1])
		rnd := rand.New(rand.NewPCG(1, 1))
		got := samples{}
		var rules *policy.Ruleset
		node := nstest.New(b)
		changes := max(2, int(40**scale))
		for range 3 {
			node.Do(b, func() error {
				compiler, table := policy.NewCompiler(), enforce.New(b.TempDir()+"/chains")
				do := func(name string, s *policy.Snapshot) error {
					begin := time.Now()
					rules = compiler.Compile(s)
					got.add(name+": compile", time.Since(begin))
					begin = time.Now()
					_, err := table.Apply(b.Context(), rules, policy.Options{Strict: true})
					got.add(name+": apply", time.Since(begin))
					return err
				}
				if err := do("cold", s); err != nil {
					return err
				}
				for range changes {
					s = policytest.LargeChange(rnd, s)
					if err := do("change", s); err != nil {
						return err
					}
				}
				return table.Remove(b.Context())
			})
		}
		elements := len(rules.In) + len(rules.Out)
		for _, set := range rules.Sets {
			elements += len(set.Members)
		}
		for _, m := range rules.Maps {
			elements += len(m.Elements)
		}
		fmt.Fprintf(&r.text, "| %d, %d | %d | %d | %d | %s | %s | %s | %s | %d |\n", size[0], size[1], len(rules.Sets)+len(rules.Maps), elements, len(rules.Chains),
			digits(median(got["cold: compile"])), digits(median(got["cold: apply"])), digits(median(got["change: compile"])), digits(median(got["change: apply"])),
			len(got["change: apply"]))
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkPolicyChurn has ten changes a second come to the largest cluster, and shows how long each takes to be in force: compiled,
// and in the kernel. The way from the API server to the node is not part of it.
func BenchmarkPolicyChurn(b *testing.B) {
	nstest.Require(b)
	size := policySizes[len(policySizes)-1]
	s := policytest.Large(size[0], size[1])
	rnd := rand.New(rand.NewPCG(2, 2))
	var took []float64
	lasts := time.Duration(60 * *scale * float64(time.Second))
	nstest.New(b).Do(b, func() error {
		compiler, table := policy.NewCompiler(), enforce.New(b.TempDir()+"/chains")
		if _, err := table.Apply(b.Context(), compiler.Compile(s), policy.Options{Strict: true}); err != nil {
			return err
		}
		begin := time.Now()
		for due := begin; due.Before(begin.Add(lasts)); due = due.Add(100 * time.Millisecond) {
			time.Sleep(time.Until(due))
			s = policytest.LargeChange(rnd, s)
			if _, err := table.Apply(b.Context(), compiler.Compile(s), policy.Options{Strict: true}); err != nil {
				return err
			}
			took = append(took, float64(time.Since(due).Nanoseconds())/1e6)
		}
		return table.Remove(b.Context())
	})
	slices.Sort(took)
	r := newReport(b, fmt.Sprintf("Ten changes a second, %d pods and %d policies, from the change to the kernel, ms:", size[0], size[1]), "| median | p99 | longest | n |")
	fmt.Fprintf(&r.text, "| %s | %s | %s | %d |\n", digits(median(took)), digits(took[len(took)*99/100]), digits(took[len(took)-1]), len(took))
	b.ReportMetric(0, "ns/op")
}
