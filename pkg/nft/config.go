package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/names"
)

// Config is what the tables are made from. Its zero value closes the node: no pod network at all.
type Config struct {
	// Own are this node's pod CIDRs. Cluster are the pod CIDRs of all clusters, Own included.
	Own, Cluster []netip.Prefix
	// KeepSource are the service CIDRs. Pods keep their source towards these and Cluster.
	KeepSource []netip.Prefix
	// Served are those of them, or addresses in them, that devices of the tailnet reach over this node.
	Served []netip.Prefix
	// Shared are networks that the host has inside the tailnet's 100.64.0.0/10, which is not the tailnet's alone.
	Shared []netip.Prefix
	// Members are the IPv4 addresses of the tailnet's other members, where they are known.
	Members []netip.Addr
	// Ports are the node's ports that lead to pods of its own.
	Ports []Port
	// TunName is tailscaled's interface. While it is "" no packet may leave for another node's pod.
	TunName string
	// NodeAddr4 and NodeAddr6 are the source that pods see when their own node speaks to them. Without one the kernel's
	// choice stays.
	NodeAddr4, NodeAddr6 netip.Addr
	// Masquerade gives pods' packets to the world outside the node's address.
	Masquerade bool
	// TailnetEgress is one of the Egress constants of package config; "" means EgressMasquerade.
	TailnetEgress string
	// LANIngress lets what is behind the node's other interfaces reach pods by a route over the node.
	LANIngress bool
	// Sites are networks beside this node that its user advertises to the tailnet: they reach what is not the cluster's there.
	Sites []netip.Prefix
	// Links are the networks that the host has neighbours in.
	Links []netip.Prefix
	// PathMTU is the largest packet in bytes that passes the tunnel to all peers, 0 where that is the tun's MTU.
	PathMTU int
	// HostMode: tailscaled is the host's own, and may be a user's exit node or subnet router.
	HostMode bool
	// Subnets are networks behind devices of the tailnet that are not the cluster's.
	Subnets Subnets

	// noSockets: this kernel does not tell whose socket a packet is for.
	noSockets bool
}

// Port is one of the node's ports that leads to a pod of its own.
type Port struct {
	// Protocol is tcp, udp or sctp.
	Protocol string
	Number   uint16
	// At is the node's address that has the port, the zero Addr for all of them.
	At netip.Addr
	// To is the pod's end, Link the host's end of its link.
	To   netip.AddrPort
	Link string
	// Gone: there is no such link. The port leads nowhere, also where others' rules lead it to whoever has the address now.
	Gone bool
}

// Valid reports whether the kernel would take it.
func (p Port) Valid() bool {
	return slices.Contains([]string{"tcp", "udp", "sctp"}, p.Protocol) && p.Number != 0 && p.To.IsValid() && p.To.Port() != 0 &&
		strings.HasPrefix(p.Link, names.PodLinkPrefix) && (!p.At.IsValid() || p.At.Is4() == p.To.Addr().Is4())
}

// Subnets say who reaches networks behind devices of the tailnet. The zero value lets no pod.
type Subnets struct {
	// Open lets every pod.
	Open bool
	// Known are those that pods reach by the tunnel or not at all, without networks of the host's own, Beside, that lie in them.
	Known, Beside []netip.Prefix
	// Named are those that some pods may reach: Tables.Consent says which.
	Named []netip.Prefix
	// All are those that anybody has told of, also where this node is in one itself.
	All []netip.Prefix
	// Exit: the node's user has chosen an exit node. What leaves by the tunnel then is for a subnet only where it is in All.
	Exit bool
}

// Validate returns all faults joined.
func (c Config) Validate() error {
	var errs []error
	if err := names.CheckTun(c.TunName); err != nil {
		errs = append(errs, err)
	}
	switch c.TailnetEgress {
	case "", config.EgressMasquerade, config.EgressPreserve, config.EgressDeny:
	default:
		errs = append(errs, fmt.Errorf("tailnet egress %q: want %s, %s or %s",
			c.TailnetEgress, config.EgressMasquerade, config.EgressPreserve, config.EgressDeny))
	}
	if c.PathMTU != 0 && c.PathMTU < 576 {
		errs = append(errs, fmt.Errorf("path MTU %d: want 0 or at least 576", c.PathMTU))
	}
	for _, p := range slices.Concat(c.Own, c.Cluster, c.KeepSource, c.Served, c.Shared, c.Sites, c.Links,
		c.Subnets.Known, c.Subnets.Beside, c.Subnets.Named, c.Subnets.All) {
		if !p.IsValid() || p.Bits() == 0 {
			errs = append(errs, fmt.Errorf("prefix %q: want a CIDR that is not everything", p))
		}
	}
	if a := c.NodeAddr4; a.IsValid() && !a.Is4() {
		errs = append(errs, fmt.Errorf("node address %s: want an IPv4 address", a))
	}
	if a := c.NodeAddr6; a.IsValid() && (!a.Is6() || a.Is4In6() || a.Zone() != "") {
		errs = append(errs, fmt.Errorf("node address %s: want an IPv6 address without zone", a))
	}
	for _, a := range c.Members {
		if !a.Is4() {
			errs = append(errs, fmt.Errorf("member %s: want an IPv4 address", a))
		}
	}
	for _, p := range c.Ports {
		if !p.Valid() {
			errs = append(errs, fmt.Errorf("port %v: want tcp, udp or sctp, two ports, a link and addresses of one family", p))
		}
	}
	return errors.Join(errs...)
}
