package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/cluster"
	"github.com/headcni/headcni/internal/lab"
)

// westRanges are those of the second cluster.
var westRanges = cluster.Ranges{Pods: "10.245.0.0/16,fd00:245::/48", Services: "10.97.0.0/16,fd00:97::/112", DNS: "10.97.0.10"}

// westTag is that of its nodes.
const westTag = "tag:west"

// pair is two clusters in one tailnet.
type pair struct{ east, west *world }

// TestClusters has two clusters in one tailnet, each of which is told of the other by what the other's controller prints: their pods reach
// each other by their own addresses, and Services by address and by name, through the tunnel or not at all, as policies let them.
func TestClusters(t *testing.T) {
	p := newPair(t)
	from := map[string]any{"east": p.east.printRemote(t, "east"), "west": p.west.printRemote(t, "west")}
	p.install(t, from["west"], from["east"])
	p.east.rolledOut(t)
	p.west.rolledOut(t)
	capture, err := p.west.CaptureUnderlay()
	if err != nil {
		t.Fatal(err)
	}
	t.Run("east", func(t *testing.T) { p.east.reachesOther(t, p.west, "west.k8s.lab") })
	t.Run("west", func(t *testing.T) { p.west.reachesOther(t, p.east, "east.k8s.lab") })
	t.Run("policies", p.policies)
	t.Run("tailscaled is killed", func(t *testing.T) {
		signalTailscaled(t, p.west.Nodes[0], "KILL")
		p.east.reachesOther(t, p.west, "west.k8s.lab")
		p.west.reachesOther(t, p.east, "east.k8s.lab")
	})
	if n := capture.Clear(); n > 0 {
		t.Errorf("%d packets of pods were on the underlay in clear", n)
	}
	if err := p.east.SendClear(p.east.Nodes[0], netip.MustParseAddr("192.0.2.1"), addrs(t, p.west.pod())[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	if n := capture.Clear(); n != 1 {
		t.Errorf("of one packet in clear the capture saw %d: it proves nothing", n)
	}
	t.Run("overlap", func(t *testing.T) { p.overlap(t, from) })
}

// newPair starts both, each with a node that leads to its Services.
func newPair(t *testing.T) *pair {
	p := &pair{}
	p.east = start(t, cluster.Options{ProxyMode: *proxyMode, Workers: 1, Other: "west", Policy: func(policy map[string]any) {
		owners := policy["tagOwners"].(map[string]any)
		owners[westTag] = owners[lab.Tag]
		rule := policy["acls"].([]map[string]any)[0]
		for _, list := range []string{westRanges.Pods, westRanges.Services, cluster.ServiceCIDRs} {
			for r := range strings.SplitSeq(list, ",") {
				rule["src"], rule["dst"] = append(rule["src"].([]string), r), append(rule["dst"].([]string), r+":*")
			}
		}
	}})
	p.west = start(t, cluster.Options{ProxyMode: *proxyMode, Beside: p.east.Cluster, Ranges: westRanges})
	for _, w := range []*world{p.east, p.west} {
		w.apply(t, "echo.yaml", echoManifest)
		w.kubectl(t, "label", "node", w.Nodes[len(w.Nodes)-1].Name, servicesLabel+"=")
	}
	p.install(t, nil, nil)
	for _, w := range []*world{p.east, p.west} {
		eventually(t, "nodes", 4*time.Minute, w.WaitReady)
		eventually(t, "pods", 4*time.Minute, w.findPods)
	}
	return p
}

// install installs the chart, or upgrades it, in both; each is told of the other so.
func (p *pair) install(t *testing.T, ofEast, ofWest any) {
	t.Helper()
	values := func(name string, remote any) map[string]any {
		network := map[string]any{"advertiseServices": map[string]any{"nodeSelector": map[string]any{servicesLabel: ""}}}
		if remote != nil {
			network["remoteClusters"] = remote
		}
		return map[string]any{"dns": map[string]any{"alias": name + ".k8s.lab"}, "network": network}
	}
	p.east.install(t, map[string]any{"config": values("east", ofEast)})
	west := values("west", ofWest)
	west["tailscale"] = map[string]any{"tags": []string{westTag}}
	p.west.install(t, map[string]any{"config": west})
}

// rolledOut waits until every node's daemon has the configuration.
func (w *world) rolledOut(t *testing.T) {
	t.Helper()
	if _, err := w.Kubectl(within(t, 5*time.Minute), "rollout", "status", "-n", namespace, "daemonset/headcni"); err != nil {
		t.Fatal(err)
	}
}

// pod is the one on the node that leads to Services.
func (w *world) pod() *corev1.Pod { return w.echo[w.Nodes[len(w.Nodes)-1].Name] }

// printRemote is the entry for other clusters that the controller prints.
func (w *world) printRemote(t *testing.T, name string) any {
	t.Helper()
	var entry []any
	eventually(t, "what "+name+"'s controller prints for others", 2*time.Minute, func(ctx context.Context) error {
		out, err := w.Kubectl(ctx, "exec", "-n", namespace, "deploy/headcni-controller", "--", "headcnictl", "dns", "remote", "--name", name)
		if err != nil {
			return err
		}
		return yaml.Unmarshal([]byte(out), &entry)
	})
	t.Logf("%s: %v", name, entry)
	return entry
}

// services are the addresses of the Service echo, IPv4 first.
func (w *world) services(t *testing.T) (out []netip.Addr) {
	t.Helper()
	for _, ip := range strings.Fields(w.kubectl(t, "get", "service", "-n", echoes, "echo", "-o", "jsonpath={.spec.clusterIPs[0]} {.spec.clusterIPs[1]}")) {
		out = append(out, netip.MustParseAddr(ip))
	}
	return out
}

// reachesOther: a pod of this cluster reaches the other's pods, which see its own address, and Services by address and by name.
func (w *world) reachesOther(t *testing.T, other *world, domain string) {
	from := w.pod()
	own := addrs(t, from)
	for node, to := range other.echo {
		for i, addr := range addrs(t, to) {
			eventually(t, "the pod on "+node, 4*time.Minute, func(ctx context.Context) error {
				out, err := w.get(ctx, from, url(addr, 8080, "/clientip"))
				if err != nil {
					return err
				}
				if seen, err := netip.ParseAddrPort(strings.TrimSpace(out)); err != nil || seen.Addr().Unmap() != own[i] {
					return fmt.Errorf("%s sees %q, want %s", addr, out, own[i])
				}
				return nil
			})
		}
	}
	for _, service := range other.services(t) {
		w.hears(t, "a Service by its address", from, url(service, 80, "/hostname"), other)
	}
	for _, flag := range []string{"-4", "-6"} {
		w.hears(t, "a Service by its name", from, "http://echo.e2e.svc."+domain+"/hostname", other, flag)
		w.hears(t, "pods by the name of a headless Service", from, "http://headless.e2e.svc."+domain+":8080/hostname", other, flag)
	}
	w.hears(t, "its own Services as ever", from, "http://echo.e2e.svc.cluster.local/hostname", w)
}

// hears waits for an answer by a pod of a cluster.
func (w *world) hears(t *testing.T, what string, from *corev1.Pod, url string, of *world, flags ...string) {
	t.Helper()
	eventually(t, what, 4*time.Minute, func(ctx context.Context) error {
		out, err := w.Kubectl(ctx, append([]string{"exec", "-n", from.Namespace, from.Name, "--", "curl", "-sS", "-g", "-m", "5", url}, flags...)...)
		if err != nil {
			return err
		}
		for _, p := range of.echo {
			if p.Name == strings.TrimSpace(out) {
				return nil
			}
		}
		return fmt.Errorf("%s is answered by %q, which is no pod of that cluster", url, out)
	})
}

// policies of a cluster hold for another's pods by their addresses, at both ends. For who asks, a Service of another cluster is its address: what
// becomes of that is the other's business.
func (p *pair) policies(t *testing.T) {
	friend, foe, to := p.east.pod(), p.east.echo[cluster.ControlPlane], p.west.pod()
	var service []string
	answers := func(from *corev1.Pod, want bool, urls ...string) {
		t.Helper()
		for _, u := range urls {
			eventually(t, fmt.Sprintf("%s to %s, which is to be answered: %t", from.Name, u, want), time.Minute, func(ctx context.Context) error {
				if out, err := p.east.get(ctx, from, u); (err == nil) != want {
					return fmt.Errorf("%q, %w", out, errors.Join(err, errors.New("it is not so")))
				}
				return nil
			})
		}
	}
	var pods []string
	for i, a := range p.west.services(t) {
		service, pods = append(service, url(a, 80, "/hostname")), append(pods, url(addrs(t, to)[i], 8080, "/hostname"))
	}
	policy := func(w *world, direction, peer string, blocks ...string) {
		t.Helper()
		var list []map[string]any
		for _, b := range blocks {
			list = append(list, map[string]any{"ipBlock": map[string]any{"cidr": b}})
		}
		b, err := json.Marshal(map[string]any{
			"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": map[string]any{"name": "other-cluster", "namespace": echoes},
			"spec": map[string]any{"podSelector": map[string]any{"matchLabels": map[string]any{"app": "echo"}}, "policyTypes": []string{direction},
				strings.ToLower(direction): []map[string]any{{peer: list}}},
		})
		if err != nil {
			t.Fatal(err)
		}
		w.apply(t, "other-cluster.yaml", string(b))
	}
	own := addrs(t, friend)
	policy(p.west, "Ingress", "from", own[0].String()+"/32", own[1].String()+"/128")
	answers(foe, false, append(pods, service...)...)
	answers(friend, true, append(pods, service...)...)
	p.west.kubectl(t, "delete", "networkpolicy", "-n", echoes, "other-cluster")
	answers(foe, true, append(pods, service...)...)

	policy(p.east, "Egress", "to", strings.Split(westRanges.Services, ",")...)
	answers(friend, false, pods...)
	answers(friend, true, service...)
	policy(p.east, "Egress", "to", strings.Split(westRanges.Pods, ",")...)
	answers(friend, false, service...)
	answers(friend, true, pods...)
	p.east.kubectl(t, "delete", "networkpolicy", "-n", echoes, "other-cluster")
	answers(friend, true, append(pods, service...)...)
}

// overlap: a cluster with ranges of this one's own, which no configuration has where Kubernetes says them, is refused by both names. Nothing that
// was in force changes.
func (p *pair) overlap(t *testing.T, from map[string]any) {
	b, err := json.Marshal(from["west"])
	if err != nil {
		t.Fatal(err)
	}
	wrong := strings.Replace(string(b), `"podCIDRs":["10.245.0.0/24"`, `"podCIDRs":["10.244.0.0/16"`, 1)
	var entry []any
	if err := json.Unmarshal([]byte(wrong), &entry); err != nil || wrong == string(b) {
		t.Fatalf("%v: %s", err, b)
	}
	p.install(t, entry, from["east"])
	eventually(t, "a Node of east is warned by both names", 2*time.Minute, func(ctx context.Context) error {
		events, err := p.east.Client.EventsV1().Events(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if strings.Contains(e.Note, "network.remoteClusters[west]") && strings.Contains(e.Note, "this cluster's own pods") {
				t.Log(e.Note)
				return nil
			}
		}
		return fmt.Errorf("none of %d events says it", len(events.Items))
	})
	p.east.reachesOther(t, p.west, "west.k8s.lab")
	p.west.reachesOther(t, p.east, "east.k8s.lab")
	p.install(t, from["west"], from["east"])
	p.east.rolledOut(t)
	eventually(t, "nodes", time.Minute, p.east.WaitReady)
	p.east.reachesOther(t, p.west, "west.k8s.lab")
}
