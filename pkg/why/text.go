package why

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"strings"
	"unicode/utf8"

	"github.com/headcni/headcni/internal/printable"
)

// marks are the words for states.
var marks = map[State]string{OK: "ok", Warn: "WARN", No: "NO", Follows: "no", Unknown: "?"}

// text is an end for people.
func (e End) text(port string) string {
	out := e.Name
	addr := ""
	if e.Addr.IsValid() {
		addr = e.Addr.String()
	}
	if number, protocol, ok := strings.Cut(port, "/"); ok {
		addr = net.JoinHostPort(addr, number) + "/" + protocol
	} else if port != "" {
		addr += " " + port
	}
	if e.Addr.IsValid() && e.Addr.String() == e.Name {
		out = ""
	}
	out = strings.TrimSpace(out + " " + addr)
	if e.Node != "" && e.Node != e.Name && "node/"+e.Node != e.Name {
		out += " on " + e.Node
	}
	return printable.Line(out)
}

// Print writes the answer for people, in lines of at most width columns; 0 is lineWidth.
func (r Report) Print(out io.Writer, width int) error {
	b := &strings.Builder{}
	width = cmp.Or(width, lineWidth)
	answer := map[Verdict]string{Yes: "YES", NoWay: "NO", Unsure: "COULD NOT LOOK"}[r.Verdict]
	b.WriteString(printable.Fold("", 4, r.From.text("")+"  ->  "+r.To.text(r.Port)+"   "+answer, width) + "\n")
	name, where := 0, 0
	for _, s := range r.Steps {
		name, where = max(name, utf8.RuneCountInString(s.Name)), max(where, utf8.RuneCountInString(s.Where))
	}
	where = min(where, 20)
	for i, s := range r.Steps {
		place := s.Where
		if utf8.RuneCountInString(place) > where {
			place = string([]rune(place)[:where-1]) + "~"
		}
		head := fmt.Sprintf("%2d %-*s %-*s %-4s ", i+1, name, s.Name, where, place, marks[s.State])
		text := printable.Line(s.Text)
		for _, f := range s.Findings {
			text = string(f.ID) + " " + text
		}
		b.WriteString(printable.Fold(head, utf8.RuneCountInString(head), text, width))
	}
	b.WriteString("\n")
	r.end(b, width)
	_, err := io.WriteString(out, b.String())
	return err
}

// end says what decides, and what there is to do.
func (r Report) end(b *strings.Builder, width int) {
	switch r.Verdict {
	case Yes:
		b.WriteString("YES\n")
	case Unsure:
		s := r.Steps[r.Step-1]
		b.WriteString(printable.Fold("", 4, fmt.Sprintf("As far as could be looked at nothing keeps it; COULD NOT LOOK at step %d, %s of %s: %s", r.Step, s.Name, s.Where, printable.Line(s.Text)), width))
	case NoWay:
		first := true
		for i, s := range r.Steps {
			if s.State != No {
				continue
			}
			head := fmt.Sprintf("NO, at step %d: ", i+1)
			if !first {
				head = fmt.Sprintf("and at step %d: ", i+1)
			}
			first = false
			for _, f := range s.Findings {
				b.WriteString(printable.Fold(head, 4, printable.Line(f.Title)+" ("+string(f.ID)+")", width))
				b.WriteString(printable.Fold("  why   ", 8, printable.Line(f.Cause), width))
				b.WriteString(printable.Fold("  do    ", 8, printable.Line(f.Remedy), width))
				head = "and: "
			}
		}
	}
	for i, s := range r.Steps {
		for _, f := range s.Findings {
			if s.State == Warn {
				b.WriteString(printable.Fold(fmt.Sprintf("WARNING, at step %d: ", i+1), 4, printable.Line(f.Title)+" ("+string(f.ID)+")", width))
				b.WriteString(printable.Fold("  do    ", 8, printable.Line(f.Remedy), width))
			}
		}
	}
}
