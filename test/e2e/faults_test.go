package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/cluster"
)

// TestFaults breaks one part after another, and takes everything away at the end.
func TestFaults(t *testing.T) {
	w := start(t, cluster.Options{ProxyMode: *proxyMode, NoClusterCIDR: *noClusterCIDR})
	w.apply(t, "echo.yaml", echoManifest)
	w.install(t, nil)
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)
	eventually(t, "pods", 2*time.Minute, w.findPods)
	w.firstPing(t) // pods may be ready before their node's routes have reached the other nodes
	for _, test := range []struct {
		name string
		run  func(*testing.T, *world)
	}{
		{"DaemonRestart", testDaemonRestart},
		{"Upgrade", testUpgrade},
		{"RuntimeRestart", testRuntimeRestart},
		{"APIServerAway", testAPIServerAway},
		{"ManyPods", testManyPods},
		{"Reboot", testReboot},
		{"NodeLoss", testNodeLoss},
		{"Uninstall", testUninstall},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, w) })
	}
}

// pings is how many datagrams a pinger sends of each family, one every 100 ms.
const pings = 150

const pingerManifest = `
apiVersion: v1
kind: Pod
metadata: {name: pinger, namespace: e2e}
spec:
  nodeName: %s
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  containers:
    - name: pinger
      image: AGNHOST
      command: [sh, -c, "busybox ping -q -i 0.1 -c %d %s & busybox ping -q -i 0.1 -c %d %s; wait"]
`

var received = regexp.MustCompile(`(\d+) packets transmitted, (\d+) packets received`)

// underTraffic runs do while a pod of the first worker pings one of the second, and returns how many pings were lost.
func (w *world) underTraffic(t *testing.T, do func()) int {
	t.Helper()
	to := addrs(t, w.echo[w.Workers()[1].Name])
	w.apply(t, "pinger.yaml", fmt.Sprintf(pingerManifest, w.Workers()[0].Name, pings, to[0], pings, to[1]))
	defer w.kubectl(t, "delete", "pod", "-n", echoes, "pinger", "--now")
	phase := func(ctx context.Context) corev1.PodPhase {
		p, err := w.Client.CoreV1().Pods(echoes).Get(ctx, "pinger", metav1.GetOptions{})
		if err != nil {
			return ""
		}
		return p.Status.Phase
	}
	eventually(t, "the pinger starts", time.Minute, func(ctx context.Context) error {
		if p := phase(ctx); p != corev1.PodRunning {
			return fmt.Errorf("phase %q", p)
		}
		return nil
	})
	do()
	eventually(t, "the pinger ends", time.Minute, func(ctx context.Context) error {
		if p := phase(ctx); p == corev1.PodRunning || p == "" {
			return fmt.Errorf("phase %q", p)
		}
		return nil
	})
	out := w.kubectl(t, "logs", "-n", echoes, "pinger")
	lost, found := 0, received.FindAllStringSubmatch(out, -1)
	if len(found) != 2 {
		t.Fatalf("the pinger says %q", out)
	}
	for _, f := range found {
		n, err := strconv.Atoi(f[2])
		if err != nil || f[1] != strconv.Itoa(pings) {
			t.Fatalf("the pinger says %q", out)
		}
		lost += pings - n
	}
	return lost
}

// daemonsReady waits until all of a DaemonSet's pods are those that it wants and ready.
func (w *world) daemonsReady(t *testing.T, name string) {
	t.Helper()
	w.kubectl(t, "rollout", "status", "-n", namespace, "daemonset/"+name, "--timeout=100s")
}

// testDaemonRestart deletes the daemons' pods: nothing is lost.
func testDaemonRestart(t *testing.T, w *world) {
	lost := w.underTraffic(t, func() {
		w.kubectl(t, "delete", "pods", "-n", namespace, "-l", "app.kubernetes.io/component=daemon", "--wait=false")
		time.Sleep(time.Second)
		w.daemonsReady(t, "headcni")
	})
	if lost > 0 {
		t.Errorf("%d of %d pings were lost", lost, 2*pings)
	}
}

// testUpgrade changes the daemons' configuration by an upgrade: nothing is lost.
func testUpgrade(t *testing.T, w *world) {
	lost := w.underTraffic(t, func() {
		w.install(t, map[string]any{"config": map[string]any{"logging": map[string]any{"level": "debug"}}})
		w.daemonsReady(t, "headcni")
	})
	if lost > 0 {
		t.Errorf("%d of %d pings were lost", lost, 2*pings)
	}
	if out := w.kubectl(t, "get", "configmap", "-n", namespace, "headcni-config", "-o", "yaml"); !strings.Contains(out, "debug") {
		t.Errorf("nothing was upgraded: %s", out)
	}
}

// testRuntimeRestart restarts containerd and kubelet on both nodes: nothing is lost, and new pods start.
func testRuntimeRestart(t *testing.T, w *world) {
	lost := w.underTraffic(t, func() {
		for _, n := range w.Workers()[:2] {
			if err := errors.Join(n.RestartContainerd(within(t, time.Minute)), n.RestartKubelet()); err != nil {
				t.Error(err)
			}
		}
	})
	if lost > 0 {
		t.Errorf("%d of %d pings were lost", lost, 2*pings)
	}
	eventually(t, "nodes", time.Minute, w.WaitReady)
	w.kubectl(t, "delete", "pods", "-n", echoes, "-l", "app=echo", "--now")
	eventually(t, "new pods", time.Minute, w.findPods)
	testPodToPod(t, w)
}

// testAPIServerAway restarts the API server while daemons run: nothing is lost, and new pods start afterwards.
func testAPIServerAway(t *testing.T, w *world) {
	lost := w.underTraffic(t, func() {
		if err := w.APIServer.Kill(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		if err := w.StartAPIServer(within(t, time.Minute)); err != nil {
			t.Fatal(err)
		}
	})
	if lost > 0 {
		t.Errorf("%d of %d pings were lost", lost, 2*pings)
	}
	w.kubectl(t, "delete", "pods", "-n", echoes, "-l", "app=echo", "--now")
	eventually(t, "new pods", time.Minute, w.findPods)
}

const manyManifest = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: many, namespace: e2e}
spec:
  replicas: %d
  selector: {matchLabels: {app: many}}
  template:
    metadata: {labels: {app: many}}
    spec:
      nodeSelector: {kubernetes.io/hostname: %s}
      # Not 0: then a pod is gone before its network is.
      terminationGracePeriodSeconds: 1
      containers:
        - {name: pause, image: AGNHOST, args: [pause]}
`

// testManyPods fills a node with 60 pods, drains it, and fills it again.
func testManyPods(t *testing.T, w *world) {
	const many = 60
	n := w.Workers()[1]
	secondsBefore, startsBefore := w.podStarts(t, n)
	w.apply(t, "many.yaml", fmt.Sprintf(manyManifest, many, n.Name))
	defer w.kubectl(t, "delete", "deployment", "-n", echoes, "many")
	for round := range 2 {
		began := time.Now()
		w.kubectl(t, "rollout", "status", "-n", echoes, "deployment/many", "--timeout=100s")
		t.Logf("round %d: %d pods ready after %.1f s", round+1, many, time.Since(began).Seconds())
		if round == 0 {
			// Of this round alone: pods of the next are made while the drain goes on, and wait until it is over.
			seconds, starts := w.podStarts(t, n)
			if starts -= startsBefore; starts == 0 {
				t.Fatal("kubelet has counted no pods")
			}
			t.Logf("kubelet on %s: %.0f pods started, %.1f s each on average (kubelet_pod_start_sli_duration_seconds)",
				n.Name, starts, (seconds-secondsBefore)/starts)
			w.kubectl(t, "drain", n.Name, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=100s")
			w.kubectl(t, "uncordon", n.Name)
		}
	}
	seen := map[string]string{}
	pods, err := w.Client.CoreV1().Pods("").List(within(t, time.Minute), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if p.Spec.HostNetwork || p.Status.Phase != corev1.PodRunning || p.DeletionTimestamp != nil {
			continue
		}
		for _, a := range addrs(t, &p) {
			if other := seen[a.String()]; other != "" {
				t.Errorf("%s and %s both have %s", p.Name, other, a)
			}
			seen[a.String()] = p.Name
		}
	}
	if len(seen) < 2*many {
		t.Errorf("only %d addresses are in use", len(seen))
	}
}

// podStarts is how long all the pods of a node took to start, and how many they are, as kubelet counts them.
func (w *world) podStarts(t *testing.T, n *cluster.Node) (seconds, starts float64) {
	t.Helper()
	values := metrics(w.kubectl(t, "get", "--raw", "/api/v1/nodes/"+n.Name+"/proxy/metrics"))
	return values["kubelet_pod_start_sli_duration_seconds_sum"], values["kubelet_pod_start_sli_duration_seconds_count"]
}

// metrics reads what has no labels in an exposition.
func metrics(text string) map[string]float64 {
	values := map[string]float64{}
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 2 && !strings.HasPrefix(line, "#") {
			if v, err := strconv.ParseFloat(f[1], 64); err == nil {
				values[f[0]] = v
			}
		}
	}
	return values
}

// testReboot cuts a node's power and starts it again. No packet of a pod is on the underlay in clear.
func testReboot(t *testing.T, w *world) {
	n := w.Workers()[1]
	capture, err := w.CaptureUnderlay()
	if err != nil {
		t.Fatal(err)
	}
	old := w.echo[n.Name].Status.PodIPs
	ctx := within(t, 2*time.Minute)
	began := time.Now()
	stop := w.keepAsking(t, w.echo[w.Workers()[0].Name], old[0].IP)
	if err := n.Reboot(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pod answers again", 2*time.Minute, func(ctx context.Context) error {
		if err := w.findPods(ctx); err != nil {
			return err
		}
		_, err := w.get(ctx, w.echo[w.Workers()[0].Name], url(netip.MustParseAddr(w.echo[n.Name].Status.PodIPs[0].IP), 8080, "/hostname"))
		return err
	})
	t.Logf("%.1f s from power cut to an answer from the rebooted node's pod", time.Since(began).Seconds())
	stop()
	eventually(t, "nodes", time.Minute, w.WaitReady)
	testPodToPod(t, w)
	if n := capture.Clear(); n > 0 {
		t.Errorf("%d packets of pods were on the underlay in clear", n)
	}
	src, dst := addrs(t, w.echo[cluster.ControlPlane]), addrs(t, w.echo[n.Name])
	if err := w.SendClear(n, src[0], dst[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	if n := capture.Clear(); n != 1 {
		t.Errorf("of one packet in clear the capture saw %d: it proves nothing", n)
	}
}

// keepAsking sends requests to addr until the returned function is called; most of them fail while its node is away.
func (w *world) keepAsking(t *testing.T, from *corev1.Pod, addr string) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			_, _ = w.Kubectl(ctx, "exec", "-n", echoes, from.Name, "--", "curl", "-sS", "-g", "-m", "1", "http://"+addr+":8080/hostname")
		}
	}()
	return func() { cancel(); <-done }
}

// testNodeLoss ends a node for good: the others go on among themselves.
func testNodeLoss(t *testing.T, w *world) {
	n := w.Workers()[1]
	if err := n.Kill(); err != nil {
		t.Fatal(err)
	}
	from, to := w.echo[w.Workers()[0].Name], w.echo[cluster.ControlPlane]
	for range 10 {
		if got := w.seenAs(t, from, url(addrs(t, to)[1], 8080, "/clientip")); got != addrs(t, from)[1] {
			t.Errorf("seen as %s", got)
		}
	}
	eventually(t, "Kubernetes sees that the node is gone", 2*time.Minute, func(ctx context.Context) error {
		if n.Ready(ctx) == nil {
			return errors.New("it is ready")
		}
		return nil
	})
}

// testUninstall takes HeadCNI away while a node is dead. The living ones are as they were before, and so is Headscale.
func testUninstall(t *testing.T, w *world) {
	w.uninstall(t)
	for _, n := range w.Nodes[:2] {
		for _, dir := range []string{"/etc/cni/net.d", "/opt/cni/bin"} {
			entries, err := os.ReadDir(n.Path(dir))
			if err != nil {
				t.Error(err)
			}
			for _, e := range entries {
				t.Errorf("%s is left on %s", dir+"/"+e.Name(), n.Name)
			}
		}
		rules, err := n.Run(within(t, time.Minute), "bash", "-c", "nft list ruleset; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip -brief link")
		if err != nil {
			t.Error(err)
		}
		for line := range strings.Lines(rules) {
			if regexp.MustCompile(`headcni|5188|metric 4278`).MatchString(line) {
				t.Errorf("left on %s: %s", n.Name, strings.TrimSpace(line))
			}
		}
	}
	for name := range w.tailnet(t) {
		t.Errorf("%s is still in Headscale", name)
	}
	if out := w.kubectl(t, "get", "nodes", "-o", "yaml"); strings.Contains(out, "headcni.io/") {
		t.Error("Nodes have annotations of ours")
	}
	// Not pods: those of the dead node stay until it is back or its Node goes.
	out := w.kubectl(t, "get", "daemonsets,deployments,jobs,services,configmaps,secrets,leases,serviceaccounts,roles,rolebindings", "-n", namespace, "-o", "name")
	for line := range strings.Lines(out) {
		if strings.Contains(line, "headcni") {
			t.Errorf("left in %s: %s", namespace, line)
		}
	}
}
