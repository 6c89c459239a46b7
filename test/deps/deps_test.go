// Package deps holds the direction of imports: cmd, then plugin, daemon and controller, then one concern a package, then
// configuration and logging. Packages of one level do not know each other.
package deps

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/headcni/headcni/"

// level orders the packages; one imports only from below, or from within its own folder.
var level = map[string]int{
	"internal/atomicfile": 0,
	"internal/filelock":   0,
	"internal/jsonobj":    0,
	"internal/jsonw":      0,
	"internal/nearest":    0,
	"internal/printable":  0,
	"internal/inetsum":    0,
	"internal/netset":     0,
	"internal/nfcmd":      0,
	"internal/nlwatch":    0,
	"internal/procfs":     0,
	"internal/rtnl":       0,
	// The chart's files alone.
	"chart":             0,
	"internal/trusted":  -1, // even files are written by it
	"internal/version":  0,
	"internal/pidlock":  1,
	"internal/nfnl":     1,
	"internal/sockdiag": 0,
	"internal/unixsock": 1,

	// What can be wrong, which every package may say.
	"pkg/findings": 0,

	"internal/program": 1,
	"internal/sysctl":  1,
	"pkg/config":       1,

	"internal/cnimain": 2,
	"pkg/logging":      2,
	"pkg/reconcile":    2,
	// Records of finished commands: a type that more than one package speaks.
	"pkg/cmdlog": 2,

	"pkg/dns":                   3,
	"pkg/headscale":             3,
	"pkg/hostfirewall":          3,
	"pkg/ipam":                  3,
	"pkg/kube":                  3,
	"pkg/monitoring":            3,
	"pkg/networking/antispoof":  3,
	"pkg/networking/conntrack":  3,
	"pkg/networking/deadman":    3,
	"pkg/networking/fastpath":   3,
	"pkg/networking/hostport":   3,
	"pkg/networking/ipvs":       3,
	"pkg/networking/noderoutes": 3,
	"pkg/networking/podlink":    3,
	"pkg/nft":                   3,
	"pkg/nodestatus":            3,
	"pkg/pathmtu":               3,
	"pkg/policy":                3,
	"pkg/serviceroute":          3,
	"pkg/tailscale":             3,
	"pkg/tailscaled":            3,

	// Rooms that several concerns meet in.
	"pkg/conflist":      4,
	"pkg/dns/nodedns":   4,
	"pkg/install":       4,
	"pkg/membership":    4,
	"pkg/policy/nflog":  4,
	"pkg/policy/report": 4,
	"pkg/policy/watch":  4,

	"pkg/doctor":         5,
	"pkg/leases":         5,
	"pkg/policy/agent":   5,
	"pkg/policy/explain": 5,

	"pkg/connectivity":      6,
	"pkg/policy/nodepolicy": 6,
	"pkg/policy/subnets":    6,
	"pkg/rollout":           6,
	"pkg/sysdump":           6,
	"pkg/why":               6,

	"pkg/controller": 7,
	"pkg/daemon":     7,
	"pkg/plugin":     7,

	// The lab starts our programs as processes and needs their configuration and clients only.
	"internal/lab": 7,

	"cmd": 8,
}

// testOnly packages import testing. Nothing that ships may.
var testOnly = []string{"internal/cluster", "internal/daemontest", "internal/golden", "internal/headscaletest", "internal/kubetest", "internal/labtest", "internal/mantest", "internal/nstest", "internal/policytest", "internal/realparts", "test"}

// pkg is what `go list` tells of a package.
type pkg struct {
	ImportPath string
	Imports    []string
}

func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Imports"}, args...)...)
	cmd.Dir = "../.."
	cmd.Stderr = t.Output()
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %s: %v", strings.Join(args, " "), err)
	}
	var pkgs []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

// folder finds the entry of names that holds path, the innermost of several, "" if none does.
func folder(path string, names []string) (found string) {
	for _, name := range names {
		if (path == name || strings.HasPrefix(path, name+"/")) && len(name) > len(found) {
			found = name
		}
	}
	return found
}

func levelled() []string {
	var names []string
	for name := range level {
		names = append(names, name)
	}
	return names
}

func TestImportsPointOneWay(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range list(t, "./...") {
		path := strings.TrimPrefix(p.ImportPath, module)
		if folder(path, testOnly) != "" {
			continue
		}
		from := folder(path, levelled())
		if from == "" {
			t.Errorf("%s has no level: give it one in this test", path)
			continue
		}
		seen[from] = true
		for _, imported := range p.Imports {
			checkImport(t, path, from, imported)
		}
	}
	// Against a test that looks at nothing.
	for _, want := range []string{"cmd", "pkg/daemon", "pkg/plugin", "pkg/nft", "pkg/networking/podlink", "pkg/config"} {
		if !seen[want] {
			t.Errorf("go list did not name %s", want)
		}
	}
}

func checkImport(t *testing.T, path, from, imported string) {
	t.Helper()
	inner, ours := strings.CutPrefix(imported, module)
	if !ours {
		return
	}
	if folder(inner, testOnly) != "" {
		t.Errorf("%s imports %s, which is for tests", path, inner)
		return
	}
	to := folder(inner, levelled())
	if to == "internal/lab" && path != "cmd/cli" {
		t.Errorf("%s imports %s: only tests and headcnictl's demo may", path, inner)
	}
	if to != from && level[to] >= level[from] {
		t.Errorf("%s imports %s: %s may import only what is below it", path, inner, from)
	}
}

// A plugin is started for every pod: what it links is paid for in its start and its size.
func TestPluginsLinkLittle(t *testing.T) {
	forbidden := []string{
		"k8s.io", "sigs.k8s.io", "tailscale.com", "github.com/prometheus", "google.golang.org", "github.com/spf13", "net/http",
		"regexp", "text/template", "github.com/containernetworking/cni/pkg/skel", "github.com/vishvananda",
	}
	for _, main := range []string{"./cmd/headcni", "./cmd/headcni-ipam"} {
		pkgs := list(t, "-deps", main)
		if !slices.ContainsFunc(pkgs, func(p pkg) bool { return p.ImportPath == "github.com/containernetworking/cni/pkg/types" }) {
			t.Errorf("%s does not link the CNI types: is the list right?", main)
		}
		for _, p := range pkgs {
			if folder(p.ImportPath, forbidden) != "" {
				t.Errorf("%s links %s", main, p.ImportPath)
			}
		}
	}
}

// Who asks a node for its status, or of its policies, links a few MB.
func TestAskingLinksLittle(t *testing.T) {
	for _, pkg := range []string{"./pkg/nodestatus", "./pkg/policy/report"} {
		for _, p := range list(t, "-deps", pkg) {
			if folder(p.ImportPath, []string{"k8s.io", "sigs.k8s.io", "tailscale.com", "github.com/prometheus", "github.com/vishvananda"}) != "" {
				t.Errorf("%s links %s", pkg, p.ImportPath)
			}
		}
	}
}

// Of Kubernetes' kinds of objects the programs link those that they use: all of them nearly double the time in which the daemon compiles.
func TestProgramsLinkFewKinds(t *testing.T) {
	allowed := []string{
		"k8s.io/api/apps/v1", "k8s.io/api/coordination/v1", "k8s.io/api/core/v1", "k8s.io/api/events/v1", "k8s.io/api/networking/v1",
	}
	linked := false
	for _, p := range list(t, "-deps", "./cmd/...") {
		if folder(p.ImportPath, []string{"k8s.io/client-go/kubernetes", "k8s.io/client-go/gentype", "k8s.io/client-go/applyconfigurations"}) != "" ||
			strings.HasPrefix(p.ImportPath, "k8s.io/api/") && !slices.Contains(allowed, p.ImportPath) {
			t.Errorf("a program links %s: let pkg/kube's Client have the kind", p.ImportPath)
		}
		linked = linked || p.ImportPath == "k8s.io/api/core/v1"
	}
	if !linked {
		t.Error("no program links k8s.io/api/core/v1: is the list right?")
	}
}

// What Headscale has in common with tailscaled and with our programs is compiled once where all of it, and all that it imports,
// has one version: gVisor, which Headscale links by way of tailscale.com, was compiled twice for a minor version of golang.org/x/sys.
// tailscale.com itself stays as each has it.
func TestToolsShareModules(t *testing.T) {
	headscale, ours := requirements(t, "test/tools/headscale/go.mod"), requirements(t, "go.mod")
	shared := 0
	for path, version := range requirements(t, "test/tools/tailscale/go.mod") {
		if _, both := headscale[path]; !both || !strings.HasPrefix(path, "golang.org/x/") && !slices.Contains(sharedModules, path) {
			continue
		}
		shared++
		if headscale[path] != version {
			t.Errorf("%s: %s in test/tools/headscale/go.mod, %s in test/tools/tailscale/go.mod: make them one (go get %s@VERSION)", path, headscale[path], version, path)
		}
	}
	if shared < 10 {
		t.Errorf("%d modules that Headscale and tailscaled share: is the list right?", shared)
	}
	const protobuf = "google.golang.org/protobuf"
	if headscale[protobuf] == "" || headscale[protobuf] != ours[protobuf] {
		t.Errorf("%s: %q in test/tools/headscale/go.mod, %q in go.mod: make them one (go get)", protobuf, headscale[protobuf], ours[protobuf])
	}
}

// sharedModules, beside golang.org/x/...
var sharedModules = []string{"gvisor.dev/gvisor", "github.com/google/btree", "github.com/klauspost/compress"}

// requirements are the modules of a go.mod with their versions.
func requirements(t *testing.T, file string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../..", file))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^\t(\S+) (v\S+)`).FindAllStringSubmatch(string(b), -1) {
		out[m[1]] = m[2]
	}
	return out
}
