// Package netset is the algebra of sets of IP prefixes, the two ranges that every tailnet has, and the addresses that mean the node itself.
package netset

import (
	"cmp"
	"net/netip"
	"slices"

	"go4.org/netipx"
)

var (
	// TailnetIPv4 is where IPv4 tailnet addresses are from: the shared address space of RFC 6598, in which providers have
	// networks too.
	TailnetIPv4 = netip.MustParsePrefix("100.64.0.0/10")
	// TailnetIPv6 is Tailscale's unique local range (tailscale.com/kb/1033).
	TailnetIPv6 = netip.MustParsePrefix("fd7a:115c:a1e0::/48")
	// ResolverIPv4 and ResolverIPv6 are where each node's tailscaled answers that node, and nobody else (tailscale.com/kb/1381).
	ResolverIPv4 = netip.MustParseAddr("100.100.100.100")
	ResolverIPv6 = netip.MustParseAddr("fd7a:115c:a1e0::53")
	// AnswererIPv4 and AnswererIPv6 are where each node's daemon answers for the tailnet's names, for the node and its pods (pkg/dns/answer). The
	// IPv4 one is link-local, and neither NodeLocal DNSCache (169.254.20.10) nor a cloud's metadata (169.254.169.254, 169.254.170.2) nor the pods'
	// gateway has it. The IPv6 one is a unique local address (RFC 4193): what pods send to fe80::/10 ends at their link.
	AnswererIPv4 = netip.MustParseAddr("169.254.116.52")
	AnswererIPv6 = netip.MustParseAddr("fd68:6561:6463:6e69::53")
)

// Union returns the prefixes of all lists, masked and in order of address, without those inside another. It does not join
// neighbours: every prefix of the result is one of the lists.
func Union(lists ...[]netip.Prefix) []netip.Prefix {
	var all []netip.Prefix
	for _, p := range slices.Concat(lists...) {
		if p.IsValid() {
			all = append(all, p.Masked())
		}
	}
	slices.SortFunc(all, func(a, b netip.Prefix) int { // the wider of two that begin alike comes first
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	var out []netip.Prefix
	for _, p := range all {
		if n := len(out); n == 0 || !out[n-1].Contains(p.Addr()) {
			out = append(out, p)
		}
	}
	return out
}

// Aggregate covers exactly what the prefixes cover in as few prefixes as possible, in order of address. Each prefix costs a
// rule that packets are compared with, and a cluster has a thousand nodes.
func Aggregate(prefixes []netip.Prefix) []netip.Prefix {
	var b netipx.IPSetBuilder
	for _, p := range prefixes {
		b.AddPrefix(p)
	}
	set, err := b.IPSet()
	if err != nil { // an invalid prefix, which Union leaves out
		return Union(prefixes)
	}
	return append([]netip.Prefix(nil), set.Prefixes()...) // nil where there is none
}

// Without returns the elements of list that are not elements of drop, in list's order.
func Without(list, drop []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(list), func(p netip.Prefix) bool { return slices.Contains(drop, p) })
}

// OfFamily returns the IPv4 or the IPv6 prefixes of list, in list's order.
func OfFamily(list []netip.Prefix, ipv6 bool) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(list), func(p netip.Prefix) bool { return p.Addr().Is6() != ipv6 })
}

// Family is an address's in words.
func Family(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// Contains reports whether a prefix of the list has the address.
func Contains(list []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
}

// Covers reports whether one prefix of set contains all of p.
func Covers(set []netip.Prefix, p netip.Prefix) bool {
	return slices.ContainsFunc(set, func(s netip.Prefix) bool { return s.Bits() <= p.Bits() && s.Contains(p.Addr()) })
}

// Overlapping returns the first prefix of set that shares an address with p.
func Overlapping(set []netip.Prefix, p netip.Prefix) (netip.Prefix, bool) {
	if i := slices.IndexFunc(set, p.Overlaps); i >= 0 {
		return set[i], true
	}
	return netip.Prefix{}, false
}
