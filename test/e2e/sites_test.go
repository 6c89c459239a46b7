package e2e

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/cluster"
	"github.com/headcni/headcni/internal/lab"
)

// TestSites has the control plane on the internet, a worker behind a router that changes ports and one behind a router that keeps them,
// with equal LANs, as two homes have. Nodes know each other by their tailnet addresses, which is the only way between them. Then what is
// on that way is restarted, one after the other.
func TestSites(t *testing.T) {
	w := start(t, cluster.Options{ProxyMode: *proxyMode, Sites: []lab.Site{{}, {NAT: lab.Hard}, {NAT: lab.Easy}}})
	w.apply(t, "echo.yaml", echoManifest)
	began := time.Now()
	w.install(t, nil)
	w.firstPing(t)
	t.Logf("%6.1f s  from helm install to an answer from pod to pod between the sites", time.Since(began).Seconds())
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)
	eventually(t, "pods", 2*time.Minute, w.findPods)
	for _, n := range w.Nodes {
		o, err := n.Object(within(t, time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		for i, a := range n.Addrs() {
			if got := o.Status.Addresses[i].Address; got != a.String() {
				t.Errorf("Kubernetes knows %s by %s, want %s", n.Name, got, a)
			}
		}
		for _, other := range w.Nodes {
			if _, err := onNode(n)(within(t, 10*time.Second), url(other.Underlay[0], 28080, "/clientip")); err == nil && other != n && other != w.Nodes[0] {
				t.Errorf("%s reaches %s by its LAN", n.Name, other.Name)
			}
		}
	}
	// After each fault: pods reach each other, and the API server each kubelet.
	works := func(t *testing.T) {
		t.Helper()
		w.back(t)
		testPodToPod(t, w)
		testLogs(t, w)
	}
	worker := w.Workers()[0]
	for _, test := range []struct {
		name string
		run  func(*testing.T, *world)
	}{
		{"PodToPod", testPodToPod},
		{"Services", testServices},
		{"Logs", testLogs},
		{"HostPort", testHostPort},
		{"NodeToPod", testNodeToPod},
		// The homes have no IPv6: a host without a route of a family reaches no Service by it, as on any network.
		{"NodeToService", func(t *testing.T, w *world) { testNodeToServiceBy(t, w, 1) }},
		{"PodToAPIServer", testPodToAPIServer},
		{"Webhook", testWebhook},
		{"PortForward", testPortForward},
		{"TailscaledRestart", func(t *testing.T, w *world) {
			if err := worker.Tailscaled.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := worker.StartTailscaled(); err != nil {
				t.Fatal(err)
			}
			works(t)
		}},
		{"RoutersForget", func(t *testing.T, w *world) {
			for _, n := range w.Workers() {
				if err := n.Routers[0].Forget(); err != nil {
					t.Fatal(err)
				}
			}
			works(t)
		}},
		{"WorkerReboot", func(t *testing.T, w *world) {
			if err := worker.Reboot(within(t, 2*time.Minute)); err != nil {
				t.Fatal(err)
			}
			eventually(t, "nodes", 2*time.Minute, w.WaitReady)
			eventually(t, "pods", 3*time.Minute, w.findPods)
			works(t)
		}},
		{"ControlPlaneReboot", func(t *testing.T, w *world) {
			if err := w.Nodes[0].Reboot(within(t, 2*time.Minute)); err != nil {
				t.Fatal(err)
			}
			eventually(t, "nodes", 2*time.Minute, w.WaitReady)
			eventually(t, "pods", 3*time.Minute, w.findPods)
			works(t)
		}},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, w) })
	}
}

// back waits until each pod reaches each other again, and says how long that took.
func (w *world) back(t *testing.T) {
	t.Helper()
	began := time.Now()
	eventually(t, "pods reach each other again", 2*time.Minute, func(ctx context.Context) error {
		// After a reboot the API server still tells of addresses that other pods have by now.
		if err := w.findPods(ctx); err != nil {
			return err
		}
		for _, from := range w.echo {
			for _, to := range w.echo {
				if out, err := w.get(ctx, from, url(addrs(t, to)[0], 8080, "/hostname")); err != nil || strings.TrimSpace(out) != to.Name {
					return fmt.Errorf("from %s to %s: %q, %v", from.Spec.NodeName, to.Spec.NodeName, out, err)
				}
			}
		}
		return nil
	})
	t.Logf("%6.1f s  until all pods reached each other", time.Since(began).Seconds())
}

// testPortForward asks a pod through the API server and its kubelet.
func testPortForward(t *testing.T, w *world) {
	const ask = `kubectl "$@" --address 127.0.0.1 >/tmp/forward-$$ & trap 'kill $!; rm -f /tmp/forward-$$' EXIT
		for _ in $(seq 100); do curl -sS -m5 http://127.0.0.1:28087/hostname 2>/dev/null && exit; sleep 0.1; done; exit 1`
	for _, p := range w.echo {
		out, err := w.Control.Run(within(t, time.Minute), "bash", "-c", ask, "forward", "--kubeconfig="+w.Kubeconfig(), "port-forward", "-n", echoes, p.Name, "28087:8080")
		if err != nil || strings.TrimSpace(out) != p.Name {
			t.Errorf("to %s on %s: %q, %v", p.Name, p.Spec.NodeName, out, err)
		}
	}
}
