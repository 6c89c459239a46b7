package printable

import "testing"

func TestCut(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "four": "four", "fives": "five...", "a\nb": "a; b", "\x1b[2J": `\x1b[2J`, "äöüß": "äöüß", "\xff": "\ufffd",
	} {
		if got := Cut(text, 4); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
