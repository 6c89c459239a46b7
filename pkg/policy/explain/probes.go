package explain

import (
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/headcni/headcni/pkg/policy"
)

const (
	// portProbes bounds the ports that are tried between two addresses, and sampleProbes the connections of a sample.
	portProbes   = 400
	sampleProbes = 400
	// setMembers, samplePods and sampleEdges bound the other ends of a sample: members of each set that the pod's rules ask, pods of
	// anybody, and edges of blocks.
	setMembers, samplePods, sampleEdges = 2, 16, 16
)

type protocolPort struct {
	policy.Protocol
	port uint16
}

// probes are connections between two addresses: ICMP first, and then each port that policies name, with its neighbours: where they
// agree, all ports do. capped: policies name more than were taken.
func probes(s *policy.Snapshot, src, dst netip.Addr) (flows []policy.Flow, capped bool) {
	ports := map[protocolPort]bool{}
	for _, p := range []policy.Protocol{policy.TCP, policy.UDP, policy.SCTP} {
		ports[protocolPort{p, 9}] = true // discard's, which few name
	}
	add := func(p policy.Protocol, n int32) {
		for _, n := range []int32{n - 1, n, n + 1} {
			if n >= 1 && n <= 65535 {
				ports[protocolPort{p, uint16(n)}] = true
			}
		}
	}
	for _, list := range portLists(s) {
		for i := range list {
			p := &list[i]
			protocol := protocolOf(p)
			switch {
			case p.Port == nil:
			case p.Port.Type == intstr.Int:
				add(protocol, p.Port.IntVal)
				if p.EndPort != nil {
					add(protocol, *p.EndPort)
				}
			default:
				for _, n := range named(s, dst, p.Port.StrVal, protocol) {
					add(protocol, int32(n))
				}
			}
		}
	}
	flows = append(flows, policy.Flow{Src: src, Dst: dst, Protocol: icmp(dst)})
	for _, p := range slices.SortedFunc(maps.Keys(ports), func(a, b protocolPort) int {
		return int(a.Protocol)<<16 + int(a.port) - int(b.Protocol)<<16 - int(b.port)
	}) {
		flows = append(flows, policy.Flow{Src: src, Dst: dst, Protocol: p.Protocol, Port: p.port})
	}
	return flows[:min(len(flows), portProbes)], len(flows) > portProbes
}

func portLists(s *policy.Snapshot) (out [][]networkingv1.NetworkPolicyPort) {
	for _, p := range s.Policies {
		for _, r := range p.Spec.Ingress {
			out = append(out, r.Ports)
		}
		for _, r := range p.Spec.Egress {
			out = append(out, r.Ports)
		}
	}
	return out
}

// protocolOf is TCP for one that nobody knows: the evaluator says what that is worth.
func protocolOf(p *networkingv1.NetworkPolicyPort) policy.Protocol {
	if p.Protocol != nil {
		switch *p.Protocol {
		case corev1.ProtocolUDP:
			return policy.UDP
		case corev1.ProtocolSCTP:
			return policy.SCTP
		}
	}
	return policy.TCP
}

// named are the ports that the pods at an address call so.
func named(s *policy.Snapshot, a netip.Addr, name string, protocol policy.Protocol) (out []uint16) {
	for _, pod := range s.Pods {
		if !slices.Contains(pod.IPs, a) {
			continue
		}
		for _, p := range pod.Ports {
			if p.Name == name && p.Protocol == protocol && !slices.Contains(out, p.Port) {
				out = append(out, p.Port)
			}
		}
	}
	return out
}

// sample are connections of a pod with others, in one direction: with members of the sets that the pod's rules ask, with some
// pods, with nodes, and with edges of blocks.
func (a *answerer) sample(own []netip.Addr, dir policy.Direction) (out []judged) {
	for _, addr := range own {
		for _, other := range a.others(addr, dir) {
			src, dst := addr, other
			if dir == policy.Ingress {
				src, dst = other, addr
			}
			s := narrow(a.Snapshot, src, dst)
			flows, _ := probes(s, src, dst)
			for _, f := range flows {
				if len(out) == sampleProbes {
					return out
				}
				out = append(out, judged{f, policy.Evaluate(s, f)})
			}
		}
	}
	return out
}

// others are the other ends of a sample, of the address's family.
func (a *answerer) others(own netip.Addr, dir policy.Direction) []netip.Addr {
	found := map[netip.Addr]bool{}
	add := func(addrs ...netip.Addr) {
		for _, x := range addrs {
			if x.Is6() == own.Is6() && x != own && x.IsValid() {
				found[x] = true
			}
		}
	}
	chain, _, _ := a.Rules.Dispatch(dir, own) // a Ruleset has no errors
	edges := 0
	for _, name := range slices.Sorted(maps.Keys(a.setsOf(chain, map[string]bool{}))) {
		set := a.Rules.Sets[name]
		for i, m := range set.Members {
			switch {
			case set.Kind != policy.Blocks && i < setMembers:
				add(m.Addr)
			case set.Kind == policy.Blocks && edges < sampleEdges:
				edges++
				add(m.Addr.Prev(), m.Addr, m.Last, m.Last.Next())
			}
		}
	}
	pods := a.Snapshot.Pods
	for i := 0; i < len(pods); i += max(1, len(pods)/samplePods) {
		add(pods[i].IPs...)
	}
	for _, n := range a.Snapshot.Nodes[:min(len(a.Snapshot.Nodes), samplePods)] {
		add(n.Addrs...)
	}
	add(netip.MustParseAddr("192.0.2.1"), nobody) // RFC 5737
	return slices.SortedFunc(maps.Keys(found), netip.Addr.Compare)
}

// setsOf are the sets that a chain asks, and those of the chains that it leads to.
func (a *answerer) setsOf(chain string, found map[string]bool) map[string]bool {
	c := a.Rules.Chains[chain]
	if c == nil {
		return found
	}
	for _, r := range c.Rules {
		switch r.Kind {
		case policy.PeerIn, policy.EndpointIn:
			found[r.Ref] = true
		default:
			for _, e := range a.Rules.Maps[r.Ref].Elements {
				a.setsOf(e.Jump, found)
			}
		}
	}
	return found
}
