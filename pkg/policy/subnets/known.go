package subnets

import (
	"net/netip"
	"slices"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/networking/noderoutes"
	"github.com/headcni/headcni/pkg/nft"
)

// Known is what a node knows of networks behind devices of the tailnet. The daemon keeps it, for a start without tailscaled or the API server.
type Known struct {
	// Named are those that Namespaces ask for.
	Named []netip.Prefix `json:"named,omitempty"`
	// Held are the named, and what devices advertise of those that were: a flow does not go on in clear where consent ends.
	Held []netip.Prefix `json:"held,omitempty"`
	// Advertised are those that devices advertise.
	Advertised []netip.Prefix `json:"advertised,omitempty"`
	// Exit: the node's user has chosen an exit node.
	Exit bool `json:"exit,omitempty"`
	// Asked: Namespaces have been read once. Before that a pod could send in clear what its Namespace wants in the tunnel.
	Asked bool `json:"asked,omitempty"`
}

// News is what there is to know now.
type News struct {
	// Named are what Namespaces ask for, if that is known.
	Named      []netip.Prefix
	NamedKnown bool
	// Asked: or that nobody may ask.
	Asked bool
	// Tailnet: the tailnet is known, with what its devices advertise, and whether one is the node's exit node.
	Tailnet    bool
	Advertised []netip.Prefix
	Exit       bool
	// Cluster are the ranges of pods and services.
	Cluster []netip.Prefix
}

// Learn returns what is known after news.
func (k Known) Learn(n News) Known {
	k.Asked = k.Asked || n.Asked
	if n.NamedKnown {
		k.Named = n.Named
	}
	if !n.Tailnet {
		k.Held = sorted(k.Held, k.Named)
		return k
	}
	k.Exit, k.Advertised = n.Exit, nil
	for _, p := range sorted(n.Advertised) {
		if p.Bits() >= minBits(p) && !netset.Covers(n.Cluster, p) && !isTailnet(p) {
			k.Advertised = append(k.Advertised, p)
		}
	}
	held := k.Named
	for _, a := range k.Advertised {
		for _, h := range k.Held {
			switch {
			case !a.Overlaps(h):
			case a.Bits() > h.Bits():
				held = append(slices.Clone(held), a)
			default:
				held = append(slices.Clone(held), h)
			}
		}
	}
	k.Held = sorted(held)
	return k
}

// sorted has each prefix once. One may lie in another, which a node may have to leave out.
func sorted(lists ...[]netip.Prefix) []netip.Prefix {
	all := slices.Concat(lists...)
	slices.SortFunc(all, netip.Prefix.Compare)
	return slices.Compact(all)
}

// Host is what the node itself has.
type Host struct {
	// Addrs are those by which the node is known, Links the networks of its links, Routes what else it has routes to.
	Addrs         []netip.Addr
	Links, Routes []netip.Prefix
	// Cluster are the ranges of pods and services, which are no networks of the host's.
	Cluster []netip.Prefix
}

// Plan has a node's rules and tables say so. open: every pod may use every subnet.
func (k Known) Plan(h Host, open bool, node *noderoutes.Config, firewall *nft.Config) {
	node.Subnets, node.Beside = k.Here(h, open || !node.LANFirst)
	firewall.Subnets = nft.Subnets{Open: open, Known: node.Subnets, Beside: node.Beside, Named: k.Named, All: sorted(k.Held, k.Advertised), Exit: k.Exit}
}

// Here says which networks this node's pods reach by the tunnel or not at all, and which of the host's own lie in them. all: not only
// those that Namespaces have named.
//
// A network that the node is in is its LAN, whoever advertises it. So is one that nobody has named where the host has a route of its own to
// all of it.
func (k Known) Here(h Host, all bool) (here, beside []netip.Prefix) {
	own := slices.DeleteFunc(slices.Concat(h.Links, h.Routes), func(p netip.Prefix) bool {
		return netset.Covers(h.Cluster, p) || isTailnet(p)
	})
	candidates := k.Held
	if all {
		candidates = slices.Concat(k.Held, k.Advertised)
	}
	for _, p := range candidates {
		if netset.Covers(h.Links, p) || slices.ContainsFunc(h.Addrs, p.Contains) || !netset.Covers(k.Held, p) && netset.Covers(own, p) {
			continue
		}
		here = append(here, p)
	}
	here = netset.Union(here)
	for _, o := range own {
		if netset.Covers(here, o) && !slices.Contains(here, o) {
			beside = append(beside, o)
		}
	}
	return here, netset.Union(beside)
}
