package connectivity

import (
	"encoding/xml"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/findings"
)

// Report is what `-o json` prints, and what the text is made from.
type Report struct {
	Version string `json:"version"`
	// OK: everything that was asked was as it should be.
	OK bool `json:"ok"`
	// Findings are of pairs of nodes, What is the group.
	Findings []doctor.Finding `json:"findings"`
	Groups   []Group          `json:"groups"`
	Nodes    int              `json:"nodes"`
	Pods     int              `json:"pods"`
	// Pairs of nodes, each in one direction.
	Pairs    int      `json:"pairs"`
	Families []string `json:"families"`
	// Disruptions are the restarts that were asked for.
	Disruptions []Disruption `json:"disruptions,omitempty"`
	// Started is how long it took until the pods ran, Seconds the whole with the removal of the namespace.
	Started float64 `json:"startedSeconds"`
	Seconds float64 `json:"seconds"`
}

// Group counts what was asked in one way.
type Group struct {
	Name  string `json:"name"`
	Right int    `json:"right"`
	Total int    `json:"total"`
	// Note says more, or why nothing was asked.
	Note string `json:"note,omitempty"`
}

// most is how many findings of a kind the text shows.
const most = 10

// Text prints a line for each group, and what is not right.
func (r Report) Text(out io.Writer) error {
	b := &strings.Builder{}
	fmt.Fprintf(b, "%d %s, %d test pods in namespace %s (%.1f s), %d %s, %s\n", r.Nodes, doctor.Plural(r.Nodes, "node"), r.Pods, Namespace, r.Started,
		r.Pairs, doctor.Plural(r.Pairs, "pair"), strings.Join(r.Families, " and "))
	w := tabwriter.NewWriter(b, 0, 0, 3, ' ', 0)
	for _, g := range r.Groups {
		count := fmt.Sprintf("%d of %d", g.Right, g.Total)
		if g.Total == 0 {
			count = "-"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", g.Name, count, g.Note)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	lines := strings.Split(b.String(), "\n") // tabwriter pads the last column too
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	b.Reset()
	b.WriteString(strings.Join(lines, "\n"))
	for _, d := range r.Disruptions {
		d.text(b)
	}
	r.wrong(b)
	if r.OK {
		fmt.Fprintf(b, "all right, %.0f s\n", r.Seconds)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// wrong says of each id who, why, and what to do once.
func (r Report) wrong(b *strings.Builder) {
	var ids []findings.ID
	for _, f := range r.Findings {
		if !slices.Contains(ids, f.ID) {
			ids = append(ids, f.ID)
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		count := 0
		for _, f := range r.Findings {
			if f.ID != id {
				continue
			}
			if count++; count == 1 {
				fmt.Fprintf(b, "\nFAIL  %s   %s\n", f.Title, id)
			}
			if count <= most {
				fmt.Fprintf(b, "  %s (%s)\n  why   %s\n", f.Where, f.What, f.Cause)
			}
		}
		if count > most {
			fmt.Fprintf(b, "  and %d more (-o json has all)\n", count-most)
		}
		if f, ok := findings.Of(id); ok {
			fmt.Fprintf(b, "  do    %s\n", f.Remedy)
		}
	}
	if common := r.common(); common != "" {
		fmt.Fprintf(b, "\nnode %s is an end of all pairs that do not reach each other: `headcnictl doctor --node %[1]s`\n", common)
	}
}

// common is the node that all pairs that do not reach each other have in common, "" where there is none, or only one pair.
func (r Report) common() string {
	count, pairs := map[string]int{}, 0
	for _, f := range r.Findings {
		if from, to, ok := strings.Cut(f.Where, " -> "); ok && f.What == podToPod && from != to {
			count[from]++
			count[to]++
			pairs++
		}
	}
	var found []string
	for end, n := range count {
		if n == pairs {
			found = append(found, end)
		}
	}
	if pairs < 2 || len(found) != 1 {
		return ""
	}
	return found[0]
}

// JUnit is the form that CI systems read: each group is a test.
func (r Report) JUnit(out io.Writer) error {
	type message struct {
		Text string `xml:"message,attr"`
		Body string `xml:",chardata"`
	}
	type testcase struct {
		Name    string    `xml:"name,attr"`
		Class   string    `xml:"classname,attr"`
		Failure []message `xml:"failure"`
		Skipped *message  `xml:"skipped"`
		Output  string    `xml:"system-out,omitempty"`
	}
	suite := struct {
		XMLName  xml.Name   `xml:"testsuite"`
		Name     string     `xml:"name,attr"`
		Tests    int        `xml:"tests,attr"`
		Failures int        `xml:"failures,attr"`
		Skipped  int        `xml:"skipped,attr"`
		Time     string     `xml:"time,attr"`
		Cases    []testcase `xml:"testcase"`
	}{Name: "headcnictl connectivity test", Tests: len(r.Groups), Time: fmt.Sprintf("%.3f", r.Seconds)}
	for _, g := range r.Groups {
		c := testcase{Name: g.Name, Class: "headcni.connectivity", Output: strings.TrimSpace(fmt.Sprintf("%d of %d %s", g.Right, g.Total, g.Note))}
		for _, f := range r.Findings {
			if f.What == g.Name {
				c.Failure = append(c.Failure, message{fmt.Sprintf("%s %s: %s", f.ID, f.Where, f.Title), f.Cause + "\nWhat to do: " + f.Remedy})
			}
		}
		if len(c.Failure) > 0 {
			suite.Failures++
		} else if g.Total == 0 {
			suite.Skipped++
			c.Skipped, c.Output = &message{Text: g.Note}, ""
		}
		suite.Cases = append(suite.Cases, c)
	}
	b, err := xml.MarshalIndent(suite, "", "  ")
	if err == nil {
		_, err = io.WriteString(out, xml.Header+string(b)+"\n")
	}
	return err
}
