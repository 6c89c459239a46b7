package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	kubetesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/tailscale"
)

func node(name string, cidrs ...string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: "u"}, Spec: corev1.NodeSpec{PodCIDRs: cidrs}}
}

func TestAggregate(t *testing.T) {
	tests := []struct{ in, want []string }{
		{nil, nil},
		{[]string{"10.244.0.0/24"}, []string{"10.244.0.0/24"}},
		{[]string{"10.244.1.0/24", "10.244.0.0/24"}, []string{"10.244.0.0/23"}},
		{[]string{"10.244.1.0/24", "10.244.2.0/24"}, []string{"10.244.1.0/24", "10.244.2.0/24"}}, // neighbours, not siblings
		{[]string{"10.244.0.0/24", "10.244.1.0/24", "10.244.2.0/24", "10.244.3.0/24"}, []string{"10.244.0.0/22"}},
		{[]string{"10.244.0.0/23", "10.244.1.0/24", "10.244.2.0/24"}, []string{"10.244.0.0/23", "10.244.2.0/24"}},
		{[]string{"fd00:0:0:1::/64", "fd00::/64", "10.0.0.0/24"}, []string{"10.0.0.0/24", "fd00::/63"}},
	}
	for _, tt := range tests {
		if diff := cmp.Diff(prefixes(tt.want...), netset.Aggregate(prefixes(tt.in...)), comparePrefixes); diff != "" {
			t.Errorf("%v: %s", tt.in, diff)
		}
	}
}

func TestLearn(t *testing.T) {
	v := func(n *corev1.Node, pods ...string) *clusterView {
		return &clusterView{synced: true, node: n, pods: prefixes(pods...)}
	}
	known := learned{Node: "a", PodCIDRs: prefixes("10.244.1.0/24"), ClusterCIDRs: prefixes("10.244.0.0/23")}
	tests := []struct {
		name string
		have learned
		v    *clusterView
		want learned
	}{
		{"nothing said yet", known, &clusterView{}, known},
		{"API server lost later", known, &clusterView{err: errors.New("refused"), services: prefixes("10.96.0.0/16")},
			learned{Node: "a", PodCIDRs: known.PodCIDRs, ClusterCIDRs: known.ClusterCIDRs, ServiceCIDRs: prefixes("10.96.0.0/16")}},
		{"first", learned{}, v(node("a", "10.244.1.0/24", "fd00::/64"), "10.244.1.0/24", "fd00::/64"),
			learned{Node: "a", PodCIDRs: prefixes("10.244.1.0/24", "fd00::/64"), ClusterCIDRs: prefixes("10.244.1.0/24", "fd00::/64")}},
		{"none given yet", learned{}, v(node("a")), learned{Node: "a"}},
		{"Node is gone", known, v(nil, "10.244.0.0/24"), learned{Node: "a", PodCIDRs: known.PodCIDRs, ClusterCIDRs: prefixes("10.244.0.0/24")}},
		{"Node without, made again", known, v(node("a")), learned{Node: "a", PodCIDRs: known.PodCIDRs}},
		{"another", known, v(node("a", "10.244.7.0/24")),
			learned{Node: "a", PodCIDRs: prefixes("10.244.7.0/24"), Leaving: prefixes("10.244.1.0/24")}},
		{"and back", learned{Node: "a", PodCIDRs: prefixes("10.244.7.0/24"), Leaving: prefixes("10.244.1.0/24")}, v(node("a", "10.244.1.0/24")),
			learned{Node: "a", PodCIDRs: prefixes("10.244.1.0/24"), Leaving: prefixes("10.244.7.0/24")}},
		{"renamed", known, v(nil), learned{Node: "b", Leaving: prefixes("10.244.1.0/24")}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			name := "a"
			if tt.name == "renamed" {
				name = "b"
			}
			got, err := tt.have.learn(tt.v, name)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, comparePrefixes); diff != "" {
				t.Error(diff)
			}
		})
	}
	if _, err := known.learn(v(node("a", "10.244.1.7/24")), "a"); err == nil {
		t.Error("took a CIDR with host bits")
	}
	live := prefixes("10.244.1.9/32")[0].Addr()
	l := learned{Leaving: prefixes("10.244.1.0/24", "10.244.2.0/24")}.stay([]netip.Addr{live})
	if diff := cmp.Diff(prefixes("10.244.1.0/24"), l.Leaving, comparePrefixes); diff != "" {
		t.Error(diff)
	}
}

func TestInForce(t *testing.T) {
	c := config.Default()
	c.Network.ClusterCIDRs = config.CIDRs{"10.244.0.0/16"}
	l := learned{PodCIDRs: prefixes("10.244.1.0/24"), ClusterCIDRs: prefixes("10.250.0.0/24"), Leaving: prefixes("10.9.0.0/24"),
		ServiceCIDRs: prefixes("10.96.0.0/16")}
	got, err := inForce(c, l)
	if err != nil {
		t.Fatal(err)
	}
	want := config.Network{PodCIDRs: config.CIDRs{"10.244.1.0/24"}, ClusterCIDRs: config.CIDRs{"10.244.0.0/16", "10.9.0.0/24", "10.250.0.0/24"},
		ServiceCIDRs: config.CIDRs{"10.96.0.0/16"}}
	want.Masquerade, want.TailnetEgress, want.LANFirst = c.Network.Masquerade, c.Network.TailnetEgress, c.Network.LANFirst
	if diff := cmp.Diff(want, got.Network); diff != "" {
		t.Error(diff)
	}
	if len(c.Network.ClusterCIDRs) != 1 {
		t.Error("changed what it was given")
	}
	l.ServiceCIDRs = prefixes("10.244.0.0/20")
	if _, err := inForce(c, l); err == nil || !strings.Contains(err.Error(), "service CIDR") {
		t.Errorf("pods among services: %v", err)
	}
}

func TestPlanNodeWrite(t *testing.T) {
	o := observation{mode: "host", tailnet: &tailscale.Status{State: tailscale.Running}}
	o.tailnet.Self.NodeKey = "nodekey:1"
	o.tailnet.Self.IPs = []netip.Addr{prefixes("100.64.0.1/32")[0].Addr(), prefixes("fd7a:115c:a1e0::1/128")[0].Addr()}
	n := node("a")
	all := map[string]string{kube.NodeKey: "nodekey:1", kube.Mode: "host", kube.TailnetIPs: "100.64.0.1,fd7a:115c:a1e0::1"}
	if w := planNodeWrite(n, o, true); !cmp.Equal(w.annotations, all) || !w.up {
		t.Errorf("new Node: %+v", w)
	}
	if w := planNodeWrite(n, observation{}, false); len(w.annotations) > 0 || w.up {
		t.Errorf("tailscaled away: %+v", w)
	}
	n.Annotations = map[string]string{kube.NodeKey: "nodekey:0", kube.Mode: "host", kube.TailnetIPs: all[kube.TailnetIPs]}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionTrue, Reason: "NoRouteCreated"}}
	if w := planNodeWrite(n, o, true); !cmp.Equal(w.annotations, map[string]string{kube.NodeKey: "nodekey:1"}) || !w.up {
		t.Errorf("key changed, cloud says no route: %+v", w)
	}
	n.Status.Conditions[0].Status = corev1.ConditionFalse
	if w := planNodeWrite(n, o, true); w.up {
		t.Error("says again what stands there")
	}
}

// startCluster watches a fake API server until the test ends.
func startCluster(t *testing.T, objects ...runtime.Object) (*cluster, *fake.Clientset, *atomic.Int64) {
	t.Helper()
	client := fake.NewClientset(objects...)
	k := watched(client, "a", slog.New(slog.DiscardHandler))
	var pokes atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { k.run(ctx, func() { pokes.Add(1) }); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	return k, client, &pokes
}

func TestClusterWatch(t *testing.T) {
	services := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16"}}}
	k, client, pokes := startCluster(t, node("a"), node("b", "10.244.2.0/24"), services)
	waitUntil(t, func() bool { v := k.view(); return v.synced && v.node != nil && len(v.services) == 1 })
	nodes := client.CoreV1().Nodes()
	own := node("a", "10.244.3.0/24")
	own.Annotations = map[string]string{"other/x": strings.Repeat("x", 1000), kube.Mode: "host"}
	own.Status.Images = []corev1.ContainerImage{{Names: []string{"big"}}}
	if _, err := nodes.Update(t.Context(), own, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, func() bool { return slices.Equal(k.view().pods, prefixes("10.244.2.0/23")) })
	v := k.view()
	if !cmp.Equal(v.node.Annotations, map[string]string{kube.Mode: "host"}) || v.node.Status.Images != nil {
		t.Errorf("keeps more than it needs: %+v", v.node)
	}
	if h := v.holder(prefixes("10.244.2.128/25")[0], "a"); h != "b" {
		t.Errorf("holder %q", h)
	}

	// News that are none to us: no pass.
	time.Sleep(50 * time.Millisecond)
	before := pokes.Load()
	other := node("b", "10.244.2.0/24")
	other.Annotations = map[string]string{"x": "y"}
	own.Status.Images = nil
	for _, n := range []*corev1.Node{other, own} {
		if _, err := nodes.Update(t.Context(), n, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(100 * time.Millisecond)
	if n := pokes.Load() - before; n != 0 {
		t.Errorf("%d passes for nothing", n)
	}
	if err := nodes.Delete(t.Context(), "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, func() bool { return k.view().node == nil })
}

func TestClusterAway(t *testing.T) {
	client := fake.NewClientset()
	away := errors.New("connection refused")
	client.PrependReactor("*", "*", func(kubetesting.Action) (bool, runtime.Object, error) { return true, nil, away })
	k := watched(client, "a", slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { k.run(ctx, func() {}); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	waitUntil(t, func() bool { return errors.Is(k.view().err, away) })
	if err := k.view().noCIDR("a", 0); err == nil || !strings.Contains(err.Error(), "cannot be asked") {
		t.Errorf("says %v", err)
	}
}

// A whole daemon on a node of a cluster, without tailscaled: late CIDR, change of CIDR, the server away, uninstall.
func TestDaemonInKubernetes(t *testing.T) {
	c := testConfig(t)
	c.Network.PodCIDRs, c.Network.ClusterCIDRs = nil, nil
	t.Setenv("NODE_NAME", "a")
	before := hostState(t)
	k, client, _ := startCluster(t, node("a"), node("b", "10.244.2.0/24"))
	make1 := func() *Daemon {
		t.Helper()
		saved, err := loadState()
		if err != nil {
			t.Fatal(err)
		}
		c := c
		c.Network.PodCIDRs = config.CIDRs{"192.0.2.0/24"} // New wants one or a real cluster; ours stands in
		d := newDaemon(t, c)
		d.cfg.Network.PodCIDRs, d.cluster, d.saved = nil, k, saved
		d.board = d.newBoard(d.parts())
		return d
	}
	waitUntil(t, func() bool { return k.view().synced })
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
		waitUntil(t, func() bool { v := k.view(); return v.node != nil && slices.Contains(v.node.Spec.PodCIDRs, cidr) })
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
	k = watched(client, "a", d.log)
	d = make1()
	d.pass(t.Context())
	if diff := cmp.Diff(programmed, hostState(t)); diff != "" || d.last.config.Network.PodCIDRs[0] != "10.244.3.0/24" {
		t.Errorf("without the API server: %v %s", d.last.config.Network.PodCIDRs, diff)
	}

	// Another range, while a pod of the old one runs.
	k, client, _ = startCluster(t, node("a"), node("b", "10.244.2.0/24"))
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
	waitUntil(t, func() bool { return k.view().node.Annotations[kube.Uninstall] == "true" })
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
	waitUntil(t, func() bool { return len(k.view().node.Annotations) == 0 })
	d.pass(t.Context())
	if diff := cmp.Diff(before, hostState(t)); diff != "" {
		t.Errorf("after uninstall (-want +got):\n%s", diff)
	}
}

func TestEventsOnTheNode(t *testing.T) {
	k, client, _ := startCluster(t, node("a"))
	d := &Daemon{cluster: k}
	for range maxEvents + 5 {
		d.tell(partFirewall, false, strings.Repeat("long ", 1000))
	}
	d.tell(partFirewall, true, "right again")
	if err := d.events.send(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	list, err := client.EventsV1().Events("default").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != maxEvents {
		t.Fatalf("%d events, %v", len(list.Items), err)
	}
	for _, e := range list.Items {
		if e.Regarding.Name != "a" || e.Action != partFirewall || e.EventTime.IsZero() {
			t.Errorf("%+v", e)
		}
	}
}
