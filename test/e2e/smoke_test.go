package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/headcni/headcni/internal/cluster"
)

// TestSmoke installs the chart and tries everything that a pod network is for.
func TestSmoke(t *testing.T) {
	w := start(t, cluster.Options{ProxyMode: *proxyMode, NoClusterCIDR: *noClusterCIDR})
	w.apply(t, "echo.yaml", echoManifest)
	began := time.Now()
	w.install(t, nil)
	w.firstPing(t)
	t.Logf("%6.1f s  from helm install to an answer from pod to pod between nodes", time.Since(began).Seconds())
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)
	eventually(t, "pods", 2*time.Minute, w.findPods)
	t.Logf("%6.1f s  from helm install to all nodes and pods ready", time.Since(began).Seconds())
	for _, test := range []struct {
		name string
		run  func(*testing.T, *world)
	}{
		{"PodToPod", testPodToPod},
		{"Services", testServices},
		{"NodePort", testNodePort},
		{"HostPort", testHostPort},
		{"NodeToPod", testNodeToPod},
		{"NodeToService", testNodeToService},
		{"PodToAPIServer", testPodToAPIServer},
		{"Webhook", testWebhook},
		{"Logs", testLogs},
		{"HelmTest", testHelm},
		{"Conformance", testConformance},
		{"Policies", testPolicies},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, w) })
	}
}

// firstPing waits for the first answer from a pod of one node to a pod of another.
func (w *world) firstPing(t *testing.T) {
	t.Helper()
	from, to := w.Workers()[0].Name, w.Workers()[1].Name
	eventually(t, "pod to pod between nodes", 3*time.Minute, func(ctx context.Context) error {
		out, err := w.Kubectl(ctx, "get", "pods", "-n", echoes, "-l", "app=echo", "-o", `jsonpath={range .items[*]}{.spec.nodeName} {.metadata.name} {.status.podIP}{"\n"}{end}`)
		if err != nil {
			return err
		}
		names, addrs := map[string]string{}, map[string]string{}
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) == 3 {
				names[f[0]], addrs[f[0]] = f[1], f[2]
			}
		}
		if names[from] == "" || addrs[to] == "" {
			return errors.New("no pods with addresses yet")
		}
		_, err = w.Kubectl(ctx, "exec", "-n", echoes, names[from], "--", "curl", "-sS", "-m1", "http://"+addrs[to]+":8080/clientip")
		return err
	})
}

// get asks from a pod and returns the answer.
func (w *world) get(ctx context.Context, from *corev1.Pod, url string) (string, error) {
	return w.Kubectl(ctx, "exec", "-n", from.Namespace, from.Name, "--", "curl", "-sS", "-g", "-m", "5", url)
}

// url is that of a server's path at addr.
func url(addr netip.Addr, port uint16, path string) string {
	return "http://" + netip.AddrPortFrom(addr, port).String() + path
}

// addrs are a pod's addresses, IPv4 first. A pod without both is a fault.
func addrs(t *testing.T, p *corev1.Pod) []netip.Addr {
	t.Helper()
	var out []netip.Addr
	for _, ip := range p.Status.PodIPs {
		out = append(out, netip.MustParseAddr(ip.IP))
	}
	if len(out) != 2 || !out[0].Is4() || !out[1].Is6() {
		t.Fatalf("%s has addresses %v, want an IPv4 and an IPv6 one", p.Name, out)
	}
	return out
}

// seenAs says which address the echo server at url sees.
func (w *world) seenAs(t *testing.T, from *corev1.Pod, url string) netip.Addr {
	t.Helper()
	out, err := w.get(within(t, 10*time.Second), from, url)
	if err != nil {
		t.Errorf("from %s on %s: %v", from.Name, from.Spec.NodeName, err)
		return netip.Addr{}
	}
	ap, err := netip.ParseAddrPort(strings.TrimSpace(out))
	if err != nil {
		t.Errorf("%s answers %q", url, out)
	}
	return ap.Addr().Unmap()
}

// testPodToPod asks every pod from every other, over both families: each sees the asker's own address.
func testPodToPod(t *testing.T, w *world) {
	for _, from := range w.echo {
		for _, to := range w.echo {
			for i, addr := range addrs(t, to) {
				if got, want := w.seenAs(t, from, url(addr, 8080, "/clientip")), addrs(t, from)[i]; got != want {
					t.Errorf("%s on %s sees %s, want %s of %s", to.Name, to.Spec.NodeName, got, want, from.Spec.NodeName)
				}
			}
		}
	}
}

// testServices asks ClusterIPs of both families by name and until every pod has answered.
func testServices(t *testing.T, w *world) {
	for _, from := range w.echo {
		for _, name := range []string{"echo", "echo.e2e.svc.cluster.local", "echo6"} {
			w.allAnswer(t, "http://"+name+"/hostname", func(ctx context.Context, url string) (string, error) { return w.get(ctx, from, url) })
		}
		for _, flag := range []string{"-4", "-6"} {
			if out, err := w.Kubectl(within(t, 10*time.Second), "exec", "-n", echoes, from.Name, "--", "curl", "-sS", "-m5", flag, "http://echo/hostname"); err != nil {
				t.Errorf("curl %s from %s: %v %s", flag, from.Spec.NodeName, err, out)
			}
		}
		if out, err := w.Kubectl(within(t, 10*time.Second), "exec", "-n", echoes, from.Name, "--", "sh", "-c", "echo hostname | nc -u -w2 echo 81"); err != nil || !strings.HasPrefix(out, "echo-") {
			t.Errorf("UDP service from %s: %q %v", from.Spec.NodeName, out, err)
		}
	}
}

// allAnswer asks url until every pod of the service has answered.
func (w *world) allAnswer(t *testing.T, url string, ask func(context.Context, string) (string, error)) {
	t.Helper()
	missing := map[string]bool{}
	for _, p := range w.echo {
		missing[p.Name] = true
	}
	for range 60 {
		out, err := ask(within(t, 10*time.Second), url)
		if err != nil {
			t.Errorf("%s: %v", url, err)
			return
		}
		delete(missing, strings.TrimSpace(out))
		if len(missing) == 0 {
			return
		}
	}
	t.Errorf("%s: no answer from %v", url, missing)
}

// onNode asks from a process on a node.
func onNode(n *cluster.Node) func(context.Context, string) (string, error) {
	return func(ctx context.Context, url string) (string, error) {
		return n.Run(ctx, "curl", "-sS", "-g", "-m", "5", url)
	}
}

// testNodePort asks every node's port from every node, from a pod, and from a host that is none.
func testNodePort(t *testing.T, w *world) {
	for _, n := range w.Nodes {
		for _, addr := range n.Underlay {
			u := url(addr, 30080, "/hostname")
			for _, from := range w.Nodes {
				w.allAnswer(t, u, onNode(from))
			}
			w.allAnswer(t, u, func(ctx context.Context, url string) (string, error) {
				return w.Control.Run(ctx, "curl", "-sS", "-g", "-m", "5", url)
			})
			for _, from := range w.echo {
				if _, err := w.get(within(t, 10*time.Second), from, u); err != nil {
					t.Errorf("from a pod on %s: %v", from.Spec.NodeName, err)
				}
			}
		}
	}
}

// testHostPort asks hostPorts from every node, the pod's own too, and from pods.
func testHostPort(t *testing.T, w *world) {
	for _, n := range w.Nodes {
		for _, addr := range n.Addrs() {
			want := w.echo[n.Name].Name
			check := func(from string, out string, err error) {
				if err != nil || strings.TrimSpace(out) != want {
					t.Errorf("from %s: port 18080 of %s (%s): %q %v, want %s", from, n.Name, addr, out, err, want)
				}
			}
			u := url(addr, 18080, "/hostname")
			for _, from := range w.Nodes {
				out, err := onNode(from)(within(t, 10*time.Second), u)
				check(from.Name, out, err)
				out, err = w.get(within(t, 10*time.Second), w.echo[from.Name], u)
				check("a pod on "+from.Name, out, err)
			}
		}
	}
}

// testNodeToPod asks pods from processes of all nodes, and processes of all nodes from pods.
func testNodeToPod(t *testing.T, w *world) {
	for _, from := range w.Nodes {
		for _, to := range w.Nodes {
			for i, addr := range addrs(t, w.echo[to.Name]) {
				if _, err := onNode(from)(within(t, 10*time.Second), url(addr, 8080, "/clientip")); err != nil {
					t.Errorf("node %s to pod on %s: %v", from.Name, to.Name, err)
				}
				if got := w.seenAs(t, w.echo[from.Name], url(to.Addrs()[i], 28080, "/clientip")); !got.IsValid() {
					t.Errorf("pod on %s to node %s", from.Name, to.Name)
				}
			}
		}
	}
}

// testNodeToService asks a ClusterIP from processes of every node until pods of every other have answered.
func testNodeToService(t *testing.T, w *world) { testNodeToServiceBy(t, w, 2) }

// testNodeToServiceBy is testNodeToService for IPv4, and the second family with 2.
func testNodeToServiceBy(t *testing.T, w *world, families int) {
	for family := range families {
		ip := strings.TrimSpace(w.kubectl(t, "get", "service", "-n", echoes, "echo", "-o", fmt.Sprintf("jsonpath={.spec.clusterIPs[%d]}", family)))
		for _, n := range w.Nodes {
			w.allAnswer(t, url(netip.MustParseAddr(ip), 80, "/hostname"), onNode(n))
		}
	}
}

// testPodToAPIServer asks the API server by its service's name with the pod's own token.
func testPodToAPIServer(t *testing.T, w *world) {
	const ask = `cd /var/run/secrets/kubernetes.io/serviceaccount && curl -sS -m5 --cacert ca.crt -H "Authorization: Bearer $(cat token)" https://kubernetes.default.svc/version`
	for _, from := range w.echo {
		out, err := w.Kubectl(within(t, 10*time.Second), "exec", "-n", echoes, from.Name, "--", "sh", "-c", ask)
		if err != nil || !strings.Contains(out, "gitVersion") {
			t.Errorf("from %s: %q %v", from.Spec.NodeName, out, err)
		}
	}
}

// testLogs reads what pods print.
func testLogs(t *testing.T, w *world) {
	for _, p := range w.echo {
		if out := w.kubectl(t, "logs", "-n", echoes, p.Name); !strings.Contains(out, "8080") {
			t.Errorf("logs of %s on %s: %q", p.Name, p.Spec.NodeName, out)
		}
	}
}

// testHelm runs the chart's own test.
func testHelm(t *testing.T, w *world) {
	if out, err := w.Helm(within(t, 3*time.Minute), "test", cluster.Release, "--namespace="+namespace); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
