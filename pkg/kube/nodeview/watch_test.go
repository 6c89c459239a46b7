package nodeview

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
	kubetesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/kube"
)

func node(name string, cidrs ...string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: "u"}, Spec: corev1.NodeSpec{PodCIDRs: cidrs}}
}

func prefixes(texts ...string) (out []netip.Prefix) {
	for _, s := range texts {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// startWatch watches a fake API server until the test ends.
func startWatch(t *testing.T, objects ...runtime.Object) (*Watch, kubetest.Client, *atomic.Int64) {
	t.Helper()
	client := kubetest.New(objects...)
	w := Of(client, "a", slog.New(slog.DiscardHandler))
	var changes atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { w.Run(ctx, func() { changes.Add(1) }); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	return w, client, &changes
}

func TestWatchWatch(t *testing.T) {
	services := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16"}}}
	w, client, changes := startWatch(t, node("a"), node("b", "10.244.2.0/24"), services)
	waitUntil(t, func() bool { v := w.View(); return v.Synced && v.Node != nil && len(v.ServiceCIDRs) == 1 })
	nodes := client.CoreV1().Nodes()
	own := node("a", "10.244.3.0/24")
	own.Annotations = map[string]string{"other/x": strings.Repeat("x", 1000), kube.Mode: "host"}
	own.Status.Images = []corev1.ContainerImage{{Names: []string{"big"}}}
	own.Status.NodeInfo = corev1.NodeSystemInfo{ContainerRuntimeVersion: "cri-o://1.34.0", OSImage: "big"}
	if _, err := nodes.Update(t.Context(), own, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, func() bool { return slices.Equal(w.View().PodCIDRs, prefixes("10.244.2.0/23")) })
	v := w.View()
	if !cmp.Equal(v.Node.Annotations, map[string]string{kube.Mode: "host"}) || v.Node.Status.Images != nil {
		t.Errorf("keeps more than it needs: %+v", v.Node)
	}
	if v.Runtime() != "cri-o://1.34.0" || v.Node.Status.NodeInfo.OSImage != "" {
		t.Errorf("runtime %q of %+v", v.Runtime(), v.Node.Status.NodeInfo)
	}
	if h := v.Holder(prefixes("10.244.2.128/25")[0]); h != "b" {
		t.Errorf("holder %q", h)
	}

	// News that are none to us: no pass.
	time.Sleep(50 * time.Millisecond)
	before := changes.Load()
	other := node("b", "10.244.2.0/24")
	other.Annotations = map[string]string{"x": "y"}
	own.Status.Images = nil
	for _, n := range []*corev1.Node{other, own} {
		if _, err := nodes.Update(t.Context(), n, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(100 * time.Millisecond)
	if n := changes.Load() - before; n != 0 {
		t.Errorf("%d passes for nothing", n)
	}
	if err := nodes.Delete(t.Context(), "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, func() bool { return w.View().Node == nil })
}

// TestNodesAddrs: a node is known by the addresses of its object and of its daemon, which may claim the tailnet's only. Whoever asked is
// told of each change of them, and of nothing else.
func TestNodesAddrs(t *testing.T) {
	other := node("b", "10.244.2.0/24")
	other.Annotations = map[string]string{kube.TailnetIPs: "fd7a:115c:a1e0::2,100.64.0.2,10.244.1.9,x"}
	other.Status.Addresses = []corev1.NodeAddress{{Address: "b.example"}, {Address: "192.168.50.2"}}
	client := kubetest.New(node("a"), other)
	w := Of(client, "a", slog.New(slog.DiscardHandler))
	var told atomic.Int64
	w.OnAddrs(func() { told.Add(1) })
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { w.Run(ctx, func() {}); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	is := func(want ...Node) {
		t.Helper()
		waitUntil(t, func() bool {
			got, all := w.Nodes()
			return all && cmp.Equal(want, got, comparePrefixes)
		})
	}
	b := Node{Name: "b", PodCIDRs: prefixes("10.244.2.0/24")}
	for _, text := range []string{"100.64.0.2", "192.168.50.2", "fd7a:115c:a1e0::2"} {
		b.Addrs = append(b.Addrs, netip.MustParseAddr(text))
	}
	is(Node{Name: "a"}, b)
	time.Sleep(50 * time.Millisecond)
	before := told.Load()
	other.Labels = map[string]string{"x": "y"}
	if _, err := client.CoreV1().Nodes().Update(t.Context(), other, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	if n := told.Load() - before; n != 0 {
		t.Errorf("told %d times of nothing", n)
	}
	other.Status.Addresses = other.Status.Addresses[:1]
	if _, err := client.CoreV1().Nodes().Update(t.Context(), other, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	b.Addrs = []netip.Addr{b.Addrs[0], b.Addrs[2]}
	is(Node{Name: "a"}, b)
	waitUntil(t, func() bool { return told.Load() == before+1 })
	if err := client.CoreV1().Nodes().Delete(t.Context(), "b", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	is(Node{Name: "a"})
}

func TestWatchAway(t *testing.T) {
	client := kubetest.New()
	away := errors.New("connection refused")
	client.PrependReactor("*", "*", func(kubetesting.Action) (bool, runtime.Object, error) { return true, nil, away })
	w := Of(client, "a", slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { w.Run(ctx, func() {}); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	waitUntil(t, func() bool { return errors.Is(w.View().Err, away) })
	if err := w.View().ErrNoCIDR(0); err == nil || !strings.Contains(err.Error(), "cannot be asked") {
		t.Errorf("says %v", err)
	}
}

func waitUntil(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatal("did not come to pass in 15 s")
}

var comparePrefixes = cmp.Options{
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
}
