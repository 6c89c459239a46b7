package ipam

import (
	"cmp"
	"math/bits"
	"net/netip"
	"slices"

	"github.com/headcni/headcni/pkg/ipam/store"
)

// number is an address, or a count of addresses, as an integer.
type number struct{ hi, lo uint64 }

func numberOf(a netip.Addr) number {
	b := a.As16()
	var n number
	for i := range 8 {
		n.hi = n.hi<<8 | uint64(b[i])
		n.lo = n.lo<<8 | uint64(b[i+8])
	}
	return n
}

// addr is the inverse of numberOf; like tells the family.
func (n number) addr(like netip.Addr) netip.Addr {
	var b [16]byte
	for i := range 8 {
		b[7-i] = byte(n.hi >> (8 * i))
		b[15-i] = byte(n.lo >> (8 * i))
	}
	if like.Is4() {
		return netip.AddrFrom16(b).Unmap()
	}
	return netip.AddrFrom16(b)
}

func (n number) add(m number) number {
	lo, carry := bits.Add64(n.lo, m.lo, 0)
	hi, _ := bits.Add64(n.hi, m.hi, carry)
	return number{hi, lo}
}

func (n number) sub(m number) number {
	lo, borrow := bits.Sub64(n.lo, m.lo, 0)
	hi, _ := bits.Sub64(n.hi, m.hi, borrow)
	return number{hi, lo}
}

func (n number) compare(m number) int {
	return cmp.Or(cmp.Compare(n.hi, m.hi), cmp.Compare(n.lo, m.lo))
}

// bitLen is the number of bits that n needs.
func (n number) bitLen() int {
	if n.hi != 0 {
		return 64 + bits.Len64(n.hi)
	}
	return bits.Len64(n.lo)
}

// span is a run of addresses that may be given, inclusive.
type span struct {
	lo, hi netip.Addr
	rng    *Range
}

func (s span) contains(a netip.Addr) bool { return s.lo.Compare(a) <= 0 && a.Compare(s.hi) <= 0 }

// size is at most 2^127: a span of all of IPv6 is not possible, its network address is reserved.
func (s span) size() number { return numberOf(s.hi).sub(numberOf(s.lo)).add(number{lo: 1}) }

// piece is the part of a span that lies in one window of the index: offsets lo to hi, inclusive.
type piece struct {
	window netip.Addr
	lo, hi uint32
	rng    *Range
}

// pieces cuts the span at window borders. A span may have more pieces than anybody can walk: stop early.
func (s span) pieces(yield func(piece) bool) {
	last, end := store.Locate(s.hi)
	for from := s.lo; ; {
		window, lo := store.Locate(from)
		p := piece{window, lo, store.WindowSize - 1, s.rng}
		if window == last {
			p.hi = end
		}
		if !yield(p) || window == last {
			return
		}
		from = store.At(window, store.WindowSize-1).Next()
	}
}

// spans returns the parts of the range that may be given, in ascending order.
func (r *Range) spans() []span {
	var out []span
	from, more := r.Start, true
	keep := func(to netip.Addr) {
		if more && from.Compare(to) <= 0 {
			out = append(out, span{from, to, r})
		}
	}
	for _, x := range r.reserved() {
		if lo := x.Addr(); from.Less(lo) && r.Start.Compare(lo) < 0 {
			keep(minAddr(lo.Prev(), r.End))
		}
		if next := lastOf(x).Next(); !next.IsValid() {
			more = false // nothing lies behind the last address there is
		} else if from.Less(next) {
			from = next
		}
	}
	keep(r.End)
	return out
}

func minAddr(a, b netip.Addr) netip.Addr {
	if b.Less(a) {
		return b
	}
	return a
}

// reserved returns the parts of the range that must not be given, sorted by address. The IPv4 broadcast address is nobody's; nor is the
// network address, which for IPv6 means any router (RFC 4291, section 2.6.1).
func (r *Range) reserved() []netip.Prefix {
	one := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
	out := []netip.Prefix{one(r.Subnet.Addr())}
	if r.Subnet.Addr().Is4() {
		out = append(out, one(lastOf(r.Subnet)))
	}
	if r.Subnet.Contains(r.Gateway) {
		out = append(out, one(r.Gateway))
	}
	for _, x := range r.Exclude {
		out = append(out, x.Masked())
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return out
}

// space holds the addresses that one range set may give, in the order of the configuration.
type space []span

func newSpace(set []Range) space {
	var s space
	for i := range set {
		s = append(s, set[i].spans()...)
	}
	return s
}

func (s space) size() number {
	var n number
	for _, sp := range s {
		n = n.add(sp.size())
	}
	return n
}

// without returns the space less some addresses.
func (s space) without(addrs ...netip.Addr) space {
	addrs = slices.Clone(addrs)
	slices.SortFunc(addrs, netip.Addr.Compare)
	addrs = slices.Compact(addrs)
	out := make(space, 0, len(s)+len(addrs))
	for _, sp := range s {
		i, _ := slices.BinarySearchFunc(addrs, sp.lo, netip.Addr.Compare)
		for ; i < len(addrs) && sp.contains(addrs[i]); i++ {
			if sp.lo != addrs[i] {
				out = append(out, span{sp.lo, addrs[i].Prev(), sp.rng})
			}
			if sp.lo = addrs[i].Next(); addrs[i] == sp.hi {
				break
			}
		}
		if !sp.hi.Less(sp.lo) && sp.lo.IsValid() {
			out = append(out, sp)
		}
	}
	return out
}

// small means that every window may be looked at: there are at most a few dozen.
func (s space) small() bool { return s.size().compare(number{lo: 16 * store.WindowSize}) <= 0 }

func (s space) find(a netip.Addr) (*Range, bool) {
	for _, sp := range s {
		if sp.contains(a) {
			return sp.rng, true
		}
	}
	return nil, false
}
