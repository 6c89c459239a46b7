// Package image holds the Dockerfile, which needs an engine that the tests do not have, to the image that `make image`
// makes without one.
package image

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const repo = "../.."

// instruction is one of a Dockerfile.
type instruction struct{ word, rest string }

func dockerfile(t *testing.T) []instruction {
	t.Helper()
	f, err := os.Open(filepath.Join(repo, "Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var all []instruction
	for sc := bufio.NewScanner(f); sc.Scan(); {
		line := strings.TrimSpace(sc.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		word, rest, _ := strings.Cut(line, " ")
		all = append(all, instruction{word, strings.TrimSpace(rest)})
	}
	return all
}

// last is the stage that becomes the image.
func last(all []instruction) []instruction {
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].word == "FROM" {
			return all[i:]
		}
	}
	return nil
}

// flagsOf says what a stage tells the image to run, as flags of test/tools/oci.
func flagsOf(t *testing.T, stage []instruction, args map[string]string) []string {
	t.Helper()
	var flags []string
	for _, in := range stage {
		rest := os.Expand(in.rest, func(name string) string { return args[name] })
		switch in.word {
		case "ENTRYPOINT", "CMD":
			var words []string
			if err := json.Unmarshal([]byte(rest), &words); err != nil {
				t.Fatalf("%s %s: not a list of words: %v", in.word, rest, err)
			}
			for _, w := range words {
				flags = append(flags, "--"+strings.ToLower(in.word)+" "+w)
			}
		case "ENV":
			flags = append(flags, "--env "+rest)
		case "LABEL":
			flags = append(flags, "--label "+strings.ReplaceAll(rest, `"`, ""))
		case "USER", "WORKDIR", "EXPOSE", "VOLUME":
			t.Errorf("%s is in the Dockerfile and not in scripts/image", in.word)
		}
	}
	slices.Sort(flags)
	return flags
}

func TestDockerfileTellsTheImageTheSame(t *testing.T) {
	cmd := exec.Command(filepath.Join(repo, "scripts/image"), "--config")
	cmd.Env = append(os.Environ(), "VERSION=v1.2.3", "REVISION=abcdef")
	cmd.Stderr = t.Output()
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Split(strings.TrimSpace(string(out)), "\n")
	slices.Sort(want)
	got := flagsOf(t, last(dockerfile(t)), map[string]string{"VERSION": "v1.2.3", "REVISION": "abcdef"})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("scripts/image (-) and Dockerfile (+):\n%s", diff)
	}
}

// The content must come from the one script, and nothing of the base image may get into the result.
func TestDockerfileTakesTheContentOfTheScript(t *testing.T) {
	var content []string
	for _, in := range last(dockerfile(t)) {
		switch in.word {
		case "FROM", "COPY", "ADD", "RUN":
			content = append(content, in.word+" "+in.rest)
		}
	}
	want := []string{"FROM scratch", "COPY --from=build /rootfs/system/ /", "COPY --from=build /rootfs/programs/ /"}
	if diff := cmp.Diff(want, content); diff != "" {
		t.Errorf("the last stage (-want +got):\n%s", diff)
	}
	var runs []string
	for _, in := range dockerfile(t) {
		if in.word == "RUN" {
			runs = append(runs, in.rest)
		}
	}
	if len(runs) != 1 || !strings.HasSuffix(runs[0], `scripts/image-rootfs "$TARGETARCH" /rootfs`) {
		t.Errorf("RUN lines: %q; want scripts/image-rootfs alone", runs)
	}
}

func TestDockerfileIsPinned(t *testing.T) {
	gomod, err := os.ReadFile(filepath.Join(repo, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	wants := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindSubmatch(gomod)
	exact := regexp.MustCompile(`golang:(\d+\.\d+)\.\d+-[a-z]+( |$)`)
	from := 0
	for _, in := range dockerfile(t) {
		if in.word != "FROM" || in.rest == "scratch" {
			continue
		}
		from++
		m := exact.FindStringSubmatch(in.rest)
		if m == nil {
			t.Fatalf("FROM %s: want a base image with an exact version", in.rest)
		}
		if m[1] != string(wants[1]) {
			t.Errorf("FROM %s, but go.mod is for Go %s", in.rest, wants[1])
		}
	}
	if from == 0 {
		t.Error("no base image found: is the Dockerfile read right?")
	}
}

// Both architectures have the same packages, but for their architecture.
func TestPackagesArePinned(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(repo, "scripts/image-packages"))
	if err != nil {
		t.Fatal(err)
	}
	versions := map[string]map[string]string{"amd64": {}, "arm64": {}}
	line := regexp.MustCompile(`^(amd64|arm64) ([a-z0-9.+-]+) (\S+) [0-9a-f]{64}$`)
	for s := range strings.Lines(string(b)) {
		s = strings.TrimSpace(s)
		if s[0] == '#' {
			continue
		}
		m := line.FindStringSubmatch(s)
		if m == nil {
			t.Fatalf("not a pin: %s", s)
		}
		versions[m[1]][m[2]] = m[3]
	}
	if versions["amd64"]["nftables"] == "" || versions["amd64"]["iptables"] == "" {
		t.Errorf("nftables or iptables is missing: %v", versions["amd64"])
	}
	if diff := cmp.Diff(versions["amd64"], versions["arm64"]); diff != "" {
		t.Errorf("amd64 (-) and arm64 (+):\n%s", diff)
	}
}
