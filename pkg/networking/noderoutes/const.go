package noderoutes

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/internal/sysctl"
	"github.com/headcni/headcni/pkg/config/names"
)

// Every number of the node's rules and routes, with its reason.
//
// The rules stand before tailscaled's (5210-5270). They are not in 5200-5299, since tailscaled takes the deletion of any
// rule there for one of its own. Everything of these numbers is ours, whoever made it, but of prefLocal (rule.ours).
const (
	// prefLocal: the node's own addresses come first, also on hosts whose rule for them was moved behind ours, as ifupdown2 does where
	// there are VRFs: prefLAN and prefLANFirst would lead them, 127.0.0.1 among them, to the default route. Elsewhere it is not there.
	prefLocal = 5185
	// prefTailnet: tailnet addresses, by tailscaled's table, before a wide static route in main (fd00::/8) takes them.
	prefTailnet = 5186
	// prefResolverElse: tailscaled's own address is nobody else's, whoever asks, and whatever routes the host has around it.
	prefResolverElse = 5187
	// prefOwn: own pods, by main's routes that are longer than the pod CIDR: no peer can take them, and a hole in the
	// CIDR does not find the default route.
	prefOwn = 5188
	// prefOwnElse: addresses of no pod go nowhere.
	prefOwnElse = 5189
	// prefTailnetHost: a network that the host has inside 100.64.0.0/10, which is not the tailnet's alone, by main's routes
	// that are longer.
	prefTailnetHost = 5190
	// prefBeside: a network of the host's own inside a subnet of the tailnet, for pods, by main's routes that are no shorter. No range of
	// the cluster's or the tailnet's is such a network or such a subnet, so that they share numbers without asking which comes first.
	prefBeside = prefTailnetHost
	// prefCluster: other nodes' pods, by tailscaled's table; for pods subnets too.
	prefCluster = 5191
	// prefClusterElse: or nowhere, whatever other routes there are.
	prefClusterElse = 5192
	// prefTailnetElse: tailnet addresses else lead nowhere. In IPv4 that is for pods and for the node's own tailnet address alone: clouds
	// have resolvers in 100.64.0.0/10, which hosts reach by their default route, from another address.
	prefTailnetElse = 5193
	// prefLAN: main's routes but the default one, before foreign subnet routes: the node keeps its own networks. It and the next
	// leave out what is for the tailnet, which the rules before them have led away: it must not find the LAN where somebody
	// deletes those first.
	prefLAN = 5194
	// prefLANFirst: main's default route as well, where the user wants no foreign routes at all.
	prefLANFirst = 5195

	// prefTunnelElse: in IPv4 it is for what comes out of the tunnel too, which is for the node's own address where somebody has taken
	// that away. It has a number of its own, so that the rules always stand in the same order. It drops in silence: the node's word that
	// there is no way would quote the packet, and take the default route while tailscaled has no routes yet.
	prefTunnelElse = 5196

	// prefServices: services are the node's own business, whatever leads to them: a peer that advertises their range, for devices of the
	// tailnet, must not even choose the source of what the node itself sends, which the kernel does before kube-proxy's DNAT.
	prefServices = 5197

	prefFirst, prefLast = prefLocal, prefServices

	// tailscaleTable is where tailscaled puts the routes that it accepted.
	tailscaleTable = 52
	// bypassMark is the fwmark bit of packets of tailscaled itself: no rule of ours may send them into the tunnel. The
	// rules match "this bit is 0"; `not fwmark` would invert the whole rule, as it does on purpose in prefLAN.
	bypassMark = names.BypassMark

	// unreachableMetric makes the route to a cluster CIDR the last choice in main, behind any route of anybody, and
	// recognisable. It is the third line of defence: without it pod traffic takes the default route when the rules are
	// gone, and it holds for packets with the bypass mark too.
	unreachableMetric = 4278

	// protocol is the origin of our rules and routes: systemd-networkd deletes foreign ones when it restarts, but not
	// "proto kernel" (systemd issue 19106).
	protocol = unix.RTPROT_KERNEL

	// noSuppress is the value of suppress_prefixlength that suppresses nothing.
	noSuppress = -1
)

// family is what differs between the two families.
type family struct {
	name    string // in words
	af      int
	tailnet netip.Prefix // all tailnet addresses
	// resolver is tailscaled's own address on each node.
	resolver netip.Addr
	// shared tells that others use the tailnet's range too.
	shared bool
	// conf is the sysctl folder, forwarding the switch for the whole host.
	conf, forwarding string
}

var families = []family{
	{"IPv4", unix.AF_INET, netset.TailnetIPv4, netset.ResolverIPv4, true, "net/ipv4/conf", sysctl.IPv4Forwarding},
	{"IPv6", unix.AF_INET6, netset.TailnetIPv6, netset.ResolverIPv6, false, "net/ipv6/conf", sysctl.IPv6Forwarding},
}

var ipv4, ipv6 = families[0], families[1]

// of returns the prefixes of the family.
func (f family) of(list []netip.Prefix) []netip.Prefix {
	return netset.OfFamily(list, f.af == unix.AF_INET6)
}
