package nft

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/names"
)

// table is the whole wanted content of our table in one family.
type table struct {
	family   knftables.Family
	counters []string
	sets     []set
	chains   []chain
}

type set struct {
	name     string
	elements []netip.Prefix
	// size is not 0 where the kernel fills the set, and how far.
	size uint64
	// keys is the type of elements that are written one by one (Consent, Sources, members), "" for prefixes.
	keys string
}

// chain is a base chain, or, where it has no kind, one that another's rules jump to.
type chain struct {
	name  string
	kind  knftables.BaseChainType
	hook  knftables.BaseChainHook
	prio  knftables.BaseChainPriority
	rules []string
}

// rulesetOf says what our tables must hold. It does no I/O.
func rulesetOf(cfg Config) []table {
	return []table{tableOf(knftables.IPv4Family, cfg), tableOf(knftables.IPv6Family, cfg)}
}

func tableOf(family knftables.Family, cfg Config) table {
	cluster := setOf(family, SetCluster, cfg.Cluster, cfg.Own)
	return table{
		family:   family,
		counters: reasons,
		// Those of prefixes first: prepare makes them before the others.
		sets: append([]set{
			cluster, setOf(family, setKeepSource, cfg.Cluster, cfg.Own, cfg.KeepSource), setOf(family, setOwn, cfg.Own),
			setOf(family, setServices, cfg.KeepSource), setOf(family, setServed, cfg.Served), setOf(family, setShared, cfg.Shared), setOf(family, setSites, cfg.Sites),
			setOf(family, setLinks, cfg.Links), setOf(family, setSubnets, cfg.Subnets.Known), setOf(family, setBeside, cfg.Subnets.Beside),
			setOf(family, setAbroad, cfg.Subnets.All, cfg.Subnets.Known, cfg.Subnets.Named),
			{name: setMembers, keys: addrType(family)}, {name: setSources, keys: linkType + " . " + addrType(family)},
			{name: setAsked, size: askedSize}, {name: setAskers, size: askedSize}, {name: setCurious, size: curiousSize},
		}, consentSets(family, cfg)...),
		chains: slices.DeleteFunc([]chain{
			{chainAntispoof, knftables.FilterType, knftables.PreroutingHook, prioAntispoof, antispoof(family, cfg)},
			{name: chainAntispoofPod, rules: antispoofPod(family, cfg)},
			{name: chainAntispoofNeighbor, rules: antispoofNeighbor(family)},
			{chainForward, knftables.FilterType, knftables.ForwardHook, prioForward, forward(family, cfg)},
			{name: chainForwardPorted, rules: ported(family, cfg)},
			{name: chainForwardSegments, rules: segments(family, cfg)},
			{name: chainForwardPod, rules: forwardPod(family, cfg)},
			{name: chainForwardTunnel, rules: forwardTunnel(family, cfg)},
			{chainPorts, knftables.NATType, knftables.PreroutingHook, prioPorts, toPorts(family, cfg)},
			{chainPortsOut, knftables.NATType, knftables.OutputHook, prioPorts, toPorts(family, cfg)},
			{chainGuard, knftables.FilterType, knftables.PostroutingHook, prioGuard, guard(family, cfg)},
			{name: chainGuardPod, rules: guardPod()},
			{name: chainGuardTunnel, rules: guardTunnel(family, cfg)},
			{chainHeard, knftables.FilterType, knftables.InputHook, prioHeard, heard(family, cfg)},
			{name: chainHeardPod, rules: heardPod(family)},
			{chainPatience, knftables.FilterType, knftables.OutputHook, prioPatience, patience(family, cluster.elements)},
			{chainNAT, knftables.NATType, knftables.PostroutingHook, prioNAT, nat(family, cfg)},
			{chainLast, knftables.FilterType, knftables.PostroutingHook, prioLast, last(family, cfg)},
			{name: chainLastTunnel, rules: lastTunnel(family, cfg)},
		}, func(c chain) bool { return c.kind == "" && len(c.rules) == 0 }),
	}
}

// setOf has no prefix inside another: nft refuses overlapping intervals.
func setOf(family knftables.Family, name string, lists ...[]netip.Prefix) set {
	return set{name: name, elements: netset.OfFamily(netset.Union(lists...), family == knftables.IPv6Family)}
}

// antispoof: a pod sends from its own address only, and nobody outside sends from a pod's.
func antispoof(family knftables.Family, cfg Config) []string {
	const outside = `iifname != "lo"` // no pod comes past the first rule
	rules := []string{
		rule(`iifname "%s" goto %s`, names.PodLinks, chainAntispoofPod),
		rule(`%s %s saddr @%s fib saddr . iif oif missing %s`, outside, family, SetCluster, drop(DropOutsideForged)),
		// The node's name server is for the node and its pods. Here nobody has the address of another, so that the set holds pods alone.
		rule(`%s %s daddr %s %s`, outside, family, answerer[family], drop(DropLANIngress)),
	}
	if cfg.TunName != "" {
		// tailscaled lets in what its node advertises. This is the second line, and keeps an exit node from leading to services.
		rules = append(rules, rule(`iifname "%s" %s daddr @%s %[2]s daddr != @%[4]s %[5]s`, cfg.TunName, family, setServices, setServed, drop(DropTailnetService)))
		if cfg.serves(family) {
			// IPVS takes it in input, and sends it on as the node does: the chain forward does not see it.
			rules = append(rules, rule(`iifname "%s" %s daddr @%s %s`, cfg.TunName, family, setServed, noteTunnel))
		}
	}
	if !cfg.LANIngress {
		// Here and not in forward, because IPVS has services on the node itself, and sends to pods as the node does.
		from := outside
		if cfg.TunName != "" {
			from += rule(` iifname != "%s"`, cfg.TunName)
		}
		rules = append(rules, rule(`%s %s daddr @%s %s`, from, family, setServices, drop(DropLANIngress)))
	}
	return rules
}

// antispoofPod is what each packet of a pod's meets first.
func antispoofPod(family knftables.Family, cfg Config) (rules []string) {
	if family == knftables.IPv6Family {
		rules = append(rules,
			rule(`meta l4proto ipv6-icmp jump %s`, chainAntispoofNeighbor),
			// The gateway is a permanent neighbour of the pod's, and what asks for it all the same asks from the pod's own address. Else
			// a pod could fill the node's table of neighbours, which is one for all links, with addresses that it makes up.
			rule(`ip6 saddr %s %s`, linkLocal[family], drop(DropPodLinkLocal)),
			// And the node must not ask for them by the pod's own link.
			rule(`ip6 daddr %s ip6 daddr != %s %s`, linkLocal[family], podGateway6, drop(DropPodLinkLocal)),
		)
	}
	rules = append(rules,
		// "missing": the way back to the source does not lead over the interface that the packet came in by. The set says the same faster.
		rule(`iif . %s saddr != @%s fib saddr . iif oif missing %s`, family, setSources, drop(DropPodForged)),
		rule(`%s daddr %s update @%s { %[1]s saddr timeout 60s limit rate over %[4]d/second burst %[5]d packets } %[6]s`,
			family, answerer[family], setCurious, nameRate, nameBurst, drop(DropPodFloods)),
	)
	if own := setOf(family, "", cfg.Own).elements; len(own) > 0 {
		// The kernel believes an ICMP error from anywhere that quotes a datagram of a socket of its own, as tailscaled's: one "packet too big"
		// and nothing large gets to a peer any more. What a pod got was for a pod of this node.
		rules = append(rules, rule(`%s%s %s`, icmpErrors[family], quotesNone(quotedDestination[family], own...), drop(DropPodQuotes)))
	}
	return rules
}

// antispoofNeighbor is about what a pod says on its link in IPv6 (RFC 4861).
func antispoofNeighbor(family knftables.Family) []string {
	if family == knftables.IPv4Family {
		return nil
	}
	return []string{
		// A pod that announces itself as router would give the node, and its neighbours, a default route.
		"icmpv6 type nd-router-advert " + drop(DropPodRouter),
		"icmpv6 type nd-redirect " + drop(DropPodRouter),
		// Before an address is usable the source is ::, which no fib lookup can find.
		"ip6 saddr :: icmpv6 type nd-neighbor-solicit accept",
		"ip6 saddr :: icmpv6 type mld2-listener-report accept",
	}
}

// falseErrors drops a pod's ICMP errors about a connection of which it is neither end, as one of another pod of this node. Before the daemon
// has said which addresses a link sends from, nothing is known of it.
func falseErrors(family knftables.Family) string {
	return rule(`ct state related %s iif . %[2]s saddr @%[3]s iif . ct original %[2]s saddr != @%[3]s iif . ct reply %[2]s saddr != @%[3]s %[4]s`,
		icmpErrors[family], family, setSources, drop(DropPodQuotes))
}

// heard is about what the node itself gets.
func heard(family knftables.Family, cfg Config) []string {
	rules := []string{rule(`iifname "%s" goto %s`, names.PodLinks, chainHeardPod)}
	if cfg.Masquerade && !cfg.noSockets {
		// Of a pod's connection to the outside conntrack may not know a segment again, as one that came late or far too early. It would end here,
		// where nobody has such a connection, and the kernel's reset would end that of the pod. The node's own connections are not meant: those
		// that are older than conntrack, or that it has forgotten, have a socket here, and must go on, and hear of their end.
		const stray = `meta l4proto tcp ct state invalid iifname != "lo"`
		rules = append(rules, stray+" "+ofSocket+" accept", stray+" "+drop(DropStraySegment))
	}
	if cfg.TunName != "" {
		// tailscaled lets in ICMP errors by whomever in the tailnet. What the node has sent by the tunnel is from or for the tailnet or pods.
		rules = append(rules, rule(`iifname "%s" %s%s%s %s`, cfg.TunName, icmpErrors[family], quotesNone(quotedSource[family], tailnet[family]),
			quotesNone(quotedDestination[family], append(setOf(family, "", cfg.Cluster, cfg.Own).elements, tailnet[family])...), drop(DropTunnelQuotes)))
	}
	return rules
}

// heardPod is about what it gets from its pods.
func heardPod(family knftables.Family) []string {
	rules := []string{falseErrors(family)}
	if family == knftables.IPv4Family {
		// The kernel refuses that itself, until somebody sets route_localnet: portmap does, on the links of pods with ports of the node, and
		// kube-proxy everywhere. Pods answer there what came by a port of the node, and only NAT leads that back.
		const home = `ip daddr 127.0.0.0/8`
		rules = append(rules, home+" ct direction reply accept", home+" "+drop(DropPodLoopback))
	}
	return rules
}

// ofSocket matches what is for a socket of the node's own: a rule with it does not match where there is none. TPROXY's are none of these.
const ofSocket = "socket transparent 0"

// drop counts, and costs nothing before there is something to drop.
func drop(reason string) string { return rule(`counter name "%s" drop`, reason) }

// noteTunnel notes what came out of the tun, for nat.
const noteTunnel = "meta mark set meta mark & " + markKeep + " | " + markFromTunnel

// serves: devices of the tailnet reach services over this node.
func (c Config) serves(family knftables.Family) bool {
	return len(netset.OfFamily(c.Served, family == knftables.IPv6Family)) > 0
}

// segments has both ends of a pod's TCP connection send segments that its path carries. The kernel only ever lowers the size. What a pod
// forwards for containers of its own, as Docker in a pod does, speaks of their links' MTU, which is mostly larger than the pod's: where
// the node's word that a packet is too large does not get back to the sender, nothing full would ever arrive. And through the tunnel
// tailscaled loses whole batches of segments larger than the path to a peer.
func segments(family knftables.Family, cfg Config) []string {
	const size = "tcp option maxseg size set"
	rules := []string{
		rule(`iifname "%s" %s rt mtu`, names.PodLinks, size),
		rule(`oifname "%s" %s rt mtu`, names.PodLinks, size),
	}
	if cfg.TunName == "" || cfg.PathMTU == 0 {
		return rules
	}
	mss := cfg.PathMTU - 20 - 20
	if family == knftables.IPv6Family {
		mss -= 20
	}
	for _, side := range []string{"oifname", "iifname"} {
		rules = append(rules, rule(`%s "%s" %s %d`, side, cfg.TunName, size, mss))
	}
	return rules
}

// forward: what comes from beside the node reaches pods, here or by the tunnel, only as an answer or by a port of the node, which is
// DNAT by whomever. Without a conntrack entry there is neither. In front stands what is frequent.
func forward(family knftables.Family, cfg Config) (rules []string) {
	fam := string(family)
	if len(ported(family, cfg)) > 0 {
		rules = append(rules, "ct state new ct status dnat jump "+chainForwardPorted)
	}
	rules = append(rules, "tcp flags & (syn | rst) == syn jump "+chainForwardSegments,
		rule(`iifname "%s" goto %s`, names.PodLinks, chainForwardPod))
	toPods := rule(`oifname != "%s"`, names.PodLinks)
	if cfg.TunName != "" {
		rules = append(rules, rule(`iifname "%s" goto %s`, cfg.TunName, chainForwardTunnel))
		toPods = rule(`oifname != "%s" %s`, cfg.TunName, toPods)
	}
	rules = append(rules, toPods+" accept", "ct direction reply accept",
		// A pod must not be told, through a port of the node either, that a service, the tailnet or its own node speaks.
		rule(`%s saddr @%s %s`, fam, setServices, drop(DropOutsideForged)),
		rule(`%s saddr %s%s %s`, fam, tailnet[family], notShared(family, "saddr"), drop(DropOutsideForged)),
		rule(`%s saddr %s %s`, fam, linkLocal[family], drop(DropOutsideForged)),
		// The IPv4 of the kernel refuses that itself.
		rule(`fib saddr type local %s`, drop(DropOutsideForged)),
	)
	if cfg.LANIngress {
		return rules
	}
	rules = append(rules, "ct status dnat accept")
	if cfg.TunName != "" && cfg.HostMode {
		// A user's subnet router joins networks in both directions.
		rules = append(rules, rule(`oifname "%s" %s saddr @%s %s daddr != @%s accept`, cfg.TunName, fam, setSites, fam, setKeepSource))
	}
	return append(rules, drop(DropLANIngress))
}

// forwardPod lets pods send, but for one that goes through the neighbours of the node. In front stands what is frequent.
func forwardPod(family knftables.Family, cfg Config) []string {
	rules := append([]string{rule(`oifname "%s" ct state != related accept`, names.PodLinks), falseErrors(family)}, toSubnets(family, cfg)...)
	return append(rules, "ct state established,related accept",
		rule(`%s daddr != @%s accept`, family, setLinks),
		rule(`%s daddr @%s update @%[2]s { %[1]s daddr timeout %[3]ds } accept`, family, setAsked, int(askedFor.Seconds())),
		rule(`update @%s { %s saddr timeout 60s limit rate %d/second burst %d packets } update @%s { %[2]s daddr timeout %[6]ds } accept`,
			setAskers, family, askRate, askBurst, setAsked, int(askedFor.Seconds())),
		drop(DropPodScans))
}

// guard: cluster destinations leave by the tunnel, to a pod of this node, or not at all.
func guard(family knftables.Family, cfg Config) []string {
	fam := string(family)
	rules := []string{rule(`oifname "%s" goto %s`, names.PodLinks, chainGuardPod), `oifname "lo" accept`}
	if cfg.TunName != "" {
		rules = append(rules, rule(`oifname "%s" goto %s`, cfg.TunName, chainGuardTunnel))
	}
	if cfg.TunName != "" && family == knftables.IPv4Family {
		// What a device of the tailnet sends to another, an answer of the node to one, and what is for an address that the tun has just
		// lost: a neighbour's pod may have sent it. Before the tun is known it is a foreign link itself.
		rules = append(rules, rule(`ip saddr %s%s ip daddr %[1]s%[3]s %[4]s`, tailnet[family], notShared(family, "saddr"),
			notShared(family, "daddr"), drop(DropTailnetClear)),
			// What the node itself sends, and pods with its network, is for the tailnet where a member of that has the address. tailscaled's
			// own packets go where a member's endpoint is.
			rule(`ip daddr @%s%s meta mark & %s != 0x%08x %s`, setMembers, notShared(family, "daddr"), markMask, names.BypassMark, drop(DropTailnetClear)))
	}
	rules = append(rules, answererStays(family))
	if family == knftables.IPv4Family {
		// By whomever, and whatever the host has in the tailnet's range.
		rules = append(rules, rule(`ip daddr %s %s`, quad100[family], drop(DropTailnetClear)))
	}
	rules = append(rules, quotes(family, cfg)...)
	return append(rules,
		rule(`%s %s`, toTailnet(family), drop(DropTailnetClear)), servicesStay(family),
		rule(`%s daddr @%s %s`, fam, SetCluster, drop(DropClusterClear)))
}

// guardPod: an answer of a service's that conntrack does not know again has its pod's source, whom the pod that asked has never called: its
// reset would end the connection. kube-proxy drops such in iptables mode alone. Here policies have seen it, and told of it.
func guardPod() []string {
	return []string{"ct state != invalid accept", "meta l4proto tcp " + drop(DropStraySegment)}
}

// guardTunnel is about what leaves by the tunnel.
func guardTunnel(family knftables.Family, cfg Config) []string {
	if cfg.TunName == "" {
		return nil
	}
	fam := string(family)
	// There is tailscaled's web client too, which takes what comes from the node for the administrator.
	own := rule(`%s daddr %s %[1]s saddr @%[3]s`, fam, quad100[family], SetCluster)
	rules := []string{
		// tailscaled's own packets inside its tunnel: a peer's endpoint was taken for reachable through the pod network.
		rule(`meta mark & %s == 0x%08x %s`, markMask, names.BypassMark, drop(DropTunnelInTunnel)),
		toCluster(family),
		own + " udp dport 53 accept", own + " tcp dport 53 accept", own + " " + drop(DropTailscaled),
	}
	if cfg.TailnetEgress == config.EgressDeny {
		// Only what a pod begins: an answer to a device that may reach the pod goes out. What conntrack does not know is none.
		out := rule(`%s daddr != @%s %[1]s daddr != %[3]s %[1]s saddr @%[4]s`, fam, setKeepSource, quad100[family], setOwn)
		out += rule(` %s daddr != @%s`, fam, setAbroad) // the forward hook has judged that
		rules = append(rules, out+" ct direction reply accept", out+" "+drop(DropTailnetEgress))
	}
	return append(rules, answererStays(family), servicesStay(family))
}

// answererStays: the node's name server is on the node, unless the daemon has gone, or has not come so far.
func answererStays(family knftables.Family) string {
	return rule(`%s daddr %s %s`, family, answerer[family], drop(DropTailnetClear))
}

// servicesStay, by the tunnel too: a service is what DNAT has made a pod of.
func servicesStay(family knftables.Family) string {
	return rule(`%s daddr @%s %s`, family, setServices, drop(DropServiceClear))
}

// toCluster ends a chain of the tunnel's for what it is right to send, by one look into a set.
func toCluster(family knftables.Family) string {
	return rule(`%s daddr @%s accept`, family, SetCluster)
}

// toTailnet matches what is for the tailnet. In IPv4 that is what pods send, as far as the host has no network of its own there:
// 100.64.0.0/10 is not the tailnet's alone, clouds have resolvers in it, which hosts reach by their default route.
func toTailnet(family knftables.Family) string {
	if family == knftables.IPv6Family {
		return rule(`ip6 daddr %s`, tailnet[family])
	}
	return rule(`ip saddr @%s ip daddr %s%s`, SetCluster, tailnet[family], notShared(family, "daddr"))
}

// quotes matches the node's own ICMP errors that leave by a foreign link and quote what came out of the tunnel: the kernel sends them from
// the link's address to whoever sent the packet, by the default route where tailscaled's routes are away.
func quotes(family knftables.Family, cfg Config) (rules []string) {
	// Only these two carry something of the sender's choice where an error quotes.
	match, v6 := notEcho, false
	if family == knftables.IPv6Family {
		match, v6 = "icmpv6 type != echo-request icmpv6 type != echo-reply", true
	}
	about := append(setOf(family, "", cfg.Cluster, cfg.Own, cfg.KeepSource).elements, tailnet[family])
	drops := func(to, reason string) {
		for _, p := range about {
			rules = append(rules, rule(`%s %s %s %s`, match, to, payload(quotedDestination[family], p), drop(reason)))
		}
	}
	if !v6 {
		// In IPv6 nothing at all leaves for there.
		drops(rule(`ip daddr %s%s`, tailnet[family], notShared(family, "daddr")), DropTailnetClear)
	}
	if len(netset.OfFamily(cfg.Subnets.Known, v6)) > 0 {
		drops(rule(`%s daddr @%s %[1]s daddr != @%[3]s`, family, setSubnets, setBeside), DropSubnetClear)
	}
	return rules
}

// notShared excepts, in IPv4, what is the host's inside the tailnet's range.
func notShared(family knftables.Family, side string) string {
	if family == knftables.IPv6Family {
		return ""
	}
	return rule(` ip %s != @%s`, side, setShared)
}

// last: a pod is seen outside, and by tailnet devices, as its node, or not at all. NAT leaves out what conntrack does not know, or
// knew before there was NAT.
func last(family knftables.Family, cfg Config) []string {
	fam := string(family)
	rules := []string{rule(`oifname "%s" accept`, names.PodLinks), `oifname "lo" accept`}
	switch {
	case cfg.TunName == "":
	case cfg.TailnetEgress == config.EgressPreserve:
		rules = append(rules, rule(`oifname "%s" accept`, cfg.TunName))
	default:
		rules = append(rules, rule(`oifname "%s" goto %s`, cfg.TunName, chainLastTunnel))
	}
	if !cfg.Masquerade {
		return rules
	}
	out := rule(`%s saddr @%s`, fam, SetCluster)
	if cfg.LANIngress {
		rules = append(rules, out+" ct direction reply accept")
	}
	return append(rules, out+" "+drop(DropPodSource))
}

func lastTunnel(family knftables.Family, cfg Config) []string {
	if cfg.TunName == "" || cfg.TailnetEgress == config.EgressPreserve {
		return nil
	}
	out := rule(`%s daddr != %s %[1]s saddr @%[3]s`, family, quad100[family], setOwn)
	// A device that called the pod by its own address hears that address.
	return []string{toCluster(family), out + " ct direction reply accept", out + " " + drop(DropPodSource)}
}

// nat: who sees which source.
func nat(family knftables.Family, cfg Config) []string {
	fam, tun := string(family), cfg.TunName
	// Pods keep their source towards pods and services.
	rules := append(hairpins(family, cfg), rule(`%s saddr @%s %s daddr @%s return`, fam, setOwn, fam, setKeepSource))
	if tun != "" {
		switch {
		case cfg.TailnetEgress == config.EgressPreserve:
			rules = append(rules, rule(`%s saddr @%s oifname "%s" return`, fam, setOwn, tun))
		case !cfg.Masquerade:
			rules = append(rules, rule(`%s saddr @%s oifname "%s" masquerade fully-random`, fam, setOwn, tun))
		}
	}
	if cfg.Masquerade {
		// The outside, other nodes' underlay addresses, tailnet devices. fully-random: a plain masquerade keeps a pod's
		// port, and with port 41641 takes the node's tailscaled its endpoint.
		rules = append(rules, rule(`%s saddr @%s oifname != "%s" masquerade fully-random`, fam, setOwn, names.PodLinks))
	}
	if tun != "" {
		fromTun := rule(`meta mark & %s == %s`, markMask, markFromTunnel)
		if cfg.serves(family) {
			// A device of the tailnet at a service: who answers from elsewhere knows the way back to this node only. kube-proxy does the same
			// where it knows the cluster's range. A pod of this node sees the device itself, unless kube-proxy hides it.
			// What IPVS has done is no DNAT in conntrack's eyes.
			rules = append(rules, rule(`%s oifname != "%s" ct original %s daddr @%s masquerade fully-random`, fromTun, names.PodLinks, fam, setServed))
		}
		rules = append(rules,
			// A peer that routes through us to another peer must not get our identity.
			rule(`%s oifname "%s" return`, fromTun, tun),
		)
		// A host process or a NodePort client that reaches a remote pod: only a tailnet address finds its way back.
		toPods := rule(`oifname "%s" %s daddr @%s %s saddr != @%s`, tun, fam, SetCluster, fam, SetCluster)
		if cfg.LANIngress {
			rules = append(rules, toPods+" masquerade fully-random")
		} else {
			rules = append(rules, toPods+" fib saddr type local masquerade fully-random", toPods+" ct status dnat masquerade fully-random")
		}
		if cfg.HostMode {
			// What the NoSNAT pref takes from a user's exit node or subnet router.
			rules = append(rules, rule(`%s oifname != "%s" %s daddr != @%s masquerade fully-random`,
				fromTun, names.PodLinks, fam, SetCluster))
		}
	}
	node := cfg.NodeAddr4
	if family == knftables.IPv6Family {
		node = cfg.NodeAddr6
	}
	if node.IsValid() {
		// Node -> own pod: the kernel may choose any address of the node, and a `src` in the pod's route would make the
		// kernel delete the route when the address goes.
		rules = append(rules, rule(`oifname "%s" fib saddr type local %s saddr != %s snat to %s`, names.PodLinks, fam, node, node))
	}
	return rules
}

// toPorts leads what is for a port of the node to the pod that has it. portmap's rules do so already, but where somebody has taken
// them away.
func toPorts(family knftables.Family, cfg Config) (rules []string) {
	for _, p := range leading(portsOf(family, cfg)) {
		at := ""
		if p.At.IsValid() {
			at = rule(`%s daddr %s `, family, p.At)
		}
		rules = append(rules, rule(`fib daddr type local %s%s dport %d dnat to %s`, at, p.Protocol, p.Number, p.To))
	}
	return rules
}

// leading are the ports whose pods are there.
func leading(ports []Port) []Port {
	return slices.DeleteFunc(slices.Clone(ports), func(p Port) bool { return p.Gone })
}

// ported: an address that a pod had goes to the next one, which the port is not for, however late the daemon hears of it.
func ported(family knftables.Family, cfg Config) (rules []string) {
	ports := portsOf(family, cfg)
	for _, p := range ports {
		// The next pod has the address and asked for the same port: it is the port's now.
		if p.Gone && slices.ContainsFunc(leading(ports), func(q Port) bool { return q.Protocol == p.Protocol && q.Number == p.Number && q.To == p.To }) {
			continue
		}
		// nft must know the protocol before it reads a port.
		rules = append(rules, rule(`%s daddr %s %s dport %d ct original proto-dst %d oifname != "%s" %s`,
			family, p.To.Addr(), p.Protocol, p.To.Port(), p.Number, p.Link, drop(DropPortStale)))
	}
	return rules
}

// hairpins are for a pod that calls itself by a port of the node: it would not take an answer from its own address.
func hairpins(family knftables.Family, cfg Config) (rules []string) {
	for _, p := range leading(portsOf(family, cfg)) {
		r := rule(`%s saddr %s %[1]s daddr %[2]s oifname "%[3]s" masquerade fully-random`, family, p.To.Addr(), p.Link)
		if !slices.Contains(rules, r) {
			rules = append(rules, r)
		}
	}
	return rules
}

func portsOf(family knftables.Family, cfg Config) []Port {
	return slices.DeleteFunc(slices.Clone(cfg.Ports), func(p Port) bool { return p.To.Addr().Is6() != (family == knftables.IPv6Family) })
}

// patience drops the node's "net unreachable" to its pods about cluster destinations, which rule 5192 causes while the
// tunnel is away: a connect() then waits for the tunnel instead of failing at once.
func patience(family knftables.Family, cluster []netip.Prefix) []string {
	match := "icmp type destination-unreachable icmp code net-unreachable"
	if family == knftables.IPv6Family {
		match = "icmpv6 type destination-unreachable icmpv6 code no-route"
	}
	var rules []string
	for _, p := range cluster {
		rules = append(rules, rule(`oifname "%s" %s %s %s`, names.PodLinks, match, payload(quotedDestination[family], p), drop(DropNoWay)))
	}
	return rules
}

// quotedDestination is where an ICMP error has the destination of the packet that it is about, in bits: behind 8 bytes of its own header.
var quotedDestination = map[knftables.Family]int{knftables.IPv4Family: (8 + 16) * 8, knftables.IPv6Family: (8 + 24) * 8}

// quotedSource is where it has that packet's source.
var quotedSource = map[knftables.Family]int{knftables.IPv4Family: (8 + 12) * 8, knftables.IPv6Family: (8 + 8) * 8}

// icmpErrors matches what may quote a packet that it is about, ICMP's redirect too (RFC 792; RFC 4443, section 2.1).
var icmpErrors = map[knftables.Family]string{
	knftables.IPv4Family: notEcho,
	knftables.IPv6Family: "icmpv6 type < 128",
}

const notEcho = "icmp type != echo-request icmp type != echo-reply"

// quotesNone matches where the address that is quoted at an offset is in none of the prefixes.
func quotesNone(at int, prefixes ...netip.Prefix) (match string) {
	for _, p := range prefixes {
		match += " " + compare(at, "!=", p)
	}
	return match
}

// payload matches a prefix at an offset, in bits, into the transport header.
func payload(at int, p netip.Prefix) string { return compare(at, "==", p) }

func compare(at int, how string, p netip.Prefix) string {
	n := (p.Bits() + 7) / 8 // bytes to load
	value := p.Addr().AsSlice()[:n]
	if p.Bits()%8 == 0 {
		return rule(`@th,%d,%d %s 0x%x`, at, n*8, how, value)
	}
	mask := slices.Repeat([]byte{0xff}, n)
	mask[n-1] = 0xff << (n*8 - p.Bits())
	return rule(`@th,%d,%d & 0x%x %s 0x%x`, at, n*8, mask, how, value)
}

func rule(format string, args ...any) string { return fmt.Sprintf(format, args...) }

// fill makes the table hold t and nothing else inside the chains and sets of t. Chains stay registered, so that each
// packet meets either all old or all new rules.
//
// Of a set whose prefixes are held only what differs is touched. It must be there still, or the transaction fails.
func (t table) fill(tx *knftables.Transaction, held map[string][]netip.Prefix) {
	tx.Add(t.object())
	for _, c := range t.counters {
		tx.Add(&knftables.Counter{Family: t.family, Table: names.NFTTable, Name: c})
	}
	for _, s := range t.sets {
		has, known := held[s.name]
		if !known {
			tx.Add(t.set(s))
			if s.filled() {
				continue
			}
			tx.Flush(t.set(s))
		}
		for _, p := range netset.Without(has, s.elements) {
			tx.Delete(t.element(s, p))
		}
		for _, p := range netset.Without(s.elements, has) {
			tx.Add(t.element(s, p))
		}
	}
	for _, c := range t.chains {
		tx.Add(t.chain(c)) // all before the first rule that jumps to one
		tx.Flush(t.chain(c))
	}
	for _, c := range t.chains {
		for _, r := range c.rules {
			tx.Add(&knftables.Rule{Family: t.family, Table: names.NFTTable, Chain: c.name, Rule: r})
		}
	}
}

// linkType is a link's index.
const linkType = "iface_index"

func addrType(family knftables.Family) string {
	if family == knftables.IPv6Family {
		return "ipv6_addr"
	}
	return "ipv4_addr"
}

// addrLen is an address's length in bytes.
func addrLen(family knftables.Family) uint32 {
	if family == knftables.IPv6Family {
		return 16
	}
	return 4
}

// filled: not by what a Config says.
func (s set) filled() bool { return s.size > 0 || s.keys != "" }

func (t table) object() *knftables.Table {
	return &knftables.Table{Family: t.family, Name: names.NFTTable}
}

func (t table) set(s set) *knftables.Set {
	if s.keys != "" {
		return &knftables.Set{Family: t.family, Table: names.NFTTable, Name: s.name, Type: s.keys}
	}
	kind := addrType(t.family)
	if s.size > 0 {
		return &knftables.Set{Family: t.family, Table: names.NFTTable, Name: s.name, Type: kind, Size: &s.size,
			Flags: []knftables.SetFlag{knftables.DynamicFlag, knftables.TimeoutFlag}}
	}
	return &knftables.Set{Family: t.family, Table: names.NFTTable, Name: s.name, Type: kind,
		Flags: []knftables.SetFlag{knftables.IntervalFlag}}
}

func (t table) element(s set, p netip.Prefix) *knftables.Element {
	return &knftables.Element{Family: t.family, Table: names.NFTTable, Set: s.name, Key: []string{p.String()}}
}

func (t table) chain(c chain) *knftables.Chain {
	if c.kind == "" {
		return &knftables.Chain{Family: t.family, Table: names.NFTTable, Name: c.name}
	}
	return &knftables.Chain{Family: t.family, Table: names.NFTTable, Name: c.name, Type: &c.kind, Hook: &c.hook,
		Priority: &c.prio, Policy: knftables.PtrTo(knftables.AcceptPolicy)}
}

// String is t as nft commands: a name for the content.
func (t table) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "counters %s %v\n", t.family, t.counters)
	for _, s := range t.sets {
		fmt.Fprintf(&b, "set %s %s %v\n", t.family, s.name, s.elements)
	}
	for _, c := range t.chains {
		fmt.Fprintf(&b, "chain %s %s %s %s %s\n", t.family, c.name, c.kind, c.hook, c.prio)
		for _, r := range c.rules {
			fmt.Fprintf(&b, "\t%s\n", r)
		}
	}
	return b.String()
}
