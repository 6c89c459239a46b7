package nft

import (
	"net/netip"
	"time"

	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config/names"
)

// Every name, priority, mark and address of the rules, with its reason.
const (
	// SetCluster holds the pod CIDRs of all clusters: what must use the tunnel or nothing.
	SetCluster = "cluster"
	// setKeepSource holds the destinations towards which pods keep their source: the cluster set and services.
	setKeepSource = "keepsrc"
	// setOwn holds this node's pod CIDRs.
	setOwn = "own"
	// setServices holds the service CIDRs. A packet that still has such a destination when it leaves was for no service.
	setServices = "services"
	// setServed holds the services that devices of the tailnet reach over this node.
	setServed = "served"
	// setSites holds the networks beside the node that its user advertises to the tailnet.
	setSites = "sites"
	// setLinks holds the networks that the host has neighbours in.
	setLinks = "links"
	// setAsked holds the neighbours that pods have begun something with lately, setAskers the pods that did. The kernel fills both.
	setAsked  = "asked"
	setAskers = "askers"
	// setCurious holds the pods that ask the node for names, each with its rate. The kernel fills it.
	setCurious = "curious"
	// setSources holds pods' links with the addresses that they send from. Tables.Sources fills it.
	setSources = "sources"
	// setShared holds what is the host's inside the tailnet's range.
	setShared = "shared"
	// setMembers holds the IPv4 addresses of the tailnet's other members.
	setMembers = "members"
	// setSubnets holds the networks behind devices of the tailnet that pods reach by the tunnel or not at all, setBeside the host's own
	// inside them, setAbroad all of the former that there are.
	setSubnets = "subnets"
	setBeside  = "beside"
	setAbroad  = "abroad"
	// consentPrefix begins the names of the sets of pods' links that may reach a subnet. Tables.Consent fills them.
	consentPrefix = "to_"

	// chainAntispoof runs before conntrack, so that a forged packet never makes an entry.
	chainAntispoof = "antispoof"
	// prioAntispoof is raw (-300).
	prioAntispoof = knftables.RawPriority

	// Each base chain asks once by which link a packet comes or goes, and a chain of its own has the rules for that link: what is of no concern
	// to a packet costs it one comparison.
	chainAntispoofPod      = "antispoof_pod"
	chainAntispoofNeighbor = "antispoof_neighbor" // ICMPv6
	chainForwardPod        = "forward_pod"
	chainForwardTunnel     = "forward_tunnel"
	chainGuardPod          = "guard_pod"
	chainGuardTunnel       = "guard_tunnel"
	chainHeardPod          = "heard_pod"
	chainLastTunnel        = "last_tunnel"
	// chainForwardPorted is about what begins something by a port of the node.
	chainForwardPorted = "forward_ported"
	// chainForwardSegments is for SYN and SYN-ACK, of which those of pods pass in both directions: the pod's node speaks for both ends.
	chainForwardSegments = "forward_segments"

	// chainForward is in forward, where both links are known, also the one that DNAT to a pod's port has chosen, DNAT is done, and source NAT
	// is not. There it notes what came out of the tunnel: before kernel 5.7 the postrouting hook has no input interface (nft takes the rule
	// and never matches it), and the NAT below must know.
	chainForward = "forward"
	prioForward  = knftables.FilterPriority

	// chainGuard is in postrouting, not output: after DNAT only there the output interface is the final one, and it
	// sees forwarded packets too. It runs before source NAT.
	chainGuard = names.NFTChain
	prioGuard  = knftables.FilterPriority

	// chainHeard is in input, which what passes through the node does not pay for.
	chainHeard = "heard"
	prioHeard  = knftables.FilterPriority

	// chainPatience is in output, where the node's own ICMP errors towards its pods pass.
	chainPatience = "patience"
	prioPatience  = knftables.FilterPriority

	// chainPorts and chainPortsOut lead to pods' ports of the node behind portmap's and kube-proxy's rules: the first NAT decision counts.
	chainPorts    = "ports"
	chainPortsOut = "ports_out"
	prioPorts     = knftables.DNATPriority + "+1"

	// chainNAT runs just before everybody else's source NAT (kube-proxy, Docker: srcnat): the first NAT decision of a
	// flow is the one that stays.
	chainNAT = "postrouting"
	prioNAT  = knftables.SNATPriority + "-1"

	// chainLast is behind all source NAT, by anybody: what has a pod's source there will have it on the wire.
	chainLast = "last"
	prioLast  = knftables.SNATPriority + "+1"

	// markMask are the fwmark bits that tailscaled uses (its linuxfw package: 0xff0000).
	markMask = "0x00ff0000"
	// markFromTunnel is what tailscaled itself sets in its forward chain on packets that came from its tun ("subnet
	// route mark"). We set it as well, because with --netfilter-mode=off it does not; no bit is taken from anybody else.
	markFromTunnel = "0x00040000"
	// markKeep are the bits that are not tailscaled's.
	markKeep = "0xff00ffff"
)

// Why packets are dropped: the names of the counters, one of each in each family.
const (
	// A pod sends from an address that is not its own, or poses as a router.
	DropPodForged = "pod_forged"
	DropPodRouter = "pod_router"
	// A pod sends from or to a link-local address. It needs none but the gateway's, and each would be a neighbour of the node's.
	DropPodLinkLocal = "pod_link_local"
	// A pod's ICMP error quotes what no pod of this node can have got, or what another has.
	DropPodQuotes = "pod_quotes"
	// A pod sends to the node's loopback.
	DropPodLoopback = "pod_loopback"
	// A port of the node leads to an address that its pod has no more.
	DropPortStale = "port_stale"
	// A pod begins something with more neighbours of the node's than it can have use for.
	DropPodScans = "pod_scans"
	// Somebody beside the node sends from an address that only pods, services, the tailnet or the node itself have.
	DropOutsideForged = "outside_forged"
	// Somebody beside the node sends to pods or services by a route over the node (Config.LANIngress).
	DropLANIngress = "lan_ingress"
	// A cluster or tailnet destination leaves by a foreign link: routing rules would not have it so.
	DropClusterClear = "cluster_in_clear"
	DropTailnetClear = "tailnet_in_clear"
	// A service destination leaves: nobody has made it a pod's.
	DropServiceClear = "service_in_clear"
	// A device of the tailnet sends to a service over a node that does not lead there (Config.Served).
	DropTailnetService = "tailnet_service"
	// A pod's source leaves by a foreign link, or towards a tailnet device, although there is to be the node's.
	DropPodSource = "pod_source"
	// A pod begins something with a tailnet device that it must not (Config.TailnetEgress).
	DropTailnetEgress = "tailnet_egress"
	// A pod sends to a network behind a device of the tailnet, or hears from one, without consent (Config.Subnets).
	DropTailnetSubnet = "tailnet_subnet"
	// What is for such a network would leave by a foreign link.
	DropSubnetClear = "subnet_in_clear"
	// A pod sends something else to tailscaled's own address than a question to its resolver.
	DropTailscaled = "tailscaled"
	// A pod asks the node for names faster than it is answered.
	DropPodFloods = "pod_floods"
	// tailscaled's own packets in its own tunnel.
	DropTunnelInTunnel = "tunnel_in_tunnel"
	// An ICMP error out of the tunnel quotes what the node never sent by it.
	DropTunnelQuotes = "tunnel_quotes"
	// A segment of TCP that conntrack takes for no part of its connection, which may be a pod's.
	DropStraySegment = "stray_segment"
	// The node's word to its pod that there is no way, while the tunnel is away.
	DropNoWay = "no_way_yet"
)

// reasons are all of them. They stay while the rules that use them are written anew.
var reasons = []string{
	DropPodForged, DropPodRouter, DropPodLinkLocal, DropPodQuotes, DropPodLoopback, DropPortStale, DropPodScans, DropOutsideForged, DropLANIngress, DropClusterClear, DropTailnetClear,
	DropServiceClear, DropTailnetService, DropPodSource, DropTailnetEgress, DropTailnetSubnet, DropSubnetClear,
	DropTailscaled, DropPodFloods, DropTunnelInTunnel, DropTunnelQuotes, DropStraySegment, DropNoWay,
}

// The kernel has one table of neighbours a family for all links and all namespaces, with room for 1024 (gc_thresh3), and one that does not
// answer stays in it for 3 s. So a pod may ask for askBurst new neighbours at once and askRate a second, and all pods together for
// askedSize in askedFor.
const (
	askRate, askBurst = 64, 128
	askedSize         = 768
	askedFor          = 5 * time.Second
)

// A pod may ask its node for nameBurst names at once and nameRate a second: CoreDNS is a pod too, and asks for all others.
const (
	nameRate, nameBurst = 2000, 4000
	curiousSize         = 4096
)

// answerer is where the node itself answers for the tailnet's names.
var answerer = map[knftables.Family]netip.Addr{
	knftables.IPv4Family: netset.AnswererIPv4,
	knftables.IPv6Family: netset.AnswererIPv6,
}

// tailnet are all tailnet addresses.
var tailnet = map[knftables.Family]netip.Prefix{
	knftables.IPv4Family: netset.TailnetIPv4,
	knftables.IPv6Family: netset.TailnetIPv6,
}

// linkLocal are addresses that mean nothing behind a router. In IPv4 pods have their gateway there.
var linkLocal = map[knftables.Family]string{knftables.IPv4Family: "169.254.0.0/16", knftables.IPv6Family: "fe80::/10"}

// podGateway6 is the node's end of each pod's link.
const podGateway6 = "fe80::1"

// quad100 is tailscaled's own resolver and web server inside the tun: the node itself rather than a tailnet device.
var quad100 = map[knftables.Family]netip.Addr{
	knftables.IPv4Family: netset.ResolverIPv4,
	knftables.IPv6Family: netset.ResolverIPv6,
}
