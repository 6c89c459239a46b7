package report

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/headcni/headcni/internal/printable"
)

const (
	// namesShown bounds how many policies a line names, and rulesShown how many rules a side lists. JSON has all.
	namesShown = 4
	rulesShown = 20
	// differencesShown bounds the connections that are named of those that the kernel treats otherwise.
	differencesShown = 5
)

// Print writes the list for people.
func (l List) Print(out io.Writer, now time.Time) error {
	if l.Problem != "" {
		fmt.Fprintf(out, "! %s\n\n", printable.Line(l.Problem))
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "POD\tADDRESSES\tDIRECTION\tISOLATED\tDENIED\tBY")
	for _, p := range l.Pods {
		first := p.Name + "\t" + join(p.Addrs)
		if p.Waiting != "" {
			fmt.Fprintf(w, "%s\tboth\tyes\t-\tpolicies not known yet: %s%s\n", first, printable.Line(p.Waiting), since(p.Since, now))
			continue
		}
		for i, d := range []Isolation{p.Ingress, p.Egress} {
			direction := [...]string{"ingress", "egress"}[i]
			if len(d.By) == 0 {
				fmt.Fprintf(w, "%s\t%s\tno\t-\t\n", first, direction)
			} else {
				fmt.Fprintf(w, "%s\t%s\tyes\t%d\t%s\n", first, direction, d.Denied, some(d.By))
			}
			first = "\t"
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(l.Pods) == 0 {
		fmt.Fprintf(out, "node %s has no pods that policies are for\n", l.Node)
	}
	fmt.Fprintf(out, "\nnode %s, %s in the cluster", l.Node, count(l.Policies, "policy", "policies"))
	if l.DeniedUnknown > 0 {
		fmt.Fprintf(out, "; %s denied of pods whose policies were not known yet", count(int(l.DeniedUnknown), "packet", "packets"))
	}
	if l.DeniedStateless > 0 {
		fmt.Fprintf(out, "; %s denied of no connection", count(int(l.DeniedStateless), "packet", "packets"))
	}
	fmt.Fprintln(out)
	if len(l.Faults) > 0 {
		fmt.Fprintln(out, "\nWhat grants nothing, since it cannot be understood:")
		printFaults(out, l.Faults)
	}
	return nil
}

func printFaults(out io.Writer, faults []Fault) {
	for _, f := range faults {
		fmt.Fprintf(out, "  ! %s: %s\n", f.Policy, printable.Line(f.Problem))
	}
}

// Print writes the explanation for people.
func (e Explanation) Print(out io.Writer) error {
	w := &writer{w: out}
	switch {
	case e.Pod != nil:
		w.line("%s", e.Pod.text())
	default:
		w.line("from  %s", e.From.text())
		port := "port " + e.Port
		switch e.Port {
		case "":
			port = "any port"
		case "icmp":
			port = "icmp"
		}
		w.line("to    %s, %s", e.To.text(), port)
	}
	for _, end := range []*End{e.Pod, e.From, e.To} {
		if end != nil && end.Note != "" {
			w.line("      %s", printable.Line(end.Note))
		}
	}
	if e.Problem != "" {
		w.line("! %s", printable.Line(e.Problem))
	}
	for _, a := range e.Answers {
		w.line("")
		if e.Pod == nil {
			of := ""
			if len(e.Answers) > 1 {
				of = join(a.Src) + " -> " + join(a.Dst) + ": "
			}
			loud := ""
			if a.wrong() {
				loud = " by policies, but THE KERNEL DOES OTHERWISE"
			}
			w.line("%s%s%s", of, strings.ToUpper(word(a.Verdict)), loud)
		}
		if a.Refused != "" {
			w.line("  whatever policies say: %s", printable.Line(a.Refused))
		}
		for _, s := range a.Sides {
			s.print(w, e.Pod != nil)
		}
	}
	return w.err
}

// writer remembers the first error.
type writer struct {
	w   io.Writer
	err error
}

func (w *writer) line(format string, args ...any) {
	if w.err == nil {
		_, w.err = fmt.Fprintf(w.w, format+"\n", args...)
	}
}

func (e *End) text() string {
	switch e.Kind {
	case "pod":
		text := fmt.Sprintf("pod %s on node %s", e.Name, e.Node)
		if len(e.Addrs) > 0 {
			text += " (" + join(e.Addrs) + ")"
		}
		return text
	case "node":
		return fmt.Sprintf("node %s (%s)", e.Name, join(e.Addrs))
	}
	return join(e.Addrs)
}

func word(v Verdict) string {
	if v == Some {
		return "allowed on some ports"
	}
	return string(v)
}

func (s Side) print(w *writer, all bool) {
	switch {
	case !all:
		w.line("%-8s of %s: %s", s.Direction, s.Of, word(s.Verdict))
	case s.Reason != "":
		w.line("%-8s %s", s.Direction, printable.Line(s.Reason))
	case len(s.Rules) == 0:
		w.line("%-8s isolated: nothing is allowed", s.Direction)
	default:
		w.line("%-8s isolated: allowed is only", s.Direction)
	}
	if s.Reason != "" && !all {
		w.line("  %s", printable.Line(s.Reason))
	}
	for _, r := range s.Rules[:min(len(s.Rules), rulesShown)] {
		r.print(w, s.Direction)
	}
	if n := len(s.Rules) - rulesShown; n > 0 {
		w.line("  and by %s more (--output json lists all)", count(n, "rule", "rules"))
	}
	if len(s.Isolating) > 0 {
		w.line("  isolated by %s", some(s.Isolating))
	}
	for _, f := range s.Faults {
		w.line("  ! %s: %s", f.Policy, printable.Line(f.Problem))
	}
	if s.Denied != nil && len(s.Isolating) > 0 {
		w.line("  denied so far, whatever the other end: %s", count(int(*s.Denied), "packet", "packets"))
	}
	s.Kernel.print(w, s.Verdict, all)
}

func (r Rule) print(w *writer, direction string) {
	field := map[string]string{"ingress": "from", "egress": "to"}[direction]
	peer := field + ": " + r.Who
	if r.Peer > 0 {
		peer = fmt.Sprintf("%s %d: %s", field, r.Peer, r.Who)
	}
	ports := "all ports"
	if len(r.Ports) > 0 {
		var list []string
		for _, p := range r.Ports {
			list = append(list, fmt.Sprintf("%d: %s", p.Port, p.Text))
		}
		ports = "port " + strings.Join(list, ", ")
	}
	w.line("  by %s, %s rule %d, %s, %s", r.Policy, direction, r.Rule, printable.Line(peer), printable.Line(ports))
}

func (k Kernel) print(w *writer, v Verdict, all bool) {
	switch {
	case k.Error != "":
		w.line("  ! THE KERNEL COULD NOT BE ASKED: %s", printable.Line(k.Error))
	case len(k.Differences) > 0:
		w.line("  ! THE KERNEL DOES OTHERWISE: of %s that it was asked about it treats %d not as policies say:",
			count(k.Asked, "connection", "connections"), len(k.Differences))
		for _, d := range k.Differences[:min(len(k.Differences), differencesShown)] {
			gate := ""
			if d.Gate {
				gate = ": the pod's link is in the group of those whose policies are not known"
			}
			w.line("    %s -> %s %s: policies say %s, the compiled rules %s, the kernel %s%s",
				d.Src, d.Dst, d.Port, said(d.Policies), said(d.Compiled), said(d.Kernel), gate)
		}
	case k.Asked > 0 && (all || v == Some):
		w.line("  the kernel does the same: asked about %s%s", count(k.Asked, "connection", "connections"), note(k.Note))
	case k.Asked > 0:
		w.line("  the kernel does the same%s", note(k.Note))
	case k.Note != "":
		w.line("  %s", printable.Line(k.Note))
	}
}

func note(text string) string {
	if text == "" {
		return ""
	}
	return "; " + printable.Line(text)
}

func said(allowed bool) string {
	if allowed {
		return "yes"
	}
	return "no"
}

// some names the first of a list.
func some(names []string) string {
	if n := len(names) - namesShown; n > 1 {
		return strings.Join(names[:namesShown], ", ") + fmt.Sprintf(" and %d more", n)
	}
	return strings.Join(names, ", ")
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func join(addrs []netip.Addr) string {
	var out []string
	for _, a := range addrs {
		out = append(out, a.String())
	}
	return strings.Join(out, " ")
}

func since(t *time.Time, now time.Time) string {
	if t == nil {
		return ""
	}
	return fmt.Sprintf(" (for %s)", now.Sub(*t).Round(time.Second))
}
