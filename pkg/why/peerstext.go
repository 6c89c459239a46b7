package why

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"unicode/utf8"

	"github.com/headcni/headcni/internal/printable"
)

// lineWidth is how wide lines are where nothing else is known, in columns.
const lineWidth = 80

// millis is a latency with two digits.
func millis(ms float64) string {
	if ms < 10 {
		return fmt.Sprintf("%.1f ms", ms)
	}
	return fmt.Sprintf("%.0f ms", ms)
}

// short is a path in a cell. An exclamation mark is for what is not as it should be.
func (p Peer) short() string {
	switch p.Path {
	case pathDirect:
		return millis(p.Millis)
	case pathRelayed:
		return millis(p.Millis) + " relay " + p.Endpoint + "!"
	case pathOffline, pathSilent:
		return p.Path + "!"
	}
	return p.Path
}

// Table prints who reaches whom, at most so many columns wide. More nodes than fit have a line each.
func (m Mesh) Table(out io.Writer, width int) error {
	b := &strings.Builder{}
	width = cmp.Or(width, lineWidth)
	if len(m.Nodes) == 1 {
		m.list(b)
	} else if !m.matrix(b, width) {
		m.lines(b)
	}
	for _, r := range m.Nodes {
		if r.Error != "" {
			b.WriteString("\n" + printable.Fold(r.Node+" ", 4, "could not be asked: "+printable.Line(r.Error), width))
		}
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// list is for one node that was asked alone: its peers, a line each.
func (m Mesh) list(b *strings.Builder) {
	w := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "PEER\tPATH\tLATENCY\tBY\tROUTES")
	for _, p := range m.Nodes[0].Peers.Peers {
		latency := "-"
		if p.Millis > 0 {
			latency = millis(p.Millis)
		}
		var routes []string
		for _, r := range p.Routes {
			routes = append(routes, r.String())
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", printable.Line(p.Name), p.Path, latency, cmp.Or(p.Endpoint, "-"), cmp.Or(strings.Join(routes, " "), "-"))
	}
	w.Flush() // into memory
	if len(m.Nodes[0].Peers.Peers) == 0 && m.Nodes[0].Error == "" {
		fmt.Fprintf(b, "%s is alone in its tailnet\n", m.Nodes[0].Node)
	}
}

// cell is how row reaches column.
func (m Mesh) cell(from, to Row) string {
	switch p, ok := m.between(from, to); {
	case from.Node == to.Node:
		return "."
	case from.Error != "", !ok && to.Error != "":
		return "?"
	case !ok:
		return "unknown!"
	default:
		return p.short()
	}
}

// matrix prints a column a node, where they fit.
func (m Mesh) matrix(b *strings.Builder, width int) bool {
	rows := [][]string{{""}}
	for _, n := range m.Nodes {
		rows[0] = append(rows[0], n.Node)
	}
	for _, from := range m.Nodes {
		line := []string{from.Node}
		for _, to := range m.Nodes {
			line = append(line, m.cell(from, to))
		}
		rows = append(rows, line)
	}
	total := 0
	for i := range rows[0] {
		widest := 0
		for _, r := range rows {
			widest = max(widest, utf8.RuneCountInString(r[i]))
		}
		total += widest + 2
	}
	if total-2 > width {
		return false
	}
	w := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	w.Flush() // into memory
	return true
}

// lines prints a line for each node, and one more for each peer that is not reached directly.
func (m Mesh) lines(b *strings.Builder) {
	for _, from := range m.Nodes {
		if from.Error != "" {
			continue
		}
		var direct []float64
		var others []string
		for _, to := range m.Nodes {
			p, ok := m.between(from, to)
			switch {
			case from.Node == to.Node:
			case ok && p.Path == pathDirect:
				direct = append(direct, p.Millis)
			default:
				others = append(others, to.Node+": "+m.cell(from, to))
			}
		}
		fmt.Fprintf(b, "%s  %d direct", from.Node, len(direct))
		if len(direct) > 0 {
			fmt.Fprintf(b, ", at most %s", millis(slices.Max(direct)))
		}
		fmt.Fprintln(b)
		for _, o := range others {
			fmt.Fprintf(b, "    %s\n", o)
		}
	}
}

// edge is a pair of nodes, with both ways.
type edge struct {
	a, b    int
	text    string
	relayed bool
	broken  bool
}

// edges are the pairs of nodes; what both ends say alike is said once.
func (m Mesh) edges() (out []edge) {
	for i, from := range m.Nodes {
		for j := i + 1; j < len(m.Nodes); j++ {
			to := m.Nodes[j]
			e := edge{a: i, b: j, text: m.cell(from, to)}
			if back := m.cell(to, from); e.text == "?" {
				e.text = back
			} else if back != "?" && back != e.text {
				e.text += " / " + back
			}
			asked := false
			for _, way := range [][2]Row{{from, to}, {to, from}} {
				if way[0].Error != "" {
					continue
				}
				p, ok := m.between(way[0], way[1])
				asked = true
				e.relayed = e.relayed || p.Path == pathRelayed
				e.broken = e.broken || !ok || p.Path == pathOffline || p.Path == pathSilent
			}
			e.broken = e.broken || !asked
			out = append(out, e)
		}
	}
	return out
}

// quote is for both languages: neither ends a string at what is not a quotation mark.
func quote(text string) string {
	return `"` + strings.NewReplacer(`"`, "'", `\`, "/").Replace(printable.Line(text)) + `"`
}

// Dot prints a graph for Graphviz.
func (m Mesh) Dot(out io.Writer) error {
	b := &strings.Builder{}
	b.WriteString("graph tailnet {\n")
	for i, n := range m.Nodes {
		fmt.Fprintf(b, "  n%d [label=%s];\n", i, quote(n.Node))
	}
	for _, e := range m.edges() {
		style := ""
		switch {
		case e.broken:
			style = ", style=dotted, color=red"
		case e.relayed:
			style = ", style=dashed"
		}
		fmt.Fprintf(b, "  n%d -- n%d [label=%s%s];\n", e.a, e.b, quote(e.text), style)
	}
	b.WriteString("}\n")
	_, err := io.WriteString(out, b.String())
	return err
}

// Mermaid prints a graph for Markdown.
func (m Mesh) Mermaid(out io.Writer) error {
	b := &strings.Builder{}
	b.WriteString("graph LR\n")
	for i, n := range m.Nodes {
		fmt.Fprintf(b, "  n%d[%s]\n", i, quote(n.Node))
	}
	for _, e := range m.edges() {
		line := "---"
		switch {
		case e.broken:
			line = "--x"
		case e.relayed:
			line = "-.-"
		}
		fmt.Fprintf(b, "  n%d %s|%s| n%d\n", e.a, line, quote(e.text), e.b)
	}
	_, err := io.WriteString(out, b.String())
	return err
}
