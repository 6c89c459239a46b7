// Package answer is an authoritative name server for the tailnet's own names, at an address that each node has for itself and its pods.
//
// It answers from what tailscaled has said, and asks nobody: no question leaves the node, whoever asks it. What tailscaled's own resolver
// does not do while accept-dns is off, it does: NXDOMAIN for who is not there, AAAA, and to go on while tailscaled is restarted.
package answer

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/headcni/headcni/internal/netset"
)

// TTL of what it says, in seconds, and of what it says there is not. tailscaled has the same.
const TTL = 5

// Names are what there is.
type Names struct {
	// Domain is the tailnet's, such as ts.example.com.
	Domain string
	// Hosts are the addresses by full name, in lower case without a final dot.
	Hosts map[string][]netip.Addr
	// Incomplete tells that there may be more names than these: then nobody hears that there is not one.
	Incomplete bool
}

// reverse are the zones of addresses: all that is a tailnet's in them is in Names.
var reverse = []netip.Prefix{netset.TailnetIPv4, netset.TailnetIPv6}

// index is Names in the form in which questions are looked up.
type index struct {
	Names
	byAddr map[netip.Addr]string
	// above are names that have others below them.
	above map[string]bool
}

func newIndex(n Names) *index {
	n.Domain = strings.ToLower(strings.TrimSuffix(n.Domain, "."))
	x := &index{Names: n, byAddr: map[netip.Addr]string{}, above: map[string]bool{}}
	for name, addrs := range n.Hosts {
		for _, a := range addrs {
			// Of an address that two names have (extra records), the first in order is its name.
			if have := x.byAddr[a]; inReverse(a) && (have == "" || name < have) {
				x.byAddr[a] = name
			}
		}
		for _, rest, ok := strings.Cut(name, "."); ok && !x.above[rest]; _, rest, ok = strings.Cut(rest, ".") {
			x.above[rest] = true
		}
	}
	return x
}

func inReverse(a netip.Addr) bool {
	return slices.ContainsFunc(reverse, func(p netip.Prefix) bool { return p.Contains(a) })
}

// found is what there is for a name.
type found struct {
	zone  string // whose SOA goes with a "no"; "" where the name is none of ours
	addrs []netip.Addr
	name  string // of an address
	// exists tells that the name does, with or without an answer of the type asked for.
	exists bool
}

// find looks a name up, in lower case and without a final dot.
func (x *index) find(name string) found {
	if a, zone, ok := addrOf(name); ok {
		n, known := x.byAddr[a]
		return found{zone: zone, name: n, exists: known || !a.IsValid()}
	}
	addrs, known := x.Hosts[name]
	f := found{addrs: addrs, exists: known || x.above[name]}
	switch {
	case x.Domain != "" && (name == x.Domain || strings.HasSuffix(name, "."+x.Domain)):
		f.zone, f.exists = x.Domain, f.exists || name == x.Domain
	case known:
		f.zone = name // an extra record outside the domain is a zone of its own
	default:
		f.exists = false
	}
	return f
}

// addrOf is the address that a name below in-addr.arpa or ip6.arpa stands for, and the reverse zone, where that is the tailnet's. The name of
// several addresses has none.
func addrOf(name string) (a netip.Addr, zone string, ok bool) {
	if rest, is4 := strings.CutSuffix(name, ".in-addr.arpa"); is4 {
		labels := strings.Split(rest, ".")
		slices.Reverse(labels)
		for len(labels) < 4 {
			labels = append(labels, "0")
		}
		a, err := netip.ParseAddr(strings.Join(labels, "."))
		if err != nil || !netset.TailnetIPv4.Contains(a) || strings.Count(rest, ".") < 1 {
			return netip.Addr{}, "", false
		}
		second := labels[1]
		if strings.Count(rest, ".") < 3 {
			a = netip.Addr{}
		}
		return a, second + ".100.in-addr.arpa", true
	}
	rest, is6 := strings.CutSuffix(name, ".ip6.arpa")
	if !is6 || name != zone6 && !strings.HasSuffix(name, "."+zone6) {
		return netip.Addr{}, "", false
	}
	return nibbles(rest), zone6, true
}

// zone6 is TailnetIPv6 in reverse.
const zone6 = "0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa"

// nibbles reads 32 of them, the last first; the zero Addr where there are fewer. What is no nibble is an address that nobody has.
func nibbles(s string) netip.Addr {
	if len(s) < 63 {
		return netip.Addr{}
	}
	if len(s) > 63 {
		return netip.IPv6Unspecified()
	}
	var b [16]byte
	for i := range 32 {
		c := strings.IndexByte("0123456789abcdef", s[62-2*i])
		if c < 0 || i < 31 && s[61-2*i] != '.' {
			return netip.IPv6Unspecified()
		}
		b[i/2] |= byte(c) << (4 * (1 - i%2))
	}
	return netip.AddrFrom16(b)
}
