package nft

import (
	"errors"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// dumpTries bounds the looks at conntrack's table while it changes.
const dumpTries = 3

// endStale has UDP for ports of the node go where the ports lead now. Conntrack keeps a flow where it began for as long as its client
// sends: at a pod that is gone, or at whoever is given its address next, and, where it began while nothing led to a pod, at the node
// itself. portmap does this when a pod gets a port, and not when it loses one, nor when somebody has flushed its rules.
//
// What cannot be deleted, as without ctnetlink in the kernel, goes on until its client is silent for two minutes. That is no reason to
// write no rules.
func endStale(old, now []Port) {
	local, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return
	}
	s := staleFlows{old: udpOnly(old), now: udpOnly(leading(now)), local: map[netip.Addr]bool{}}
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

// staleFlows are flows to ports of the node that lead elsewhere than the ports do.
type staleFlows struct {
	old, now []Port
	local    map[netip.Addr]bool
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter. Flows that others lead elsewhere, such as a NodePort's, are theirs.
func (s staleFlows) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
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
