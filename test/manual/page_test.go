package manual

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// step is a paragraph of a block of a page: what a reader copies in one go.
type step struct {
	Kind, Text string
	used       bool
}

// page is a document below docs, or a section of one.
type page struct {
	t     *testing.T
	title string
	steps []*step
	// replace puts a machine's own values in the place of the page's examples.
	replace *strings.Replacer
}

var (
	fence   = regexp.MustCompile("(?ms)^```(\\w+)\n(.*?)^```$")
	comment = regexp.MustCompile(`(?m)^# .*\n`)
)

// open reads the steps of a document below docs; with a title only those below that heading of the second level.
func open(t *testing.T, name, title string) *page {
	t.Helper()
	b, err := os.ReadFile("../../docs/" + name)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	if title != "" {
		var found bool
		if _, text, found = strings.Cut(text, "\n## "+title+"\n"); !found {
			t.Fatalf("%s has no section %q", name, title)
		}
		text, _, _ = strings.Cut(text, "\n## ")
	}
	r := &page{t: t, title: strings.TrimSpace(name + " " + title)}
	for _, m := range fence.FindAllStringSubmatch(text, -1) {
		parts := []string{m[2]}
		if m[1] == "bash" {
			parts = strings.Split(m[2], "\n\n")
		}
		for _, p := range parts {
			r.steps = append(r.steps, &step{Kind: m[1], Text: strings.TrimSpace(comment.ReplaceAllString(p, ""))})
		}
	}
	return r
}

// step finds the one step that holds a text.
func (r *page) step(part string) string {
	r.t.Helper()
	var found *step
	for _, s := range r.steps {
		if strings.Contains(s.Text, part) {
			if found != nil {
				r.t.Fatalf("%s has two steps with %q", r.title, part)
			}
			found = s
		}
	}
	if found == nil {
		r.t.Fatalf("%s has no step with %q", r.title, part)
	}
	found.used = true
	if r.replace != nil {
		return r.replace.Replace(found.Text)
	}
	return found.Text
}

// all fails the test where a step was not asked for.
func (r *page) all() {
	r.t.Helper()
	for _, s := range r.steps {
		if !s.used {
			r.t.Errorf("%s: nobody did this:\n%s", r.title, s.Text)
		}
	}
}
