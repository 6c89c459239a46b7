package store

import (
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"testing"
)

func TestLocate(t *testing.T) {
	for _, text := range []string{"10.244.1.7", "10.255.255.255", "0.0.0.0", "255.255.255.255", "fd00:244:1::7", "fd00::ffff:ffff:ffff:ffff"} {
		a := netip.MustParseAddr(text)
		window, offset := Locate(a)
		if back := At(window, offset); back != a {
			t.Errorf("At(Locate(%s)) = %s", a, back)
		}
		if _, zero := Locate(window); zero != 0 {
			t.Errorf("window %s of %s does not begin at offset 0", window, a)
		}
	}
	if window, offset := Locate(netip.MustParseAddr("10.244.1.7")); window.String() != "10.240.0.0" || offset != 0x40107 {
		t.Errorf("10.244.1.7 is %#x of %s", offset, window)
	}
}

// naive answers a Bitmap's questions by looking at each address.
type naive map[uint32]bool

func (n naive) free(lo, hi uint32) (out []uint32) {
	for o := lo; o <= hi; o++ {
		if !n[o] {
			out = append(out, o)
		}
	}
	return out
}

func (n naive) densest(lo, hi uint32) (taken int, offset uint32) {
	taken = -1
	for _, o := range n.free(lo, hi) {
		count := 0
		for b := o &^ (BlockSize - 1); b < o&^(BlockSize-1)+BlockSize; b++ {
			if n[b] {
				count++
			}
		}
		if count > taken {
			taken, offset = count, o
		}
	}
	return taken, offset
}

func TestBitmapAgainstNaive(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	const span = 4 * groupSize
	for _, fill := range []int{0, 20, 90, 100} {
		var b Bitmap
		n := naive{}
		for o := range uint32(span) {
			if r.IntN(100) < fill {
				n[o] = true
				set(t, &b, o, true)
			}
		}
		for range 60 {
			for range 20 { // churn, so that summaries are kept and not just made
				o := r.Uint32N(span)
				n[o] = !n[o]
				set(t, &b, o, n[o])
			}
			lo := r.Uint32N(span)
			hi := lo + r.Uint32N(span-lo)
			if r.IntN(3) == 0 {
				lo, hi = lo&^(groupSize-1), hi|(groupSize-1)
			}
			compare(t, &b, n, lo, hi, r)
		}
	}
}

func set(t *testing.T, b *Bitmap, o uint32, taken bool) {
	t.Helper()
	if changed, err := b.Set(o, taken); err != nil || !changed {
		t.Fatalf("Set(%d, %v) = %v, %v", o, taken, changed, err)
	}
}

func compare(t *testing.T, b *Bitmap, n naive, lo, hi uint32, r *rand.Rand) {
	t.Helper()
	free := n.free(lo, hi)
	if got, err := b.Free(lo, hi); err != nil || got != len(free) {
		t.Fatalf("Free(%d, %d) = %d, %v, want %d", lo, hi, got, err, len(free))
	}
	first, ok, err := b.First(lo, hi)
	if err != nil || ok != (len(free) > 0) || ok && first != free[0] {
		t.Fatalf("First(%d, %d) = %d, %v, %v", lo, hi, first, ok, err)
	}
	if len(free) > 0 {
		i := r.IntN(len(free))
		if got, ok, err := b.Nth(lo, hi, i); err != nil || !ok || got != free[i] {
			t.Fatalf("Nth(%d, %d, %d) = %d, %v, %v, want %d", lo, hi, i, got, ok, err, free[i])
		}
	}
	if got, ok, err := b.Nth(lo, hi, len(free)); ok || err != nil {
		t.Fatalf("Nth behind the last = %d, %v, %v", got, ok, err)
	}
	wantTaken, wantOffset := n.densest(lo, hi)
	taken, offset, ok, err := b.Densest(lo, hi)
	if err != nil || ok != (wantTaken >= 0) || ok && (taken != wantTaken || offset != wantOffset) {
		t.Fatalf("Densest(%d, %d) = %d, %d, %v, %v, want %d, %d", lo, hi, taken, offset, ok, err, wantTaken, wantOffset)
	}
}

func TestBitmapNoticesDamage(t *testing.T) {
	var good Bitmap
	for o := range uint32(100) {
		set(t, &good, o, true)
	}
	damaged := Bitmap{taken: good.taken, fullest: good.fullest, load: func(g int, d *groupData) error {
		*d = *good.data[0]
		d[1] ^= 1 << 63
		return nil
	}}
	if _, err := damaged.Free(0, 50); err != ErrIndex {
		t.Errorf("Free over a flipped bit: %v, want ErrIndex", err)
	}
	if n := bits.OnesCount64(good.data[0][1]); n != 36 {
		t.Errorf("the undamaged bitmap changed: %d bits", n)
	}
}
