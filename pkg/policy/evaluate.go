package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/validate/content"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
)

// Flow is a connection, by its own ends: the source before and the destination after all translation.
type Flow struct {
	Src, Dst netip.Addr
	// Protocol may be another one than policies can name, ICMP for one. Port has no meaning then.
	Protocol Protocol
	// Port is the destination's.
	Port uint16
}

// Verdict says whether a flow is allowed, by each of its ends.
type Verdict struct {
	Egress, Ingress Judgement
}

// Allowed reports whether both ends allow the flow, wherever they are.
func (v Verdict) Allowed() bool { return v.Egress.Allowed && v.Ingress.Allowed }

// AllowedHere reports whether the own node lets the flow pass: it judges for its own pods.
func (v Verdict) AllowedHere() bool {
	return (v.Egress.Allowed || !v.Egress.Here) && (v.Ingress.Allowed || !v.Ingress.Here)
}

// Judgement is what the policies of one end's pod say.
type Judgement struct {
	Allowed bool
	// Here: the pod is on the own node, which enforces this.
	Here bool
	// Pod is NAMESPACE/NAME of the pod, "" where the end is none.
	Pod string
	// Reason tells why, where no rule does.
	Reason Reason
	// Isolating are the policies (NAMESPACE/NAME) that isolate the pod in this direction, in order of name.
	Isolating []string
	// Rules are all that allow the flow.
	Rules []Match
}

// Reason is why policies do not decide.
type Reason string

// The reasons for a judgement that comes from no rule.
const (
	NoPod       Reason = "no pod has this address"
	NotIsolated Reason = "no policy selects the pod"
	OwnNode     Reason = "the other end is the pod's own node"
	Itself      Reason = "the other end is the pod itself"
	Contested   Reason = "several running pods claim this address"
)

// Match is the place in a policy that allows a flow. Indexes count from 0; -1 stands for a list that is absent or empty, which
// allows all.
type Match struct {
	Policy           string
	Rule, Peer, Port int
}

// Evaluate judges a flow as the API's documentation has it. It reads all policies each time: what is to be fast must share no
// code with it, so that it can be held against it.
func Evaluate(s *Snapshot, f Flow) Verdict {
	e := evaluator{s}
	return Verdict{
		Egress:  e.judge(f, f.Src, f.Dst, networkingv1.PolicyTypeEgress),
		Ingress: e.judge(f, f.Dst, f.Src, networkingv1.PolicyTypeIngress),
	}
}

type evaluator struct{ *Snapshot }

// judge asks the policies of the pod at the address own.
func (e evaluator) judge(f Flow, own, other netip.Addr, dir networkingv1.PolicyType) Judgement {
	pods := e.podsAt(own)
	if len(pods) == 0 {
		return Judgement{Allowed: true, Reason: NoPod}
	}
	pod := pods[0]
	j := Judgement{Pod: pod.Namespace + "/" + pod.Name, Here: pod.Node == e.Node}
	for _, p := range e.Policies {
		if p == nil || !e.isolates(p, dir) {
			continue
		}
		if slices.ContainsFunc(pods, func(pod *Pod) bool { return isSubject(p, pod) }) {
			j.Isolating = append(j.Isolating, p.Namespace+"/"+p.Name)
			j.Rules = append(j.Rules, e.matches(p, pod, other, f, dir)...)
		}
	}
	slices.Sort(j.Isolating)
	slices.SortStableFunc(j.Rules, func(a, b Match) int { return strings.Compare(a.Policy, b.Policy) })
	switch {
	case other == own:
		j.Allowed, j.Reason = true, Itself
	case e.isNode(pod.Node, other):
		j.Allowed, j.Reason = true, OwnNode
	case len(j.Isolating) == 0:
		j.Allowed, j.Reason = true, NotIsolated
	case len(pods) > 1:
		j.Reason = Contested
	default:
		j.Allowed = len(j.Rules) > 0
	}
	if j.Reason != "" {
		j.Rules = nil
	}
	return j
}

// podsAt finds whose address it is. A pod of the own node comes before others': its link is here. Then a pod that terminates gives
// way to one that does not: the address is another's by then. Two of one rank cannot both have it, and nobody can tell whose
// packets these are: both are the answer.
func (e evaluator) podsAt(a netip.Addr) (pods []*Pod) {
	rank := func(p *Pod) (r int) {
		if p.Node == e.Node {
			r += 2
		}
		if !p.Terminating {
			r++
		}
		return r
	}
	best := -1
	for _, p := range e.Pods {
		switch {
		case !p.networked() || !slices.Contains(p.IPs, a):
		case rank(p) > best:
			best, pods = rank(p), []*Pod{p}
		case rank(p) == best:
			pods = append(pods, p)
		}
	}
	slices.SortFunc(pods, func(a, b *Pod) int {
		return cmp.Or(strings.Compare(string(a.UID), string(b.UID)), strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	return pods
}

func (e evaluator) isNode(name string, a netip.Addr) bool {
	return slices.ContainsFunc(e.Nodes, func(n Node) bool { return n.Name == name && slices.Contains(n.Addrs, a) })
}

// isolates reports whether the policy concerns a direction. Without policyTypes it concerns ingress, and egress if it has rules for
// that. A type that nobody knows may have been meant to be either.
func (evaluator) isolates(p *networkingv1.NetworkPolicy, dir networkingv1.PolicyType) bool {
	types := p.Spec.PolicyTypes
	if len(types) == 0 {
		return dir == networkingv1.PolicyTypeIngress || len(p.Spec.Egress) > 0
	}
	for _, t := range types {
		if t == dir || t != networkingv1.PolicyTypeIngress && t != networkingv1.PolicyTypeEgress {
			return true
		}
	}
	return false
}

// isSubject reports whether the policy is for the pod. What cannot be understood of a selector narrows nothing: the policy isolates
// all that it may have meant.
func isSubject(p *networkingv1.NetworkPolicy, pod *Pod) bool {
	no, _ := selectorSays(&p.Spec.PodSelector, pod.Labels)
	return p.Namespace == pod.Namespace && !no
}

// matches lists what allows the flow.
func (e evaluator) matches(p *networkingv1.NetworkPolicy, pod *Pod, other netip.Addr, f Flow, dir networkingv1.PolicyType) (out []Match) {
	// Whom a selector that cannot be understood was for nobody knows: it gives rights to nobody.
	if _, unclear := selectorSays(&p.Spec.PodSelector, pod.Labels); unclear {
		return nil
	}
	type rule struct {
		peers []networkingv1.NetworkPolicyPeer
		ports []networkingv1.NetworkPolicyPort
	}
	var rules []rule
	if dir == networkingv1.PolicyTypeIngress {
		for _, r := range p.Spec.Ingress {
			rules = append(rules, rule{r.From, r.Ports})
		}
	} else {
		for _, r := range p.Spec.Egress {
			rules = append(rules, rule{r.To, r.Ports})
		}
	}
	for i, r := range rules {
		for _, peer := range allOf(len(r.peers)) {
			if peer >= 0 && !e.isPeer(&r.peers[peer], p.Namespace, other) {
				continue
			}
			for _, port := range allOf(len(r.ports)) {
				if port < 0 || e.isPort(&r.ports[port], f) {
					out = append(out, Match{p.Namespace + "/" + p.Name, i, peer, port})
				}
			}
		}
	}
	return out
}

// allOf lists the indexes of a list, and -1 for an empty one.
func allOf(n int) []int {
	if n == 0 {
		return []int{-1}
	}
	var out []int
	for i := range n {
		out = append(out, i)
	}
	return out
}

// isPeer reports whether the peer of a policy in a namespace is who has the address.
func (e evaluator) isPeer(peer *networkingv1.NetworkPolicyPeer, namespace string, a netip.Addr) bool {
	if peer.IPBlock != nil {
		return peer.PodSelector == nil && peer.NamespaceSelector == nil && e.inBlock(peer.IPBlock, a)
	}
	if peer.PodSelector == nil && peer.NamespaceSelector == nil {
		return false
	}
	if peer.NamespaceSelector != nil && empty(peer.NamespaceSelector) && (peer.PodSelector == nil || empty(peer.PodSelector)) {
		// All pods of all namespaces: the cluster's, those not seen yet too.
		return slices.ContainsFunc(e.PodCIDRs, func(c netip.Prefix) bool { return c.Contains(a) })
	}
	// Where several pods claim the address, nobody can tell who it is: all of them must be peers.
	pods := e.podsAt(a)
	return len(pods) > 0 && !slices.ContainsFunc(pods, func(pod *Pod) bool {
		return peer.NamespaceSelector == nil && pod.Namespace != namespace ||
			peer.NamespaceSelector != nil && !e.namespaceIs(peer.NamespaceSelector, pod.Namespace) ||
			peer.PodSelector != nil && !selects(peer.PodSelector, pod.Labels)
	})
}

// namespaceIs: a namespace that is not known (yet) has no labels to ask, which is not the same as to lack them.
func (e evaluator) namespaceIs(sel *metav1.LabelSelector, name string) bool {
	if empty(sel) {
		return true
	}
	for _, n := range e.Namespaces {
		if n.Name == name {
			return selects(sel, n.Labels)
		}
	}
	return false
}

// inBlock: a node is known by all its addresses. A block that excepts one of them excepts all, and one that holds one holds all.
func (e evaluator) inBlock(b *networkingv1.IPBlock, a netip.Addr) bool {
	cidr, err := netip.ParsePrefix(b.CIDR)
	if err != nil {
		return false
	}
	var except []netip.Prefix
	for _, text := range b.Except {
		x, err := netip.ParsePrefix(text)
		if err != nil {
			return false
		}
		except = append(except, x)
	}
	excepted := func(a netip.Addr) bool {
		return slices.ContainsFunc(except, func(x netip.Prefix) bool { return x.Contains(a) })
	}
	in := cidr.Contains(a) && !excepted(a)
	for _, n := range e.Nodes {
		if !slices.Contains(n.Addrs, a) {
			continue
		}
		switch {
		case slices.ContainsFunc(n.Addrs, excepted):
			return false
		case slices.ContainsFunc(n.Addrs, cidr.Contains):
			in = true
		}
	}
	return in
}

// isPort reports whether the flow is for a port. A port's name means what the destination's pod has by that name.
func (e evaluator) isPort(p *networkingv1.NetworkPolicyPort, f Flow) bool {
	protocol := TCP
	if p.Protocol != nil {
		switch *p.Protocol {
		case corev1.ProtocolTCP:
		case corev1.ProtocolUDP:
			protocol = UDP
		case corev1.ProtocolSCTP:
			protocol = SCTP
		default:
			return false
		}
	}
	if f.Protocol != protocol {
		return false
	}
	if p.Port == nil {
		return p.EndPort == nil
	}
	switch p.Port.Type {
	case intstr.Int:
		first, last := p.Port.IntVal, p.Port.IntVal
		if p.EndPort != nil {
			last = *p.EndPort
		}
		return first >= 1 && last <= 65535 && first <= int32(f.Port) && int32(f.Port) <= last
	case intstr.String:
		return p.EndPort == nil && e.hasNamedPort(f.Dst, NamedPort{p.Port.StrVal, protocol, f.Port})
	}
	return false
}

func (e evaluator) hasNamedPort(a netip.Addr, want NamedPort) bool {
	pods := e.podsAt(a)
	return len(pods) == 1 && slices.Contains(pods[0].Ports, want)
}

func empty(sel *metav1.LabelSelector) bool {
	return len(sel.MatchLabels)+len(sel.MatchExpressions) == 0
}

// selects reports whether a selector certainly selects labels.
func selects(sel *metav1.LabelSelector, labels map[string]string) bool {
	no, unclear := selectorSays(sel, labels)
	return !no && !unclear
}

// selectorSays asks each requirement of a selector: whether one says no, and whether one cannot be understood.
func selectorSays(sel *metav1.LabelSelector, labels map[string]string) (no, unclear bool) {
	for key, want := range sel.MatchLabels {
		if !validKey(key) || !validValue(want) {
			unclear = true
			continue
		}
		if got, has := labels[key]; !has || got != want {
			no = true
		}
	}
	for _, r := range sel.MatchExpressions {
		got, has := labels[r.Key]
		listed := slices.Contains(r.Values, got)
		var yes, understood bool
		switch r.Operator {
		case metav1.LabelSelectorOpIn:
			yes, understood = has && listed, len(r.Values) > 0
		case metav1.LabelSelectorOpNotIn:
			yes, understood = !has || !listed, len(r.Values) > 0
		case metav1.LabelSelectorOpExists:
			yes, understood = has, len(r.Values) == 0
		case metav1.LabelSelectorOpDoesNotExist:
			yes, understood = !has, len(r.Values) == 0
		}
		if !understood || !validKey(r.Key) || slices.ContainsFunc(r.Values, func(v string) bool { return !validValue(v) }) {
			unclear = true
		} else if !yes {
			no = true
		}
	}
	return no, unclear
}

func validKey(key string) bool { return len(content.IsLabelKey(key)) == 0 }

func validValue(value string) bool { return len(validation.IsValidLabelValue(value)) == 0 }
