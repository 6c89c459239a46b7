// Package mantest keeps the manual pages and the shells' completion of our programs as files that make install copies: made from the
// commands themselves, so that a page says what --help says.
package mantest

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/headcni/headcni/internal/golden"
)

// dir is where the files are, from a program's folder.
const dir = "../../docs/man"

// Pages holds the manual pages of a program, one for each command that is not hidden. -update writes them.
func Pages(t *testing.T, root *cobra.Command, section string) {
	t.Helper()
	made := map[string]bool{}
	var page func(*cobra.Command)
	page = func(cmd *cobra.Command) {
		cmd.DisableAutoGenTag = true // it has the day
		name := strings.ReplaceAll(cmd.CommandPath(), " ", "-") + "." + section
		var b bytes.Buffer
		header := doc.GenManHeader{Title: strings.ToUpper(strings.TrimSuffix(name, "."+section)), Section: section, Source: "HeadCNI", Manual: "HeadCNI"}
		if err := doc.GenMan(cmd, &header, &b); err != nil {
			t.Fatal(err)
		}
		made[name] = true
		golden.Check(t, filepath.Join(dir, name), undated(b.String()))
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() {
				page(sub)
			}
		}
	}
	page(root)
	files, err := filepath.Glob(filepath.Join(dir, root.Name()+`[.\-]*`))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !made[filepath.Base(f)] && filepath.Ext(f) == "."+section {
			t.Errorf("%s is of no command: remove it", f)
		}
	}
}

// undated leaves out the day on which a page was made: else every day would make other files.
func undated(page string) string {
	before, title, _ := strings.Cut(page, ".TH ")
	line, after, _ := strings.Cut(title, "\n")
	fields := strings.Split(line, `" "`)
	fields[2] = ""
	return before + ".TH " + strings.Join(fields, `" "`) + "\n" + after
}

// Completion holds what the shells read to complete a program's words.
func Completion(t *testing.T, root *cobra.Command) {
	t.Helper()
	for shell, write := range map[string]func(*bytes.Buffer) error{
		"bash": func(b *bytes.Buffer) error { return root.GenBashCompletionV2(b, true) },
		"zsh":  func(b *bytes.Buffer) error { return root.GenZshCompletion(b) },
		"fish": func(b *bytes.Buffer) error { return root.GenFishCompletion(b, true) },
	} {
		var b bytes.Buffer
		if err := write(&b); err != nil {
			t.Fatal(err)
		}
		golden.Check(t, filepath.Join(dir, root.Name()+"."+shell), b.String())
	}
}
