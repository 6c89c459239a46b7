package doctor

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/headcni/headcni/internal/printable"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/nodestatus"
)

// Report is what `-o json` prints, and what the text is made from.
type Report struct {
	// Version is that of the program that looked.
	Version string `json:"version"`
	// OK: no finding is a failure, or waits.
	OK       bool         `json:"ok"`
	Findings []Finding    `json:"findings"`
	Nodes    []NodeReport `json:"nodes"`
	checks   []Check
}

// NodeReport is one node.
type NodeReport struct {
	Name string `json:"name"`
	// Right: nothing that was found of it is a failure, or waits.
	Right bool `json:"right"`
	// Error is why it did not answer, Status what it answered.
	Error  string             `json:"error,omitempty"`
	Status *nodestatus.Status `json:"status,omitempty"`
}

// Wrong reports whether something does not work, or not yet.
func (f Finding) Wrong() bool { return f.Severity != findings.Warn }

// NewReport judges what was seen; thorough asks everything.
func NewReport(version string, s Seen, thorough bool) Report {
	return newReport(version, s, slices.DeleteFunc(Judge(s), func(c Check) bool { return c.Thorough && !thorough }))
}

// NewReportOf is a report of checks that were made elsewhere.
func NewReportOf(version string, checks []Check) Report { return newReport(version, Seen{}, checks) }

func newReport(version string, s Seen, checks []Check) Report {
	r := Report{Version: version, OK: true, Findings: []Finding{}, Nodes: []NodeReport{}, checks: checks}
	wrong := map[string]bool{}
	for _, c := range r.checks {
		for _, f := range c.Found {
			wrong[c.Where] = wrong[c.Where] || f.Wrong()
			r.OK = r.OK && !f.Wrong()
		}
		r.Findings = append(r.Findings, c.Found...)
	}
	for _, n := range s.Nodes {
		out := NodeReport{Name: n.Name, Right: !wrong[n.Name], Status: n.Status}
		if n.Err != nil {
			out.Error = n.Err.Error()
		}
		r.Nodes = append(r.Nodes, out)
	}
	return r
}

// Warnings is how many findings are warnings.
func (r Report) Warnings() (n int) {
	for _, f := range r.Findings {
		if !f.Wrong() {
			n++
		}
	}
	return n
}

// Summary is the report in one line, for who waits: how many nodes are right, and what is wrong, without what changes by itself.
func (r Report) Summary() string {
	var texts []string
	for _, f := range r.Findings {
		if t := f.Where + " " + string(f.ID); f.Wrong() && !slices.Contains(texts, t) {
			texts = append(texts, t)
		}
	}
	return strings.TrimSuffix(fmt.Sprintf("%d of %d %s right: %s", r.right(), len(r.Nodes), Plural(len(r.Nodes), "node"), abridge(texts)), ": ")
}

func (r Report) right() (n int) {
	for _, node := range r.Nodes {
		if node.Right {
			n++
		}
	}
	return n
}

// Text is how a report is printed.
type Text struct {
	// Width is where lines are broken, in columns, 0 = nowhere: who reads a pipe looks for words in lines.
	Width int
	Now   time.Time
}

// Status prints one screen.
func (t Text) Status(out io.Writer, r Report) error {
	b := &strings.Builder{}
	fmt.Fprintf(b, "HeadCNI %s   %s\n\n", r.Version, strings.Join(append(r.servers(), fmt.Sprintf("%d of %d %s right", r.right(), len(r.Nodes), Plural(len(r.Nodes), "node"))), "   "))
	w := tabwriter.NewWriter(b, 0, 0, 3, ' ', 0)
	for _, line := range r.lines() {
		fmt.Fprintln(w, line)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	t.found(b, "NOT RIGHT", r.Findings, Finding.Wrong)
	t.found(b, "WARNINGS", r.Findings, func(f Finding) bool { return !f.Wrong() })
	_, err := io.WriteString(out, b.String())
	return err
}

// servers are the control servers that nodes are in, mostly one.
func (r Report) servers() (out []string) {
	for _, n := range r.Nodes {
		if n.Status != nil && n.Status.Tailnet != nil {
			if text := "Headscale " + n.Status.Tailnet.ControlURL; n.Status.Tailnet.ControlURL != "" && !slices.Contains(out, text) {
				out = append(out, text)
			}
		}
	}
	return out
}

// lines tell what is known; what is not has no line.
func (r Report) lines() (out []string) {
	ready, modes, enforced, policies, isolated, waiting, asked := 0, map[string]int{}, 0, 0, 0, 0, 0
	by := map[string]int{}
	for _, n := range r.Nodes {
		s := n.Status
		if s == nil {
			continue
		}
		asked++
		if s.Ready {
			ready++
		}
		modes[s.Mode]++
		for path, n := range counts(s) {
			by[path] += n
		}
		if p := s.Policy; p != nil {
			policies, isolated, waiting = max(policies, p.Policies), isolated+p.Isolated, waiting+len(p.Unknown)
			if p.InForce {
				enforced++
			}
		}
	}
	not := ""
	if ready < len(r.Nodes) {
		not = fmt.Sprintf(", %d not", len(r.Nodes)-ready)
	}
	line := fmt.Sprintf("nodes\t%d\t%d ready%s", len(r.Nodes), ready, not)
	out = append(out, line)
	var ts []string
	for _, m := range []struct{ mode, text string }{{"daemon", "own (daemon mode)"}, {"host", "the host's"}, {"", "not found"}} {
		if modes[m.mode] > 0 {
			ts = append(ts, fmt.Sprintf("%d %s", modes[m.mode], m.text))
		}
	}
	if ts != nil {
		out = append(out, "tailscaled\t"+fmt.Sprint(asked)+"\t"+strings.Join(ts, ", "))
	}
	total := 0
	for _, n := range by {
		total += n
	}
	if total > 0 {
		out = append(out, fmt.Sprintf("paths\t%d\t%s", total, countText(by)))
	}
	if enforced > 0 || policies > 0 {
		line := fmt.Sprintf("policy\t%d\tenforced on %d of %d, %d addresses of pods isolated", policies, enforced, len(r.Nodes), isolated)
		if waiting > 0 {
			line += fmt.Sprintf(", %d pods wait", waiting)
		}
		out = append(out, line)
	}
	if line := r.fastPath(); line != "" {
		out = append(out, line)
	}
	if len(r.Nodes) == 1 && r.Nodes[0].Status != nil {
		out = append(out, one(*r.Nodes[0].Status)...)
	}
	return out
}

// fastPath says on how many nodes there is one, and why there is none elsewhere, "" where no node tells.
func (r Report) fastPath() string {
	told, on, why := 0, 0, map[string]int{}
	for _, n := range r.Nodes {
		switch {
		case n.Status == nil || n.Status.FastPath == nil:
			continue
		case n.Status.FastPath.Why == "":
			on++
		default:
			why[n.Status.FastPath.Why]++
		}
		told++
	}
	if told == 0 {
		return ""
	}
	line := fmt.Sprintf("fast path\t%d\tbetween a node's own pods, on %d of %d", on, on, len(r.Nodes))
	for _, w := range slices.Sorted(maps.Keys(why)) {
		line += fmt.Sprintf("; none on %d: %s", why[w], w)
	}
	return line
}

// one tells more of a node that was asked alone.
func one(s nodestatus.Status) (out []string) {
	right, approved := 0, false
	for _, p := range s.Parts {
		if p.OK {
			right++
		}
		approved = approved || p.OK && p.Name == "approval" // which asked whoever knows; tailscaled may learn of it hours later
	}
	out = append(out, fmt.Sprintf("parts\t%d\t%d right", len(s.Parts), right))
	for _, c := range s.PodCIDRs {
		state := "advertised and approved"
		switch {
		case !c.Advertised:
			state = "not advertised"
		case !c.Approved && !approved:
			state = "advertised, not known to be approved"
		}
		out = append(out, fmt.Sprintf("pods\t\t%s %s", c.CIDR, state))
	}
	if t := s.Tailnet; t != nil {
		end := "never ends"
		if t.KeyExpiry != nil {
			end = "ends " + t.KeyExpiry.UTC().Format(time.DateOnly)
		}
		out = append(out, fmt.Sprintf("node key\t\t%s", end))
	}
	return out
}

// found prints those findings that are kind, under a title. What is the same on several nodes, as where Headscale is down, is printed once.
func (t Text) found(b *strings.Builder, title string, all []Finding, kind func(Finding) bool) {
	var once []Finding
	where := map[int][]string{}
	for _, f := range all {
		if !kind(f) {
			continue
		}
		i := slices.IndexFunc(once, func(o Finding) bool {
			return o.ID == f.ID && o.What == f.What && o.Cause == f.Cause && o.Severity == f.Severity
		})
		if i < 0 {
			i = len(once)
			once = append(once, f)
		}
		if !f.Since.IsZero() && f.Since.Before(once[i].Since) {
			once[i].Since = f.Since
		}
		where[i] = append(where[i], f.Where)
	}
	for i, f := range once {
		if i == 0 {
			fmt.Fprintf(b, "\n%s\n", title)
		}
		f.Where = abridge(where[i])
		t.finding(b, f)
	}
}

func (t Text) finding(b *strings.Builder, f Finding) {
	since := ""
	if !f.Since.IsZero() {
		since = " (" + ago(t.Now.Sub(f.Since)) + ")"
	}
	where := strings.TrimSpace(f.Where + "  " + f.What)
	t.write(b, cmp.Or(where, "-"), "  ", fmt.Sprintf("%s  %s%s", f.ID, f.Title, since))
	t.write(b, "", "  why   ", f.Cause)
	if f.Severity == findings.Wait {
		t.write(b, "", "  do    ", "wait: it passes by itself; where it does not, "+f.Remedy)
		return
	}
	t.write(b, "", "  do    ", f.Remedy)
}

// write prints a text with what stands before it, broken where a line would be too long.
func (t Text) write(b *strings.Builder, head, indent, text string) {
	head += indent
	b.WriteString(printable.Fold(head, min(utf8.RuneCountInString(head), 8), text, t.Width))
}

// ago is a duration as people say it.
func ago(d time.Duration) string {
	switch d = max(d, 0); {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

// Doctor prints every check, and counts.
func (t Text) Doctor(out io.Writer, r Report) error {
	b := &strings.Builder{}
	width, count, warn, fail := 0, 0, 0, 0
	for _, c := range r.checks {
		width = max(width, utf8.RuneCountInString(c.Where))
		count += c.Count
	}
	for _, c := range r.checks {
		head := fmt.Sprintf("%-*s  ", width, c.Where)
		if len(c.Found) == 0 {
			if c.OK != "" {
				t.write(b, head, "ok    ", c.OK)
			}
			continue
		}
		for _, f := range c.Found {
			mark := "FAIL  "
			switch f.Severity {
			case findings.Warn:
				mark = "WARN  "
				warn++
			case findings.Wait:
				mark = "WAIT  "
				fail++
			default:
				fail++
			}
			what := ""
			if f.What != "" {
				what = f.What + ": "
			}
			t.write(b, head, mark, fmt.Sprintf("%s  %s%s", f.ID, what, f.Title))
			t.write(b, "", "        why   ", f.Cause)
			t.write(b, "", "        do    ", f.Remedy)
		}
	}
	fmt.Fprintf(b, "%d checks: %d ok, %d %s, %d %s\n", count, max(0, count-warn-fail), warn, Plural(warn, "warning"), fail, Plural(fail, "failure"))
	_, err := io.WriteString(out, b.String())
	return err
}
