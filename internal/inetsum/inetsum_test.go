package inetsum

import "testing"

func TestOf(t *testing.T) {
	for text, want := range map[string]uint16{
		"":                                 0xffff,
		"\x00\x01\xf2\x03\xf4\xf5\xf6\xf7": 0x220d, // RFC 1071, section 3
		"\x00\x01\xf2":                     0x0dfe, // an odd byte is the upper half of a word
		"\xff\xff\xff\xff":                 0,
	} {
		if got := Of([]byte(text)); got != want {
			t.Errorf("%x: %#04x, want %#04x", text, got, want)
		}
	}
}
