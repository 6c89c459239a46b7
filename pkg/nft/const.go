package nft

import (
	"net/netip"

	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/netset"
)

// Every name, priority, mark and address of the rules, with its reason.
const (
	// setCluster holds the pod CIDRs of all clusters: what must use the tunnel or nothing.
	setCluster = "cluster"
	// setKeepSource holds the destinations towards which pods keep their source: the cluster set and services.
	setKeepSource = "keepsrc"
	// setOwn holds this node's pod CIDRs.
	setOwn = "own"
	// setShared holds what is the host's inside the tailnet's range.
	setShared = "shared"

	// chainAntispoof runs before conntrack, so that a forged packet never makes an entry.
	chainAntispoof = "antispoof"
	// prioAntispoof is raw (-300).
	prioAntispoof = knftables.RawPriority

	// chainTunnel notes in the forward hook what came out of the tunnel. Before kernel 5.7 the postrouting hook has no
	// input interface (nft takes the rule and never matches it), and the NAT below must know.
	chainTunnel = "tunnel"
	prioTunnel  = knftables.FilterPriority

	// chainClamp is in forward, where SYN and SYN-ACK of pods pass in both directions: the pod's node clamps for both ends.
	chainClamp = "clamp"
	prioClamp  = knftables.ManglePriority

	// chainGuard is in postrouting, not output: after DNAT only there the output interface is the final one, and it
	// sees forwarded packets too. It runs before source NAT.
	chainGuard = "guard"
	prioGuard  = knftables.FilterPriority

	// chainPatience is in output, where the node's own ICMP errors towards its pods pass.
	chainPatience = "patience"
	prioPatience  = knftables.FilterPriority

	// chainNAT runs just before everybody else's source NAT (kube-proxy, Docker: srcnat): the first NAT decision of a
	// flow is the one that stays.
	chainNAT = "postrouting"
	prioNAT  = knftables.SNATPriority + "-1"

	// markMask are the fwmark bits that tailscaled uses (its linuxfw package: 0xff0000).
	markMask = "0x00ff0000"
	// markFromTunnel is what tailscaled itself sets in its forward chain on packets that came from its tun ("subnet
	// route mark"). We set it as well, because with --netfilter-mode=off it does not; no bit is taken from anybody else.
	markFromTunnel = "0x00040000"
	// markKeep are the bits that are not tailscaled's.
	markKeep = "0xff00ffff"
)

// tailnet are all tailnet addresses.
var tailnet = map[knftables.Family]netip.Prefix{
	knftables.IPv4Family: netset.TailnetIPv4,
	knftables.IPv6Family: netset.TailnetIPv6,
}

// quad100 is tailscaled's own resolver and web server inside the tun: the node itself rather than a tailnet device.
var quad100 = map[knftables.Family]string{
	knftables.IPv4Family: "100.100.100.100",
	knftables.IPv6Family: "fd7a:115c:a1e0::53",
}
