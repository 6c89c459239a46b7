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
	"github.com/headcni/headcni/pkg/findings"
)

// TestConnectivity tries the cluster by `headcnictl connectivity test`: healthy; with a node's tailscaled held; interrupted; killed; without rights.
func TestConnectivity(t *testing.T) {
	w := start(t, cluster.Options{Workers: 2, ProxyMode: *proxyMode})
	ctl := filepath.Join(w.Dir, "headcnictl")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", ctl, "../../cmd/cli").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	run := func(kubeconfig string, args ...string) (out, stderr, code string) {
		t.Helper()
		errors := filepath.Join(w.Dir, "stderr")
		command := fmt.Sprintf("code=0; KUBECONFIG=%s %s connectivity test %s 2>%s || code=$?; echo exit $code", kubeconfig, ctl, strings.Join(args, " "), errors)
		out, err := w.Control.Run(within(t, 5*time.Minute), "sh", "-c", command)
		if err != nil {
			t.Fatal(err)
		}
		stderr, err = w.Control.Run(within(t, time.Minute), "cat", errors)
		if err != nil {
			t.Fatal(err)
		}
		i := strings.LastIndex(out, "exit ")
		out, code = out[:i], strings.TrimSpace(out[i+len("exit "):])
		t.Logf("headcnictl connectivity test %s: exit code %s\n%s%s", strings.Join(args, " "), code, stderr, out)
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

	w.interrupted(t, admin, ctl, syscall.SIGINT)
	gone("after Ctrl-C")
	w.interrupted(t, admin, ctl, syscall.SIGKILL)
	// It takes away what the killed one has left, and names the pairs.
	held := w.Workers()[1]
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
}

// interrupted ends a test when its pods are there.
func (w *world) interrupted(t *testing.T, kubeconfig, ctl string, sig syscall.Signal) {
	t.Helper()
	p, err := w.Control.Start(ctl, []string{"KUBECONFIG=" + kubeconfig}, "connectivity", "test")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "test pods", time.Minute, func(ctx context.Context) error {
		out, err := w.Kubectl(ctx, "get", "pods", "-n", connectivity.Namespace, "-o", "name")
		if err == nil && strings.Count(out, "pod/") < 6 {
			err = fmt.Errorf("there are %q", out)
		}
		return err
	})
	if err := p.Signal(sig); err != nil {
		t.Error(err)
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
