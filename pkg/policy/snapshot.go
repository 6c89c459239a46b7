// Package policy says what Kubernetes NetworkPolicies mean for the pods of a cluster, as one node sees it. Compile makes the rules that the
// kernel must hold for the node's own pods. Evaluate answers for one connection, slowly and from the API's words, why it is allowed or
// not: it shares no code with Compile, so that either can be held against the other. Nothing here touches the host.
package policy

import (
	"net/netip"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Snapshot is all that policies depend on, at one moment. Who has filled it changes nothing in it any more, and whoever reads it
// must not either. Addresses are not IPv4-mapped. The order of lists has no meaning.
type Snapshot struct {
	// Node is the name of the own node, whose pods are protected.
	Node string
	// Pods are those of the whole cluster. One that changes is another *Pod: the same pointer in two snapshots is the same pod, and
	// the same policy where it is a policy's.
	Pods       []*Pod
	Namespaces []Namespace
	// Policies are as the API has them: nothing is taken for valid.
	Policies []*networkingv1.NetworkPolicy
	Nodes    []Node
	// PodCIDRs hold the addresses of this cluster's pods and no others. All of them is what an empty namespaceSelector means.
	PodCIDRs []netip.Prefix
}

// Pod is what policies need of a Pod.
type Pod struct {
	Namespace, Name string
	// UID is of the own node's pods alone.
	UID types.UID
	// Node is the name of the node that it runs on, "" before it is scheduled.
	Node   string
	Labels map[string]string
	// IPs are its addresses, at most one a family: those of its link where it is on the own node and has one, since after a reboot
	// the status still names those of the time before.
	IPs []netip.Addr
	// Ports are those that its containers name.
	Ports []NamedPort
	// HostNetwork pods have their node's addresses. Policies know them as that node.
	HostNetwork bool
	// Done pods (phase Succeeded or Failed) have given their addresses back, whatever their status says.
	Done bool
	// Terminating pods still run, until their link is gone.
	Terminating bool
}

// NamedPort is a container's port with a name.
type NamedPort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}

// Namespace is what policies need of a Namespace.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// Node is a node with every address from which its packets may come: those that the API server knows and the tailnet's.
type Node struct {
	Name  string
	Addrs []netip.Addr
}

// Protocol is a transport protocol, by its number in IP packets.
type Protocol uint8

// The protocols that a policy can name.
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// String returns the name, as nft has it.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case SCTP:
		return "sctp"
	}
	return "unknown"
}

// networked reports whether the pod has addresses of its own that are in use.
func (p *Pod) networked() bool { return !p.HostNetwork && !p.Done }
