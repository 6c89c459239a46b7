package e2e

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/cluster"
	"github.com/headcni/headcni/pkg/connectivity"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/findings"
)

// TestConnectivity tries the cluster by `headcnictl connectivity test`: healthy; with restarts; with a node's tailscaled held; interrupted; killed; without rights.
func TestConnectivity(t *testing.T) {
	w := start(t, cluster.Options{Workers: 2, ProxyMode: *proxyMode})
	ctl := filepath.Join(w.Dir, "headcnictl")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", ctl, "../../cmd/cli").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	command := "test"
	run := func(kubeconfig string, args ...string) (out, stderr, code string) {
		t.Helper()
		errors := filepath.Join(w.Dir, "stderr")
		line := fmt.Sprintf("code=0; KUBECONFIG=%s %s connectivity %s %s 2>%s || code=$?; echo exit $code", kubeconfig, ctl, command, strings.Join(args, " "), errors)
		out, err := w.Control.Run(within(t, 5*time.Minute), "sh", "-c", line)
		if err != nil {
			t.Fatal(err)
		}
		stderr, err = w.Control.Run(within(t, time.Minute), "cat", errors)
		if err != nil {
			t.Fatal(err)
		}
		i := strings.LastIndex(out, "exit ")
		out, code = out[:i], strings.TrimSpace(out[i+len("exit "):])
		t.Logf("headcnictl connectivity %s %s: exit code %s\n%s%s", command, strings.Join(args, " "), code, stderr, out)
		return out, stderr, code
	}
	gone := func(what string) {
		t.Helper()
		if out := w.kubectl(t, "get", "namespace", "--ignore-not-found", "-o", "name", connectivity.Namespace); out != "" {
			t.Errorf("%s: %s is still there", what, strings.TrimSpace(out))
		}
	}
	admin := w.Kubeconfig()
	w.install(t, nil)
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)
	eventually(t, "CoreDNS", 2*time.Minute, func(ctx context.Context) error {
		out, err := w.Kubectl(ctx, "get", "pods", "-n", "kube-system", "-l", "k8s-app=kube-dns", "-o", `jsonpath={.items[0].status.conditions[?(@.type=="Ready")].status}`)
		if err == nil && out != "True" {
			err = fmt.Errorf("its pod's condition Ready is %q", out)
		}
		return err
	})

	out, _, code := run(admin, "-o", "json")
	var r connectivity.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil || code != "0" || !r.OK || r.Nodes != 3 || r.Pairs != 6 || len(r.Families) != 2 {
		t.Fatalf("a healthy cluster: %v, %+v", err, r)
	}
	counted := map[string]int{}
	for _, g := range r.Groups {
		if g.Right != g.Total {
			t.Errorf("%+v", g)
		}
		counted[g.Name] = g.Total
	}
	for name, want := range map[string]int{
		"test pods": 3, "pod to pod": 3 * 3 * 2, "packet sizes": 3 * 3 * 2 * 2, "pod to service": 3 * 2, "DNS": 3 * 2, "node port": 3 * 2 * 2, "host port": 3 * 2 * 2,
		"pod to node": 3 * 2 * 2, "pod to API server": 3,
		// In four steps each pod that asks, its own node's and the next one's by TCP and UDP, and each that answers, the next one's.
		"policy": 4 * 3 * (2*2*2 + 2),
	} {
		if counted[name] != want {
			t.Errorf("%s: %d, want %d", name, counted[name], want)
		}
	}
	gone("after a test")

	if _, stderr, code := run(w.user(t, "looker", "pods/exec")); code != "2" || !strings.Contains(stderr, "the rights to get, create, patch and delete namespaces") {
		t.Errorf("without rights: exit code %s of %s", code, stderr)
	}
	w.kubectl(t, "create", "namespace", connectivity.Namespace)
	if _, stderr, code := run(admin); code != "2" || !strings.Contains(stderr, "is not of a test like this") {
		t.Errorf("a namespace of somebody's: exit code %s of %s", code, stderr)
	}
	w.kubectl(t, "delete", "namespace", connectivity.Namespace)

	held := w.Workers()[1]
	if _, stderr, code := run(w.user(t, "looker", "pods/exec"), "--disrupt", "--yes"); code != "2" || !strings.Contains(stderr, connectivity.DisruptRights+namespace) {
		t.Errorf("restarts without rights: exit code %s of %s", code, stderr)
	}
	if _, stderr, code := run(admin, "--disrupt", "</dev/null"); code != "2" || !strings.Contains(stderr, "Say so by --yes") {
		t.Errorf("restarts without consent: exit code %s of %s", code, stderr)
	}
	out, _, code = run(admin, "-o", "json", "--disrupt="+held.Name, "--yes")
	var restarted connectivity.Report
	if err := json.Unmarshal([]byte(out), &restarted); err != nil || code != "0" || !restarted.OK || len(restarted.Disruptions) != 2 {
		t.Fatalf("with restarts: exit code %s, %v", code, err)
	}
	for _, d := range restarted.Disruptions {
		lost := 0
		for _, f := range d.Flows {
			if lost += f.Lost; !f.Back || f.Sent < 50 {
				t.Errorf("%s: %+v", d.Part, f)
			}
		}
		// Within each of three nodes, between the one and each of the others, and from one of these to the other.
		if len(d.Flows) != (3+4+1)*2 || d.Node != held.Name || d.Part == "tailscaled" && lost == 0 {
			t.Errorf("%s on %s: %d flows, %d lost", d.Part, d.Node, len(d.Flows), lost)
		}
	}
	gone("after restarts")
	before := w.tailscaledPod(t, held.Name)
	w.interruptedWhen(t, "tailscaled is restarted", func(ctx context.Context) error {
		if now := w.tailscaledPod(t, held.Name); now == before {
			return fmt.Errorf("it is still %s", now)
		}
		return nil
	}, admin, syscall.SIGINT, ctl, "connectivity", "test", "--disrupt="+held.Name, "--yes")
	gone("after Ctrl-C in a restart")
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)

	w.interrupted(t, admin, syscall.SIGINT, ctl, "connectivity", "test")
	gone("after Ctrl-C")
	w.interrupted(t, admin, syscall.SIGKILL, ctl, "connectivity", "test")
	// It takes away what the killed one has left, and names the pairs.
	signalTailscaled(t, held, "STOP")
	out, stderr, code := run(admin, "-o", "text")
	signalTailscaled(t, held, "CONT")
	for _, want := range []string{w.Workers()[0].Name + " -> " + held.Name + " (pod to pod)", string(findings.PodToPod), "headcnictl doctor --node " + held.Name} {
		if code != "1" || !strings.Contains(out, want) {
			t.Errorf("with a tailscaled held: exit code %s, want 1 and %q", code, want)
		}
	}
	if !strings.Contains(stderr, "removing what an earlier test has left") {
		t.Errorf("after one that was killed: %s", stderr)
	}
	gone("after a test that found something")
	out, _, code = run(admin, "-o", "junit", "--nodes", w.Workers()[0].Name+","+held.Name)
	var suite struct {
		Tests    int `xml:"tests,attr"`
		Failures int `xml:"failures,attr"`
	}
	if err := xml.Unmarshal([]byte(out), &suite); err != nil || code != "0" || suite.Tests != len(r.Groups) || suite.Failures != 0 {
		t.Errorf("as JUnit, with tailscaled again: exit code %s, %+v, %v", code, suite, err)
	}

	command = "perf"
	out, _, code = run(admin, "-o", "json", "--time", "50s")
	var perf connectivity.PerfReport
	// Each of the nodes with itself, in two families, and with the next one: pods, tailnet and underlay.
	if err := json.Unmarshal([]byte(out), &perf); err != nil || code != "0" || !perf.OK || perf.Nodes != 3 || perf.Pairs != 6 || len(perf.Rows) != 3*2+3*3*2 {
		t.Fatalf("a measurement: %v, %+v", err, perf)
	}
	for _, r := range perf.Rows {
		if r.Times < 1 || r.Error != "" || r.One < 1e6 || r.Eight < 1e6 || r.P50 <= 0 || r.P99 < r.P50 {
			t.Errorf("%+v", r)
		}
		if tunnel := r.From != r.To && r.Way != connectivity.ByUnderlay; tunnel != strings.HasPrefix(r.Path, "direct ") {
			t.Errorf("the path of %+v", r)
		}
	}
	gone("after a measurement")
	if out, _, code := run(admin, "--time", "16s", "--nodes", w.Workers()[0].Name+","+held.Name); code != "0" || !strings.Contains(out, "of what their nodes have by the tailnet") {
		t.Errorf("a measurement as a table: exit code %s of %s", code, out)
	}
	w.interrupted(t, admin, syscall.SIGINT, ctl, "connectivity", "perf")
	gone("after Ctrl-C in a measurement")
}

// interrupted ends a test when its pods are there, and waits for its end.
func (w *world) interrupted(t *testing.T, kubeconfig string, sig syscall.Signal, ctl string, args ...string) {
	t.Helper()
	w.interruptedWhen(t, "test pods", func(ctx context.Context) error {
		out, err := w.Kubectl(ctx, "get", "pods", "-n", connectivity.Namespace, "-o", "name")
		if err == nil && strings.Count(out, "pod/") < 6 {
			err = fmt.Errorf("there are %q", out)
		}
		return err
	}, kubeconfig, sig, ctl, args...)
}

// tailscaledPod is the UID of the one on a node, "" where there is none.
func (w *world) tailscaledPod(t *testing.T, node string) string {
	t.Helper()
	return w.kubectl(t, "get", "pods", "-n", namespace, "-l", doctor.TailscaledLabels, "--field-selector", "spec.nodeName="+node, "-o", "jsonpath={.items[*].metadata.uid}")
}

// interruptedWhen ends it when something is so.
func (w *world) interruptedWhen(t *testing.T, what string, so func(context.Context) error, kubeconfig string, sig syscall.Signal, ctl string, args ...string) {
	t.Helper()
	p, err := w.Control.Start(ctl, []string{"KUBECONFIG=" + kubeconfig}, args...)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, what, 4*time.Minute, so)
	// Signal would give it too little time to clean up.
	if err := syscall.Kill(p.PID(), sig); err != nil {
		t.Error(err)
	}
	select {
	case <-p.Done():
	case <-time.After(4 * time.Minute):
		t.Errorf("%v does not end it: %v", sig, p.Kill())
	}
}

// signalTailscaled stops a node's tailscaled, or lets it go on.
func signalTailscaled(t *testing.T, n *cluster.Node, sig string) {
	t.Helper()
	command := fmt.Sprintf(`for p in /proc/[0-9]*; do c=$(tr '\0' ' ' 2>/dev/null <$p/cmdline) || continue; [[ $c != */tailscaled\ * ]] || { kill -%s ${p#/proc/}; echo did; }; done`, sig)
	if out, err := n.Run(within(t, time.Minute), "bash", "-c", command); err != nil || !strings.Contains(out, "did") {
		t.Fatalf("signal tailscaled: %q %v", out, err)
	}
}
