package policy

import (
	"cmp"
	"net/netip"
)

// Ruleset is what the kernel is to hold for the own node's pods. Its objects refer to each other by name. Chains, port maps and
// block sets never change: their names are hashes of their content. Address and endpoint sets are named after what they stand for,
// and their elements come and go.
//
// A Ruleset is read-only once it is made, and shares objects with others that were compiled before it.
type Ruleset struct {
	Sets   map[string]*Set
	Maps   map[string]*PortMap
	Chains map[string]*Chain
	// In and Out name the class chain of each isolated local pod's address, for what comes to it and for what it begins.
	In, Out map[netip.Addr]string
	// Faults are what could not be understood of the policies, in order of policy.
	Faults []Fault
}

// Fault is a part of a policy that cannot be enforced as it stands. Such a part never gives rights to anybody.
type Fault struct {
	// Policy is NAMESPACE/NAME.
	Policy string
	// Problem says which part, why, and what happens instead.
	Problem string
}

// Direction is a pod's side of a connection.
type Direction uint8

// The directions.
const (
	Ingress Direction = iota
	Egress
)

// String returns the direction's word in the names of chains.
func (d Direction) String() string {
	if d == Ingress {
		return "in"
	}
	return "out"
}

// SetKind is what a set holds.
type SetKind uint8

// The kinds of sets.
const (
	// Addresses of pods, which change.
	Addresses SetKind = iota
	// Blocks of addresses, as intervals that do not touch each other. They never change.
	Blocks
	// Endpoints are ports of pods: address, protocol, port.
	Endpoints
)

// Set is a set of one family's peers.
type Set struct {
	Name string
	Kind SetKind
	IPv6 bool
	// Members are sorted, and each is there once. Of Blocks they are Range, of Addresses they have neither Last nor Port.
	Members []Member
}

// Member is an element of a set.
type Member struct {
	Addr netip.Addr
	// Last is the last address of an interval that begins with Addr.
	Last netip.Addr
	// Protocol and Port complete an endpoint.
	Protocol Protocol
	Port     uint16
}

// Compare orders members by address, protocol and port.
func (m Member) Compare(o Member) int {
	return cmp.Or(m.Addr.Compare(o.Addr), cmp.Compare(m.Protocol, o.Protocol), cmp.Compare(m.Port, o.Port))
}

// PortMap says what happens to a flow by its destination's port.
type PortMap struct {
	Name string
	// Ranges: the map is one protocol's, and its keys are ranges. Otherwise keys are protocol and port.
	Ranges bool
	// Elements are sorted by protocol and port, and do not overlap.
	Elements []PortElement
}

// PortElement is an element of a port map.
type PortElement struct {
	Protocol Protocol
	// Last equals First but in a map of ranges.
	First, Last uint16
	// Jump is the group chain that asks for the peer; "" accepts every peer.
	Jump string
}

// Chain is a class chain, which says what pods with the same rights may do in one direction, or a group chain, which asks whether
// the other end is one of a group of peers. A packet that reaches the end of a class chain is denied, and one that reaches the end of
// a group chain returns.
type Chain struct {
	Name  string
	Dir   Direction
	Class bool
	Rules []Rule
}

// RuleKind is what a rule of a chain asks.
type RuleKind uint8

// The kinds of rules.
const (
	// PeerIn accepts where the other end is in an Addresses or Blocks set.
	PeerIn RuleKind = iota
	// EndpointIn accepts where the responder, with the flow's protocol and port, is in an Endpoints set.
	EndpointIn
	// PortsOf follows a port map.
	PortsOf
	// RangesOf follows a map of ranges, for one protocol.
	RangesOf
)

// Rule is one question of a chain.
type Rule struct {
	Kind RuleKind
	// Ref names the set or the port map.
	Ref string
	// IPv6 is the family of the set, and Protocol that of the map of ranges.
	IPv6     bool
	Protocol Protocol
}
