package netset

import "net/netip"

// Set is a set of prefixes that says what overlaps a prefix in a time that does not grow with their number. It only grows.
// Make it with NewSet.
type Set struct {
	prefixes map[netip.Prefix]bool
	// within has for each wider prefix one that lies in it.
	within map[netip.Prefix]netip.Prefix
	// has are the lengths that IPv4 and IPv6 prefixes of the set have.
	has [2][129]bool
}

// NewSet makes a set of prefixes, which are masked.
func NewSet(prefixes ...netip.Prefix) *Set {
	s := &Set{prefixes: map[netip.Prefix]bool{}, within: map[netip.Prefix]netip.Prefix{}}
	s.Add(prefixes...)
	return s
}

// Add puts prefixes into the set. Invalid ones are left out.
func (s *Set) Add(prefixes ...netip.Prefix) {
	for _, p := range prefixes {
		if p = p.Masked(); !p.IsValid() || s.prefixes[p] {
			continue
		}
		s.prefixes[p] = true
		s.has[family(p)][p.Bits()] = true
		for bits := p.Bits() - 1; bits >= 0; bits-- {
			wider := netip.PrefixFrom(p.Addr(), bits).Masked()
			if _, known := s.within[wider]; known {
				break // and so is all that is wider still
			}
			s.within[wider] = p
		}
	}
}

// Overlapping returns a prefix of the set that shares an address with p: the narrowest that holds all of p, else one within p.
func (s *Set) Overlapping(p netip.Prefix) (netip.Prefix, bool) {
	if q, ok := s.Covering(p); ok {
		return q, true
	}
	q, ok := s.within[p.Masked()]
	return q, ok
}

// Covering returns the narrowest prefix of the set that contains all of p.
func (s *Set) Covering(p netip.Prefix) (netip.Prefix, bool) {
	for bits := p.Bits(); bits >= 0; bits-- {
		if !s.has[family(p)][bits] {
			continue
		}
		if q := netip.PrefixFrom(p.Addr(), bits).Masked(); s.prefixes[q] {
			return q, true
		}
	}
	return netip.Prefix{}, false
}

func family(p netip.Prefix) int {
	if p.Addr().Is4() {
		return 0
	}
	return 1
}
