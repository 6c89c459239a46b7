package policy

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// understood is a policy made ready for the pods that it selects.
type understood struct {
	serial   uint64 // no other has it
	id       string // NAMESPACE/NAME
	subject  selector
	isolates [2]bool // by Direction
	rules    [2][]rule
	faults   []Fault
	done     bool
}

// rule grants a flow that is one of its ports' and whose other end is one of its peers.
type rule struct {
	peers *peers
	// anyPort: ports are not asked, nor is the protocol.
	anyPort bool
	ranges  []portRange
	named   []NamedPort // with Port 0
}

type portRange struct {
	protocol    Protocol
	first, last uint16
}

// read understands the rules of a policy, once. What cannot be understood isolates whom it may have meant and grants nothing.
func (u *understood) read(c *cluster, p *networkingv1.NetworkPolicy) {
	if u.done {
		return
	}
	u.done = true
	fault := func(format string, args ...any) {
		u.faults = append(u.faults, Fault{u.id, fmt.Sprintf(format, args...)})
	}
	u.isolates[Ingress] = len(p.Spec.PolicyTypes) == 0
	u.isolates[Egress] = len(p.Spec.PolicyTypes) == 0 && len(p.Spec.Egress) > 0
	for _, t := range p.Spec.PolicyTypes {
		u.isolates[Ingress] = u.isolates[Ingress] || t != networkingv1.PolicyTypeEgress
		u.isolates[Egress] = u.isolates[Egress] || t != networkingv1.PolicyTypeIngress
		if t != networkingv1.PolicyTypeIngress && t != networkingv1.PolicyTypeEgress {
			fault("policyTypes: %q: known are Ingress and Egress: it isolates both ways", t)
		}
	}
	if u.subject.unclear != nil {
		fault("podSelector: %v: every pod that it may have meant is isolated, and the policy grants nothing", u.subject.unclear)
		return
	}
	inRule := func(dir string, i int) func(string, ...any) {
		return func(format string, args ...any) { fault(dir+" rule %d: "+format, append([]any{i + 1}, args...)...) }
	}
	if u.isolates[Ingress] {
		for i, r := range p.Spec.Ingress {
			u.rules[Ingress] = append(u.rules[Ingress], c.rule(p.Namespace, r.From, r.Ports, inRule("ingress", i)))
		}
	}
	if u.isolates[Egress] {
		for i, r := range p.Spec.Egress {
			u.rules[Egress] = append(u.rules[Egress], c.rule(p.Namespace, r.To, r.Ports, inRule("egress", i)))
		}
	}
}

func (c *cluster) rule(namespace string, list []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort, fault func(string, ...any)) rule {
	r := rule{peers: c.peersOf(namespace, list, fault), anyPort: len(ports) == 0}
	for i := range ports {
		if err := r.addPort(&ports[i]); err != nil {
			fault("port %d: %v: it stands for no port", i+1, err)
		}
	}
	return r
}

func (r *rule) addPort(p *networkingv1.NetworkPolicyPort) error {
	protocol := TCP
	if p.Protocol != nil {
		var known bool
		protocol, known = map[corev1.Protocol]Protocol{corev1.ProtocolTCP: TCP, corev1.ProtocolUDP: UDP, corev1.ProtocolSCTP: SCTP}[*p.Protocol]
		if !known {
			return fmt.Errorf("protocol %q: known are TCP, UDP and SCTP", *p.Protocol)
		}
	}
	switch {
	case p.Port == nil && p.EndPort != nil:
		return fmt.Errorf("endPort without port")
	case p.Port == nil:
		r.ranges = append(r.ranges, portRange{protocol, 0, 65535})
	case p.Port.Type == intstr.Int:
		first, last := p.Port.IntVal, p.Port.IntVal
		if p.EndPort != nil {
			last = *p.EndPort
		}
		if first < 1 || last > 65535 || last < first {
			return fmt.Errorf("%d to %d: want 1 to 65535, the first not above the last", first, last)
		}
		r.ranges = append(r.ranges, portRange{protocol, uint16(first), uint16(last)})
	case p.EndPort != nil:
		return fmt.Errorf("endPort with a port's name")
	case p.Port.Type == intstr.String:
		r.named = append(r.named, NamedPort{Name: p.Port.StrVal, Protocol: protocol})
	default:
		return fmt.Errorf("neither a number nor a name")
	}
	return nil
}

// numbers are a pod's ports of a name and protocol.
func numbers(pod *Pod, want NamedPort) (out []uint16) {
	for _, p := range pod.Ports {
		if p.Name == want.Name && p.Protocol == want.Protocol {
			out = append(out, p.Port)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
