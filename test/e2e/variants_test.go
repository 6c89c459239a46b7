package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/cluster"
	"github.com/headcni/headcni/internal/lab"
)

// TestHostTailscaled has a node with a tailscaled of its own among others, and a Kubernetes that gives Nodes no pod CIDRs:
// the controller does.
func TestHostTailscaled(t *testing.T) {
	w := start(t, cluster.Options{HostTailscaled: []string{"worker-1"}, NoPodCIDRs: true, ProxyMode: *proxyMode})
	w.apply(t, "echo.yaml", echoManifest)
	pools := []string{"10.244.0.0/16", "fd00:244::/48"}
	w.install(t, map[string]any{"config": map[string]any{"network": map[string]any{"clusterCIDRs": pools}}})
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)
	eventually(t, "pods", 2*time.Minute, w.findPods)
	for _, n := range w.Nodes {
		o, err := n.Object(within(t, time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		want := "daemon"
		if n.Name == "worker-1" {
			want = "host"
		}
		if got := o.Annotations["headcni.io/mode"]; got != want || len(o.Spec.PodCIDRs) != 2 {
			t.Errorf("%s is in mode %q with %v, want %q and two pod CIDRs", n.Name, got, o.Spec.PodCIDRs, want)
		}
	}
	t.Run("PodToPod", func(t *testing.T) { testPodToPod(t, w) })
	t.Run("Services", func(t *testing.T) { testServices(t, w) })
	t.Run("NodeToPod", func(t *testing.T) { testNodeToPod(t, w) })
}

// TestDeployScript installs with a pre-auth key, by deploy-with-helm.sh: Headscale's policy approves the routes. It ends
// well only where pods of all nodes reach each other. An upgrade by headcnictl keeps what it was told, and an uninstall leaves nothing.
func TestDeployScript(t *testing.T) {
	w := start(t, cluster.Options{ProxyMode: *proxyMode, Policy: func(p map[string]any) {
		routes := map[string][]string{}
		for _, c := range cluster.PodPrefixes() {
			routes[c.String()] = []string{lab.Tag}
		}
		p["autoApprovers"] = map[string]any{"routes": routes}
	}})
	w.apply(t, "echo.yaml", echoManifest)
	key, err := w.AuthKey(within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	// The relay speaks plain HTTP here.
	values, err := json.Marshal(map[string]any{"tailscaled": map[string]any{
		"extraEnv": []map[string]string{{"name": "TS_DEBUG_USE_DERP_HTTP", "value": "true"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(w.Dir, "deploy.yaml")
	if err := os.WriteFile(file, values, 0o600); err != nil {
		t.Fatal(err)
	}
	script, err := filepath.Abs("../../deploy-with-helm.sh")
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if out, err := w.Control.Run(within(t, 6*time.Minute), "env", "KUBECONFIG="+w.Kubeconfig(), "bash", script,
		"-u", w.Control.URL, "-k", key, "--image", "headcni.local/headcni:e2e", "-f", file); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%.1f s", time.Since(began).Seconds())
	eventually(t, "pods", time.Minute, w.findPods)
	testPodToPod(t, w)

	ctl := func(want string, args ...string) {
		t.Helper()
		began := time.Now()
		out, err := w.Control.Run(within(t, 6*time.Minute), "env",
			append([]string{"KUBECONFIG=" + w.Kubeconfig(), filepath.Join(filepath.Dir(script), "bin", "headcnictl")}, args...)...)
		if err != nil || !strings.Contains(out, want) {
			t.Fatalf("%s: %v, want %q:\n%s", args[0], err, want, out)
		}
		t.Logf("%s: %.1f s", args[0], time.Since(began).Seconds())
	}
	ctl("2 of 2 others", "routes")
	ctl("a pod on every node answers", "upgrade", "--image", "headcni.local/headcni:e2e", "--set", "config.logging.level=debug")
	if text := w.kubectl(t, "get", "configmap", "-n", namespace, "headcni-config", "-o", "yaml"); !strings.Contains(text, "level: debug") || !strings.Contains(text, w.Control.URL) {
		t.Errorf("after the upgrade the configuration is\n%s", text)
	}
	testPodToPod(t, w)
	ctl("HeadCNI is off", "uninstall", "--yes")
	if left := w.kubectl(t, "get", "daemonsets,deployments,jobs,configmaps,secrets,leases,serviceaccounts,roles,rolebindings", "-n", namespace, "-o", "name"); strings.Contains(left, "headcni") {
		t.Errorf("the uninstall left\n%s", left)
	}
	ctl("Helm has no release", "uninstall", "--yes")
}
