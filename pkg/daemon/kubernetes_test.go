package daemon

import (
	"context"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/tailscale"
)

func TestRangesInForce(t *testing.T) {
	c := config.Default()
	c.Network.ClusterCIDRs = config.CIDRs{"10.244.0.0/16"}
	l := nodeview.LastKnown{PodCIDRs: prefixes("10.244.1.0/24"), ClusterCIDRs: prefixes("10.250.0.0/24"), Leaving: prefixes("10.9.0.0/24"),
		ServiceCIDRs: prefixes("10.96.0.0/16")}
	got, err := rangesInForce(c, l)
	if err != nil {
		t.Fatal(err)
	}
	want := config.Ranges{Pods: prefixes("10.244.1.0/24"), Cluster: prefixes("10.244.0.0/16", "10.9.0.0/24", "10.250.0.0/24"),
		Remote: []netip.Prefix{}, Services: prefixes("10.96.0.0/16")}
	if diff := cmp.Diff(want, got, comparePrefixes); diff != "" {
		t.Error(diff)
	}
	l.ServiceCIDRs = prefixes("10.244.0.0/20")
	if _, err := rangesInForce(c, l); err == nil || !strings.Contains(err.Error(), "service CIDR") {
		t.Errorf("pods among services: %v", err)
	}
}

func node(name string, cidrs ...string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: "u"}, Spec: corev1.NodeSpec{PodCIDRs: cidrs}}
}

// startWatch watches a fake API server until the test ends.
func startWatch(t *testing.T, objects ...runtime.Object) (*nodeview.Watch, kubetest.Client) {
	t.Helper()
	client := kubetest.New(objects...)
	w := nodeview.Of(client, "a", quiet)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { w.Run(ctx, func() {}); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	return w, client
}

// A whole daemon on a node of a cluster, without tailscaled: late CIDR, change of CIDR, the server away, uninstall.
func TestDaemonInKubernetes(t *testing.T) {
	c := testConfig(t)
	c.Network.PodCIDRs, c.Network.ClusterCIDRs = nil, nil
	t.Setenv("NODE_NAME", "a")
	before := hostState(t)
	k, client := startWatch(t, node("a"), node("b", "10.244.2.0/24"))
	make1 := func() *Daemon {
		t.Helper()
		saved, err := loadState()
		if err != nil {
			t.Fatal(err)
		}
		c := c
		c.Network.PodCIDRs = config.CIDRs{"192.0.2.0/24"} // New wants one or a real cluster; ours stands in
		d := newDaemon(t, c)
		d.cfg.Network.PodCIDRs, d.kubernetes, d.saved = nil, k, saved
		d.board = d.newBoard(d.parts())
		return d
	}
	waitUntil(t, func() bool { return k.View().Synced })
	d := make1()
	d.pass(t.Context())
	if got := partErrors(d)[partConfig]; !strings.Contains(got, "has given Node a no pod CIDR yet") {
		t.Fatalf("config: %q", got)
	}
	if rules := run(t, "ip", "rule"); strings.Contains(rules, "519") {
		t.Errorf("half done:\n%s", rules)
	}
	give := func(cidr string) {
		t.Helper()
		if _, err := client.CoreV1().Nodes().Update(t.Context(), node("a", cidr), metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		waitUntil(t, func() bool { v := k.View(); return v.Node != nil && slices.Contains(v.Node.Spec.PodCIDRs, cidr) })
		d.pass(t.Context())
		if got := partErrors(d); got[partConfig] != "" || got[partRoutes] != "" || got[partFirewall] != "" {
			t.Fatalf("parts: %v", got)
		}
	}
	give("10.244.3.0/24")
	if rules := run(t, "ip", "rule"); !strings.Contains(rules, "5188:\tfrom all to 10.244.3.0/24") || !strings.Contains(rules, "5191:\tfrom all to 10.244.2.0/23") {
		t.Errorf("rules:\n%s", rules)
	}
	programmed := hostState(t)

	// Boots and goes on with the server away, from what was kept.
	k = nodeview.Of(client, "a", d.log)
	d = make1()
	d.pass(t.Context())
	if got := partErrors(d)[partConfig]; !strings.Contains(got, "asks the API server whether") {
		t.Errorf("config: %q", got)
	}
	d.began = time.Time{} // it does not answer for long
	d.pass(t.Context())
	if diff := cmp.Diff(programmed, hostState(t)); diff != "" || d.last.ranges.Pods[0].String() != "10.244.3.0/24" {
		t.Errorf("without the API server: %v %s", d.last.ranges.Pods, diff)
	}

	// Another range, while a pod of the old one runs.
	k, client = startWatch(t, node("a"), node("b", "10.244.2.0/24"))
	d = make1()
	run(t, "ip", "link", "add", "hc0123456789", "type", "veth", "peer", "name", "peer0")
	run(t, "ip", "link", "set", "hc0123456789", "up", "alias", conflist.NetworkName+" c1/eth0 default/web")
	run(t, "ip", "route", "add", "10.244.3.9/32", "dev", "hc0123456789", "proto", "static")
	give("10.244.8.0/24")
	rules := run(t, "ip", "rule")
	if !strings.Contains(rules, "5188:\tfrom all to 10.244.3.0/24") || strings.Contains(rules, "5189:\tfrom all to 10.244.3.0/24") ||
		!strings.Contains(rules, "5189:\tfrom all to 10.244.8.0/24") {
		t.Errorf("with a pod of the old range:\n%s", rules)
	}
	if out := run(t, "ip", "route", "get", "10.244.3.9"); !strings.Contains(out, "hc0123456789") {
		t.Errorf("the old pod is cut off: %s", out)
	}
	run(t, "ip", "link", "del", "hc0123456789")
	d.pass(t.Context())
	if rules := run(t, "ip", "rule"); strings.Contains(rules, "to 10.244.3.0/24 lookup main") {
		t.Errorf("the old range stays for good:\n%s", rules)
	}

	asked := node("a", "10.244.8.0/24")
	asked.Annotations = map[string]string{kube.Uninstall: "true", kube.NodeKey: "nodekey:1"}
	if _, err := client.CoreV1().Nodes().Update(t.Context(), asked, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, func() bool { return k.View().Node.Annotations[kube.Uninstall] == "true" })
	if d.pass(t.Context()) != fullCheck {
		t.Error("not uninstalled")
	}
	n, err := client.CoreV1().Nodes().Get(t.Context(), "a", metav1.GetOptions{})
	if err != nil || n.Annotations[kube.Uninstalled] == "" || n.Annotations[kube.NodeKey] != "" {
		t.Errorf("Node: %v, %v", n.Annotations, err)
	}
	if _, err := client.CoreV1().Nodes().Update(t.Context(), node("a", "10.244.8.0/24"), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, func() bool { return len(k.View().Node.Annotations) == 0 })
	d.pass(t.Context())
	if diff := cmp.Diff(before, hostState(t)); diff != "" {
		t.Errorf("after uninstall (-want +got):\n%s", diff)
	}
}

// TestConflistOfAnEarlierBoot: a Node that was made anew while its machine was off has other pod CIDRs, and another Node may have the former ones. The conflist of the boot
// before names these, and its gate finds them closed, as all of the cluster is without tailscaled: until that answers a pod would get an
// address at which everybody else looks for a pod of another node. Nor does its gate wait for NetworkPolicies that were switched on meanwhile.
func TestConflistOfAnEarlierBoot(t *testing.T) {
	c := testConfig(t)
	c.Network.PodCIDRs, c.Network.ClusterCIDRs = nil, nil
	nstest.FreshState(t)
	c.CNI.ConfDir = t.TempDir()
	t.Setenv("NODE_NAME", "a")
	former, now := netip.MustParsePrefix("10.244.3.0/24"), netip.MustParsePrefix("10.244.8.0/24")
	old, err := conflist.Render(conflist.Input{PodCIDRs: []netip.Prefix{former}, MTU: 1280, IPAM: config.Default().IPAM})
	if err == nil {
		err = os.WriteFile(conflist.Path(c.CNI.ConfDir), old, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	d := newDaemon(t, func() config.Config { c := c; c.Network.PodCIDRs = config.CIDRs{"192.0.2.0/24"}; return c }())
	d.cfg.Network.PodCIDRs = nil
	d.kubernetes, _ = startWatch(t, node("a", now.String()), node("b", former.String()))
	d.saved.Kubernetes = nodeview.LastKnown{Node: "a", PodCIDRs: []netip.Prefix{former}}
	d.board = d.newBoard(d.parts())
	t.Cleanup(func() { _ = removeNetwork(context.Background(), d.saved) })
	waitUntil(t, func() bool { return d.kubernetes.View().Synced })
	d.pass(t.Context())
	if got := partErrors(d); got[partRoutes] != "" || got[partConflist] == "" {
		t.Fatal(got)
	}
	var gate podlink.Handle
	defer gate.Close()
	if err := gate.Gate([]netip.Prefix{former}, false); err != nil {
		t.Error("the gate alone tells:", err)
	}
	have, err := conflist.IPAM(c.CNI.ConfDir)
	if err != nil || len(have.Sets) != 1 || have.Sets[0][0].Subnet != now {
		t.Errorf("pods get addresses of %+v, %v", have.Sets, err)
	}
	d.cfg.Network.NetworkPolicy = true
	d.pass(t.Context())
	if b, err := os.ReadFile(conflist.Path(c.CNI.ConfDir)); err != nil || !strings.Contains(string(b), `"enable_network_policy": true`) {
		t.Errorf("the gate does not wait for policies: %s, %v", b, err)
	}
}

// An uninstall that failed half-way, and is wanted no more, leaves a process whose loops have ended: it would say that policies are in force, and
// no new pod would get any. It ends, and the next one makes all anew.
func TestUninstallIsWantedNoMore(t *testing.T) {
	c := testConfig(t)
	c.Network.PodCIDRs, c.Network.ClusterCIDRs = nil, nil
	nstest.FreshState(t)
	c.CNI.ConfDir = t.TempDir()
	// A host's own tailscaled is away: its prefs cannot be put back.
	if err := (state{Mode: config.ModeHost, Prefs: &tailscale.SavedPrefs{}}).save(state{}); err != nil {
		t.Fatal(err)
	}
	asked := node("a", "10.244.1.0/24")
	asked.Annotations = map[string]string{kube.Uninstall: "true"}
	k, client := startWatch(t, asked)
	d := newDaemon(t, func() config.Config { c := c; c.Network.PodCIDRs = config.CIDRs{"192.0.2.0/24"}; return c }())
	d.cfg.Network.PodCIDRs, d.kubernetes = nil, k
	d.board = d.newBoard(d.parts())
	waitUntil(t, func() bool { return k.View().UninstallAsked() })
	ctx, cancel := context.WithCancelCause(t.Context())
	d.end = cancel
	if d.pass(ctx); d.uninstallAt.IsZero() || d.uninstalled || ctx.Err() != nil {
		t.Fatal("it did not fail: ", d.uninstalled)
	}
	if _, err := client.CoreV1().Nodes().Update(t.Context(), node("a", "10.244.1.0/24"), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, func() bool { return !k.View().UninstallAsked() })
	d.pass(ctx)
	if err := context.Cause(ctx); err == nil || !strings.Contains(err.Error(), "uninstall") {
		t.Errorf("it goes on: %v, %v", err, partErrors(d))
	}
}
