package controller

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/headcni/headcni/internal/netset"
)

// Lengths of the pod CIDRs that we give to Nodes, those of kube-controller-manager.
const (
	bits4 = 24
	bits6 = 64
	// allocateAfter is how long Kubernetes has for it: kube-controller-manager takes seconds.
	allocateAfter = 30 * time.Second
)

// allocate gives pod CIDRs to Nodes that have none, one of each family of network.clusterCIDRs. It gives nothing where any
// Node has got its own from somebody else: two allocators would give one range twice. The error says which Nodes get none.
func (o observation) allocate() (map[string][]netip.Prefix, error) {
	if len(o.ranges) == 0 {
		return nil, nil
	}
	taken := takenRanges{netset.NewSet(), map[netip.Prefix]netip.Addr{}}
	var needy []node
	var other []string
	for _, n := range o.nodes {
		switch {
		case n.cidrErr != nil, len(n.cidrs) > 0 && !n.allocated:
			other = append(other, n.name)
		case len(n.cidrs) > 0:
			taken.Add(n.cidrs...)
		case n.leaving:
		case o.now.Sub(n.created) >= allocateAfter:
			needy = append(needy, n)
		}
	}
	if len(needy) == 0 {
		return nil, nil
	}
	if len(other) > 0 {
		return nil, fmt.Errorf("Nodes without a pod CIDR (%s) get none: %s has one that is not from headcni-controller, and whoever gave it "+
			"(kube-controller-manager --allocate-node-cidrs) has to give all", abridge(nodeNames(needy)), abridge(other))
	}
	for _, t := range o.tailnet {
		for _, r := range t.Approved {
			if netset.Covers(o.ranges, r) {
				taken.Add(r) // of a Node that is gone, or of another cluster
			}
		}
	}
	given := map[string][]netip.Prefix{}
	for _, n := range needy {
		cidrs, err := o.cut(taken)
		if err != nil {
			return given, fmt.Errorf("give Node %s a pod CIDR: %w", n.name, err)
		}
		given[n.name] = cidrs
		taken.Add(cidrs...)
	}
	return given, nil
}

// cut finds the lowest free range of each family.
func (o observation) cut(taken takenRanges) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, v6 := range []bool{false, true} {
		var of []netip.Prefix
		for _, r := range o.ranges {
			if r.Addr().Is6() == v6 {
				of = append(of, r)
			}
		}
		if len(of) == 0 {
			continue
		}
		free, ok := netip.Prefix{}, false
		for _, r := range of {
			if free, ok = firstFree(r, taken); ok {
				break
			}
		}
		if !ok {
			return nil, fmt.Errorf("no free /%d is left in %v: make network.clusterCIDRs wider", nodeBits(v6), of)
		}
		out = append(out, free)
	}
	return out, nil
}

func nodeBits(v6 bool) int {
	if v6 {
		return bits6
	}
	return bits4
}

// firstFree goes through the ranges of a node's size within r. One step leaves what is taken behind, so there are no more
// steps than taken ranges.
func firstFree(r netip.Prefix, taken takenRanges) (netip.Prefix, bool) {
	bits := nodeBits(r.Addr().Is6())
	a, begun := taken.from[r]
	if !begun {
		a = r.Masked().Addr()
	}
	for r.Contains(a) {
		c := netip.PrefixFrom(a, bits)
		if c.Bits() < r.Bits() {
			return netip.Prefix{}, false // r is smaller than one node's range
		}
		by, ok := taken.Overlapping(c)
		if !ok {
			taken.from[r] = a
			return c, true
		}
		if by.Bits() > bits {
			by = c
		}
		next, ok := after(by)
		if !ok {
			break
		}
		a = next
	}
	return netip.Prefix{}, false
}

// takenRanges are those that are in use.
type takenRanges struct {
	*netset.Set
	// from is where a range has something free at the earliest: what is taken only grows.
	from map[netip.Prefix]netip.Addr
}

// after is the address behind a prefix; ok is false at the end of the address space.
func after(p netip.Prefix) (netip.Addr, bool) {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits() - 1; i >= 0; i-- {
		bit := byte(1) << (7 - i%8)
		if b[i/8]&bit == 0 {
			b[i/8] |= bit
			a, ok := netip.AddrFromSlice(b)
			return a, ok
		}
		b[i/8] &^= bit
	}
	return netip.Addr{}, false
}
