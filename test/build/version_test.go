// Package build holds the Makefile and its scripts: what a version is called, and that a target builds what it runs.
package build

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/version"
)

const repo = "../.."

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// run runs a program in a folder and returns what it prints. Neither the machine's Git configuration nor a Git hook that runs the
// test has a say.
func run(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "GIT_") {
			cmd.Env = append(cmd.Env, e)
		}
	}
	cmd.Env = append(cmd.Env, "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com",
		"GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// TestRelease: the release that is being worked on, or stands here, has one name.
func TestRelease(t *testing.T) {
	var chart struct{ Version, AppVersion string }
	if err := yaml.Unmarshal([]byte(read(t, repo+"/chart/Chart.yaml")), &chart); err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^\d+\.\d+\.\d+$`).MatchString(chart.AppVersion) || chart.Version != chart.AppVersion {
		t.Errorf("chart/Chart.yaml: version %q, appVersion %q, want one release for both", chart.Version, chart.AppVersion)
	}
	if want := chart.AppVersion + "-dev"; version.Version != want {
		t.Errorf("internal/version says %s, want %s, as chart/Chart.yaml has it", version.Version, want)
	}
	if got := run(t, repo, "scripts/version", "--release"); got != chart.AppVersion {
		t.Errorf("scripts/version --release prints %q, want %s", got, chart.AppVersion)
	}
	if !regexp.MustCompile(`(?m)^## \[` + regexp.QuoteMeta(chart.AppVersion) + `\]( - \d{4}-\d\d-\d\d)?$`).MatchString(read(t, repo+"/CHANGELOG.md")) {
		t.Errorf("CHANGELOG.md has no section %s", chart.AppVersion)
	}
	for _, name := range []string{"README.md", "README_CN.md", "docs/install.md"} {
		for _, m := range regexp.MustCompile(`headcni:(\d[\w.]*)`).FindAllStringSubmatch(read(t, filepath.Join(repo, name)), -1) {
			if m[1] != chart.AppVersion {
				t.Errorf("%s names the image %s, want release %s", name, m[0], chart.AppVersion)
			}
		}
	}
}

// TestVersion follows a work tree from an unpacked archive to five commits behind a release.
func TestVersion(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"scripts/version", "chart/Chart.yaml"} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(read(t, filepath.Join(repo, name))), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	release := run(t, dir, "scripts/version", "--release")
	want := func(pattern string) {
		t.Helper()
		got := run(t, dir, "scripts/version")
		if !regexp.MustCompile("^" + strings.ReplaceAll(pattern, "RELEASE", regexp.QuoteMeta(release)) + "$").MatchString(got) {
			t.Errorf("version %s, want %s", got, pattern)
		}
	}
	git := func(args ...string) { t.Helper(); run(t, dir, "git", args...) }
	commit := func() { t.Helper(); git("commit", "-q", "--allow-empty", "-m", "x") }

	want("RELEASE-dev")
	git("init", "-q")
	want("RELEASE-dev") // no commit yet
	git("add", ".")
	commit()
	want(`RELEASE-dev\+[0-9a-f]{7}`)
	git("tag", "nightly")
	want(`RELEASE-dev\+[0-9a-f]{7}`)
	if err := os.WriteFile(filepath.Join(dir, "scripts/version"), []byte(read(t, filepath.Join(dir, "scripts/version"))+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	want(`RELEASE-dev\+[0-9a-f]{7}-dirty`)
	git("checkout", "-q", ".")
	git("tag", "v"+release)
	want("RELEASE")
	commit()
	commit()
	want("RELEASE-2-g[0-9a-f]{7}")
}
