package store

import (
	"errors"
	"math/bits"
	"net/netip"
)

// A Bitmap covers a window of 2^WindowBits addresses, cut into groups of 2^groupBits, each with a summary, so that no
// question about a window reads more than a few groups. Blocks of 2^BlockBits addresses (an IPv4 /28) are what the
// dense-pack strategy counts in.
const (
	WindowBits = 20
	WindowSize = 1 << WindowBits
	BlockBits  = 4
	BlockSize  = 1 << BlockBits

	groupBits     = 12
	groupSize     = 1 << groupBits
	groups        = WindowSize / groupSize
	groupWords    = groupSize / 64
	blocksPerWord = 64 / BlockSize

	// allFull is the summary of a group none of whose blocks has room.
	allFull = 255
)

type groupData [groupWords]uint64

// Bitmap says which addresses of a window are taken. It does no I/O but through its loader.
type Bitmap struct {
	taken   [groups]uint16 // addresses taken per group
	fullest [groups]uint8  // most addresses taken in a block of the group that is not full, or allFull
	data    [groups]*groupData
	load    func(group int, d *groupData) error // nil: everything is free
}

// ErrIndex means that an index is not what it should be. It is to be dropped and made anew: no lease is in danger.
var ErrIndex = errors.New("damaged index")

// Locate says in which window an address lies, by the window's first address, and where in it.
func Locate(a netip.Addr) (window netip.Addr, offset uint32) {
	b := a.As16()
	offset = uint32(b[13]&0x0f)<<16 | uint32(b[14])<<8 | uint32(b[15])
	b[13], b[14], b[15] = b[13]&0xf0, 0, 0
	return restore(a, b), offset
}

// At is the inverse of Locate.
func At(window netip.Addr, offset uint32) netip.Addr {
	b := window.As16()
	b[13], b[14], b[15] = b[13]|byte(offset>>16)&0x0f, byte(offset>>8), byte(offset)
	return restore(window, b)
}

func restore(like netip.Addr, b [16]byte) netip.Addr {
	if like.Is4() {
		return netip.AddrFrom16(b).Unmap()
	}
	return netip.AddrFrom16(b)
}

// group returns the bits of a group, read on first use and checked against the summary.
func (b *Bitmap) group(g int) (*groupData, error) {
	if b.data[g] != nil {
		return b.data[g], nil
	}
	d := new(groupData)
	if b.load != nil {
		if err := b.load(g, d); err != nil {
			return nil, err
		}
		if taken, fullest := d.summary(); taken != b.taken[g] || fullest != b.fullest[g] {
			return nil, ErrIndex
		}
	}
	b.data[g] = d
	return d, nil
}

func (d *groupData) summary() (taken uint16, fullest uint8) {
	most := -1
	for _, w := range d {
		taken += uint16(bits.OnesCount64(w))
		for range blocksPerWord {
			if n := bits.OnesCount16(uint16(w)); n < BlockSize && n > most {
				most = n
			}
			w >>= BlockSize
		}
	}
	if most < 0 {
		return taken, allFull
	}
	return taken, uint8(most)
}

// Set marks an address as taken or free and reports whether that was news.
func (b *Bitmap) Set(offset uint32, taken bool) (changed bool, err error) {
	g := int(offset >> groupBits)
	d, err := b.group(g)
	if err != nil {
		return false, err
	}
	word, bit := &d[offset%groupSize/64], uint64(1)<<(offset%64)
	if (*word&bit != 0) == taken {
		return false, nil
	}
	*word ^= bit
	b.taken[g], b.fullest[g] = d.summary()
	return true, nil
}

// add marks an address of a bitmap in the making, whose summaries summarise then makes.
func (b *Bitmap) add(offset uint32) {
	g := offset >> groupBits
	if b.data[g] == nil {
		b.data[g] = new(groupData)
	}
	b.data[g][offset%groupSize/64] |= 1 << (offset % 64)
}

func (b *Bitmap) summarise() {
	for g, d := range b.data {
		if d != nil {
			b.taken[g], b.fullest[g] = d.summary()
		}
	}
}

// Fill marks every address.
func (b *Bitmap) Fill() {
	for g := range groups {
		b.data[g] = new(groupData)
		for i := range b.data[g] {
			b.data[g][i] = ^uint64(0)
		}
	}
	b.summarise()
}

// Taken reports whether an address is marked.
func (b *Bitmap) Taken(offset uint32) (bool, error) {
	d, err := b.group(int(offset >> groupBits))
	if err != nil {
		return false, err
	}
	return d[offset%groupSize/64]>>(offset%64)&1 != 0, nil
}

// part is what a span has of one group: offsets lo to hi, both inside the group.
type part struct {
	group  int
	lo, hi uint32
}

func (p part) whole() bool { return p.hi-p.lo == groupSize-1 }

// parts cuts the span lo to hi (inclusive) at group borders.
func parts(lo, hi uint32) func(yield func(part) bool) {
	return func(yield func(part) bool) {
		for g := int(lo >> groupBits); g <= int(hi>>groupBits); g++ {
			first, last := uint32(g)<<groupBits, uint32(g)<<groupBits|(groupSize-1)
			if !yield(part{g, max(lo, first), min(hi, last)}) {
				return
			}
		}
	}
}

// freeIn returns word w of a group with a one for each free address between the offsets lo and hi.
func (d *groupData) freeIn(p part, w int) uint64 {
	first := uint32(p.group)<<groupBits + uint32(w)*64
	if first > p.hi || first+63 < p.lo {
		return 0
	}
	free := ^d[w]
	if p.lo > first {
		free &= ^uint64(0) << (p.lo - first)
	}
	if p.hi < first+63 {
		free &= ^uint64(0) >> (first + 63 - p.hi)
	}
	return free
}

func (p part) words() (from, to int) {
	return int(p.lo % groupSize / 64), int(p.hi % groupSize / 64)
}

func (p part) offset(word, bit int) uint32 {
	return uint32(p.group)<<groupBits + uint32(word)*64 + uint32(bit)
}

// First finds the lowest free address between the offsets lo and hi (inclusive).
func (b *Bitmap) First(lo, hi uint32) (offset uint32, ok bool, err error) {
	return b.Nth(lo, hi, 0)
}

// Free counts the free addresses between the offsets lo and hi (inclusive).
func (b *Bitmap) Free(lo, hi uint32) (int, error) {
	n := 0
	for p := range parts(lo, hi) {
		free, err := b.freeOf(p)
		if err != nil {
			return 0, err
		}
		n += free
	}
	return n, nil
}

func (b *Bitmap) freeOf(p part) (int, error) {
	if p.whole() || b.taken[p.group] == groupSize {
		return groupSize - int(b.taken[p.group]), nil
	}
	d, err := b.group(p.group)
	if err != nil {
		return 0, err
	}
	n := 0
	for w, to := p.words(); w <= to; w++ {
		n += bits.OnesCount64(d.freeIn(p, w))
	}
	return n, nil
}

// Nth finds the free address that has n free ones below it between the offsets lo and hi (inclusive).
func (b *Bitmap) Nth(lo, hi uint32, n int) (offset uint32, ok bool, err error) {
	for p := range parts(lo, hi) {
		free, err := b.freeOf(p)
		if err != nil {
			return 0, false, err
		}
		if n >= free {
			n -= free
			continue
		}
		d, err := b.group(p.group)
		if err != nil {
			return 0, false, err
		}
		for w, to := p.words(); w <= to; w++ {
			free := d.freeIn(p, w)
			if c := bits.OnesCount64(free); n >= c {
				n -= c
				continue
			}
			for range n {
				free &= free - 1
			}
			return p.offset(w, bits.TrailingZeros64(free)), true, nil
		}
	}
	return 0, false, nil
}

// Densest finds the lowest free address, between the offsets lo and hi (inclusive), of the block that has most addresses
// taken, and says how many those are.
func (b *Bitmap) Densest(lo, hi uint32) (taken int, offset uint32, ok bool, err error) {
	taken = -1
	var best part
	for p := range parts(lo, hi) {
		switch n := int(b.fullest[p.group]); {
		case n == allFull || n <= taken:
			continue // nothing better in this group, whatever part of it is asked for
		case p.whole():
			taken, best = n, p
		default:
			// The fullest block may lie outside the part, or have no room inside it: look at the blocks themselves.
			d, err := b.group(p.group)
			if err != nil {
				return 0, 0, false, err
			}
			if n, _ := d.densest(p); n > taken {
				taken, best = n, p
			}
		}
	}
	if taken < 0 {
		return 0, 0, false, nil
	}
	d, err := b.group(best.group)
	if err != nil {
		return 0, 0, false, err
	}
	taken, offset = d.densest(best)
	return taken, offset, true, nil
}

// densest is Densest within one group; taken is -1 where the part has no free address.
func (d *groupData) densest(p part) (taken int, offset uint32) {
	taken = -1
	for w, to := p.words(); w <= to; w++ {
		free := d.freeIn(p, w)
		for i := 0; i < blocksPerWord && free != 0; i++ {
			shift := i * BlockSize
			n := bits.OnesCount16(uint16(d[w] >> shift))
			if room := uint16(free >> shift); room != 0 && n > taken {
				taken, offset = n, p.offset(w, shift+bits.TrailingZeros16(room))
			}
		}
	}
	return taken, offset
}
