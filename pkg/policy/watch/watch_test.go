package watch

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	kubetesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/policy"
)

func addrs(texts ...string) (out []netip.Addr) {
	for _, s := range texts {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func prefixes(texts ...string) (out []netip.Prefix) {
	for _, s := range texts {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

var compareAddrs = cmp.Options{
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
}

// cluster has two nodes; all reports whether their Nodes have been read.
func cluster(all *atomic.Bool) func() ([]nodeview.Node, bool) {
	return func() ([]nodeview.Node, bool) {
		return []nodeview.Node{
			{Name: "a", Addrs: addrs("100.64.0.1", "192.168.50.1"), PodCIDRs: prefixes("10.244.1.0/24")},
			{Name: "b", Addrs: addrs("10.244.1.9", "192.168.50.2"), PodCIDRs: prefixes("10.244.2.0/24")},
		}, all.Load()
	}
}

func onNode(node, name string, ips ...string) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID("uid-" + name), Labels: map[string]string{"app": name}},
		Spec:       corev1.PodSpec{NodeName: node},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, ip := range ips {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	return p
}

// start follows an imitated API server until the test ends.
func start(t *testing.T, all *atomic.Bool, client kubetest.Client) (*Watch, *atomic.Int64) {
	t.Helper()
	w := New(client, "a", cluster(all))
	var told atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { w.Run(ctx, func() { told.Add(1) }); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	return w, &told
}

func waitFor(t *testing.T, w *Watch, what string, ok func(c *Cluster) bool) (c *Cluster) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if c = w.Snapshot(); c != nil && ok(c) {
			return c
		}
	}
	t.Fatal("did not come to pass in 15 s:", what)
	return nil
}

func podOf(c *Cluster, name string) *policy.Pod {
	for _, p := range c.Pods {
		if p.Name == name {
			return p
		}
	}
	return nil
}

// TestSnapshot: what counts of each kind is in it, and nothing that one node says takes an address from another's pods.
func TestSnapshot(t *testing.T) {
	web := onNode("a", "web", "10.244.1.10", "fd00:244:1::a")
	web.Spec.Containers = []corev1.Container{{Ports: []corev1.ContainerPort{
		{Name: "http", ContainerPort: 8080}, {ContainerPort: 81}, {Name: "bad", ContainerPort: 70000}, {Name: "dns", ContainerPort: 53, Protocol: corev1.ProtocolUDP},
	}}}
	web.Spec.InitContainers = []corev1.Container{
		{Ports: []corev1.ContainerPort{{Name: "once", ContainerPort: 1}}},
		{RestartPolicy: new(corev1.ContainerRestartPolicyAlways), Ports: []corev1.ContainerPort{{Name: "side", ContainerPort: 2}}},
	}
	thief := onNode("b", "thief", "10.244.1.10", "10.244.2.7")
	done := onNode("b", "done", "10.244.2.8")
	done.Status.Phase = corev1.PodSucceeded
	host := onNode("b", "host", "192.168.50.2")
	host.Spec.HostNetwork = true
	static := onNode("a", "static", "10.244.1.11")
	static.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "hash"}
	leaving := onNode("b", "leaving", "10.99.0.1")
	leaving.DeletionTimestamp, leaving.Finalizers = &metav1.Time{Time: time.Now()}, []string{"x"}
	allow := &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "u", Annotations: map[string]string{"kubectl": strings.Repeat("x", 1000)}},
		Spec:       networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}},
	}
	var all atomic.Bool
	all.Store(true)
	w, _ := start(t, &all, kubetest.New(web, thief, done, host, static, leaving, allow,
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns", Labels: map[string]string{"team": "x"}}}))
	got := waitFor(t, w, "a snapshot", func(*Cluster) bool { return true })
	slices.SortFunc(got.Pods, func(a, b *policy.Pod) int { return strings.Compare(a.Name, b.Name) })
	labels := func(name string) map[string]string { return map[string]string{"app": name} }
	want := &policy.Snapshot{
		Node: "a",
		Pods: []*policy.Pod{
			{Namespace: "ns", Name: "done", Node: "b", Labels: labels("done"), Done: true},
			{Namespace: "ns", Name: "host", Node: "b", HostNetwork: true},
			{Namespace: "ns", Name: "leaving", Node: "b", Labels: labels("leaving"), IPs: addrs("10.99.0.1"), Terminating: true},
			{Namespace: "ns", Name: "static", UID: "uid-static", Node: "a", Labels: labels("static"), IPs: addrs("10.244.1.11")},
			{Namespace: "ns", Name: "thief", Node: "b", Labels: labels("thief"), IPs: addrs("10.244.2.7")},
			{
				Namespace: "ns", Name: "web", UID: "uid-web", Node: "a", Labels: labels("web"), IPs: addrs("10.244.1.10", "fd00:244:1::a"),
				Ports: []policy.NamedPort{
					{Name: "http", Protocol: policy.TCP, Port: 8080}, {Name: "dns", Protocol: policy.UDP, Port: 53}, {Name: "side", Protocol: policy.TCP, Port: 2},
				},
			},
		},
		Namespaces: []policy.Namespace{{Name: "ns", Labels: map[string]string{"team": "x"}}},
		Policies:   []*networkingv1.NetworkPolicy{{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "u"}, Spec: allow.Spec}},
		Nodes:      []policy.Node{{Name: "a", Addrs: addrs("100.64.0.1", "192.168.50.1")}, {Name: "b", Addrs: addrs("192.168.50.2")}},
		PodCIDRs:   prefixes("10.99.0.1/32", "10.244.1.0/24", "10.244.2.0/24", "fd00:244:1::a/128"),
	}
	if diff := cmp.Diff(want, got.Snapshot, compareAddrs); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[types.UID]types.UID{"uid-static": "hash"}, got.Static); diff != "" || got.Since.IsZero() {
		t.Error(diff, got.Since)
	}
	if again := w.Snapshot(); !again.Since.IsZero() {
		t.Error("a change that one snapshot had already:", again.Since)
	}
}

// TestWhole: while anything of any kind has not been read there is no snapshot.
func TestWhole(t *testing.T) {
	for _, kind := range []string{kindPods, kindNamespaces, kindPolicies, "nodes"} {
		t.Run(kind, func(t *testing.T) {
			var all, back atomic.Bool
			all.Store(kind != "nodes")
			client := kubetest.New(onNode("a", "web"))
			away := errors.New("connection refused")
			client.PrependReactor("list", kind, func(kubetesting.Action) (bool, runtime.Object, error) { return !back.Load(), nil, away })
			w, told := start(t, &all, client)
			if kind != "nodes" {
				for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
					if since, err := w.Away(); errors.Is(err, away) && !since.IsZero() && told.Load() > 0 {
						break
					}
					if time.Now().After(end) {
						t.Fatal("nobody says that the API server is away")
					}
				}
			}
			time.Sleep(50 * time.Millisecond)
			if w.Snapshot() != nil {
				t.Error("a snapshot of half a cluster")
			}
			back.Store(true)
			all.Store(true)
			waitFor(t, w, "a whole cluster", func(c *Cluster) bool { return podOf(c, "web") != nil })
			if since, err := w.Away(); err != nil || !since.IsZero() {
				t.Error(err, since)
			}
		})
	}
}

// TestChanges: each change that policies can ask for is told of, and no other.
func TestChanges(t *testing.T) {
	var all atomic.Bool
	all.Store(true)
	client := kubetest.New(onNode("b", "web", "10.244.2.1"), onNode("b", "db", "10.244.2.2"), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns"}})
	w, told := start(t, &all, client)
	waitFor(t, w, "a whole cluster", func(c *Cluster) bool { return len(c.Pods) == 2 })
	pods, ctx := client.CoreV1().Pods("ns"), t.Context()
	web := onNode("b", "web", "10.244.2.1")
	update := func(change func()) {
		t.Helper()
		change()
		if _, err := pods.Update(ctx, web, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(50 * time.Millisecond)
	before := told.Load()
	update(func() { web.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady}} })
	update(func() { web.Annotations = map[string]string{"x": "y"} })
	time.Sleep(50 * time.Millisecond)
	if n := told.Load() - before; n != 0 {
		t.Errorf("told %d times of nothing", n)
	}
	update(func() { web.Labels = map[string]string{"app": "other"} })
	c := waitFor(t, w, "a label", func(c *Cluster) bool { return podOf(c, "web").Labels["app"] == "other" })
	if podOf(c, "db").Labels["app"] != "db" || podOf(c, "db") != podOf(w.Snapshot(), "db") {
		t.Error("another pod is another one now")
	}
	update(func() { web.Status.Phase = corev1.PodFailed })
	waitFor(t, w, "the end of a pod", func(c *Cluster) bool { return podOf(c, "web").Done && podOf(c, "web").IPs == nil })
	if err := pods.Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, w, "a pod less", func(c *Cluster) bool { return len(c.Pods) == 1 && podOf(c, "db") != nil })
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns", Labels: map[string]string{"a": "b"}}}
	if _, err := client.CoreV1().Namespaces().Update(ctx, namespace, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, w, "a namespace's label", func(c *Cluster) bool { return c.Namespaces[0].Labels["a"] == "b" })
	rules := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p"}}
	policies := client.NetworkingV1().NetworkPolicies("ns")
	if _, err := policies.Create(ctx, rules, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, w, "a policy", func(c *Cluster) bool { return len(c.Policies) == 1 })
	rules.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}
	if _, err := policies.Update(ctx, rules, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, w, "another policy", func(c *Cluster) bool { return len(c.Policies[0].Spec.PolicyTypes) == 1 })
	if err := policies.Delete(ctx, "p", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, w, "no policy", func(c *Cluster) bool { return len(c.Policies) == 0 })
}

// TestRevoked: only who may read Nodes and no policies was told to stop.
func TestRevoked(t *testing.T) {
	for _, c := range []struct {
		forbidden []string
		away      bool
		want      bool
	}{{nil, false, false}, {[]string{"networkpolicies"}, false, true}, {[]string{"networkpolicies", "nodes"}, false, false}, {nil, true, false}} {
		client := kubetest.New(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}})
		client.PrependReactor("*", "*", func(a kubetesting.Action) (bool, runtime.Object, error) {
			if c.away {
				return true, nil, errors.New("connection refused")
			}
			kind := a.GetResource()
			return slices.Contains(c.forbidden, kind.Resource), nil, apierrors.NewForbidden(kind.GroupResource(), "", errors.New("RBAC"))
		})
		if got := New(client, "a", nil).Revoked(t.Context()); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

// TestShared: pods with the same labels hold one map, and what is no longer used is not kept for ever.
func TestShared(t *testing.T) {
	w := New(kubetest.New(), "a", nil)
	s, trim := &w.pods, w.trimPod
	for i := range 100 {
		p := onNode("b", fmt.Sprint("web-", i), "10.244.2.1")
		p.Labels = map[string]string{"app": "web", "hash": "1"}
		s.set(trim(p))
	}
	s.list[0].Labels["probe"] = "x"
	for i := range s.list {
		if s.list[i].Labels["probe"] != "x" {
			t.Fatalf("pod %d has labels of its own", i)
		}
	}
	for i := range 100000 {
		p := onNode("b", "changing")
		p.Labels = map[string]string{"n": fmt.Sprint(i)}
		s.set(trim(p))
	}
	if n := s.shared.n; n > 4*len(s.list)+2048 {
		t.Errorf("%d texts are kept of %d pods", n, len(s.list))
	}
}
