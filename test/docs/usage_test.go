package docs

import (
	"cmp"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/realparts"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/findings"
)

// usage is what a program of ours takes on its command line: names of commands, and of flags.
type usage struct{ commands, flags map[string]bool }

// usages reads the usage of our programs out of their source, by the program's name.
func usages(t *testing.T) map[string]usage {
	t.Helper()
	files, err := filepath.Glob(root + "/cmd/*/*.go")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]usage{}
	for _, file := range files {
		program := filepath.Base(filepath.Dir(file))
		if program == "cli" {
			program = "headcnictl"
		}
		u, ok := out[program]
		if !ok {
			u = usage{commands: map[string]bool{"completion": true, "help": true}, flags: map[string]bool{"help": true, "version": true}}
			out[program] = u
		}
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.KeyValueExpr:
				if key, ok := n.Key.(*ast.Ident); ok && key.Name == "Use" {
					name, _, _ := strings.Cut(text(n.Value), " ")
					u.commands[name] = true
				}
			case *ast.CallExpr:
				if definesFlag(n) {
					u.flags[text(n.Args[1])] = true
					// In the help of a flag pflag takes what stands in backquotes for the name of the flag's value, and prints it behind the
					// flag: a command in backquotes garbles the line.
					ast.Inspect(n.Args[len(n.Args)-1], func(n ast.Node) bool {
						if lit, ok := n.(*ast.BasicLit); ok && strings.Contains(text(lit), "`") {
							t.Errorf("%s: %q: no backquotes in the help of a flag", set.Position(lit.Pos()), text(lit))
						}
						return true
					})
				}
			}
			return true
		})
	}
	return out
}

// text is that of a string literal, else "".
func text(e ast.Expr) string {
	lit, ok := e.(*ast.BasicLit)
	if !ok {
		return ""
	}
	s, _ := strconv.Unquote(lit.Value) // numbers are none
	return s
}

// definesFlag: cmd.Flags().StringVar(&v, "name", ...) and its like.
func definesFlag(call *ast.CallExpr) bool {
	method, ok := call.Fun.(*ast.SelectorExpr)
	return ok && regexp.MustCompile(`^(Bool|Duration|Int|String|StringArray|StringSlice)VarP?$`).MatchString(method.Sel.Name) && len(call.Args) >= 4
}

// TestUsageOfFlags: the help of every flag can be printed as it is written.
func TestUsageOfFlags(t *testing.T) {
	flags := 0
	for _, u := range usages(t) {
		flags += len(u.flags)
	}
	if flags < 40 {
		t.Errorf("only %d flags found", flags)
	}
}

// command is a line of a document that begins with a program.
type command struct {
	where, program string
	args           []string
}

var span = regexp.MustCompile("`([^`\n]+)`")

// commands finds each call of a program in the blocks and in the text of the documents. What kubectl exec runs counts too.
func commands(t *testing.T, programs ...string) (out []command) {
	t.Helper()
	call := regexp.MustCompile(`(?:^|[|;&] *| -- )(?:sudo )?(?:[A-Z_]+=\S* )*(?:\S*/)?(` + strings.Join(programs, "|") + `)((?: [^|;&>#]*)?)$?`)
	for _, name := range append(guides(t), "README_CN.md", "CONTRIBUTING.md") {
		whole := read(t, name)
		var lines []string
		for _, b := range fence.FindAllStringSubmatch(whole, -1) {
			if b[1] == "bash" {
				lines = append(lines, strings.Split(strings.ReplaceAll(comment.ReplaceAllString(b[2], ""), "\\\n", " "), "\n")...)
			}
		}
		for _, m := range span.FindAllStringSubmatch(fence.ReplaceAllString(whole, ""), -1) {
			lines = append(lines, m[1])
		}
		for _, line := range lines {
			for _, m := range call.FindAllStringSubmatch(line, -1) {
				out = append(out, command{name + ": " + strings.TrimSpace(line), m[1], strings.Fields(m[2])})
			}
		}
	}
	return out
}

// TestCommandsExist: our programs have the commands and flags, and daemon.yaml and the chart the keys, with which the documents call them.
func TestCommandsExist(t *testing.T) {
	have := usages(t)
	for _, plugin := range []string{"headcni", "headcni-ipam"} { // they take none
		delete(have, plugin)
	}
	parents := []string{"config", "demo", "dns", "ipam", "key", "policy"}
	all := commands(t, slices.Collect(maps.Keys(have))...)
	checked := 0
	for _, c := range all {
		u := have[c.program]
		for i, arg := range c.args {
			switch name, value, _ := strings.Cut(strings.TrimPrefix(arg, "--"), "="); {
			case strings.HasPrefix(arg, "--"):
				if checked++; !u.flags[name] {
					t.Errorf("%s\n%s has no flag --%s", c.where, c.program, name)
				}
				if name == "set" && value == "" && i+1 < len(c.args) {
					if key, _, _ := strings.Cut(c.args[i+1], "="); !slices.Contains(config.Keys(), key) {
						t.Errorf("%s\ndaemon.yaml has no key %s", c.where, key)
					}
				}
			case (i == 0 || i == 1 && slices.Contains(parents, c.args[0])) && regexp.MustCompile(`^[a-z]+$`).MatchString(arg):
				if checked++; !u.commands[arg] {
					t.Errorf("%s\n%s has no command %s", c.where, c.program, arg)
				}
			}
		}
	}
	if checked < 60 {
		t.Errorf("found %d words to check: is the pattern right?", checked)
	}
}

// TestChartValuesExist: the chart has the values that the documents set, and the script the options.
func TestChartValuesExist(t *testing.T) {
	var values map[string]any
	if err := yaml.Unmarshal([]byte(read(t, "chart/values.yaml")), &values); err != nil {
		t.Fatal(err)
	}
	script := read(t, "deploy-with-helm.sh")
	set := regexp.MustCompile(`--set(?:-file|-string)? '?([A-Za-z.]+)=`)
	checked := 0
	for _, c := range commands(t, "helm", `deploy-with-helm\.sh`) {
		for _, m := range set.FindAllStringSubmatch(strings.Join(c.args, " "), -1) {
			if checked++; !has(values, strings.Split(m[1], ".")) {
				t.Errorf("%s\nchart/values.yaml has no %s", c.where, m[1])
			}
		}
		for _, arg := range c.args {
			if flag, _, _ := strings.Cut(arg, "="); c.program != "helm" && strings.HasPrefix(flag, "-") && flag != "-" {
				if checked++; !regexp.MustCompile(`(?m)^ +.*` + regexp.QuoteMeta(flag) + `[ ,].*`).MatchString(script) {
					t.Errorf("%s\nthe script has no %s", c.where, flag)
				}
			}
		}
	}
	for _, name := range append(guides(t), "README_CN.md") {
		for _, m := range span.FindAllStringSubmatch(read(t, name), -1) {
			if key := regexp.MustCompile(`^config(\.[A-Za-z]+){2,}`).FindString(m[1]); key != "" && !strings.HasPrefix(key, "config.toml") {
				if checked++; !has(values, strings.Split(key, ".")) {
					t.Errorf("%s: chart/values.yaml has no %s", name, key)
				}
			}
		}
	}
	if checked < 30 {
		t.Errorf("found %d words to check: is the pattern right?", checked)
	}
}

// TestOthersCommandsExist asks the pinned Headscale, helm and, where Kubernetes is built, kubectl whether they know the commands and flags with
// which the documents call them: with --help they parse the line and do nothing.
func TestOthersCommandsExist(t *testing.T) {
	if os.Getenv("HEADCNI_TOOLS") == "" {
		nstest.Skip(t, "HEADCNI_TOOLS names no folder with the pinned programs")
	}
	programs := map[string]string{"headscale": realparts.Tool(t, "headscale"), "helm": realparts.Tool(t, "helm")}
	for _, dir := range filepath.SplitList(os.Getenv("HEADCNI_TOOLS")) {
		if _, err := os.Stat(filepath.Join(dir, "kubectl")); err == nil {
			programs["kubectl"] = filepath.Join(dir, "kubectl")
		}
	}
	tried, seen := map[string]int{}, map[string]bool{}
	number := regexp.MustCompile(`\b(ID|N)$`)
	for _, c := range commands(t, slices.Collect(maps.Keys(programs))...) {
		args := c.args
		if i := slices.Index(args, "--"); i >= 0 {
			args = args[:i] // what kubectl exec runs
		}
		for i := range args {
			args[i] = number.ReplaceAllString(args[i], "1")
		}
		// Not for kubectl itself: our own plug-in.
		line := strings.Join(append([]string{c.program}, args...), " ")
		if len(args) == 0 || args[0] == "headcni" || seen[line] {
			continue
		}
		seen[line] = true
		tried[c.program]++
		cmd := exec.CommandContext(t.Context(), programs[c.program], append(slices.Clone(args), "--help")...)
		cmd.Env = append(os.Environ(), "KUBECONFIG=/dev/null", "HOME="+t.TempDir())
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s\n%v: %s", c.where, err, out[:min(len(out), 300)])
		}
	}
	if tried["headscale"] < 5 || tried["helm"] < 5 {
		t.Errorf("tried %v: is the pattern right?", tried)
	}
}

// TestFindingsAreNamed: docs/troubleshooting.md leads from a symptom to every finding, and to none that does not exist.
func TestFindingsAreNamed(t *testing.T) {
	named := map[string]bool{}
	for _, id := range regexp.MustCompile(`\bHC\d{3}\b`).FindAllString(read(t, "docs/troubleshooting.md"), -1) {
		named[id] = true
	}
	for _, f := range findings.Table {
		if !named[string(f.ID)] {
			t.Errorf("docs/troubleshooting.md does not name %s: %s", f.ID, f.Title)
		}
		delete(named, string(f.ID))
	}
	for _, id := range slices.SortedFunc(maps.Keys(named), cmp.Compare[string]) {
		t.Errorf("docs/troubleshooting.md names %s, which is no finding", id)
	}
	for _, name := range append(guides(t), "README_CN.md") {
		for _, id := range regexp.MustCompile(`\bHC\d{3}\b`).FindAllString(read(t, name), -1) {
			if !slices.ContainsFunc(findings.Table, func(f findings.Finding) bool { return string(f.ID) == id }) {
				t.Errorf("%s names %s, which is no finding", name, id)
			}
		}
	}
}

// TestDemoPrints: what the README shows of the demo is what it prints today, but for the numbers.
func TestDemoPrints(t *testing.T) {
	files, err := filepath.Glob(root + "/cmd/cli/demo*.go")
	if err != nil {
		t.Fatal(err)
	}
	verb := regexp.MustCompile(`%[-+.\d]*[a-z]`)
	var prints []*regexp.Regexp
	for _, file := range append(files, root+"/internal/lab/lab.go") {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			// One that is little more than verbs would match anything.
			if lit, ok := n.(*ast.BasicLit); ok && len(verb.ReplaceAllString(text(lit), "")) > 5 {
				prints = append(prints, regexp.MustCompile("^"+verb.ReplaceAllString(regexp.QuoteMeta(text(lit)), ".+")+`( +[\d.]+ m?s)?$`))
			}
			return true
		})
	}
	shown := 0
	for _, b := range blocks(read(t, "README.md")) {
		if b.Kind != "text" {
			continue
		}
		for line := range strings.Lines(b.Text) {
			line = strings.TrimRight(line, "\n")
			if strings.HasPrefix(line, "       ") || line == "" {
				continue // a table, whose words are values
			}
			shown++
			said := strings.TrimPrefix(strings.TrimPrefix(line, "  "), "ok ")
			if !slices.ContainsFunc(prints, func(re *regexp.Regexp) bool { return re.MatchString(said) }) {
				t.Errorf("README.md shows %q, which the demo does not print", said)
			}
		}
	}
	if shown < 10 {
		t.Errorf("README.md shows %d lines of the demo", shown)
	}
}

// TestKeysTakeTheirValues: where a document says `network.lanIngress: deny`, the daemon takes that value for that key.
func TestKeysTakeTheirValues(t *testing.T) {
	says := regexp.MustCompile(`^(?:config\.)?(\w+(?:\.\w+)+): (\S+)$`)
	checked := 0
	for _, name := range append(guides(t), "CONTRIBUTING.md", "CHANGELOG.md") {
		for _, m := range span.FindAllStringSubmatch(read(t, name), -1) {
			if kv := says.FindStringSubmatch(m[1]); kv != nil && slices.Contains(config.Keys(), kv[1]) {
				checked++
				if _, err := config.Load(root+"/docs/daemon.yaml", false, nil, []string{kv[1] + "=" + kv[2]}); err != nil {
					t.Errorf("%s says `%s`: %v", name, m[1], err)
				}
			}
		}
	}
	if checked < 8 {
		t.Errorf("found %d keys with values: is the pattern right?", checked)
	}
}
