package policy

import (
	"net/netip"
	"slices"
)

// Elements answers what a packet's look-ups find. A Ruleset does, and so does the kernel that holds it.
type Elements interface {
	// Dispatch returns the class chain of an isolated local pod's address.
	Dispatch(dir Direction, a netip.Addr) (chain string, found bool, err error)
	// Port returns what a port map has for a port: the chain to ask, or "" for every peer.
	Port(portMap string, p Protocol, port uint16) (jump string, found bool, err error)
	// Has reports whether a set holds an address or, if it is one of endpoints, an endpoint. m.Last has no meaning.
	Has(set string, m Member) (bool, error)
}

// Dispatch implements Elements.
func (r *Ruleset) Dispatch(dir Direction, a netip.Addr) (string, bool, error) {
	chains := r.Out
	if dir == Ingress {
		chains = r.In
	}
	chain, found := chains[a]
	return chain, found, nil
}

// Port implements Elements.
func (r *Ruleset) Port(portMap string, p Protocol, port uint16) (string, bool, error) {
	if m := r.Maps[portMap]; m != nil {
		for _, e := range m.Elements {
			if e.Protocol == p && e.First <= port && port <= e.Last {
				return e.Jump, true, nil
			}
		}
	}
	return "", false, nil
}

// Has implements Elements.
func (r *Ruleset) Has(set string, m Member) (bool, error) {
	s := r.Sets[set]
	if s == nil {
		return false, nil
	}
	if s.Kind == Blocks {
		return slices.ContainsFunc(s.Members, func(b Member) bool { return b.Addr.Compare(m.Addr) <= 0 && m.Addr.Compare(b.Last) <= 0 }), nil
	}
	_, found := slices.BinarySearchFunc(s.Members, m, Member.Compare)
	return found, nil
}

// Judge walks the chains as a flow's first packet does in one direction, with look-ups in have. The chains are those of r. Flows with
// the own node pass no chain, and are not for Judge.
func (r *Ruleset) Judge(have Elements, dir Direction, f Flow) (allowed bool, err error) {
	own, other := f.Dst, f.Src
	if dir == Egress {
		own, other = f.Src, f.Dst
	}
	chain, isolated, err := have.Dispatch(dir, own)
	if err != nil || !isolated || own == other {
		return err == nil, err
	}
	return r.walk(have, chain, other, f)
}

func (r *Ruleset) walk(have Elements, chain string, other netip.Addr, f Flow) (accepted bool, err error) {
	c := r.Chains[chain]
	if c == nil {
		return false, nil
	}
	for _, rule := range c.Rules {
		switch rule.Kind {
		case PeerIn:
			if rule.IPv6 == other.Is6() {
				accepted, err = have.Has(rule.Ref, Member{Addr: other})
			}
		case EndpointIn:
			if rule.IPv6 == other.Is6() {
				accepted, err = have.Has(rule.Ref, Member{Addr: other, Protocol: f.Protocol, Port: f.Port})
			}
		case PortsOf, RangesOf:
			if rule.Kind == RangesOf && rule.Protocol != f.Protocol {
				continue
			}
			var jump string
			var found bool
			if jump, found, err = have.Port(rule.Ref, f.Protocol, f.Port); found && jump != "" {
				accepted, err = r.walk(have, jump, other, f)
			} else {
				accepted = found
			}
		}
		if accepted || err != nil {
			return accepted, err
		}
	}
	return false, nil
}
