package conformance

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/golden"
)

const document = "../../docs/cni-conformance.md"

// TestTable prints the rules, and holds that each has tests that exist and that each test has a rule.
func TestTable(t *testing.T) {
	here := testsOf(t, ".")
	others := map[string][]string{}
	used := map[string]bool{"TestMain": true, "TestTable": true}
	count := map[program]int{}
	for _, r := range rules {
		count[r.of]++
		t.Logf("%-16s %-12s %s: %s", r.section, r.of, r.rule, strings.Join(r.tests, ", "))
		if len(r.tests) == 0 {
			t.Errorf("%s: %s: no test", r.section, r.rule)
		}
		for _, name := range r.tests {
			folder, test, elsewhere := strings.Cut(name, ".")
			if !elsewhere {
				used[name] = true
				if !slices.Contains(here, name) {
					t.Errorf("%s: there is no %s here", r.rule, name)
				}
				continue
			}
			if others[folder] == nil {
				others[folder] = testsOf(t, filepath.Join("../..", folder))
			}
			if !slices.Contains(others[folder], test) {
				t.Errorf("%s: there is no %s in %s", r.rule, test, folder)
			}
		}
	}
	for _, name := range here {
		if !used[name] {
			t.Errorf("%s holds no rule of the table", name)
		}
	}
	t.Logf("%d rules: %d for headcni, %d for headcni-ipam, %d for both", len(rules), count[plugin], count[ipams], count[both])
	golden.Check(t, document, render())
}

// testsOf are the names of tests and fuzz tests in a folder.
func testsOf(t *testing.T, dir string) (names []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && (strings.HasPrefix(fn.Name.Name, "Test") || strings.HasPrefix(fn.Name.Name, "Fuzz")) {
				names = append(names, fn.Name.Name)
			}
		}
	}
	return names
}

const head = `# Conformance with the CNI specification

<!-- Written by go test ./test/conformance -run Table -update; edit test/conformance/rules_test.go. -->

What [the specification](https://github.com/containernetworking/cni/blob/spec-v1.1.0/SPEC.md) (1.1.0, and 0.3.0 to 1.0.0 where
they differ) asks of a plugin, in our words, and the tests that hold it. A test without a folder is in test/conformance: it runs the
programs as they ship, as a runtime runs them. A last part is about robustness, which no specification asks for.

Worth knowing:

- STATUS stays well when the pool is full, other than the specification wants: [why](adr/0011-full-pool.md).
- A MAC address is for headcni to set: declare the capability ` + "`mac`" + ` for headcni and for no plugin behind it. When ` + "`tuning`" + ` sets one,
  be it the same, the kernel forgets the pod's permanent neighbours, and the pod is cut off. CHECK says so. ` + "`args.cni.mac`" + ` and
  ` + "`MAC`" + ` in ` + "`CNI_ARGS`" + ` reach every plugin, so use them only where ` + "`tuning`" + ` is not in the list.
- A plugin behind headcni may make the pod's MTU smaller, never larger: the host's end of the link would lose what is larger.
- ` + "`bandwidth`" + ` needs ` + "`ifb`" + ` and ` + "`tbf`" + ` in the kernel.

| Section | Rule | Tests | For |
|---|---|---|---|
`

func render() string {
	var b strings.Builder
	b.WriteString(head)
	for _, r := range rules {
		of := string(r.of)
		if r.of == both {
			of = string(plugin) + ", " + string(ipams)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", r.section, strings.ReplaceAll(r.rule, "|", `\|`), strings.Join(r.tests, "<br>"), of)
	}
	return b.String()
}
