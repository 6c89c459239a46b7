package manual

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// step is a paragraph of a block of the README: what a reader copies in one go.
type step struct {
	Kind, Text string
	used       bool
}

// readme is a section of README.md.
type readme struct {
	t     *testing.T
	title string
	steps []*step
	// replace puts a machine's own values in the place of the README's examples.
	replace *strings.Replacer
}

var (
	fence   = regexp.MustCompile("(?ms)^```(\\w+)\n(.*?)^```$")
	comment = regexp.MustCompile(`(?m)^# .*\n`)
)

// section reads the steps below a heading of the second level.
func section(t *testing.T, title string) *readme {
	t.Helper()
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, found := strings.Cut(string(b), "\n## "+title+"\n")
	if !found {
		t.Fatalf("README.md has no section %q", title)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	r := &readme{t: t, title: title}
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
func (r *readme) step(part string) string {
	r.t.Helper()
	var found *step
	for _, s := range r.steps {
		if strings.Contains(s.Text, part) {
			if found != nil {
				r.t.Fatalf("%q of README.md has two steps with %q", r.title, part)
			}
			found = s
		}
	}
	if found == nil {
		r.t.Fatalf("%q of README.md has no step with %q", r.title, part)
	}
	found.used = true
	if r.replace != nil {
		return r.replace.Replace(found.Text)
	}
	return found.Text
}

// all fails the test where a step was not asked for.
func (r *readme) all() {
	r.t.Helper()
	for _, s := range r.steps {
		if !s.used {
			r.t.Errorf("%q of README.md: nobody did this:\n%s", r.title, s.Text)
		}
	}
}
