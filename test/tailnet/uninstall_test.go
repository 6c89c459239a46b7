package tailnet

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// usersRoute is one that the user of a host advertises.
const usersRoute = "192.168.99.0/24"

// A host whose user has a tailscaled with a route and settings of their own.
func TestUninstallHost(t *testing.T) {
	l := steady.Enter(t)
	n := l.Nodes[leavingHost]
	if err := n.ConfigureDaemon(nil); err != nil {
		t.Fatal(err)
	}
	labtest.StartTailscaled(t, n)
	labtest.Up(t, l, n, labtest.AuthKey(t, l, "--tags", lab.Tag), "--advertise-routes="+usersRoute)
	labtest.Approve(t, l, n, usersRoute)
	before := hostState(t, n)
	liveAndLeave(t, l, n)
	if got := approved(t, l, n.Name); !slices.Contains(got, netip.MustParsePrefix(usersRoute)) {
		t.Errorf("the user's route is not approved any more; these are: %v", got)
	}
	// tailscaled takes a labtest.Moment to follow its prefs.
	labtest.Eventually(t, "the host after uninstall, - before, + after", func() error { return same(before, hostState(t, n)) })
}

func TestUninstallDaemon(t *testing.T) {
	l := steady.Enter(t)
	n := l.Nodes[leavingDaemon]
	if err := n.ConfigureDaemon(nil); err != nil {
		t.Fatal(err)
	}
	before := hostState(t, n)
	labtest.StartTailscaled(t, n)
	liveAndLeave(t, l, n)
	labtest.Stop(t, n.Tailscaled)
	after := hostState(t, n)
	// tailscaled sets this one and leaves it so. Without marks on packets it changes nothing (ip-sysctl.rst).
	const mark = "/proc/sys/net/ipv4/conf/all/src_valid_mark"
	after[mark] = before[mark]
	// It leaves empty chains.
	const rules = "nft -s list ruleset"
	for _, s := range []map[string]string{before, after} {
		s[rules] = emptyTables(s[rules])
	}
	// The folder of its socket stays, on a tmpfs.
	if after["/run/headcni"] == "drwxr-xr-x run/headcni\n" {
		after["/run/headcni"] = before["/run/headcni"]
	}
	if err := same(before, after); err != nil {
		t.Errorf("the host after uninstall, - before, + after: %v", err)
	}
}

// emptyTables takes away chains without rules, and then tables without chains.
func emptyTables(rules string) string {
	rules = regexp.MustCompile(`(?m)^\tchain \S+ \{\n(\t\ttype .*\n)?\t\}\n\n?`).ReplaceAllString(rules, "")
	return regexp.MustCompile(`(?m)^table .* \{\n\}\n`).ReplaceAllString(rules, "")
}

func same(before, after map[string]string) error {
	if d := cmp.Diff(before, after); d != "" {
		return fmt.Errorf("%s", d)
	}
	return nil
}

func approved(t *testing.T, l *lab.Lab, name string) []netip.Prefix {
	t.Helper()
	for _, node := range headscaleNodes(t, l) {
		if node.Hostname == name {
			return node.Approved
		}
	}
	return nil
}

// liveAndLeave runs the daemon, has a pod, and uninstalls.
func liveAndLeave(t *testing.T, l *lab.Lab, n *lab.Node) {
	t.Helper()
	labtest.StartDaemon(t, n)
	p, err := n.AddPod(labtest.Within(t), "leaving", lab.PodOptions{})
	if err != nil {
		t.Fatal(err)
	}
	far := labtest.AddPod(t, l.Nodes[nodeA], "far-from-"+n.Name, lab.PodOptions{})
	for _, v6 := range []bool{false, true} {
		if err := n.WaitRoute(labtest.Within(t), far.Addr(v6)); err != nil {
			t.Fatal(err)
		}
		labtest.WantTCP(t, "to "+far.Name, p, labtest.Echo(far, v6), p.Addr(v6))
	}
	if err := p.Remove(labtest.Within(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Run(labtest.Within(t), "headcni-daemon", "uninstall"); err == nil || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("uninstall beside a running daemon: %v", err)
	}
	labtest.Stop(t, n.Daemon)
	for range 2 { // the second finds nothing to do
		if _, err := n.Run(labtest.Within(t), "headcni-daemon", "uninstall"); err != nil {
			t.Fatal(err)
		}
	}
}

// hostState is all of a host that we could have changed.
func hostState(t *testing.T, n *lab.Node) map[string]string {
	t.Helper()
	state := map[string]string{}
	for _, cmd := range []string{
		"ip -4 rule", "ip -6 rule", "ip -4 route show table all", "ip -6 route show table all", "nft -s list ruleset",
	} {
		args := strings.Fields(cmd)
		out, err := n.Run(labtest.Within(t), args[0], args[1:]...)
		if err != nil {
			t.Fatal(err)
		}
		state[cmd] = volatile.ReplaceAllString(out, "")
	}
	for _, dir := range []string{"/etc/cni", "/etc/headcni", "/opt/cni", "/var/lib/headcni", "/var/lib/cni", "/run/headcni"} {
		state[dir] = tree(t, n, dir)
	}
	// The lab makes this one, uninstall removes it.
	if dir := "/var/lib/headcni"; state[dir] == "drwxr-xr-x var/lib/headcni\n" {
		state[dir] = ""
	}
	sysctls(t, n, state)
	if n.Tailscaled != nil && n.Tailscaled.Alive() {
		prefs, err := json.MarshalIndent(labtest.Prefs(t, n), "", " ")
		if err != nil {
			t.Fatal(err)
		}
		state["prefs"] = string(prefs)
	}
	return state
}

// volatile are the parts of what ip(8) prints that change by themselves.
// Others join while the test goes on.
var volatile = regexp.MustCompile(` expires \d+sec|(?m)^(100\.64|fd7a:115c:a1e0:)\S+ dev \S+ table 52.*\n`)

// tree lists a folder with modes and link targets.
func tree(t *testing.T, n *lab.Node, dir string) string {
	t.Helper()
	var list strings.Builder
	root := n.Path("/")
	err := filepath.WalkDir(n.Path(dir), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		fmt.Fprintln(&list, info.Mode(), strings.TrimPrefix(path, root))
		return err
	})
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return list.String()
}

// sysctls reads the network's settings.
func sysctls(t *testing.T, n *lab.Node, into map[string]string) {
	t.Helper()
	// /proc/sys/net shows the network namespace of the thread that opens it.
	err := n.Do(func() error {
		return filepath.WalkDir("/proc/sys/net", func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || strings.Contains(path, "nf_conntrack_count") || strings.Contains(path, "nf_conntrack_buckets") {
				return err
			}
			if b, err := os.ReadFile(path); err == nil { // some can only be written
				into[path] = string(b)
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}
