// Package nodestatus is what a node says of itself: the daemon answers with it on a Unix socket, and programs on the node ask.
package nodestatus

import (
	"net/netip"
	"time"

	"github.com/headcni/headcni/pkg/reconcile"
)

// Status is what a running daemon knows of its node.
type Status struct {
	Version string `json:"version"`
	// Time is when it said so, by its own clock.
	Time  time.Time `json:"time,omitzero"`
	Ready bool      `json:"ready"`
	// Mode is host or daemon, "" while auto has found no tailscaled.
	Mode string `json:"mode"`
	// Tun is the tailnet's interface, TunMTU its MTU in bytes, 0 while it has not been seen.
	Tun    string `json:"tun"`
	TunMTU int    `json:"tunMTU"`
	// SmallPath is the peer whose path carries least, SmallPathBytes how much inside the tunnel; "" and 0 where all carry TunMTU.
	SmallPath      string `json:"smallPath,omitempty"`
	SmallPathBytes int    `json:"smallPathBytes,omitempty"`
	// Dropped are the packets that the node's rules dropped, by reason, without those that none was dropped for.
	Dropped map[string]uint64 `json:"dropped,omitempty"`
	// GuardTest is what came of the guard's self-test, in words, "" before it has ended.
	GuardTest string `json:"guardTest,omitempty"`
	// Policy tells of NetworkPolicies, nil where they are not enforced.
	Policy *Policy `json:"policy,omitempty"`
	// FastPath is of flows between the node's own pods that go past its rules, nil where nobody tells of it.
	FastPath *FastPath `json:"fastPath,omitempty"`
	// PeerMTU is of packets between pods of two nodes that are larger than TunMTU, nil where nobody asked for them.
	PeerMTU *PeerMTU `json:"peerMTU,omitempty"`
	// Names are what may lead questions for names in a circle, each with what to do. Two of them are an error of the part names.
	Names []string `json:"names,omitempty"`
	// Parts are those of the node, each with its error and remedy where it has one.
	Parts    []reconcile.Status `json:"parts"`
	PodCIDRs []PodCIDR          `json:"podCIDRs"`
	// Services are the routes to services that the node advertises to the tailnet. Headscale routes them to one of the nodes that do.
	Services []PodCIDR `json:"services,omitempty"`
	// Tailnet is nil while tailscaled does not answer.
	Tailnet *Tailnet `json:"tailnet,omitempty"`
}

// FastPath is how the kernel carries flows between the node's own pods.
type FastPath struct {
	// Links are how many pods' links are in it. Why says why there is none, "" where there is.
	Links int    `json:"links"`
	Why   string `json:"why,omitempty"`
}

// PeerMTU is which paths to peers carry more than the tun's MTU, as was seen.
type PeerMTU struct {
	// Peers of Of have such a path; the largest carries Bytes, 0 where there is none.
	Peers int `json:"peers"`
	Of    int `json:"of"`
	Bytes int `json:"bytes"`
}

// Policy is how NetworkPolicies stand on the node.
type Policy struct {
	// InForce is false until the first ones are, and while they cannot be kept so.
	InForce bool `json:"inForce"`
	// Policies is how many the cluster has, Isolated how many addresses of own pods they concern.
	Policies int `json:"policies"`
	Isolated int `json:"isolated"`
	// Stale: the API server has not answered since the daemon's start, and what it said before is in force.
	Stale bool `json:"stale,omitempty"`
	// Unknown are pods whose policies are not known yet, the one that waits longest first.
	Unknown []UnknownPod `json:"unknown,omitempty"`
}

// UnknownPod is a pod that waits for its policies.
type UnknownPod struct {
	Pod   string    `json:"pod"` // NAMESPACE/NAME
	Since time.Time `json:"since"`
	Why   string    `json:"why"`
}

// PodCIDR tells how far the tailnet knows one of the node's pod CIDRs.
type PodCIDR struct {
	CIDR       netip.Prefix `json:"cidr"`
	Advertised bool         `json:"advertised"`
	// Approved means that Headscale routes it to this node.
	Approved bool `json:"approved"`
}

// Tailnet is the node's place in the tailnet.
type Tailnet struct {
	Version    string       `json:"tailscaled"`
	State      string       `json:"state"`
	ControlURL string       `json:"controlURL"`
	Name       string       `json:"name"`
	IPs        []netip.Addr `json:"ips"`
	// KeyExpiry is when the node key expires, nil = never.
	KeyExpiry *time.Time `json:"keyExpiry,omitempty"`
	// Health holds what tailscaled itself complains of.
	Health []string `json:"health,omitempty"`
	// NAT is none, easy, hard or unknown, Outside how others see the node by IPv4, the zero AddrPort where no router translates or nobody has told.
	NAT     string         `json:"nat,omitempty"`
	Outside netip.AddrPort `json:"outside,omitzero"`
	Peers   []Peer         `json:"peers"`
}

// Peer is another node of the tailnet.
type Peer struct {
	Name string       `json:"name"`
	IPs  []netip.Addr `json:"ips"`
	// Path is direct, relayed, idle or offline; Endpoint the address or the relay behind it.
	Path     string `json:"path"`
	Endpoint string `json:"endpoint,omitempty"`
	// Routes are what the tailnet routes to the peer, PodCIDRs those of them that are pods to this node.
	Routes   []netip.Prefix `json:"routes,omitempty"`
	PodCIDRs []netip.Prefix `json:"podCIDRs,omitempty"`
}
