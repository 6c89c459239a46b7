package subnets

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	kubetesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/tailscale"
)

// node is a kernel that can be asked and told, and that fails when it is to.
type node struct {
	mu    sync.Mutex
	links map[string]podlink.Attachment
	has   map[netip.Prefix][]int
	asked int
	err   error
}

func (n *node) Attached() (map[string]podlink.Attachment, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.links), nil
}

func (n *node) Consent(want map[netip.Prefix][]int) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked++
	if n.err != nil {
		return 0, n.err
	}
	n.has = want
	return 0, nil
}

func (n *node) ConsentChanges(ctx context.Context) (<-chan struct{}, error) { panic("not asked") }

func (n *node) holds() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	for _, p := range slices.SortedFunc(maps.Keys(n.has), netip.Prefix.Compare) {
		out = append(out, fmt.Sprintf("%s%v", p, n.has[p]))
	}
	return strings.Join(out, " ")
}

func (n *node) change(do func()) { n.mu.Lock(); do(); n.mu.Unlock() }

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what)
		}
	}
}

func namespaceOf(name, annotation string) *corev1.Namespace {
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, UID: "uid-" + "1"}}
	if annotation != "" {
		n.Annotations = map[string]string{kube.TailnetSubnets: annotation}
	}
	return n
}

func start(t *testing.T, client kubetest.Client, n *node) *Agent {
	t.Helper()
	a := New(Config{Log: slog.New(slog.DiscardHandler), Client: client, Node: "a", Table: n, Links: n, Changed: func() {}})
	a.Named(prefixes(taken))
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	a.Start(ctx, &wg, func(context.Context, func(context.Context) (<-chan struct{}, error), func()) {})
	t.Cleanup(func() { cancel(); a.Stop(); wg.Wait() })
	return a
}

func link(label string, index int) podlink.Attachment {
	return podlink.Attachment{Label: label, Index: index}
}

// A pod's link may use what its Namespace names, for as long as both are there.
func TestAgent(t *testing.T) {
	n := &node{links: map[string]podlink.Attachment{
		"hca": link("shop/web", 4), "hcb": link("shop/db", 5), "hcc": link("edge/web", 6), "hcd": link("shop", 7), "hce": link("", 8),
	}}
	client := kubetest.New(namespaceOf("shop", "192.168.50.0/24,10.244.7.0/24"), namespaceOf("edge", ""), namespaceOf("other", "fd00:50::/64"))
	a := start(t, client, n)
	want := func(text string) {
		t.Helper()
		eventually(t, "the kernel holds "+n.holds()+", want "+text, func() bool { return n.holds() == text })
	}
	want("192.168.50.0/24[4 5]")
	named, known := a.Named(prefixes(taken))
	if text(named) != "192.168.50.0/24 fd00:50::/64" || !known {
		t.Errorf("named %v, %v", named, known)
	}
	eventually(t, "no event", func() bool {
		list, err := client.Events("default").List(t.Context(), metav1.ListOptions{})
		return err == nil && len(list.Items) == 1 && strings.Contains(list.Items[0].Note, "10.244.7.0/24") &&
			list.Items[0].Regarding.Name == "shop" && list.Items[0].Type == corev1.EventTypeWarning
	})
	update := func(n *corev1.Namespace) {
		t.Helper()
		if _, err := client.Namespaces().Update(t.Context(), n, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	update(namespaceOf("edge", "192.168.50.0/24, 192.168.60.0/24"))
	want("192.168.50.0/24[4 5 6] 192.168.60.0/24[6]")
	n.change(func() { delete(n.links, "hca"); n.links["hcf"] = link("shop/new", 9) })
	a.Wake()
	want("192.168.50.0/24[5 6 9] 192.168.60.0/24[6]")
	update(namespaceOf("shop", ""))
	want("192.168.50.0/24[6] 192.168.60.0/24[6]")
	if err := client.Namespaces().Delete(t.Context(), "edge", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	want("")
	// The cluster grows over what somebody has named.
	a.Named(prefixes(taken + " fd00:50::/48"))
	if named, _ := a.Named(prefixes(taken + " fd00:50::/48")); len(named) > 0 {
		t.Errorf("named %v, which is the cluster's", named)
	}
	n.change(func() { n.err = errors.New("the kernel is tired") })
	a.Wake()
	eventually(t, "no error", func() bool { return a.Err() != nil })
	n.change(func() { n.err = nil })
	eventually(t, "an error that stays", func() bool { return a.Err() == nil })
}

// Of many daemons each tells of a faulty annotation; one event is there.
func TestOneEvent(t *testing.T) {
	client := kubetest.New(namespaceOf("shop", "nonsense"))
	const daemons = 3
	for range daemons {
		start(t, client, &node{})
	}
	eventually(t, "not every daemon tells", func() bool {
		told := 0
		for _, a := range client.Actions() {
			if a.Matches("create", "events") {
				told++
			}
		}
		return told == daemons
	})
	list, err := client.Events("default").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 1 {
		t.Errorf("%d events, %v", len(list.Items), err)
	}
}

// Before everything is known, and while nobody may ask, what is in the kernel stays.
func TestUnknownStays(t *testing.T) {
	client := kubetest.New()
	client.PrependReactor("list", "namespaces", func(kubetesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "namespaces"}, "", errors.New("no"))
	})
	n := &node{links: map[string]podlink.Attachment{"hca": link("shop/web", 4)}}
	a := start(t, client, n)
	eventually(t, "nothing said", func() bool { return a.Err() != nil })
	if err := a.Err(); !strings.Contains(err.Error(), "ClusterRole") {
		t.Error(err)
	}
	if named, known := a.Named(nil); known || len(named) > 0 {
		t.Errorf("named %v, known %v", named, known)
	}
	a.Wake()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.asked > 0 {
		t.Error("the kernel was written to")
	}
}

func TestNews(t *testing.T) {
	var a *Agent
	a.Wake()
	a.Stop()
	if err := a.Err(); err != nil {
		t.Error(err)
	}
	peers := []tailscale.Peer{{Allowed: prefixes("100.64.0.7/32 192.168.50.0/24")}, {Allowed: prefixes("fd00:50::/64")}}
	for _, c := range []struct {
		status *tailscale.Status
		prefs  *tailscale.SavedPrefs
		want   bool
	}{
		{nil, nil, false}, {&tailscale.Status{State: tailscale.Starting, Peers: peers}, &tailscale.SavedPrefs{}, false},
		{&tailscale.Status{State: tailscale.Running, Peers: peers}, nil, false},
		{&tailscale.Status{State: tailscale.Running, Peers: peers}, &tailscale.SavedPrefs{ExitNode: true}, true},
	} {
		n := a.News(nil, c.status, c.prefs)
		if n.Tailnet != c.want || !n.NamedKnown || n.Exit != c.want || c.want != (text(n.Advertised) == "100.64.0.7/32 192.168.50.0/24 fd00:50::/64") {
			t.Errorf("%+v", n)
		}
	}
}
