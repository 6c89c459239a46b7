package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/cluster"
)

// nodeGrace is long enough for a kubelet to register its Node again.
const nodeGrace = 45 * time.Second

// otherConflist is what another CNI that is gone may leave behind. A runtime that reads it has no network for pods.
const (
	otherPath     = "/etc/cni/net.d/05-other.conflist"
	otherConflist = `{"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "gone"}]}`
)

// TestWarnings sees what is said where something is not as somebody may think: a node that uses another CNI, a Node that is gone.
func TestWarnings(t *testing.T) {
	w := start(t, cluster.Options{ProxyMode: *proxyMode})
	if err := os.WriteFile(w.Workers()[0].Path(otherPath), []byte(otherConflist), 0o600); err != nil {
		t.Fatal(err)
	}
	w.apply(t, "echo.yaml", echoManifest)
	w.install(t, warningValues(false))
	for _, test := range []struct {
		name string
		run  func(*testing.T, *world)
	}{
		{"OtherCNI", testOtherCNI},
		{"StaleNode", testStaleNode},
		{"OtherCNIIsBack", testOtherCNIIsBack},
	} {
		if !t.Run(test.name, func(t *testing.T) { test.run(t, w) }) {
			return // each goes on from the one before
		}
	}
}

func warningValues(exclusive bool) map[string]any {
	return map[string]any{"config": map[string]any{
		"cni":        map[string]any{"exclusive": exclusive},
		"kubernetes": map[string]any{"nodeGrace": nodeGrace.String()},
	}}
}

// warned waits for a warning of a part on a node whose note holds text.
func (w *world) warned(t *testing.T, n *cluster.Node, part, text string) {
	t.Helper()
	eventually(t, "an event on "+n.Name, time.Minute, func(ctx context.Context) error {
		events, err := w.Client.EventsV1().Events(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if e.Regarding.Name == n.Name && e.Type == corev1.EventTypeWarning && e.Action == part && strings.Contains(e.Note, text) {
				return nil
			}
		}
		return fmt.Errorf("no event %s with %q among %d", part, text, len(events.Items))
	})
}

// vouched tells whether the Node says that its network is there.
func vouched(ctx context.Context, n *cluster.Node) error {
	o, err := n.Object(ctx)
	if err != nil {
		return err
	}
	for _, c := range o.Status.Conditions {
		if c.Type == corev1.NodeNetworkUnavailable && c.Status == corev1.ConditionFalse {
			return nil
		}
	}
	return fmt.Errorf("%s has no condition NetworkUnavailable=False", n.Name)
}

// testOtherCNI: as long as a node's runtime reads another configuration before ours, its daemon is not ready and does not
// vouch for the network; cni.exclusive takes that one away.
func testOtherCNI(t *testing.T, w *world) {
	n := w.Workers()[0]
	w.warned(t, n, "conflist", "05-other.conflist; uninstall the other CNI and remove the file, or set cni.exclusive: true")
	for _, other := range []*cluster.Node{w.Nodes[0], w.Nodes[2]} {
		eventually(t, "the network of the others", time.Minute, func(ctx context.Context) error { return vouched(ctx, other) })
	}
	if vouched(within(t, time.Minute), n) == nil {
		t.Error("the Node says that its network is there")
	}
	pods, err := w.Client.CoreV1().Pods(namespace).List(within(t, time.Minute), metav1.ListOptions{
		LabelSelector: "app.kubernetes.io/component=daemon", FieldSelector: "spec.nodeName=" + n.Name,
	})
	if err != nil || len(pods.Items) != 1 || isReady(&pods.Items[0]) {
		t.Errorf("%d daemons on %s, %v; want one that is not ready", len(pods.Items), n.Name, err)
	}
	w.install(t, warningValues(true))
	eventually(t, "pods", 2*time.Minute, w.findPods)
	eventually(t, "the network", time.Minute, func(ctx context.Context) error { return vouched(ctx, n) })
	if _, err := os.Stat(n.Path(otherPath)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the other CNI's configuration: %v", err)
	}
	testPodToPod(t, w)
}

// testStaleNode: a Node that is gone for longer than the grace period takes its node in Headscale with it; one that is back
// before keeps it. One that is back later joins anew.
func testStaleNode(t *testing.T, w *world) {
	dead, back := w.Workers()[0], w.Workers()[1]
	before := w.tailnet(t)
	w.kubectl(t, "delete", "node", back.Name)
	if err := back.RestartKubelet(); err != nil {
		t.Fatal(err)
	}
	if err := dead.Kill(); err != nil {
		t.Fatal(err)
	}
	w.kubectl(t, "delete", "node", dead.Name)
	gone := time.Now()
	eventually(t, "the dead node's place in Headscale goes", nodeGrace+3*time.Minute, func(context.Context) error {
		if w.tailnet(t)[dead.Name] != 0 {
			return errors.New("it is there")
		}
		return nil
	})
	if took := time.Since(gone); took < nodeGrace {
		t.Errorf("it went after %v, want %v at least", took, nodeGrace)
	}
	if now := w.tailnet(t); now[back.Name] != before[back.Name] || now[cluster.ControlPlane] != before[cluster.ControlPlane] {
		t.Errorf("nodes in Headscale were %v and are %v", before, now)
	}
	if err := dead.Boot(within(t, 2*time.Minute)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)
	// Their Nodes are new and may have other ranges now.
	w.kubectl(t, "delete", "pods", "-n", echoes, "-l", "app=echo", "--now")
	eventually(t, "pods", 2*time.Minute, w.findPods)
	testPodToPod(t, w)
	if now := w.tailnet(t); now[dead.Name] == 0 || now[dead.Name] == before[dead.Name] {
		t.Errorf("nodes in Headscale were %v and are %v", before, now)
	}
}

// testOtherCNIIsBack: uninstalling gives the other CNI its configuration back. The plugins go, though containerd's pods are still there and
// in libcni's cache, but not from a node where such a pod is in multus's.
func testOtherCNIIsBack(t *testing.T, w *world) {
	without, with := w.Workers()[0], w.Workers()[1]
	for _, n := range []*cluster.Node{without, with} {
		if _, err := n.Run(within(t, time.Minute), "bash", "-c", "grep -l headcni /var/lib/cni/results/*"); err != nil {
			t.Fatalf("libcni's cache on %s knows no pod of ours: this test cannot fail: %v", n.Name, err)
		}
	}
	if _, err := with.Run(within(t, time.Minute), "bash", "-c", "mkdir -p /var/lib/cni/multus/results && cp /var/lib/cni/results/* /var/lib/cni/multus/results"); err != nil {
		t.Fatal(err)
	}
	w.uninstall(t)
	if b, err := os.ReadFile(without.Path(otherPath)); err != nil || string(b) != otherConflist {
		t.Errorf("the other CNI's configuration: %q, %v", b, err)
	}
	for n, stay := range map[*cluster.Node]bool{without: false, with: true} {
		if _, err := os.Stat(n.Path("/opt/cni/bin/headcni")); (err == nil) != stay {
			t.Errorf("on %s the plugin is there: %t (%v), want %t", n.Name, err == nil, err, stay)
		}
	}
}
