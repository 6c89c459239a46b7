// Package printable makes text that came from elsewhere fit for a log line, an error or a terminal.
package printable

import (
	"strconv"
	"strings"
	"unicode"
)

// Line puts text on one line. What a terminal or a log would not print as a character is escaped as in Go.
func Line(text string) string {
	var b strings.Builder
	for _, r := range text {
		switch {
		case r == '\n':
			b.WriteString("; ")
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return b.String()
}

// Cut is Line of at most max runes; what is left out is three dots.
func Cut(text string, max int) string {
	n := 0
	for i := range text {
		if n++; n > max {
			return Line(text[:i]) + "..."
		}
	}
	return Line(text)
}
