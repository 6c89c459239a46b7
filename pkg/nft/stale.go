package nft

import (
	"errors"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
)

// dumpTries bounds the looks at conntrack's table while it changes.
const dumpTries = 3

// endStale ends flows that conntrack leads elsewhere than our rules do now: it keeps a flow where it began, for as long as somebody sends.
//
//   - UDP to ports of the node: at a pod that is gone, or at whoever is given its address next, and, where it began while nothing led to a
//     pod, at the node itself. portmap does this when a pod gets a port, and not when it loses one, nor when somebody has flushed its rules.
//   - What pods began while somebody had taken our tables away, gap: with their own source, which the chain last drops ever after.
//
// What cannot be deleted, as without ctnetlink in the kernel, goes on until its sender pauses for as long as conntrack remembers. That is
// no reason to write no rules.
func endStale(old []Port, cfg Config, gap bool) {
	s := staleFlows{old: udpOnly(old), now: udpOnly(leading(cfg.Ports)), own: cfg.Own, keep: keepsSource(cfg), gap: gap && cfg.Masquerade, local: map[netip.Addr]bool{}}
	if len(s.old)+len(s.now) == 0 && !s.gap {
		return
	}
	local, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return
	}
	for _, a := range local {
		s.local[addrOf(a.IP)] = true
	}
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		for range dumpTries {
			if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, s); !errors.Is(err, netlink.ErrDumpInterrupted) {
				break
			}
		}
	}
}

// udpOnly are the ports of the protocol whose flows have no end of their own.
func udpOnly(ports []Port) []Port {
	return slices.DeleteFunc(slices.Clone(ports), func(p Port) bool { return p.Protocol != "udp" })
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip) // the zero Addr is nobody's
	return a.Unmap()
}

// staleFlows are flows that are to end: those to ports of the node that lead elsewhere than the ports do, and those of a gap.
type staleFlows struct {
	old, now []Port
	// own are pods of this node, keep whom they show themselves to.
	own, keep []netip.Prefix
	gap       bool
	local     map[netip.Addr]bool
}

// keepsSource are the destinations that nat leaves a pod's source to. Whom the tunnel leads to is told by the link there, here by address.
func keepsSource(c Config) []netip.Prefix {
	keep := slices.Concat(c.Own, c.Cluster, c.KeepSource)
	if c.TailnetEgress == config.EgressPreserve {
		keep = slices.Concat(keep, []netip.Prefix{tailnet[knftables.IPv4Family], tailnet[knftables.IPv6Family]}, c.Subnets.Known, c.Subnets.Named, c.Subnets.All)
	}
	return netset.Union(keep)
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (s staleFlows) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	return s.misled(flow) || s.gap && s.unmasked(flow)
}

// misled: it does not go where a port leads. Flows that others lead elsewhere, such as a NodePort's, are theirs.
func (s staleFlows) misled(flow *netlink.ConntrackFlow) bool {
	at := netip.AddrPortFrom(addrOf(flow.Forward.DstIP), flow.Forward.DstPort)
	if flow.Forward.Protocol != unix.IPPROTO_UDP || !s.local[at.Addr()] {
		return false
	}
	leads := func(ports []Port, to *netip.AddrPort) bool {
		return slices.ContainsFunc(ports, func(p Port) bool {
			return p.Number == at.Port() && p.To.Addr().Is4() == at.Addr().Is4() && (!p.At.IsValid() || p.At == at.Addr()) && (to == nil || p.To == *to)
		})
	}
	to := netip.AddrPortFrom(addrOf(flow.Reverse.SrcIP), flow.Reverse.SrcPort)
	if to == at { // nobody leads it anywhere
		return leads(s.now, nil)
	}
	return leads(s.old, &to) && !leads(s.now, &to)
}

// unmasked: a pod of this node began it towards somebody who is to see the node, and sees the pod; see nat.
func (s staleFlows) unmasked(flow *netlink.ConntrackFlow) bool {
	from, to := addrOf(flow.Forward.SrcIP), addrOf(flow.Reverse.SrcIP)
	return addrOf(flow.Reverse.DstIP) == from && netset.Contains(s.own, from) && !s.local[to] && !to.IsMulticast() && !netset.Contains(s.keep, to)
}
