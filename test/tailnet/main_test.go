package tailnet

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// soon bounds what takes a moment on an idle machine. This one may be busy, and no speed is tested here.
const soon = 2 * time.Minute

const (
	host   = config.ModeHost
	daemon = config.ModeDaemon
)

// Machines of the lab of TestTailnet/steady. The first two are the cluster; the others are left alone until a test
// takes them.
const (
	nodeA = iota
	nodeB
	laptop
	crowded
	hostLocal
	flat
	keyOnly
	faulty
	duplicate
	leavingHost
	leavingDaemon
	steadyNodes
)

// TestTailnet tests on two labs: one in which nothing is broken that others need, and one for faults.
func TestTailnet(t *testing.T) {
	nstest.Require(t)
	bin := programs(t)
	t.Run("steady", func(t *testing.T) {
		t.Parallel()
		modes := make([]string, steadyNodes)
		for i := range modes {
			modes[i] = host
		}
		for _, i := range []int{nodeB, crowded, hostLocal, keyOnly, duplicate, leavingDaemon} {
			modes[i] = daemon
		}
		l := newLab(t, lab.Options{
			Nodes: steadyNodes, Spare: steadyNodes - 2, Modes: modes, Bin: bin, Policy: autoApprove,
			Batch: 500 * time.Millisecond, // Headscale's own default, which changes what nodes get to know and when
		})
		for name, test := range map[string]func(*testing.T, *lab.Lab){
			"traffic": testTraffic, "MTU": testMTU, "crowd": testCrowd, "host-local": testHostLocal, "flat": testFlat,
			"pre-auth key": testPreAuthKey, "bad input": testBadInput, "duplicate CIDR": testDuplicate,
			"uninstall host": testUninstallHost, "uninstall daemon": testUninstallDaemon,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				test(t, l)
			})
		}
	})
	t.Run("faults", func(t *testing.T) {
		t.Parallel()
		testFaults(t, newLab(t, lab.Options{Nodes: 3, Spare: 1, Modes: []string{host, daemon, host}, Bin: bin}))
	})
}

// programs makes a folder with our programs: those of HEADCNI_BIN, else built ones, but with a daemon that has the race
// detector where we have it. It is the one with goroutines that share memory.
func programs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if built := os.Getenv(lab.BinEnv); built != "" {
		files, err := os.ReadDir(built)
		if err != nil {
			t.Fatalf("%s: %v", lab.BinEnv, err)
		}
		for _, f := range files {
			if err := os.Symlink(filepath.Join(built, f.Name()), filepath.Join(dir, f.Name())); err != nil {
				t.Fatal(err)
			}
		}
	} else if err := lab.Build(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := (lab.Options{Bin: dir}).Check(); err != nil {
		nstest.Skip(t, err.Error())
	}
	if raceDetector {
		raced := filepath.Join(t.TempDir(), "headcni-daemon")
		cmd := exec.CommandContext(t.Context(), "go", "build", "-race", "-o", raced, "../../cmd/headcni-daemon")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build headcni-daemon: %v\n%s", err, out)
		}
		if err := os.Rename(raced, filepath.Join(dir, "headcni-daemon")); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// newLab makes a lab that ends with the test, and shows its logs where the test failed.
func newLab(t *testing.T, opt lab.Options) *lab.Lab {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*soon)
	defer cancel()
	l, err := lab.New(ctx, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, path := range l.Logs() {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Error(err)
				continue
			}
			raced := strings.Contains(string(text), "DATA RACE")
			if raced {
				t.Errorf("%s: a data race", path)
			}
			if t.Failed() {
				t.Logf("--- %s\n%s", path, digest(string(text), raced))
				// The whole of it stays with `go test -artifacts`.
				name := filepath.Base(filepath.Dir(path)) + "-" + filepath.Base(path)
				if err := os.WriteFile(filepath.Join(t.ArtifactDir(), name), text, 0o644); err != nil {
					t.Error(err)
				}
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// digest is the end of a log. The dedicated tailscaled, which is talkative, shares one with the daemon.
func digest(text string, all bool) string {
	if all {
		return text
	}
	enough := 500
	if ours := regexp.MustCompile(`(?m)^(time=|headcni-daemon:).*\n`).FindAllString(text, -1); len(ours) > 0 {
		text, enough = strings.Join(ours, ""), 5000
	}
	if len(text) < enough {
		return text
	}
	return "[...]" + text[len(text)-enough:]
}

// tagAuto is the tag whose nodes' routes Headscale approves by itself.
const tagAuto = "tag:auto"

func autoApprove(policy map[string]any) {
	owners := policy["tagOwners"].(map[string]any)
	owners[tagAuto] = owners[lab.Tag]
	routes := map[string]any{}
	for _, c := range lab.ClusterCIDRs {
		routes[c.String()] = []string{tagAuto}
	}
	policy["autoApprovers"] = map[string]any{"routes": routes}
}

// within is a context for what takes a moment.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits until try succeeds.
func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(soon)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// start configures a node that was left alone and starts tailscaled and the daemon. It does not wait for readiness.
func start(t *testing.T, n *lab.Node, change func(*lab.Node, map[string]any)) {
	t.Helper()
	if err := n.ConfigureDaemon(change); err != nil {
		t.Fatal(err)
	}
	startTailscaled(t, n)
	if err := n.StartDaemon(); err != nil {
		t.Fatal(err)
	}
}

func startTailscaled(t *testing.T, n *lab.Node) {
	t.Helper()
	if err := n.StartTailscaled(); err != nil {
		t.Fatal(err)
	}
	if err := n.WaitSocket(within(t)); err != nil {
		t.Fatal(err)
	}
}

func startDaemon(t *testing.T, n *lab.Node) {
	t.Helper()
	if err := n.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	ready(t, n)
}

func ready(t *testing.T, n *lab.Node) {
	t.Helper()
	if err := n.WaitReady(within(t)); err != nil {
		t.Fatal(err)
	}
}

// addPod makes a pod that is removed with the test, unless the test does it.
func addPod(t *testing.T, n *lab.Node, name string, opt lab.PodOptions) *lab.Pod {
	t.Helper()
	p, err := n.AddPod(within(t), name, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), soon)
		defer cancel()
		if _, err := os.Stat(n.Path("/run/netns/" + name)); err != nil {
			return // the test has removed it
		}
		if err := p.Remove(ctx); err != nil {
			t.Errorf("remove %s: %v", name, err)
		}
	})
	return p
}

// section of a daemon.yaml in the making.
func section(c map[string]any, name string) map[string]any {
	if c[name] == nil {
		c[name] = map[string]any{}
	}
	return c[name].(map[string]any)
}

// authKey makes a pre-auth key.
func authKey(t *testing.T, l *lab.Lab, args ...string) string {
	t.Helper()
	out, err := l.Control.Run(within(t), "headscale", append([]string{"preauthkeys", "create", "--expiration", "24h"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return lastWord(t, out)
}

func lastWord(t *testing.T, s string) string {
	t.Helper()
	words := strings.Fields(s)
	if len(words) == 0 {
		t.Fatal("printed nothing")
	}
	return words[len(words)-1]
}

func family(v6 bool) string { return fmt.Sprintf("IPv%d", map[bool]int{false: 4, true: 6}[v6]) }
