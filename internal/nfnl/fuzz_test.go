package nfnl

import "testing"

// FuzzAttributes: no message of the kernel, cut or mangled, is read beyond its end.
func FuzzAttributes(f *testing.F) {
	for _, b := range [][]byte{nil, {8, 0, 1, 0, 'a', 'b', 'c', 0}, {4, 0, 1, 0x80}, {3, 0, 1, 0}, {0xff, 0xff, 1, 0, 1}, {5, 0, 1, 0, 'x'}} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := List(b)
		if err != nil {
			return
		}
		n := 0
		for _, a := range list {
			n += 4 + len(a.Value)
			_ = Text(a.Value)
		}
		if n > len(b) {
			t.Errorf("%d bytes of attributes out of %d", n, len(b))
		}
		for typ := range 20 {
			_ = Get(b, typ)
		}
		_, _ = decode(b) // what it cannot read it says
		isRelevant(0, b, func(int, map[int][]byte) bool { return false })
	})
}
