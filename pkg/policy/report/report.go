// Package report is what a node says of its NetworkPolicies: types, text for people, and how to ask the daemon. It links neither
// Kubernetes nor Prometheus.
package report

import (
	"net/netip"
	"slices"
	"time"
)

// List is how policies stand on a node.
type List struct {
	Node string `json:"node"`
	// Policies is how many there are in the cluster.
	Policies int `json:"policies"`
	// Problem is what keeps them from being in force as they are, "" where nothing does.
	Problem string `json:"problem,omitempty"`
	// Pods are the node's own, in order of name.
	Pods   []Pod   `json:"pods"`
	Faults []Fault `json:"faults,omitempty"`
	// DeniedUnknown are the packets of pods whose policies were not known yet, DeniedStateless those of isolated pods that belong to
	// no connection.
	DeniedUnknown   uint64 `json:"deniedUnknown"`
	DeniedStateless uint64 `json:"deniedStateless"`
}

// Pod is a pod of the own node.
type Pod struct {
	Name  string       `json:"name"` // NAMESPACE/NAME
	Addrs []netip.Addr `json:"addrs"`
	// Waiting says why its policies are not known yet, "" where they are, and Since from when on.
	Waiting string     `json:"waiting,omitempty"`
	Since   *time.Time `json:"since,omitempty"`
	Ingress Isolation  `json:"ingress"`
	Egress  Isolation  `json:"egress"`
}

// Isolation is how a pod stands in one direction.
type Isolation struct {
	// By are the policies that isolate it. Without one it is open.
	By []string `json:"by,omitempty"`
	// Denied are the packets that were, since the daemon began.
	Denied uint64 `json:"denied"`
}

// Fault is a part of a policy that grants nothing, since it cannot be understood.
type Fault struct {
	Policy  string `json:"policy"`
	Problem string `json:"problem"`
}

// Explanation says what policies mean for a pod, or for connections between two ends.
type Explanation struct {
	// Node is the one that answers.
	Node string `json:"node"`
	// From and To are the ends. Of a pod that was asked about alone only Pod is there.
	Pod  *End `json:"pod,omitempty"`
	From *End `json:"from,omitempty"`
	To   *End `json:"to,omitempty"`
	// Port is the one that was asked about, such as 80/tcp, "" for all.
	Port string `json:"port,omitempty"`
	// Answers are for the addresses of the ends: several where these differ.
	Answers []Answer `json:"answers"`
	// Problem is what keeps policies from being in force as they are, "" where nothing does.
	Problem string `json:"problem,omitempty"`
}

// End is one end of connections.
type End struct {
	// Kind is pod, node or address.
	Kind string `json:"kind"`
	// Name is NAMESPACE/NAME of a pod, or the name of a node.
	Name string `json:"name,omitempty"`
	// Node is where a pod runs.
	Node  string       `json:"node,omitempty"`
	Addrs []netip.Addr `json:"addrs"`
	// Note is what is to be known about it.
	Note string `json:"note,omitempty"`
}

// Verdict is whether policies allow what was asked about.
type Verdict string

// The verdicts. Some allows certain ports, and denies the others.
const (
	Allowed Verdict = "allowed"
	Denied  Verdict = "denied"
	Some    Verdict = "some"
)

// Answer is for connections between some addresses.
type Answer struct {
	Src []netip.Addr `json:"src,omitempty"`
	Dst []netip.Addr `json:"dst,omitempty"`
	// Verdict is that of both ends together, and of Refused.
	Verdict Verdict `json:"verdict"`
	// Refused is what refuses it on this node whatever policies say, "" where nothing does.
	Refused string `json:"refused,omitempty"`
	Sides   []Side `json:"sides"`
}

// Side is what one end's policies say.
type Side struct {
	// Direction is ingress or egress.
	Direction string `json:"direction"`
	// Of names the end: NAMESPACE/NAME of a pod, or who it is that has no policies.
	Of      string  `json:"of"`
	Verdict Verdict `json:"verdict"`
	// Reason is why policies do not decide, "" where they do.
	Reason string `json:"reason,omitempty"`
	// Isolating are the policies that isolate the pod in this direction.
	Isolating []string `json:"isolating,omitempty"`
	// Rules are those that allow what was asked about; of a pod alone they are all.
	Rules []Rule `json:"rules,omitempty"`
	// Faults are what could not be understood of the isolating policies.
	Faults []Fault `json:"faults,omitempty"`
	// Denied are the pod's packets that were, to and from whomever, since the daemon began. It is nil where another node counts them.
	Denied *uint64 `json:"denied,omitempty"`
	Kernel Kernel  `json:"kernel"`
}

// Rule is a peer of a rule, with its ports. Numbers count from 1.
type Rule struct {
	Policy string `json:"policy"`
	// Rule is its number among the policy's rules for the direction, and Peer the peer's in from or to, 0 where that is absent or empty:
	// everybody.
	Rule int `json:"rule"`
	Peer int `json:"peer,omitempty"`
	// Who is the peer in words, beginning with its field in YAML.
	Who string `json:"who"`
	// Ports are what is allowed: all where there are none.
	Ports []Port `json:"ports,omitempty"`
}

// Port is an entry of a rule's ports.
type Port struct {
	Port int `json:"port"` // its number
	// Text is as the policy has it, and what a name stands for.
	Text string `json:"text"`
}

// Kernel is what the kernel of the node does, as its own look-ups say.
type Kernel struct {
	// Asked is how many connections it was asked about, 0 where it was not.
	Asked int `json:"asked"`
	// Note says why it was not, or not about all.
	Note string `json:"note,omitempty"`
	// Differences are the connections that it treats otherwise than policies say.
	Differences []Difference `json:"differences,omitempty"`
	// Error is why it could not be asked.
	Error string `json:"error,omitempty"`
}

// Difference is a connection that policies and the kernel judge differently.
type Difference struct {
	Src netip.Addr `json:"src"`
	Dst netip.Addr `json:"dst"`
	// Port is such as 80/tcp.
	Port string `json:"port"`
	// Policies, Compiled and Kernel say whether it is allowed: by the API's words, by the rules that were made of them, by the kernel.
	Policies bool `json:"policies"`
	Compiled bool `json:"compiled"`
	Kernel   bool `json:"kernel"`
	// Gate: the kernel denies it for the group of the pod's link, which says that policies are not known.
	Gate bool `json:"gate,omitempty"`
}

// Wrong reports whether the kernel does otherwise than policies say, as far as it was asked.
func (e Explanation) Wrong() bool { return slices.ContainsFunc(e.Answers, Answer.wrong) }

func (a Answer) wrong() bool {
	return slices.ContainsFunc(a.Sides, func(s Side) bool { return len(s.Kernel.Differences) > 0 || s.Kernel.Error != "" })
}
