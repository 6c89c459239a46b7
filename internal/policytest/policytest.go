// Package policytest makes random clusters with NetworkPolicies, changes of them, and connections to ask about, for tests that hold
// what is compiled, and what the kernel does, against the API's words.
package policytest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/headcni/headcni/pkg/policy"
)

// LocalPods and RemotePods are how many pods of the own and of other nodes a cluster has, and Outside how many addresses are neither
// pods' nor nodes'. Addresses depend on the number alone, so that one set of links serves for all clusters.
const LocalPods, RemotePods, Outside = 4, 9, 4

// Local returns the addresses of a pod of the own node, IPv4 first; i counts from 0.
func Local(i int) []netip.Addr { return pair("10.244.1.%d", "fd00:244:1::%d", 10+i) }

// Remote returns those of a pod elsewhere.
func Remote(i int) []netip.Addr { return pair("10.244.2.%d", "fd00:244:2::%d", 10+i) }

// External returns those of somebody outside.
func External(i int) []netip.Addr {
	return pair("203.0.113.%d", "2001:db8::%d", []int{1, 5, 128, 254}[i])
}

// Nodes are the own node, one, and two others, with all their addresses.
func Nodes() []policy.Node {
	node := func(name string, addrs ...string) policy.Node {
		n := policy.Node{Name: name}
		for _, a := range addrs {
			n.Addrs = append(n.Addrs, netip.MustParseAddr(a))
		}
		return n
	}
	return []policy.Node{
		node("one", "192.168.50.1", "100.64.0.1", "fd7a:115c:a1e0::1"),
		node("two", "192.168.50.2", "100.64.0.2", "fd7a:115c:a1e0::2"),
		node("three", "192.168.50.200", "100.64.0.3"),
	}
}

func pair(v4, v6 string, i int) []netip.Addr {
	return []netip.Addr{netip.MustParseAddr(fmt.Sprintf(v4, i)), netip.MustParseAddr(fmt.Sprintf(v6, i))}
}

// Cluster makes a cluster of random pods and policies.
func Cluster(r *rand.Rand) *policy.Snapshot {
	s := &policy.Snapshot{
		Node: "one", Nodes: Nodes(),
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")},
	}
	for _, n := range namespaces {
		if r.IntN(8) > 0 { // a pod's namespace may not be known yet
			s.Namespaces = append(s.Namespaces, policy.Namespace{Name: n, Labels: labels(r)})
		}
	}
	for i := range LocalPods {
		s.Pods = append(s.Pods, pod(r, "one", i, Local(i)))
	}
	for i := range RemotePods {
		s.Pods = append(s.Pods, pod(r, pick(r, "two", "three"), LocalPods+i, Remote(i)))
	}
	if r.IntN(3) == 0 { // one who claims another's address
		s.Pods = append(s.Pods, pod(r, pick(r, "one", "two"), LocalPods+RemotePods, pick(r, slices.Concat(allPods()...)...)))
	}
	for range r.IntN(7) {
		s.Policies = append(s.Policies, networkPolicy(r, len(s.Policies)))
	}
	return s
}

// Change returns the cluster after one or a few changes. The old one stays as it is.
func Change(r *rand.Rand, old *policy.Snapshot) *policy.Snapshot {
	s := *old
	s.Pods, s.Namespaces, s.Policies = slices.Clone(s.Pods), slices.Clone(s.Namespaces), slices.Clone(s.Policies)
	for range 1 + r.IntN(3) {
		switch i := r.IntN(len(s.Pods)); r.IntN(8) {
		case 0:
			s.Policies = append(s.Policies, networkPolicy(r, 100+r.IntN(1000)))
		case 1:
			if len(s.Policies) > 0 {
				s.Policies = slices.Delete(s.Policies, 0, 1)
			}
		case 2:
			if len(s.Policies) > 0 {
				j := r.IntN(len(s.Policies))
				p := networkPolicy(r, 0)
				p.Namespace, p.Name = s.Policies[j].Namespace, s.Policies[j].Name
				s.Policies[j] = p
			}
		case 3:
			p := *s.Pods[i]
			p.Labels = labels(r)
			s.Pods[i] = &p
		case 4:
			if len(s.Namespaces) > 0 {
				s.Namespaces[r.IntN(len(s.Namespaces))].Labels = labels(r)
			}
		case 5:
			p := *s.Pods[i]
			p.Ports = ports(r)
			s.Pods[i] = &p
		case 6: // the address goes to a pod of other labels
			s.Pods[i] = pod(r, s.Pods[i].Node, 100+r.IntN(1000), s.Pods[i].IPs)
		case 7:
			p := *s.Pods[i]
			p.Done = !p.Done
			s.Pods[i] = &p
		}
	}
	return &s
}

var (
	namespaces = []string{"shop", "edge", "lab"}
	values     = []string{"a", "b", "c"}
	numbers    = []uint16{1, 79, 80, 81, 443, 8080, 8081, 30000, 31000, 32000, 65535}
	protocols  = []policy.Protocol{policy.TCP, policy.UDP, policy.SCTP}
)

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

func allPods() (out [][][]netip.Addr) {
	var local, remote [][]netip.Addr
	for i := range LocalPods {
		local = append(local, Local(i))
	}
	for i := range RemotePods {
		remote = append(remote, Remote(i))
	}
	return [][][]netip.Addr{local, remote}
}

func labels(r *rand.Rand) map[string]string {
	out := map[string]string{}
	for _, key := range []string{"app", "tier"} {
		if r.IntN(4) > 0 {
			out[key] = pick(r, values...)
		}
	}
	return out
}

func ports(r *rand.Rand) (out []policy.NamedPort) {
	for _, name := range []string{"http", "dns"} {
		if r.IntN(3) > 0 {
			out = append(out, policy.NamedPort{Name: name, Protocol: pick(r, protocols...), Port: pick(r, numbers...)})
		}
	}
	return out
}

func pod(r *rand.Rand, node string, i int, ips []netip.Addr) *policy.Pod {
	p := &policy.Pod{
		Namespace: pick(r, namespaces...), Name: fmt.Sprint("pod-", i), UID: types.UID(fmt.Sprint(i)), Node: node, Labels: labels(r), IPs: ips,
		Ports: ports(r),
	}
	if r.IntN(6) == 0 {
		p.IPs = ips[:1]
	}
	switch r.IntN(20) {
	case 0:
		p.Done = true
	case 1:
		p.Terminating = true
	case 2:
		if node != "one" {
			p.HostNetwork, p.IPs = true, []netip.Addr{netip.MustParseAddr("192.168.50.2")}
		}
	}
	return p
}

func networkPolicy(r *rand.Rand, i int) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: pick(r, namespaces...), Name: fmt.Sprint("policy-", i)}}
	p.Spec.PodSelector = *labelSelector(r)
	if r.IntN(3) == 0 {
		p.Spec.PodSelector = metav1.LabelSelector{}
	}
	for range r.IntN(4) {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: peers(r), Ports: policyPorts(r)})
	}
	for range r.IntN(4) {
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peers(r), Ports: policyPorts(r)})
	}
	in, out := networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress
	p.Spec.PolicyTypes = pick(r, nil, []networkingv1.PolicyType{in}, []networkingv1.PolicyType{out}, []networkingv1.PolicyType{in, out})
	if r.IntN(40) == 0 {
		p.Spec.PolicyTypes = []networkingv1.PolicyType{"Sideways"}
	}
	return p
}

func labelSelector(r *rand.Rand) *metav1.LabelSelector {
	sel := &metav1.LabelSelector{}
	if r.IntN(2) == 0 {
		sel.MatchLabels = map[string]string{pick(r, "app", "tier"): pick(r, values...)}
	}
	if r.IntN(3) == 0 {
		e := metav1.LabelSelectorRequirement{Key: pick(r, "app", "tier"), Operator: pick(r,
			metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist)}
		if e.Operator == metav1.LabelSelectorOpIn || e.Operator == metav1.LabelSelectorOpNotIn {
			e.Values = []string{pick(r, values...), pick(r, values...)}
		}
		if r.IntN(20) == 0 {
			e.Operator = "Like"
		}
		sel.MatchExpressions = append(sel.MatchExpressions, e)
	}
	return sel
}

func peers(r *rand.Rand) (out []networkingv1.NetworkPolicyPeer) {
	n := r.IntN(4)
	if r.IntN(12) == 0 {
		n += 6 // more than a chain asks one by one
	}
	for range n {
		var p networkingv1.NetworkPolicyPeer
		switch r.IntN(5) {
		case 0:
			p.PodSelector = labelSelector(r)
		case 1:
			p.NamespaceSelector = labelSelector(r)
		case 2:
			p.PodSelector, p.NamespaceSelector = labelSelector(r), labelSelector(r)
		case 3:
			p.IPBlock = block(r)
		case 4:
			p.NamespaceSelector = &metav1.LabelSelector{}
			if r.IntN(2) == 0 {
				p.PodSelector = labelSelector(r)
			}
		}
		if r.IntN(40) == 0 {
			p = networkingv1.NetworkPolicyPeer{}
		}
		out = append(out, p)
	}
	return out
}

func block(r *rand.Rand) *networkingv1.IPBlock {
	b := pick(r,
		networkingv1.IPBlock{CIDR: "0.0.0.0/0", Except: []string{"203.0.113.128/25", "192.168.50.2/32"}},
		networkingv1.IPBlock{CIDR: "::/0", Except: []string{"2001:db8::100/120"}},
		networkingv1.IPBlock{CIDR: "203.0.113.7/24", Except: []string{"203.0.113.4/30"}},
		networkingv1.IPBlock{CIDR: "10.244.2.0/28"},
		networkingv1.IPBlock{CIDR: "10.244.0.0/16", Except: []string{"10.244.2.12/30", "10.244.1.11/32"}},
		networkingv1.IPBlock{CIDR: "192.168.50.0/25"},
		networkingv1.IPBlock{CIDR: "100.64.0.0/10", Except: []string{"100.64.0.3/32"}},
		networkingv1.IPBlock{CIDR: "fd00:244:2::/48"},
		networkingv1.IPBlock{CIDR: "203.0.113.5/32"},
		networkingv1.IPBlock{CIDR: "10.0.0.0/8", Except: []string{"10.0.0.0/8"}},
		networkingv1.IPBlock{CIDR: "everywhere"},
	)
	return &b
}

func policyPorts(r *rand.Rand) (out []networkingv1.NetworkPolicyPort) {
	if r.IntN(3) == 0 {
		return nil
	}
	for range 1 + r.IntN(3) {
		var p networkingv1.NetworkPolicyPort
		if r.IntN(4) > 0 {
			protocol := pick(r, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP)
			p.Protocol = &protocol
		}
		switch r.IntN(6) {
		case 0:
		case 1:
			p.Port = &intstr.IntOrString{Type: intstr.String, StrVal: pick(r, "http", "dns", "nobody")}
		case 2, 3:
			p.Port = &intstr.IntOrString{IntVal: int32(pick(r, numbers...))}
		case 4, 5:
			i := r.IntN(len(numbers) - 1)
			last := int32(numbers[i+r.IntN(len(numbers)-i)])
			p.Port, p.EndPort = &intstr.IntOrString{IntVal: int32(numbers[i])}, &last
		}
		if r.IntN(40) == 0 {
			last := int32(70000)
			p.EndPort = &last
		}
		out = append(out, p)
	}
	return out
}

// Probes lists n connections that pass the own node's forwarding and have a local pod as one end. Half of them are denied by the
// policies, where that many can be found: most random ones are allowed for the same dull reason.
func Probes(r *rand.Rand, s *policy.Snapshot, n int) []policy.Flow {
	ends := [2][]netip.Addr{}
	add := func(addrs []netip.Addr) {
		for _, a := range addrs {
			family := 0
			if a.Is6() {
				family = 1
			}
			ends[family] = append(ends[family], a)
		}
	}
	for _, kind := range allPods() {
		for _, a := range kind {
			add(a)
		}
	}
	for i := range Outside {
		add(External(i))
	}
	for _, node := range Nodes()[1:] {
		add(node.Addrs)
	}
	around := map[uint16]bool{0: true}
	for _, p := range numbers {
		around[p-1], around[p], around[p+1] = true, true, true
	}
	ports := slices.Sorted(maps.Keys(around))
	var denied, allowed []policy.Flow
	for range 8 * n {
		local := Local(r.IntN(LocalPods))[r.IntN(2)]
		family := 0
		if local.Is6() {
			family = 1
		}
		f := policy.Flow{Src: local, Dst: pick(r, ends[family]...), Protocol: pick(r, protocols...), Port: pick(r, ports...)}
		if r.IntN(2) == 0 {
			f.Src, f.Dst = f.Dst, f.Src
		}
		if r.IntN(12) == 0 {
			f.Protocol, f.Port = []policy.Protocol{1, 58}[family], 0
		}
		switch verdict := policy.Evaluate(s, f); {
		case !verdict.AllowedHere() && len(denied) < n/2:
			denied = append(denied, f)
		case verdict.AllowedHere() && len(allowed) < n-n/2:
			allowed = append(allowed, f)
		}
	}
	return append(denied, allowed...)
}
