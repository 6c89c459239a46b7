// Package docs holds what people read and copy to the code: both READMEs, the documents' commands and configuration, the example
// configuration, the shipped conflist.
// It also holds that no test can be skipped where everything must run.
package docs

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/netconf"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/kube"
)

const root = "../.."

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// block is one fenced piece of a document.
type block struct{ Kind, Text string }

var (
	fence   = regexp.MustCompile("(?ms)^ *```(\\w*)\n(.*?)^ *```$")
	comment = regexp.MustCompile(`(?m)^\s*# .*\n`)
)

// guides are the documents with commands for users.
func guides(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(root, "docs/*.md"))
	if err != nil || len(found) < 15 {
		t.Fatal(found, err)
	}
	out := []string{"README.md", "chart/README.md"}
	for _, f := range found {
		out = append(out, "docs/"+filepath.Base(f))
	}
	return out
}

// blocks finds the fenced pieces, also where they are indented, as in a list. Comments are left out: they are in the reader's language.
func blocks(text string) []block {
	var out []block
	for _, m := range fence.FindAllStringSubmatch(text, -1) {
		out = append(out, block{m[1], comment.ReplaceAllString(m[2], "")})
	}
	return out
}

func TestLinksLeadSomewhere(t *testing.T) {
	var docs []string
	for _, pattern := range []string{"*.md", "chart/*.md", "docs/*.md", "docs/zh/*.md", "docs/adr/*.md"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil || len(found) == 0 {
			t.Fatalf("%s: %v, %v", pattern, found, err)
		}
		docs = append(docs, found...)
	}
	for _, doc := range docs {
		name, err := filepath.Rel(root, doc)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(fence.ReplaceAllString(read(t, name), ""), -1) {
			target(t, name, m[2]+m[3])
		}
	}
}

// TestMapIsWhole: docs/architecture.md has a row for each package that is built into a program.
func TestMapIsWhole(t *testing.T) {
	inMap := read(t, "docs/architecture.md")
	seen := 0
	for _, below := range []string{"cmd", "internal", "pkg"} {
		err := filepath.WalkDir(filepath.Join(root, below), func(path string, d fs.DirEntry, err error) error {
			if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
				return err
			}
			folder, err := filepath.Rel(root, filepath.Dir(path))
			if seen++; err == nil && !strings.Contains(inMap, "`"+folder+"`") {
				t.Errorf("docs/architecture.md says nothing of %s", folder)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if seen < 100 {
		t.Errorf("%d files: were they looked for in the right place?", seen)
	}
}

// TestNothingStandsTwice: a merge of two branches can leave a row or a point of a list twice. Heads of tables may repeat, and errors.md
// is generated.
func TestNothingStandsTwice(t *testing.T) {
	for _, name := range append(append(guides(t), "CONTRIBUTING.md", "CHANGELOG.md"), slices.Collect(maps.Values(translations(t)))...) {
		if name == "docs/errors.md" {
			continue
		}
		lines := strings.Split(fence.ReplaceAllString(read(t, name), ""), "\n")
		seen := map[string]bool{}
		for i, line := range lines {
			if len(line) < 60 || i+1 < len(lines) && strings.HasPrefix(lines[i+1], "|---") {
				continue
			}
			if seen[line] {
				t.Errorf("%s has this line twice: %s", name, line)
			}
			seen[line] = true
		}
	}
}

func TestDecisionsAreListed(t *testing.T) {
	index := read(t, "docs/adr/README.md")
	files, err := filepath.Glob(filepath.Join(root, "docs/adr/0*.md"))
	if err != nil || len(files) == 0 {
		t.Fatal(err, len(files))
	}
	for _, f := range files {
		title, _, _ := strings.Cut(read(t, filepath.Join("docs/adr", filepath.Base(f))), "\n")
		if want := "- [" + strings.TrimPrefix(title, "# ") + "](" + filepath.Base(f) + ")\n"; !strings.Contains(index, want) {
			t.Errorf("docs/adr/README.md lacks %q", want)
		}
	}
}

func TestDocumentsNameTargetsThatExist(t *testing.T) {
	makefile := read(t, "Makefile")
	for _, name := range append(guides(t), "CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md", ".github/workflows/ci.yml") {
		for _, m := range regexp.MustCompile("(?m)(?:^|`|sudo |run: |PATH\" |&& )make ([a-z0-9-]+)\\b").FindAllStringSubmatch(read(t, name), -1) {
			if !strings.Contains(makefile, "\n"+m[1]+":") {
				t.Errorf("%s says `make %s`, which the Makefile does not have", name, m[1])
			}
		}
	}
}

// TestForms: GitHub shows nothing of a form or a workflow that is no YAML.
func TestForms(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(root, ".github/*/*.yml"))
	if err != nil || len(files) < 4 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		var form map[string]any
		if b, err := os.ReadFile(f); err != nil || yaml.UnmarshalStrict(b, &form) != nil || len(form) == 0 {
			t.Errorf("%s: %v, %v", f, err, form)
		}
	}
}

// TestDocumentsNameTestsThatExist: who reads which test holds a promise finds it.
func TestDocumentsNameTestsThatExist(t *testing.T) {
	have := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		for _, m := range regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)\w+)\(`).FindAllStringSubmatch(string(b), -1) {
			have[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	docs, err := filepath.Glob(filepath.Join(root, "docs/*.md"))
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	for _, doc := range docs {
		text := read(t, filepath.Join("docs", filepath.Base(doc)))
		for _, m := range regexp.MustCompile("`((?:Test|Fuzz|Benchmark)[A-Z]\\w+)`").FindAllStringSubmatch(text, -1) {
			if named++; !have[m[1]] {
				t.Errorf("docs/%s names %s, which is not there", filepath.Base(doc), m[1])
			}
		}
	}
	if named == 0 {
		t.Error("no document names a test: this looks for the wrong thing")
	}
}

// TestContributingLeadsSomewhere: what CONTRIBUTING.md tells a newcomer to open, or to run, is there.
func TestContributingLeadsSomewhere(t *testing.T) {
	text := read(t, "CONTRIBUTING.md")
	paths := 0
	for _, m := range regexp.MustCompile("`((?:\\.ci|chart|cmd|docs|internal|pkg|scripts|systemd|test)/[^` ]*)`").FindAllStringSubmatch(text, -1) {
		paths++
		if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
			t.Errorf("CONTRIBUTING.md names %s, which is not there", m[1])
		}
	}
	if paths < 40 {
		t.Errorf("found %d paths: is the pattern right?", paths)
	}
	for _, m := range regexp.MustCompile(`-run (Test\w+) \./([\w/]+)`).FindAllStringSubmatch(text, -1) {
		files, err := filepath.Glob(filepath.Join(root, m[2], "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(files, func(f string) bool { return strings.Contains(read(t, f[len(root)+1:]), "\nfunc "+m[1]+"(") }) {
			t.Errorf("CONTRIBUTING.md says to run %s of %s, which has no such test", m[1], m[2])
		}
	}
}

// TestErrorsLeadSomewhere: an address of ours in a message is that of a file in this repository.
func TestErrorsLeadSomewhere(t *testing.T) {
	link := regexp.MustCompile(`"[^"\n]*https://github\.com/headcni/headcni/blob/main/([\w./-]+)`)
	found := 0
	for _, dir := range []string{"cmd", "pkg", "internal"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
				return err
			}
			b, err := os.ReadFile(path)
			for _, m := range link.FindAllSubmatch(b, -1) {
				found++
				if _, err := os.Stat(filepath.Join(root, string(m[1]))); err != nil {
					t.Errorf("%s points to %s, which is not there", path, m[1])
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if found == 0 {
		t.Error("found no address: is the pattern right?")
	}
}

// What a reader copies into a file must be taken by the program that reads it.
func TestConfigurationIsValid(t *testing.T) {
	var plugins, ipams, daemons, secrets int
	var all []block
	for _, name := range []string{"docs/configuration.md", "docs/install.md", "docs/install-by-hand.md"} {
		all = append(all, blocks(read(t, name))...)
	}
	for _, b := range all {
		switch {
		case b.Kind == "yaml" && strings.Contains(b.Text, "\nkind: Secret\n"):
			secrets++
			checkSecret(t, b.Text)
		case b.Kind == "yaml" && strings.HasPrefix(b.Text, "headscale:\n"):
			daemons++
			loadDaemon(t, b.Text)
		case b.Kind != "json":
		case strings.Contains(b.Text, `"type": "headcni",`):
			plugins++
			if _, err := netconf.Parse([]byte(b.Text)); err != nil {
				t.Errorf("%v in\n%s", err, b.Text)
			}
		case strings.HasPrefix(b.Text, "{\n  \"type\": \"headcni-ipam\""):
			ipams++
			if _, err := ipam.ParseConfig("headcni", []byte(b.Text)); err != nil {
				t.Errorf("%v in\n%s", err, b.Text)
			}
		}
	}
	if plugins != 1 || ipams != 1 || daemons != 1 || secrets != 1 {
		t.Errorf("found %d plugin, %d ipam, %d daemon configurations and %d Secrets, want one each", plugins, ipams, daemons, secrets)
	}
}

// checkSecret holds the Secret to the name and key that the controller mounts.
func checkSecret(t *testing.T, text string) {
	t.Helper()
	var s corev1.Secret
	text = strings.Replace(text, "<base64-encoded-api-key>", "a2V5", 1)
	if err := yaml.UnmarshalStrict([]byte(text), &s); err != nil {
		t.Errorf("%v in\n%s", err, text)
	}
	if s.Name != kube.AuthSecret || string(s.Data[kube.AuthSecretKey]) != "key" {
		t.Errorf("want Secret %s with the key %s in\n%s", kube.AuthSecret, kube.AuthSecretKey, text)
	}
}

func loadDaemon(t *testing.T, text string) config.Config {
	t.Helper()
	file := filepath.Join(t.TempDir(), "daemon.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(file, false, nil, nil)
	if err != nil {
		t.Errorf("%v in\n%s", err, text)
	}
	return c
}

// TestExampleIsComplete: docs/daemon.yaml has every key, and the default of each but for those that it says have none.
func TestExampleIsComplete(t *testing.T) {
	text := read(t, "docs/daemon.yaml")
	got := loadDaemon(t, text)
	want := config.Default()
	want.Headscale.URL = got.Headscale.URL
	want.Network.PodCIDRs, want.Network.ClusterCIDRs = got.Network.PodCIDRs, got.Network.ClusterCIDRs
	// An empty list means the same as none.
	if diff := cmp.Diff(strings.ReplaceAll(want.String(), ": null", ": []"), got.String()); diff != "" {
		t.Errorf("not the defaults (-default +docs/daemon.yaml):\n%s", diff)
	}
	if n := strings.Count(text, "# no default"); n != 3 {
		t.Errorf("%d keys are said to have no default, want the 3 that this test leaves out", n)
	}
	var tree map[string]any
	if err := yaml.Unmarshal([]byte(text), &tree); err != nil {
		t.Fatal(err)
	}
	for _, key := range config.Keys() {
		if !has(tree, strings.Split(key, ".")) {
			t.Errorf("docs/daemon.yaml lacks %s", key)
		}
	}
}

func has(tree map[string]any, path []string) bool {
	v, ok := tree[path[0]]
	if !ok || len(path) == 1 {
		return ok
	}
	inner, ok := v.(map[string]any)
	return ok && has(inner, path[1:])
}

func TestShippedConflist(t *testing.T) {
	var list struct {
		CNIVersion  string
		CNIVersions []string
		Name        string
		Plugins     []map[string]any
	}
	if err := json.Unmarshal([]byte(read(t, "10-headcni.conflist")), &list); err != nil {
		t.Fatal(err)
	}
	if list.CNIVersion != "0.4.0" || !slices.Equal(list.CNIVersions, []string{"0.4.0", "1.0.0", "1.1.0"}) {
		t.Errorf("versions %s, %v: old runtimes read the first, new ones the best of the second", list.CNIVersion, list.CNIVersions)
	}
	if len(list.Plugins) != 1 {
		t.Fatalf("%d plugins, want 1", len(list.Plugins))
	}
	// What libcni gives to the plugin.
	p := list.Plugins[0]
	p["name"], p["cniVersion"] = list.Name, "1.1.0"
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	c, err := netconf.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Warnings) > 0 {
		t.Errorf("warnings: %v", c.Warnings)
	}
	if _, err := ipam.ParseConfig(list.Name, c.IPAM.Raw); err != nil {
		t.Error(err)
	}
}

// TestOneWayToSkip: nstest.Skip fails where HEADCNI_TEST_REQUIRE is set, testing's own Skip does not.
func TestOneWayToSkip(t *testing.T) {
	var files int
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.Contains(path, "internal/nstest/") {
			return err
		}
		files++
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			x, _ := sel.X.(*ast.Ident)
			ours := x != nil && x.Name == "nstest"
			if slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, sel.Sel.Name) && !ours {
				t.Errorf("%s: skip by nstest.Skip, so that make test can forbid it", set.Position(sel.Pos()))
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 50 {
		t.Errorf("looked at %d files only", files)
	}
}
