package policytest

import (
	"fmt"
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

// Large makes a cluster as people have them, for measurements: nodes of 110 pods, ten pods of each namespace and ten policies of each
// hundred pods, or as many as are asked for. Half of the policies name peers of the own namespace, the others a team's in all
// namespaces, blocks or ports.
func Large(pods, policies int) *policy.Snapshot {
	r := rand.New(rand.NewPCG(uint64(pods), uint64(policies)))
	s := &policy.Snapshot{Node: "node-0", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00:10::/32")}}
	spaces := max(pods/50, 1)
	for i := range spaces {
		s.Namespaces = append(s.Namespaces, policy.Namespace{Name: fmt.Sprint("ns-", i), Labels: map[string]string{
			"kubernetes.io/metadata.name": fmt.Sprint("ns-", i), "team": fmt.Sprint("team-", i%20)}})
	}
	for i := range pods {
		node, on := i/110, i%110
		p := &policy.Pod{
			Namespace: fmt.Sprint("ns-", r.IntN(spaces)), Name: fmt.Sprint("pod-", i), UID: types.UID(fmt.Sprint(i)), Node: fmt.Sprint("node-", node),
			Labels: map[string]string{"app": fmt.Sprint("app-", r.IntN(10)), "tier": fmt.Sprint("tier-", r.IntN(3)), "version": fmt.Sprint("v", r.IntN(4))},
			IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(node >> 8), byte(node), byte(10 + on)}),
				netip.MustParseAddr(fmt.Sprintf("fd00:10:%x::%x", node, 10+on))},
		}
		if i%2 == 0 {
			p.Ports = []policy.NamedPort{{Name: "http", Protocol: policy.TCP, Port: 8080}}
		}
		s.Pods = append(s.Pods, p)
	}
	for i := range (pods + 109) / 110 {
		s.Nodes = append(s.Nodes, policy.Node{Name: fmt.Sprint("node-", i), Addrs: []netip.Addr{
			netip.AddrFrom4([4]byte{192, 168, byte(i >> 8), byte(i)}), netip.AddrFrom4([4]byte{100, 64, byte(i >> 8), byte(i + 1)})}})
	}
	for i := range policies {
		s.Policies = append(s.Policies, LargePolicy(r, fmt.Sprint("ns-", i%spaces), fmt.Sprint("policy-", i)))
	}
	return s
}

// LargePolicy makes one of Large's policies.
func LargePolicy(r *rand.Rand, namespace, name string) *networkingv1.NetworkPolicy {
	is := func(key string, n int) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchLabels: map[string]string{key: fmt.Sprintf("%s-%d", key, r.IntN(n))}}
	}
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
	p.Spec.PodSelector = *is("app", 10)
	p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
	var peer networkingv1.NetworkPolicyPeer
	switch r.IntN(6) {
	case 0, 1, 2:
		peer.PodSelector = is("app", 10)
	case 3:
		peer.NamespaceSelector, peer.PodSelector = is("team", 20), is("app", 10)
	case 4:
		peer.IPBlock = &networkingv1.IPBlock{CIDR: fmt.Sprintf("172.%d.%d.0/24", 16+r.IntN(16), r.IntN(256))}
	case 5:
		peer.NamespaceSelector = is("team", 20)
	}
	port := intstr.FromInt32(int32(8000 + r.IntN(10)))
	if r.IntN(10) == 0 {
		port = intstr.FromString("http")
	}
	dns, udp := intstr.FromInt32(53), corev1.ProtocolUDP
	p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{peer}, Ports: []networkingv1.NetworkPolicyPort{{Port: &port}}}}
	p.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{
		{To: []networkingv1.NetworkPolicyPeer{peer}},
		{To: []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{}}}, Ports: []networkingv1.NetworkPolicyPort{{Port: &dns, Protocol: &udp}}},
	}
	return p
}

// LargeChange returns a large cluster after one change: another policy in the place of one, or a pod with the labels of another,
// on the own node one time in three.
func LargeChange(r *rand.Rand, old *policy.Snapshot) *policy.Snapshot {
	s := *old
	if r.IntN(3) == 0 && len(s.Policies) > 0 {
		s.Policies = slices.Clone(s.Policies)
		i := r.IntN(len(s.Policies))
		s.Policies[i] = LargePolicy(r, s.Policies[i].Namespace, s.Policies[i].Name)
		return &s
	}
	s.Pods = slices.Clone(s.Pods)
	i := r.IntN(len(s.Pods))
	if r.IntN(3) == 0 {
		i = r.IntN(min(110, len(s.Pods)))
	}
	p := *s.Pods[i]
	p.Labels = s.Pods[r.IntN(len(s.Pods))].Labels
	s.Pods[i] = &p
	return &s
}
