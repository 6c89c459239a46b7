package daemon

import (
	"cmp"
	"encoding/json"
	"errors"
	"net/netip"
	"slices"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/config/netconf"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/dns/nodedns"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/membership"
	"github.com/headcni/headcni/pkg/networking/noderoutes"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/pathmtu"
	"github.com/headcni/headcni/pkg/policy/subnets"
	"github.com/headcni/headcni/pkg/reconcile"
	"github.com/headcni/headcni/pkg/serviceroute"
	"github.com/headcni/headcni/pkg/tailscale"
)

// observation is what a plan is made from: the host and the tailnet as they are now.
type observation struct {
	membership.Seen
	// tun is the interface that carries the tailnet, also while it is gone.
	tun string
	// tunMTU in bytes.
	tunMTU int
	// hostPrefixes are the prefixes of the host's own addresses, without our links, the tun and lo.
	hostPrefixes []netip.Prefix
	// sites are networks beside this node that its user advertises to the tailnet.
	sites []netip.Prefix
	// advertised is all that tailscaled advertises, serves are the routes to services that it is to, servesErr is what keeps it from more.
	advertised, serves []netip.Prefix
	servesErr          error
	// hostNetworks are what the host has routes to but the default one.
	hostNetworks []netip.Prefix
	// subnets are networks behind devices of the tailnet.
	subnets subnets.Known
	// members are the IPv4 addresses of the tailnet's other members, as far as they were ever known.
	members []netip.Addr
	// ports are those of the node that lead to pods of its own, portsErr is what keeps some from being known.
	ports    []nft.Port
	portsErr error
	// shared are networks that the host has inside the tailnet's IPv4 range.
	shared []netip.Prefix
	dns    nodedns.Seen
	// nodeAddr4 and nodeAddr6 are the node's own addresses towards its pods; the zero Addr where it has none.
	nodeAddr4, nodeAddr6 netip.Addr
	// prefs are tailscaled's now, nil while it does not answer.
	prefs *tailscale.SavedPrefs
	// controlURL is tailscaled's control server, "" while it does not answer.
	controlURL string
	// ipam is the ipam object of a conflist written by hand, nil where there is none.
	ipam json.RawMessage
	// ranges are those in force: the configuration's, in Kubernetes with what that says.
	ranges config.Ranges
	// leaving are former pod CIDRs whose pods still run here.
	leaving []netip.Prefix
	// path is the path to a peer that carries least, the zero Path where all carry the tun's MTU.
	path pathmtu.Path
	// wide are peers' ranges of pods that more than the tun's MTU goes to, and how many bytes; uplinkMTU is what the node's uplinks carry. Both
	// only where network.peerMTU wants them.
	wide      map[netip.Prefix]int
	uplinkMTU int
	// held is why pod CIDRs that Kubernetes gave us must not be used: another Node has them too, or they are outside the cluster's.
	held []error
}

// plan is what the node should look like.
type plan struct {
	node     noderoutes.Config
	firewall nft.Config
	prefs    tailscale.PrefsSpec
	conflist []byte
	// mtu of pods in bytes.
	mtu int
	// duplicate is why our CIDRs must not be advertised: another node has them. The node's own pods go on.
	duplicate error
}

// makePlan derives the node's state from the configuration and what was observed. It does no I/O. An error means that
// the configuration cannot work on this host: nothing may be applied.
func makePlan(c config.Config, o observation, s state) (plan, error) {
	own := o.ranges.Pods
	// What a peer merely advertises never widens the set.
	clusterCIDRs := netset.Union(own, o.ranges.Cluster, o.ranges.Remote)
	if err := refuse(clusterCIDRs, o); err != nil {
		return plan{}, err
	}
	p := plan{
		node: noderoutes.Config{Own: own, Leaving: o.leaving, Cluster: clusterCIDRs, Services: o.ranges.Services, TunName: o.tun, LANFirst: lanFirst(c, o, s)},
		firewall: nft.Config{
			Own: slices.Concat(own, o.leaving), Cluster: clusterCIDRs, KeepSource: o.ranges.Services, Served: serviceroute.Served(o.serves, netset.Without(o.advertised, s.Advertised), o.ranges.Services), Shared: o.shared, Members: o.members, Ports: o.ports, TunName: o.tun,
			NodeAddr4: o.nodeAddr4, NodeAddr6: o.nodeAddr6, PathMTU: o.path.Bytes,
			LANIngress: c.Network.LANIngress == config.LANAllow, Sites: netset.Without(o.sites, slices.Concat(own, o.leaving)),
			Links:      withNeighbours(o.hostPrefixes),
			Masquerade: c.Network.Masquerade, TailnetEgress: c.Network.TailnetEgress, HostMode: o.Mode == config.ModeHost,
		},
		prefs:     tailscale.PrefsSpec{AdvertiseRoutes: slices.Concat(own, o.serves)},
		duplicate: errors.Join(append(o.held, duplicate(own, o))...),
	}
	p.prefs.DropRoutes = netset.Without(s.Advertised, p.prefs.AdvertiseRoutes)
	host := subnets.Host{Addrs: []netip.Addr{o.nodeAddr4, o.nodeAddr6}, Links: o.hostPrefixes, Routes: o.hostNetworks, Cluster: o.ranges.All()}
	o.subnets.Plan(host, c.Network.TailnetSubnets == config.SubnetsAllow, &p.node, &p.firewall)
	p.mtu = podMTU(c, o)
	if o.Mode == config.ModeDaemon {
		// The dedicated tailscaled must not take the host's resolver over.
		p.prefs.CorpDNS = new(bool)
	}
	var err error
	p.conflist, err = conflist.Render(conflist.Input{
		PodCIDRs: own, ServiceCIDRs: o.ranges.Services, MTU: p.mtu,
		IPAM: c.IPAM, AdoptedIPAM: o.ipam, MagicDNS: c.DNS.MagicDNS, NetworkPolicy: c.Network.NetworkPolicy,
	})
	return p, err
}

// withNeighbours leaves out single addresses, of which kube-proxy's ipvs link has one for each Service.
func withNeighbours(prefixes []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(prefixes), func(p netip.Prefix) bool { return p.IsSingleIP() || p.Bits() == 0 })
}

// podMTU is what is configured, where the tun or the node's uplink carries it, else what these do. Where somebody has set that too small for IPv6, which the part
// links tells, new pods of both families get what IPv6 needs: the plugin refuses less.
func podMTU(c config.Config, o observation) int {
	tun := cmp.Or(o.tunMTU, names.TunMTU)
	if slices.ContainsFunc(o.ranges.Pods, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		tun = max(tun, netconf.MinMTU6)
	}
	if c.Network.PeerMTU == string(config.Auto) {
		tun = max(tun, pathmtu.Worthwhile(o.uplinkMTU, true, tun)) // what routes do not carry, the node says to the pod
	}
	if c.Network.MTU == 0 {
		return tun
	}
	return min(c.Network.MTU, tun)
}

// refuse names the reasons why the node's pod CIDRs cannot be used here.
func refuse(clusterCIDRs []netip.Prefix, o observation) error {
	var errs []error
	for _, h := range o.hostPrefixes {
		for _, p := range clusterCIDRs {
			if p.Overlaps(h) {
				errs = append(errs, findings.Errorf(findings.RangeOverlapsHost, "pod range %s overlaps %s, which an interface of this host has: choose another range", p, h))
			}
		}
	}
	return errors.Join(errs...)
}

// duplicate names the online nodes that advertise our CIDRs, unless the tailnet routes them to us already.
func duplicate(own []netip.Prefix, o observation) error {
	var errs []error
	for _, p := range own {
		for _, peer := range o.peers() {
			if r, ok := taken(p, peer); ok && !o.owns(p) {
				errs = append(errs, findings.Errorf(findings.RangeTaken, "pod range %s: %s advertises %s already and is online; give this node another network.podCIDRs", p, peer.Name, r))
			}
		}
	}
	return errors.Join(errs...)
}

// strangers names nodes of our own tags that have routes of a family and none of them inside our ranges: theirs or ours are
// configured wrongly. Such routes are never pods here. Nodes that share their LAN besides their pods are none of these.
func strangers(o observation) error {
	if o.Tailnet == nil {
		return nil
	}
	cluster := netset.Union(o.ranges.Pods, o.ranges.Cluster, o.ranges.Remote)
	if len(cluster) == 0 {
		return nil // they are not known yet, as before the API server has answered
	}
	var errs []error
	for _, p := range o.Tailnet.Peers {
		if !slices.ContainsFunc(p.Tags, func(t string) bool { return slices.Contains(o.Tailnet.Self.Tags, t) }) {
			continue
		}
		for _, ipv6 := range []bool{false, true} {
			routes := slices.DeleteFunc(netset.OfFamily(p.Routes, ipv6), func(r netip.Prefix) bool { return r.Bits() == 0 })
			inside := func(r netip.Prefix) bool { return netset.Covers(cluster, r) }
			if len(routes) > 0 && !slices.ContainsFunc(routes, inside) {
				errs = append(errs, findings.Errorf(findings.StrangeRoutes, "%s, which has a tag of ours, advertises %v, outside our network.clusterCIDRs and network.remoteCIDRs %v: it gets "+
					"nothing from this node as pods; if they are pods, make network.clusterCIDRs the same on both nodes, or name them in network.remoteCIDRs",
					p.Name, routes, netset.OfFamily(cluster, ipv6)))
			}
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return reconcile.Warning{Err: errors.Join(errs...)}
}

// accepted are the routes that tailscaled speaks of: none while it does not run, or before the part prefs has it accept any.
func (o observation) accepted() noderoutes.Accepted {
	if !o.Running() || o.prefs == nil || !o.prefs.RouteAll {
		return noderoutes.Accepted{}
	}
	return noderoutes.Accepted{TunName: o.tun, Routes: o.Tailnet.TunnelRoutes(), MTUs: o.wide}
}

// podPeers are those with pods.
func (o observation) podPeers() []tailscale.Peer {
	inside := o.insideClusters()
	return slices.DeleteFunc(slices.Clone(o.peers()), func(p tailscale.Peer) bool { return len(p.IPs) == 0 || !slices.ContainsFunc(p.Routes, inside) })
}

// insideClusters tells pods' ranges from other routes.
func (o observation) insideClusters() func(netip.Prefix) bool {
	clusters := netset.Union(o.ranges.Pods, o.ranges.Cluster, o.ranges.Remote)
	return func(r netip.Prefix) bool { return netset.Covers(clusters, r) }
}

// directPeers are those whose paths are worth knowing. Packets through a relay are a TCP stream, and fit.
func (o observation) directPeers() []pathmtu.Peer {
	var out []pathmtu.Peer
	inside := o.insideClusters()
	for _, p := range o.podPeers() {
		endpoint, _ := netip.ParseAddrPort(p.CurAddr) // "" is none
		pods := slices.DeleteFunc(slices.Clone(p.Routes), func(r netip.Prefix) bool { return !inside(r) })
		out = append(out, pathmtu.Peer{Name: p.Name, Addr: p.IPs[0], Endpoint: endpoint, Pods: pods})
	}
	return out
}

// tunLink is the tun as tailscaled says it is; without addresses while it does not run.
func (o observation) tunLink() noderoutes.Tun {
	t := noderoutes.Tun{Name: o.tun, IPv6: len(netset.OfFamily(o.ranges.Pods, true)) > 0}
	if o.Running() {
		t.Addrs = o.Tailnet.Self.IPs
	}
	return t
}

func (o observation) peers() []tailscale.Peer {
	if o.Tailnet == nil {
		return nil
	}
	return o.Tailnet.Peers
}

// owns reports whether the tailnet routes p to this node now.
func (o observation) owns(p netip.Prefix) bool {
	return o.Tailnet != nil && slices.Contains(o.Tailnet.Self.Routes, p)
}

// taken finds a route of an online peer inside or around p. Wide routes of exit nodes and site routers are no claim to
// a pod range: our rules let cluster traffic follow table 52, where the longest prefix wins.
func taken(p netip.Prefix, peer tailscale.Peer) (netip.Prefix, bool) {
	if !peer.Online {
		return netip.Prefix{}, false
	}
	for _, r := range peer.Routes {
		if r.Overlaps(p) && r.Bits() >= p.Bits() {
			return r, true
		}
	}
	return netip.Prefix{}, false
}

// lanFirst: where the user had not accepted routes and has chosen no exit node, nothing but the cluster should follow what
// peers advertise.
func lanFirst(c config.Config, o observation, s state) bool {
	switch {
	case c.Network.LANFirst != config.Auto:
		return c.Network.LANFirst == "true"
	case o.Mode == config.ModeDaemon:
		return true
	}
	found := s.Prefs
	if found == nil {
		// Before we have it accept routes, not after: one of them may lead to where Headscale is.
		found = o.prefs
	}
	if found == nil {
		return false
	}
	exitNode := found.ExitNode
	if o.prefs != nil {
		exitNode = o.prefs.ExitNode // which the user may choose at any time
	}
	return !found.RouteAll && !exitNode
}
