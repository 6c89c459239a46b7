package program

import (
	"io"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/printable"
)

// Columns is how wide help is.
const Columns = 80

// help prints what a command is for, and how it is used, as cobra's own does, but in Columns.
func help(cmd *cobra.Command, _ []string) {
	text := cmd.Long
	if text == "" {
		text = cmd.Short
	}
	var b strings.Builder
	b.WriteString(paragraphs(text) + "\n")
	for line := range strings.Lines(cmd.UsageString()) {
		b.WriteString(fold(strings.TrimRight(line, "\n")))
	}
	_, _ = io.WriteString(cmd.OutOrStdout(), b.String()) // Output keeps what cannot be written
}

// paragraphs breaks a text anew. Lines that begin with blanks stay as they are, but for lists.
func paragraphs(text string) string {
	var b strings.Builder
	var open []string
	end := func() {
		if len(open) > 0 {
			b.WriteString(printable.Fold("", 0, strings.Join(open, " "), Columns))
			open = nil
		}
	}
	for line := range strings.Lines(strings.TrimSpace(text) + "\n") {
		line = strings.TrimRight(line, " \n")
		if line == "" || strings.HasPrefix(line, " ") {
			end()
			if strings.Contains(strings.TrimSpace(line), "  ") { // of a list: a name, and what it is
				line = strings.TrimRight(fold(line), "\n")
			}
			b.WriteString(line + "\n")
			continue
		}
		open = append(open, line)
	}
	end()
	return b.String()
}

// fold breaks a line that is too wide, and puts the rest below its last column.
func fold(line string) string {
	if utf8.RuneCountInString(line) <= Columns {
		return line + "\n"
	}
	indent := len(line) - len(strings.TrimLeft(line, " "))
	if i := strings.Index(line[indent:], "  "); i >= 0 { // a name, and what it is
		rest := line[indent+i:]
		indent += i + len(rest) - len(strings.TrimLeft(rest, " "))
	}
	return printable.Fold(line[:indent], indent, line[indent:], Columns)
}
