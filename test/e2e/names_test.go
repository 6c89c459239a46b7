package e2e

import (
	"context"
	_ "embed" // testdata
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/cluster"
	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/pkg/kube"
)

//go:embed testdata/names.yaml
var namesManifest string

// askers are pods that may ask CoreDNS and nobody else, and whom they ask about what.
type askers struct {
	*world
	pods []*corev1.Pod
	// servers are CoreDNS' pods.
	servers []corev1.Pod
	// addresses are the nodes' names in the tailnet, and what they must lead to: an IPv4 and an IPv6 address.
	addresses map[string][]string
	// service are the addresses of a Service of the cluster, IPv4 first.
	service []netip.Addr
}

// TestNames has pods that may ask CoreDNS and nobody else resolve the tailnet's names, by each of its pods, while Headscale is dead and
// after tailscaled was restarted. A device of the tailnet resolves the cluster's names by split DNS, and reaches Services and pods by what it
// is told, as policies let it; what it leads to is reached by pods with consent. Afterwards the Corefile is as it was, to the byte.
func TestNames(t *testing.T) {
	w := start(t, cluster.Options{ProxyMode: *proxyMode, Device: true, Policy: func(policy map[string]any) {
		rule := policy["acls"].([]map[string]any)[0]
		for _, p := range cluster.ServicePrefixes() {
			rule["dst"] = append(rule["dst"].([]string), p.String()+":*")
		}
		for p := range strings.SplitSeq(behindDevice, ",") {
			rule["dst"] = append(rule["dst"].([]string), p+":*")
		}
		policy["nodeAttrs"] = []map[string]any{{"target": []string{lab.Tag}, "attr": []string{"cache-network-maps", "magicdns-aaaa"}}}
	}})
	before := w.corefile(t)
	w.apply(t, "echo.yaml", echoManifest)
	w.kubectl(t, "annotate", "service", "-n", echoes, "echo", kube.TailnetName+"="+tailnetName)
	w.kubectl(t, "label", "node", w.Workers()[0].Name, servicesLabel+"=")
	w.install(t, map[string]any{"config": map[string]any{
		"dns":     map[string]any{"alias": "e2e.k8s.lab"},
		"network": map[string]any{"advertiseServices": map[string]any{"nodeSelector": map[string]any{servicesLabel: ""}}},
	}})
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)
	eventually(t, "pods", 2*time.Minute, w.findPods)
	w.apply(t, "names.yaml", namesManifest)
	a := &askers{world: w, addresses: map[string][]string{}}
	a.find(t)
	for _, ip := range strings.Fields(w.kubectl(t, "get", "service", "-n", echoes, "echo", "-o", "jsonpath={.spec.clusterIPs[0]} {.spec.clusterIPs[1]}")) {
		a.service = append(a.service, netip.MustParseAddr(ip))
	}
	began := time.Now()
	// kubelet brings a changed ConfigMap into CoreDNS' pods within a minute and a half.
	eventually(t, "names of the tailnet", 4*time.Minute, a.all)
	t.Logf("%6.1f s  until all CoreDNS answer for the tailnet", time.Since(began).Seconds())
	if after := w.corefile(t); !strings.HasPrefix(after, before) {
		t.Errorf("the Corefile was\n%s\nand is\n%s", before, after)
	}
	a.deniedElsewhere(t)
	a.printed(t)
	w.joinDevice(t)
	a.behindDevice(t)

	if err := w.Control.Headscale.Kill(); err != nil {
		t.Fatal(err)
	}
	w.split(t)
	if err := a.all(within(t, time.Minute)); err != nil {
		t.Errorf("while Headscale is dead: %v", err)
	}
	w.kubectl(t, "delete", "pods", "-n", namespace, "-l", "app.kubernetes.io/component=tailscaled", "--wait=false")
	time.Sleep(time.Second)
	eventually(t, "names after tailscaled was restarted without Headscale", 2*time.Minute, a.all)
	if err := w.Control.StartHeadscale(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	a.fromDevice(t)
	w.uninstall(t)
	if after := w.corefile(t); after != before {
		t.Errorf("the Corefile was\n%s\nand is after uninstall\n%s", before, after)
	}
}

func (w *world) corefile(t *testing.T) string {
	t.Helper()
	return w.kubectl(t, "get", "configmap", "-n", "kube-system", "coredns", "-o", "jsonpath={.data.Corefile}")
}

// find waits for the pods, and learns the nodes' addresses in the tailnet.
func (a *askers) find(t *testing.T) {
	t.Helper()
	eventually(t, "pods that ask, and what they ask for", 2*time.Minute, func(ctx context.Context) error {
		a.pods = nil
		list, err := a.Client.CoreV1().Pods("names").List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for i := range list.Items {
			if p := &list.Items[i]; isReady(p) {
				a.pods = append(a.pods, p)
			}
		}
		if len(a.pods) != len(a.Workers()) {
			return fmt.Errorf("%d pods", len(a.pods))
		}
		servers, err := a.Client.CoreV1().Pods("kube-system").List(ctx, metav1.ListOptions{LabelSelector: "k8s-app=kube-dns"})
		if err != nil {
			return err
		}
		a.servers = servers.Items
		for _, n := range a.Nodes {
			o, err := n.Object(ctx)
			if err != nil {
				return err
			}
			ips := strings.Split(o.Annotations[kube.TailnetIPs], ",")
			if len(ips) != 2 {
				return fmt.Errorf("%s has tailnet addresses %v", n.Name, ips)
			}
			a.addresses[n.Name+"."+lab.BaseDomain] = ips
		}
		return nil
	})
}

// all asks for every node's name, of both families, by UDP and TCP, each of CoreDNS' pods, from every pod. A name that nobody has is none,
// and a name of the cluster is answered as before. One shell of each pod asks all: kubectl takes its time.
func (a *askers) all(ctx context.Context) error {
	var script strings.Builder
	var want []string
	ask := func(answer string, args ...string) {
		question := strings.Join(args, " ")
		fmt.Fprintf(&script, "echo \"%s: $(dig +short +tries=1 +time=2 %s | tr '\\n' ' ')\"\n", question, question)
		want = append(want, question+": "+answer)
	}
	for _, server := range a.servers {
		nobody := "@" + server.Status.PodIP + " nobody." + lab.BaseDomain
		fmt.Fprintf(&script, "echo \"%s: $(dig +tries=1 +time=2 %s | sed -n 's/.*status: \\([A-Z]*\\).*/\\1/p')\"\n", nobody, nobody)
		want = append(want, nobody+": NXDOMAIN")
		ask(a.service[0].String(), "@"+server.Status.PodIP, "echo.e2e.svc.cluster.local")
		ask(a.service[0].String(), "@"+server.Status.PodIP, "echo.e2e.svc.e2e.k8s.lab") // as other clusters ask
		for _, name := range slices.Sorted(maps.Keys(a.addresses)) {
			for i, kind := range []string{"A", "AAAA"} {
				for _, by := range []string{"+notcp", "+tcp"} {
					ask(a.addresses[name][i], "@"+server.Status.PodIP, by, name, kind)
				}
			}
		}
	}
	var errs []error
	for _, from := range a.pods {
		out, err := a.Kubectl(ctx, "exec", "-n", from.Namespace, from.Name, "--", "sh", "-c", script.String())
		if err != nil {
			errs = append(errs, err)
			continue
		}
		got := map[string]bool{}
		for line := range strings.Lines(out) {
			got[strings.TrimSpace(line)] = true
		}
		for _, w := range want {
			if !got[w] {
				errs = append(errs, fmt.Errorf("from %s: want %s", from.Spec.NodeName, w))
			}
		}
		if len(errs) > 0 {
			errs = append(errs, fmt.Errorf("%s was answered\n%s", from.Spec.NodeName, out))
		}
	}
	return errors.Join(errs...)
}

func (a *askers) dig(ctx context.Context, from *corev1.Pod, args ...string) (string, error) {
	out, err := a.Kubectl(ctx, append([]string{"exec", "-n", from.Namespace, from.Name, "--", "dig", "+short", "+tries=1", "+time=2"}, args...)...)
	return strings.TrimSpace(out), err
}

// deniedElsewhere: these pods reach CoreDNS only, and so not the tailnet's resolver by themselves.
func (a *askers) deniedElsewhere(t *testing.T) {
	t.Helper()
	for _, from := range a.pods {
		for name := range a.addresses {
			if out, err := a.dig(within(t, time.Minute), from, "@100.100.100.100", name); err == nil {
				t.Errorf("%s asks 100.100.100.100 itself and is answered %q", from.Spec.NodeName, out)
			}
		}
	}
}

// printed: what `headcnictl dns` prints in the controller's pod is what the controller writes, and has the cluster's DNS for Headscale.
func (a *askers) printed(t *testing.T) {
	t.Helper()
	ctl := func(args ...string) string {
		return a.kubectl(t, append([]string{"exec", "-n", namespace, "deploy/headcni-controller", "--", "headcnictl", "dns"}, args...)...)
	}
	if out := ctl("corefile"); !strings.Contains(a.corefile(t), strings.TrimSpace(out)) {
		t.Errorf("headcnictl dns corefile prints\n%s\nand the Corefile is\n%s", out, a.corefile(t))
	}
	address := a.kubectl(t, "get", "service", "-n", "kube-system", "kube-dns", "-o", "jsonpath={.spec.clusterIP}")
	if out := ctl("remote", "--name", "e2e", "--service-cidr", cluster.ServiceCIDRs); !strings.Contains(out, "domain: e2e.k8s.lab\n") || !strings.Contains(out, "- "+address+"\n") {
		t.Errorf("headcnictl dns remote prints\n%s", out)
	}
	out := ctl("headscale", "--service-cidr", cluster.ServiceCIDRs)
	for _, want := range []string{"cluster.local:\n      - " + address, "# Checked: the policy has rules to 10.96.0.0/16", "# Checked: " + a.Workers()[0].Name + " leads to 10.96.0.0/16"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}
