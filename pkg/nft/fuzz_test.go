package nft

import (
	"strings"
	"testing"
)

// FuzzElements: no list of a set's elements, cut or mangled, is read beyond its end; what is read twice says the same.
func FuzzElements(f *testing.F) {
	element := []byte{20, 0, 1, 0x80, 16, 0, 1, 0x80, 12, 0, 1, 0, 10, 244, 0, 0, 0, 0, 0, 0}
	f.Add(element)
	f.Add(append(append([]byte{}, element...), 12, 0, 1, 0x80, 8, 0, 3, 0, 0, 0, 0, 1))
	f.Add([]byte{4, 0, 1, 0x80})
	f.Fuzz(func(t *testing.T, b []byte) {
		read := func() (string, error) {
			var text strings.Builder
			if err := writeElements(&text, b); err != nil {
				return "", err
			}
			return text.String(), nil
		}
		one, err := read()
		two, again := read()
		if one != two || (err == nil) != (again == nil) {
			t.Errorf("%q %v, then %q %v", one, err, two, again)
		}
		if _, err := flatten(b); err != nil && one != "" {
			t.Errorf("elements %q of a list that cannot be read: %v", one, err)
		}
	})
}
