package explain

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/headcni/headcni/internal/printable"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/report"
)

// selectorShown is how much of a selector is shown, in characters: it may have thousands of values.
const selectorShown = 200

// rule is one of a policy, whatever its direction.
type rule struct {
	peers []networkingv1.NetworkPolicyPeer
	ports []networkingv1.NetworkPolicyPort
}

func rulesIn(p *networkingv1.NetworkPolicy, dir policy.Direction) (out []rule) {
	if dir == policy.Ingress {
		for _, r := range p.Spec.Ingress {
			out = append(out, rule{r.From, r.Ports})
		}
		return out
	}
	for _, r := range p.Spec.Egress {
		out = append(out, rule{r.To, r.Ports})
	}
	return out
}

func policyOf(s *policy.Snapshot, name string) *networkingv1.NetworkPolicy {
	for _, p := range s.Policies {
		if p != nil && p.Namespace+"/"+p.Name == name {
			return p
		}
	}
	return nil
}

// rulesOf lists what allows any of the connections.
func rulesOf(s *policy.Snapshot, dir policy.Direction, all []judged) (out []report.Rule) {
	type place struct {
		policy     string
		rule, peer int
	}
	ports := map[place][]int{}
	for _, j := range all {
		for _, m := range j.side(dir).Rules {
			at := place{m.Policy, m.Rule, m.Peer}
			if !slices.Contains(ports[at], m.Port) {
				ports[at] = append(ports[at], m.Port)
			}
		}
	}
	for at, list := range ports {
		slices.Sort(list)
		p := policyOf(s, at.policy)
		out = append(out, describe(p, dir, at.rule, at.peer, list, func(name string, protocol policy.Protocol) []uint16 {
			return named(s, all[0].Dst, name, protocol)
		}))
	}
	slices.SortFunc(out, func(a, b report.Rule) int {
		return cmp.Or(strings.Compare(a.Policy, b.Policy), a.Rule-b.Rule, a.Peer-b.Peer)
	})
	return out
}

// allRules lists all rules of policies.
func allRules(s *policy.Snapshot, dir policy.Direction, pod *policy.Pod, of []string) (out []report.Rule) {
	numbers := func(name string, protocol policy.Protocol) []uint16 {
		if dir == policy.Egress {
			return nil // each peer's own
		}
		return named(s, pod.IPs[0], name, protocol)
	}
	for _, name := range of {
		p := policyOf(s, name)
		if _, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector); err != nil {
			continue // it grants nothing, and its fault says so
		}
		for i, r := range rulesIn(p, dir) {
			var ports []int
			for n := range r.ports {
				ports = append(ports, n)
			}
			if len(r.peers) == 0 {
				out = append(out, describe(p, dir, i, -1, ports, numbers))
			}
			for peer := range r.peers {
				out = append(out, describe(p, dir, i, peer, ports, numbers))
			}
		}
	}
	return out
}

// describe puts a peer of a rule into words, with some of its ports. Indexes count from 0, and -1 stands for a list that is absent.
func describe(p *networkingv1.NetworkPolicy, dir policy.Direction, at, peer int, ports []int, numbers func(string, policy.Protocol) []uint16) report.Rule {
	r := rulesIn(p, dir)[at]
	out := report.Rule{Policy: p.Namespace + "/" + p.Name, Rule: at + 1, Peer: peer + 1, Who: "everybody"}
	if peer >= 0 {
		out.Who = peerText(&r.peers[peer], p.Namespace)
	}
	for _, n := range ports {
		if n >= 0 {
			out.Ports = append(out.Ports, report.Port{Port: n + 1, Text: portOf(&r.ports[n], dir, numbers)})
		}
	}
	return out
}

func peerText(p *networkingv1.NetworkPolicyPeer, namespace string) string {
	var parts []string
	if b := p.IPBlock; b != nil {
		text := "ipBlock " + b.CIDR
		if len(b.Except) > 0 {
			text += " except " + strings.Join(b.Except, ", ")
		}
		parts = append(parts, printable.Cut(text, selectorShown))
	}
	if p.NamespaceSelector != nil {
		parts = append(parts, "namespaceSelector "+selectorText(p.NamespaceSelector, "all namespaces"))
	}
	if p.PodSelector != nil {
		text := "podSelector " + selectorText(p.PodSelector, "all pods")
		if p.NamespaceSelector == nil {
			text += " in " + namespace
		}
		parts = append(parts, text)
	}
	if len(parts) == 0 {
		return "nothing, which stands for nobody"
	}
	return strings.Join(parts, " and ")
}

func selectorText(sel *metav1.LabelSelector, all string) string {
	if len(sel.MatchLabels)+len(sel.MatchExpressions) == 0 {
		return "{} (" + all + ")"
	}
	if _, err := metav1.LabelSelectorAsSelector(sel); err != nil {
		return "that cannot be understood"
	}
	return printable.Cut(metav1.FormatLabelSelector(sel), selectorShown)
}

func portOf(p *networkingv1.NetworkPolicyPort, dir policy.Direction, numbers func(string, policy.Protocol) []uint16) string {
	protocol := "tcp"
	if p.Protocol != nil {
		protocol = strings.ToLower(string(*p.Protocol))
	}
	switch {
	case p.Port == nil:
		return "all of " + protocol
	case p.Port.Type == intstr.Int && p.EndPort != nil:
		return fmt.Sprintf("%d-%d/%s", p.Port.IntVal, *p.EndPort, protocol)
	case p.Port.Type == intstr.Int:
		return fmt.Sprintf("%d/%s", p.Port.IntVal, protocol)
	}
	text := p.Port.StrVal + "/" + protocol
	found := numbers(p.Port.StrVal, protocolOf(p))
	switch {
	case len(found) > 0:
		return fmt.Sprintf("%s (%s)", text, strings.Trim(fmt.Sprint(found), "[]"))
	case dir == policy.Ingress:
		return text + " (the pod has none of that name)"
	}
	return text + " (as the other end names it)"
}
