package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/cluster"
)

// suite is a part of upstream's own tests.
type suite struct {
	// focus and skip are regular expressions of their names; an empty skip leaves nothing out.
	focus, skip string
	// procs is how many run at once.
	procs int
	limit time.Duration
}

// testConformance runs upstream's own tests, in parallel.
func testConformance(t *testing.T, w *world) {
	if *conformance != "" {
		w.upstream(t, suite{focus: *conformance, skip: *skip, procs: 6, limit: 40 * time.Minute})
	}
}

// somePolicies are a part of upstream's tests of NetworkPolicies, in some minutes, in which every kind of rule comes up: both
// directions, all three kinds of peers, ports by number and by name, UDP, stacked policies, and changes of policies and labels.
const somePolicies = `Netpol NetworkPolicy.*(` +
	`support a 'default-deny-all' policy|` +
	`policy based on PodSelector and NamespaceSelector|` +
	`updated (policy|namespace)|` +
	`access to updated pod|` +
	`egress access on one named port|` +
	`except clause while egress access|` +
	`specifies only UDP|` +
	`Ingress, Egress specified together|` +
	`overlapping podSelectors)|Netpol.*UDP should enforce policy based on Ports`

// testPolicies runs a part of upstream's tests of NetworkPolicies.
func testPolicies(t *testing.T, w *world) {
	if *policies {
		w.policies(t, somePolicies)
	}
}

// TestNetpol runs upstream's tests of NetworkPolicies, those that -netpol chooses, in each of kube-proxy's modes.
func TestNetpol(t *testing.T) {
	for _, mode := range []string{cluster.ModeNFTables, cluster.ModeIPTables} {
		t.Run(mode, func(t *testing.T) {
			w := start(t, cluster.Options{ProxyMode: mode, NoClusterCIDR: *noClusterCIDR})
			w.apply(t, "echo.yaml", echoManifest)
			w.install(t, nil)
			eventually(t, "nodes", 2*time.Minute, w.WaitReady)
			eventually(t, "pods", 2*time.Minute, w.findPods)
			w.firstPing(t)
			w.policies(t, *netpol)
		})
	}
}

// policies runs upstream's tests of NetworkPolicies. Each starts pods, and a process for each question from one to another: many at
// once would time out on two processors.
func (w *world) policies(t *testing.T, focus string) {
	t.Helper()
	s := suite{focus: focus, procs: 4, limit: 40 * time.Minute}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	switch {
	case err == nil:
		err = unix.Close(fd)
	case errors.Is(err, syscall.EPROTONOSUPPORT):
		s.skip, err = `Feature:SCTPConnectivity`, nil
		t.Log("this kernel has no SCTP: what upstream marks as [Feature:SCTPConnectivity] is left out")
	}
	if err != nil {
		t.Fatal(err)
	}
	w.upstream(t, s)
}

// upstream runs upstream's own tests from the control host. All that it chooses must pass, and there must be some.
func (w *world) upstream(t *testing.T, s suite) {
	t.Helper()
	path, err := w.Control.Run(within(t, 10*time.Second), "bash", "-c", "type -P e2e.test")
	if err != nil {
		t.Fatalf("e2e.test: %v; build it with test/tools/ensure kubernetes-e2e", err)
	}
	ginkgo := func(limit time.Duration, flags ...string) (string, error) {
		// e2e.test leaves files in its temporary folder.
		args := append([]string{"TMPDIR=" + t.TempDir(), "ginkgo", "--no-color", "--focus=" + s.focus}, flags...)
		if s.skip != "" {
			args = append(args, "--skip="+s.skip)
		}
		args = append(args, strings.TrimSpace(path), "--", "--kubeconfig="+w.Kubeconfig(), "--provider=skeleton")
		return w.Control.Run(within(t, limit), "env", args...)
	}
	out, err := ginkgo(time.Minute, "--dry-run")
	if err != nil {
		t.Fatalf("which tests there are: %v\n%s", err, out)
	}
	want := passed(out)
	began := time.Now()
	out, err = ginkgo(s.limit, "--procs="+strconv.Itoa(s.procs), "--timeout="+(s.limit-time.Minute).String())
	if *artifacts != "" {
		if err := os.WriteFile(filepath.Join(*artifacts, "upstream.log"), []byte(out), 0o600); err != nil {
			t.Error(err)
		}
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	for _, line := range lines {
		if strings.Contains(line, "[FAIL]") {
			t.Log(line)
		}
	}
	t.Logf("%d of %d of upstream's tests passed in %.0f s", passed(out), want, time.Since(began).Seconds())
	if err != nil || want == 0 || passed(out) != want {
		t.Errorf("%v\n%s", err, strings.Join(lines[max(0, len(lines)-300):], "\n"))
	}
}

var passedCount = regexp.MustCompile(`(\d+) Passed`)

// passed reads how many tests have passed in what ginkgo prints.
func passed(out string) int {
	n := 0
	if found := passedCount.FindStringSubmatch(out); found != nil {
		n, _ = strconv.Atoi(found[1]) // digits
	}
	return n
}
