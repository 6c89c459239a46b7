package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/headcni/headcni/internal/cluster"
	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/realparts"
)

// bridgeFile is where the old network's CNI configuration is, under the name of flannel's.
const bridgeFile = "/etc/cni/net.d/10-flannel.conflist"

// bridgeNetwork is another pod network on a node, made as flannel's host-gw makes it: a bridge with an address of the node's pod range, host-local,
// and a route to each other node's range by that node's address. What it has in the kernel goes with a reboot, its file does not.
func bridgeNetwork(t *testing.T, w *world, n *cluster.Node) {
	t.Helper()
	ranges := map[string][]string{}
	for _, other := range w.Nodes {
		o, err := other.Object(within(t, time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		ranges[other.Name] = o.Spec.PodCIDRs
	}
	var pools [][]map[string]string
	for _, r := range ranges[n.Name] {
		pools = append(pools, []map[string]string{{"subnet": r}})
	}
	b, err := json.Marshal(map[string]any{"cniVersion": "1.0.0", "name": "cbr0", "plugins": []any{map[string]any{
		"type": "bridge", "bridge": "cni0", "mtu": 1450, "isDefaultGateway": true, "hairpinMode": true,
		"ipam": map[string]any{"type": "host-local", "ranges": pools},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	var script strings.Builder
	script.WriteString("set -e; sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1\n")
	for _, path := range []string{realparts.Tool(t, "bridge"), realparts.Tool(t, "host-local"), filepath.Join(os.Getenv(lab.BinEnv), "loopback")} {
		fmt.Fprintf(&script, "cp %s /opt/cni/bin/\n", path)
	}
	for _, other := range w.Nodes {
		for i, r := range ranges[other.Name] {
			if other != n {
				fmt.Fprintf(&script, "ip route replace %s via %s\n", r, other.Addrs()[i])
			}
		}
	}
	if out, err := n.Run(within(t, time.Minute), "bash", "-c", script.String()); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.WriteFile(n.Path(bridgeFile), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

var pinged = regexp.MustCompile(`(\d+) packets transmitted, (\d+) received`)

// pinging pings from one pod to another all the time. The returned function says how many of how many were lost.
func pinging(t *testing.T, w *world, from, to *corev1.Pod) (stop func() (lost, sent int)) {
	t.Helper()
	n, err := w.Node(from.Spec.NodeName)
	if err != nil {
		t.Fatal(err)
	}
	own, addr := addrs(t, from)[0], addrs(t, to)[0]
	ns, err := n.Run(within(t, time.Minute), "bash", "-c", fmt.Sprintf(
		`for ns in /run/netns/*; do [[ -z $(nsenter --net=$ns ip -o address show to %s) ]] || echo -n $ns; done`, own))
	if err != nil || ns == "" {
		t.Fatalf("the namespace of pod %s: %q, %v", from.Name, ns, err)
	}
	p, err := n.Start("nsenter", nil, "--net="+strings.TrimSpace(ns), "ping", "-q", "-i", "0.1", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	return func() (lost, sent int) {
		t.Helper()
		if err := p.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(p.Log)
		if err != nil {
			t.Fatal(err)
		}
		m := pinged.FindStringSubmatch(string(b))
		if m == nil {
			t.Fatalf("ping says %q", b)
		}
		sent, _ = strconv.Atoi(m[1]) // the pattern has digits
		got, _ := strconv.Atoi(m[2])
		return sent - got, sent
	}
}

// TestMigrate goes the way of docs/migration.md from flannel, node by node, there, back with one node, and there again, and counts what is lost.
func TestMigrate(t *testing.T) {
	w := start(t, cluster.Options{ProxyMode: *proxyMode})
	for _, n := range w.Nodes {
		bridgeNetwork(t, w, n)
	}
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)
	w.apply(t, "echo.yaml", echoManifest)
	eventually(t, "pods", 2*time.Minute, w.findPods)
	testPodToPod(t, w)
	control, first, second := w.Nodes[0], w.Workers()[0], w.Workers()[1]

	// HeadCNI comes beside it, puts nothing in force, and says so.
	stop := pinging(t, w, w.echo[control.Name], w.echo[first.Name])
	out := migrateInstall(t, w)
	for _, want := range []string{"HC102", "Not done"} {
		if !strings.Contains(out, want) {
			t.Errorf("the installation does not say %q:\n%s", want, out)
		}
	}
	for _, n := range w.Nodes {
		nothingInForce(t, n)
	}
	testPodToPod(t, w)

	t.Logf("%s took %.1f s from the drain to its pods", second.Name, move(t, w, second).Seconds())
	lost, sent := stop()
	t.Logf("beside the installation and the move of %s: %d of %d pings were lost between the others", second.Name, lost, sent)
	if lost > 0 || sent < 100 {
		t.Errorf("%d of %d pings were lost between nodes that were not moved", lost, sent)
	}
	apart(t, w, second)

	// Back with it.
	w.kubectl(t, "drain", second.Name, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=100s")
	w.kubectl(t, "annotate", "node", second.Name, "headcni.io/uninstall=true")
	eventually(t, "our file goes", time.Minute, func(context.Context) error {
		if _, err := os.Stat(second.Path("/etc/cni/net.d/10-headcni.conflist")); !os.IsNotExist(err) {
			return fmt.Errorf("it is there: %v", err)
		}
		return nil
	})
	reboot(t, second)
	bridgeNetwork(t, w, second)
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)
	w.kubectl(t, "uncordon", second.Name)
	nothingInForce(t, second)
	eventually(t, "pods", 2*time.Minute, func(ctx context.Context) error { return w.reach(ctx, w.Nodes...) })
	testPodToPod(t, w)

	// And all of them.
	w.kubectl(t, "annotate", "node", second.Name, "headcni.io/uninstall-", "headcni.io/uninstalled-")
	for _, n := range []*cluster.Node{second, first, control} {
		t.Logf("%s took %.1f s from the drain to its pods", n.Name, move(t, w, n).Seconds())
	}
	testPodToPod(t, w)
	testServices(t, w)
	testNodeToPod(t, w)
	if out, err := w.ctl(t, "status", "--wait=1m"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	testHelm(t, w)
}

// ctl runs headcnictl as an administrator.
func (w *world) ctl(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return w.Control.Run(within(t, 6*time.Minute), "env", append([]string{"KUBECONFIG=" + w.Kubeconfig(), filepath.Join(os.Getenv(lab.BinEnv), "headcnictl")}, args...)...)
}

// migrateInstall installs as the page says. It cannot end well while the other network is there.
func migrateInstall(t *testing.T, w *world) string {
	t.Helper()
	// The relay speaks plain HTTP here.
	values, err := json.Marshal(map[string]any{"tailscaled": map[string]any{"extraEnv": []map[string]string{{"name": "TS_DEBUG_USE_DERP_HTTP", "value": "true"}}}})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"migrate.yaml": string(values), "api-key": w.Control.APIKey} {
		if err := os.WriteFile(filepath.Join(w.Dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := w.ctl(t, "install", "-u", w.Control.URL, "--key-file", filepath.Join(w.Dir, "api-key"), "--image", "headcni.local/headcni:e2e",
		"-f", filepath.Join(w.Dir, "migrate.yaml"), "--timeout", "40s")
	if err == nil {
		t.Fatalf("it says that it is done:\n%s", out)
	}
	return out + err.Error()
}

var inForce = regexp.MustCompile(`(?m)^table ip6? headcni$|^51[89]\d:`)

// nothingInForce holds that we have no rules on a node but the policies', which concern our own pods' links.
func nothingInForce(t *testing.T, n *cluster.Node) {
	t.Helper()
	out, err := n.Run(within(t, time.Minute), "bash", "-c", "nft list tables; ip rule; ip -6 rule")
	if err != nil {
		t.Fatal(err)
	}
	if found := inForce.FindAllString(out, -1); found != nil {
		t.Errorf("%s has of ours %q", n.Name, found)
	}
}

func reboot(t *testing.T, n *cluster.Node) {
	t.Helper()
	if err := n.Reboot(within(t, 3*time.Minute)); err != nil {
		t.Fatal(err)
	}
}

// move takes a node from the old network to HeadCNI, and returns how long its pods were away.
func move(t *testing.T, w *world, n *cluster.Node) time.Duration {
	t.Helper()
	began := time.Now()
	w.kubectl(t, "drain", n.Name, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=100s")
	if err := os.Remove(n.Path(bridgeFile)); err != nil {
		t.Fatal(err)
	}
	reboot(t, n)
	eventually(t, n.Name+" is right", 3*time.Minute, func(context.Context) error {
		if out, err := w.ctl(t, "status", "--node", n.Name); err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return n.Ready(t.Context())
	})
	w.kubectl(t, "uncordon", n.Name)
	eventually(t, "pods", 2*time.Minute, func(ctx context.Context) error { return w.reach(ctx, n) })
	return time.Since(began)
}

// reach asks the pods of these nodes for each other.
func (w *world) reach(ctx context.Context, nodes ...*cluster.Node) error {
	if err := w.findPods(ctx); err != nil {
		return err
	}
	for _, from := range nodes {
		for _, to := range nodes {
			for _, ip := range w.echo[to.Name].Status.PodIPs {
				if out, err := w.get(ctx, w.echo[from.Name], url(netip.MustParseAddr(ip.IP), 8080, "/hostname")); err != nil || strings.TrimSpace(out) != w.echo[to.Name].Name {
					return fmt.Errorf("from %s to %s: %q, %v", from.Name, to.Name, out, err)
				}
			}
		}
	}
	return nil
}

// apart holds what the page says of the time in between: a node that is through and those that are not do not reach each other.
func apart(t *testing.T, w *world, moved *cluster.Node) {
	t.Helper()
	for _, n := range w.Nodes {
		if n == moved {
			continue
		}
		for _, way := range [][2]*cluster.Node{{n, moved}, {moved, n}} {
			ctx, cancel := context.WithTimeoutCause(t.Context(), 3*time.Second, errors.New("no answer"))
			_, err := w.get(ctx, w.echo[way[0].Name], url(addrs(t, w.echo[way[1].Name])[0], 8080, "/hostname"))
			cancel()
			if err == nil {
				t.Errorf("%s reaches %s: docs/migration.md says that it does not", way[0].Name, way[1].Name)
			}
		}
	}
}
