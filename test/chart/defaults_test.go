package chart

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/golden"
)

// TestDefaults: the templates fill in what values.yaml says.
func TestDefaults(t *testing.T) {
	b, err := yaml.Marshal(readValues(t))
	if err != nil {
		t.Fatal(err)
	}
	golden.Check(t, chartDir+"/files/defaults.yaml", "# Written by go test ./test/chart -run Defaults -update; edit values.yaml.\n"+string(b))
}

// TestEveryTemplateFillsIn: they share the values, but nobody has to know in which order Helm comes to them.
func TestEveryTemplateFillsIn(t *testing.T) {
	var files []string
	for _, pattern := range []string{"*.yaml", "*/*.yaml", "*.txt"} {
		found, err := filepath.Glob(filepath.Join(chartDir, "templates", pattern))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil || !strings.HasPrefix(string(text), "{{- include \"headcni.defaults\" . -}}\n") {
			t.Errorf("%s does not begin by filling in the defaults: %v", file, err)
		}
	}
	if len(files) < 10 {
		t.Errorf("only %d templates", len(files))
	}
}

// blocks are the maps of values that are not a user's own, by their paths, and those that are, as a whole.
func blocks(values map[string]any, at string) (paths []string) {
	for _, key := range slices.Sorted(maps.Keys(values)) {
		if inner, ok := values[key].(map[string]any); ok {
			path := strings.TrimPrefix(at+"."+key, ".")
			if paths = append(paths, path); !isFree(path) {
				paths = append(paths, blocks(inner, path)...)
			}
		}
	}
	return paths
}

// without takes a block out of values.
func without(values map[string]any, path string) map[string]any {
	key, rest, inner := strings.Cut(path, ".")
	if inner {
		without(values[key].(map[string]any), rest)
	} else {
		delete(values, key)
	}
	return values
}

// older copies the chart and gives it other values: those of an older chart, as `helm upgrade --reuse-values` does.
func older(t *testing.T, values map[string]any) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(chartDir)); err != nil {
		t.Fatal(err)
	}
	b, err := yaml.Marshal(values)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "values.yaml"), b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestMissingValues: a block that is null, or missing, is the default; so is everything at once.
func TestMissingValues(t *testing.T) {
	given := cases[0].args
	want := renderChart(t, chartDir, given...)
	same := func(t *testing.T, chart string, args ...string) {
		t.Helper()
		if diff := cmp.Diff(want, renderChart(t, chart, args...)); diff != "" {
			t.Errorf("(-default +got): %s", diff)
		}
	}
	paths := blocks(readValues(t), "")
	if len(paths) < 32 {
		t.Errorf("only %d blocks", len(paths))
	}
	nulls := map[string]any{}
	for _, path := range paths {
		nulls[strings.Split(path, ".")[0]] = nil
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			same(t, older(t, without(readValues(t), path)), given...)
			if !slices.ContainsFunc(given, func(arg string) bool { return strings.HasPrefix(arg, path+".") }) { // or it is not null
				same(t, chartDir, slices.Concat(given, []string{"--set", path + "=null"})...)
			}
		})
	}
	for name, values := range map[string]map[string]any{"all missing": {}, "all null": nulls} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			same(t, older(t, values), given...)
		})
	}
}

// TestTakenOut: what a user has taken out of a map of his own keys stays out.
func TestTakenOut(t *testing.T) {
	for set, gone := range map[string]string{
		"security.seLinuxOptions.type=null": "seLinuxOptions", "security.appArmorProfile.type=null": "appArmorProfile: {",
		"daemon.resources.requests=null,tailscaled.resources.requests=null,controller.resources.requests=null":                 "requests:",
		"monitoring.dashboard.enabled=true,monitoring.dashboard.labels.grafana_dashboard=null,monitoring.dashboard.labels.x=y": "grafana_dashboard:",
		"admissionPolicy.enabled=false": "ValidatingAdmissionPolicy",
	} {
		out := renderChart(t, chartDir, slices.Concat(cases[0].args, []string{"--set", set})...)
		if strings.Contains(out, gone) {
			t.Errorf("%s: %s is there", set, gone)
		}
	}
	if out := renderChart(t, chartDir, cases[0].args...); !strings.Contains(out, "seLinuxOptions") || !strings.Contains(out, "appArmorProfile: {") ||
		!strings.Contains(out, "requests:") || !strings.Contains(out, "ValidatingAdmissionPolicy") {
		t.Errorf("the default lacks what is to be taken out:\n%s", out)
	}
}
