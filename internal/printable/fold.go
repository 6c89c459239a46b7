package printable

import (
	"strings"
	"unicode/utf8"
)

// Fold puts a text behind a head, in lines of at most width columns where a word allows, each but the first behind so many blanks. A width
// of 0 is none.
func Fold(head string, indent int, text string, width int) string {
	var b strings.Builder
	line, empty := head, true
	for _, word := range strings.Fields(text) {
		if width > 0 && !empty && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width {
			b.WriteString(line + "\n")
			line, empty = strings.Repeat(" ", indent), true
		}
		if !empty {
			line += " "
		}
		line, empty = line+word, false
	}
	return b.String() + strings.TrimRight(line, " ") + "\n"
}
