package ipam

import (
	"net/netip"

	"github.com/headcni/headcni/pkg/ipam/store"
)

// taken tells the strategies which addresses are taken. The store answers from its index, tests from memory.
type taken interface {
	Bitmap(window netip.Addr) (*store.Bitmap, error)
	Linked(netip.Addr) (bool, error)
}

// draw returns uniformly distributed bits.
type draw func() uint64

// choice is an address and the range it is from; nil where no address is free.
type choice struct {
	addr netip.Addr
	rng  *Range
}

// pick chooses a free address. It changes nothing; that last is the address given last matters to Sequential only.
func pick(s Strategy, from space, last netip.Addr, t taken, d draw) (choice, error) {
	switch {
	case s == DensePack:
		return densest(from, t)
	case s == Random && from.small():
		return anyFree(from, t, d)
	case s == Random:
		return randomFree(from, t, d)
	}
	return next(from, last, t)
}

// next goes once round the space, starting behind last.
func next(from space, last netip.Addr, t taken) (choice, error) {
	for _, sp := range from.after(last) {
		if c, err := first(sp, t); c.rng != nil || err != nil {
			return c, err
		}
	}
	return choice{}, nil
}

// after turns the space so that it begins behind the address; the span of which the address is part is cut in two. An
// address that is no longer part of the space is followed by the next higher one of its subnet, else by the next subnet.
func (s space) after(last netip.Addr) space {
	if !last.IsValid() {
		return s
	}
	for i, sp := range s {
		if !sp.contains(last) {
			continue
		}
		turned := make(space, 0, len(s)+1)
		if last != sp.hi {
			turned = append(turned, span{last.Next(), sp.hi, sp.rng})
		}
		turned = append(append(turned, s[i+1:]...), s[:i]...)
		return append(turned, span{sp.lo, last, sp.rng})
	}
	start := 0
	for i, sp := range s {
		if sp.rng.Subnet.Contains(last) {
			if start = i + 1; last.Less(sp.lo) {
				start = i
				break
			}
		}
	}
	return append(append(make(space, 0, len(s)), s[start:]...), s[:start]...)
}

// first finds the lowest free address of a span.
func first(sp span, t taken) (choice, error) {
	for p := range sp.pieces {
		b, err := t.Bitmap(p.window)
		if err != nil {
			return choice{}, err
		}
		offset, ok, err := b.First(p.lo, p.hi)
		if err != nil {
			return choice{}, err
		}
		if ok {
			return choice{store.At(p.window, offset), p.rng}, nil
		}
	}
	return choice{}, nil
}

// anyFree counts the free addresses and takes the n-th of them.
func anyFree(from space, t taken, d draw) (choice, error) {
	total := 0
	var free []int
	for p := range from.pieces {
		b, err := t.Bitmap(p.window)
		if err != nil {
			return choice{}, err
		}
		n, err := b.Free(p.lo, p.hi)
		if err != nil {
			return choice{}, err
		}
		free, total = append(free, n), total+n
	}
	if total == 0 {
		return choice{}, nil
	}
	n := int(below(number{lo: uint64(total)}, d).lo)
	i := 0
	for p := range from.pieces {
		if n >= free[i] {
			n, i = n-free[i], i+1
			continue
		}
		b, err := t.Bitmap(p.window)
		if err != nil {
			return choice{}, err
		}
		offset, ok, err := b.Nth(p.lo, p.hi, n)
		if err != nil || !ok {
			return choice{}, err
		}
		return choice{store.At(p.window, offset), p.rng}, nil
	}
	return choice{}, nil
}

func (s space) pieces(yield func(piece) bool) {
	for _, sp := range s {
		for p := range sp.pieces {
			if !yield(p) {
				return
			}
		}
	}
}

// maxDraws bounds the search in a space of more than 2^24 addresses. Only one that is nearly full gets there.
const maxDraws = 64

// randomFree draws until an address is free, which makes it uniform over the free ones without an index. A space that is
// nearly full is searched from the last draw on.
func randomFree(from space, t taken, d draw) (choice, error) {
	size := from.size()
	var c choice
	for range maxDraws {
		c = from.at(below(size, d))
		linked, err := t.Linked(c.addr)
		if err != nil {
			return choice{}, err
		}
		if !linked {
			return c, nil
		}
	}
	return next(from, c.addr, t)
}

// at is the n-th address of the space.
func (s space) at(n number) choice {
	for _, sp := range s {
		if size := sp.size(); n.compare(size) >= 0 {
			n = n.sub(size)
			continue
		}
		return choice{numberOf(sp.lo).add(n).addr(sp.lo), sp.rng}
	}
	return choice{}
}

// below draws a number less than limit, by drawing as many bits as it has until they make one.
func below(limit number, d draw) number {
	top := limit.sub(number{lo: 1}).bitLen()
	for {
		n := number{lo: d()}
		if top > 64 {
			n.hi = d() & (1<<(top-64) - 1)
		} else if top < 64 {
			n.lo &= 1<<top - 1
		}
		if n.compare(limit) < 0 {
			return n
		}
	}
}

// densest takes the fullest block of all windows, or of the first window that has room where there are too many.
func densest(from space, t taken) (choice, error) {
	var best choice
	most := -1
	var seen netip.Addr
	all := from.small()
	for p := range from.pieces {
		if !all && most >= 0 && p.window != seen {
			break
		}
		b, err := t.Bitmap(p.window)
		if err != nil {
			return choice{}, err
		}
		n, offset, ok, err := b.Densest(p.lo, p.hi)
		if err != nil {
			return choice{}, err
		}
		if ok && n > most {
			most, best, seen = n, choice{store.At(p.window, offset), p.rng}, p.window
		}
	}
	return best, nil
}
