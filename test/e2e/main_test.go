// Package e2e runs the chart, with the image that `make image` makes, on a real Kubernetes on this machine (see
// internal/cluster): its nodes become ready by HeadCNI only.
package e2e

import (
	"context"
	_ "embed" // testdata
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/cluster"
	"github.com/headcni/headcni/internal/nstest"
)

const (
	// imageEnv holds the path of the tar file that `make image` writes.
	imageEnv  = "HEADCNI_IMAGE"
	namespace = cluster.Namespace
	echoes    = "e2e" // the namespace of the pods that answer
)

var (
	conformance   = flag.String("conformance", "", "run upstream's tests with this focus too, such as '\\[sig-network\\].*\\[Conformance\\]'")
	skip          = flag.String("skip", "", "leave out those of -conformance's tests that this matches")
	policies      = flag.Bool("policies", false, "TestSmoke runs some of upstream's tests of NetworkPolicies too")
	netpol        = flag.String("netpol", `\[sig-network\] Netpol`, "the focus of TestNetpol's tests of upstream's")
	proxyMode     = flag.String("proxy-mode", cluster.ModeNFTables, "kube-proxy's mode, nftables or iptables")
	noClusterCIDR = flag.Bool("no-cluster-cidr", false, "run kube-proxy without --cluster-cidr")
	versions      = flag.String("versions", "", "fail unless this matches what every node says that it runs, such as 'kubelet v1.37.2, containerd://2.4.2'")
	artifacts     = flag.String("logs", "", "copy all logs into this folder at the end")
)

//go:embed testdata/echo.yaml
var echoManifest string

func TestMain(m *testing.M) { nstest.Main(m) }

// world is the cluster of a test and what runs on it.
type world struct {
	*cluster.Cluster
	chart cluster.Chart
	// echo and host are a pod of each node, by the node's name: one with an address of its own, one with the host's.
	echo, host map[string]*corev1.Pod
}

// start starts a cluster that ends with the test, with our image on its nodes.
func start(t *testing.T, opt cluster.Options) *world {
	t.Helper()
	nstest.Require(t)
	image := os.Getenv(imageEnv)
	if image == "" {
		nstest.Skip(t, imageEnv+" is not set; run `make e2e`")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	opt.Step = func(what string, at time.Duration) { t.Logf("%6.1f s  %s", at.Seconds(), what) }
	c, err := cluster.Start(ctx, opt)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Cluster: c, chart: cluster.Chart{Dir: "../../chart", Image: image}}
	t.Cleanup(func() {
		if t.Failed() {
			w.explain(t)
		}
		w.keepLogs(t)
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	if err := c.ImportImage(ctx, image); err != nil {
		t.Fatal(err)
	}
	w.checkVersions(t)
	return w
}

// checkVersions says what the cluster is made of, which must be what was asked for.
func (w *world) checkVersions(t *testing.T) {
	t.Helper()
	for _, n := range w.Nodes {
		o, err := n.Object(within(t, time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		got := fmt.Sprintf("kubelet %s, %s", o.Status.NodeInfo.KubeletVersion, o.Status.NodeInfo.ContainerRuntimeVersion)
		t.Logf("%s: %s", n.Name, got)
		if ok, err := regexp.MatchString(*versions, got); err != nil || !ok {
			t.Fatalf("want %q (%v)", *versions, err)
		}
	}
}

// explain shows what the cluster says of itself.
func (w *world) explain(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	for _, args := range [][]string{
		{"get", "nodes,pods", "-A", "-o", "wide"},
		{"get", "events", "-A", "--field-selector=type!=Normal"},
		{"logs", "-n", namespace, "deployment/headcni-controller", "--tail=20", "--all-pods", "--prefix"},
		{"logs", "-n", namespace, "daemonset/headcni", "--tail=20", "--all-pods", "--all-containers", "--prefix"},
		{"logs", "-n", namespace, "daemonset/headcni-tailscaled", "--tail=20", "--all-pods", "--prefix"},
	} {
		out, err := w.Kubectl(ctx, args...)
		t.Logf("--- kubectl %s\n%s", strings.Join(args, " "), out)
		if err != nil {
			t.Log(err)
		}
	}
}

// keepLogs copies the logs of all programs and pods, if that was asked for.
func (w *world) keepLogs(t *testing.T) {
	if *artifacts == "" {
		return
	}
	pods, _ := filepath.Glob(filepath.Join(w.Dir, "*", "disk", "var", "log", "pods", "*", "*", "*.log")) // the pattern is well-formed
	for _, path := range append(w.Logs(), pods...) {
		name, err := filepath.Rel(w.Dir, path)
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err == nil {
			to := filepath.Join(*artifacts, strings.Replace(name, "disk/var/log/pods", "pods", 1))
			if err = os.MkdirAll(filepath.Dir(to), 0o755); err == nil {
				err = os.WriteFile(to, text, 0o644)
			}
		}
		if err != nil {
			t.Error(err)
		}
	}
}

// within is a context that ends after d.
func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, fmt.Errorf("not within %v", d))
	t.Cleanup(cancel)
	return ctx
}

// kubectl runs kubectl, which must succeed.
func (w *world) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := w.Kubectl(within(t, 2*time.Minute), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// apply has a manifest applied.
func (w *world) apply(t *testing.T, name, manifest string) {
	t.Helper()
	path := filepath.Join(w.Dir, name)
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(manifest, "AGNHOST", w.Agnhost)), 0o600); err != nil {
		t.Fatal(err)
	}
	w.kubectl(t, "apply", "--server-side", "-f", path)
}

// install installs the chart as a user would.
func (w *world) install(t *testing.T, values map[string]any) {
	t.Helper()
	w.chart.Values = values
	if err := w.Install(within(t, time.Minute), w.chart); err != nil {
		t.Fatal(err)
	}
}

// uninstall takes HeadCNI away.
func (w *world) uninstall(t *testing.T) {
	t.Helper()
	if out, err := w.Helm(within(t, 4*time.Minute), "uninstall", cluster.Release, "--namespace="+namespace, "--timeout=3m"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// tailnet maps the names of the nodes in Headscale to their numbers, which begin at 1.
func (w *world) tailnet(t *testing.T) map[string]int {
	t.Helper()
	out, err := w.Control.Run(within(t, time.Minute), "headscale", "nodes", "list", "--output", "json")
	if err != nil {
		t.Fatal(err)
	}
	var list []struct {
		ID   int    `json:"id"`
		Name string `json:"given_name"`
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	ids := map[string]int{}
	for _, n := range list {
		ids[n.Name] = n.ID
	}
	return ids
}

// findPods looks the echo pods up, all of which must be ready, one on each node.
func (w *world) findPods(ctx context.Context) error {
	found := map[string]map[string]*corev1.Pod{"echo": {}, "host": {}}
	pods, err := w.Client.CoreV1().Pods(echoes).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for i := range pods.Items {
		p := &pods.Items[i]
		if !isReady(p) {
			return fmt.Errorf("pod %s on %s is not ready (%s)", p.Name, p.Spec.NodeName, p.Status.Phase)
		}
		if m := found[p.Labels["app"]]; m != nil {
			m[p.Spec.NodeName] = p
		}
	}
	for app, m := range found {
		if len(m) != len(w.Nodes) {
			return fmt.Errorf("%d of %d pods %s", len(m), len(w.Nodes), app)
		}
	}
	w.echo, w.host = found["echo"], found["host"]
	return nil
}

func isReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// eventually waits until try succeeds.
func eventually(t *testing.T, what string, limit time.Duration, try func(context.Context) error) {
	t.Helper()
	ctx := within(t, limit)
	for {
		err := try(ctx)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: %v: %v", what, context.Cause(ctx), err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
