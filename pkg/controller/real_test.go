package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clienttesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/internal/realparts"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

// cluster is a controller between a real Headscale and an API server that is only imitated: what a real one does is
// tested in test/e2e.
type cluster struct {
	*Controller
	t   *testing.T
	api *headscale.Client
	log *strings.Builder
	key string
}

func newTestCluster(t *testing.T, w *realparts.World, nodes ...runtime.Object) *cluster {
	t.Helper()
	cfg := config.Default()
	cfg.Headscale.URL = w.URL
	cfg.Network.ClusterCIDRs = config.CIDRs{"10.244.0.0/16"}
	c := &cluster{t: t, log: &strings.Builder{}, key: w.APIKey()}
	c.Controller = newController(cfg, slog.New(slog.NewTextHandler(c.log, nil)), func(name string) string {
		return map[string]string{"HEADSCALE_API_KEY": c.key}[name]
	}, kubetest.New(nodes...), "test")
	api, err := headscale.New(headscale.Options{URL: w.URL, Key: secret.New(c.key)})
	if err != nil {
		t.Fatal(err)
	}
	c.api = api
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { c.watch(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	c.until("the Nodes are known", func() bool { _, synced := c.snapshot(); return synced })
	return c
}

// must runs a pass that has to go well.
func (c *cluster) must() (pending bool) {
	c.t.Helper()
	pending, err := c.pass(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	return pending
}

func (c *cluster) until(what string, ok func() bool) {
	c.t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			c.t.Fatalf("waited in vain until %s; log:\n%s", what, c.log)
		}
	}
}

// joinKeyNow is what a node would join with.
func (c *cluster) joinKeyNow() string {
	c.t.Helper()
	return string(c.joinSecret().Data[kube.JoinSecretKey])
}

func (c *cluster) joinSecret() *corev1.Secret {
	c.t.Helper()
	s, err := c.client.Secrets("kube-system").Get(c.t.Context(), kube.JoinSecret, metav1.GetOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

// says writes what a node's daemon writes, and waits until the controller knows.
func (c *cluster) says(name, nodeKey, mode string) {
	c.t.Helper()
	err := c.annotate(c.t.Context(), name, map[string]any{kube.NodeKey: nodeKey, kube.Mode: mode})
	if err != nil {
		c.t.Fatal(err)
	}
	c.until("the annotation is seen", func() bool {
		nodes, _ := c.snapshot()
		return slices.ContainsFunc(nodes, func(n node) bool { return n.name == name && n.key == nodeKey })
	})
}

func (c *cluster) state(node string) kube.View {
	c.t.Helper()
	n, err := c.client.Nodes().Get(c.t.Context(), node, metav1.GetOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	v, _, err := kube.ViewOf(n)
	if err != nil {
		c.t.Fatal(err)
	}
	return v
}

func kubeNode(name string, cidrs ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.Now()}}
	if n.Spec.PodCIDRs = cidrs; len(cidrs) > 0 {
		n.Spec.PodCIDR = cidrs[0]
	}
	return n
}

func nodeKeyOf(t *testing.T, d *realparts.Tailscaled) string {
	t.Helper()
	var st struct{ Self struct{ PublicKey string } }
	if err := json.Unmarshal([]byte(d.CLI("status", "--json", "--peers=false")), &st); err != nil {
		t.Fatal(err)
	}
	return st.Self.PublicKey
}

// TestOnRealHeadscale takes a node from its first join to the end of its Node.
func TestOnRealHeadscale(t *testing.T) {
	w := realparts.New(t, 10*time.Millisecond)
	c := newTestCluster(t, w, kubeNode("one", "10.244.1.0/24"), kubeNode("thief", "10.244.2.0/24"))
	c.must()
	joinKey := c.joinKeyNow()
	d := w.Node()
	d.CLI("up", "--login-server="+w.URL, "--auth-key="+joinKey, "--hostname=one",
		"--advertise-routes=10.244.1.0/24,10.244.2.0/24,10.244.0.0/16,192.168.7.0/24,0.0.0.0/0,::/0")
	key := nodeKeyOf(t, d)
	c.says("one", key, config.ModeDaemon)
	c.until("one is routed", func() bool { c.must(); return c.state("one").State == kube.StateRouted })

	n, err := c.api.NodeByKey(t.Context(), key)
	if err != nil || !slices.Equal(n.Approved, prefixes("10.244.1.0/24")) || !slices.Equal(n.Tags, []string{"tag:headcni"}) {
		t.Errorf("approved %v, tags %v, %v: want its own pod CIDR and the tag", n.Approved, n.Tags, err)
	}
	// What a person approves for it outside the pod ranges stays; what somebody slips in within them goes.
	if _, err := c.api.ApproveRoutes(t.Context(), n, prefixes("192.168.7.0/24", "10.244.2.0/24", "10.244.0.0/16"), nil); err != nil {
		t.Fatal(err)
	}
	c.must()
	if n, err = c.api.Node(t.Context(), n.ID); err != nil || !slices.Equal(n.Approved, prefixes("10.244.1.0/24", "192.168.7.0/24")) {
		t.Errorf("approved %v, %v", n.Approved, err)
	}
	// Another Node that says it is this one gets nothing, and takes nothing.
	c.says("thief", key, config.ModeDaemon)
	c.must()
	if v := c.state("thief"); v.State != kube.StateRefused || !strings.Contains(v.Message, "calls itself one") {
		t.Errorf("the thief: %+v", v)
	}
	if v := c.state("one"); v.State != kube.StateRouted {
		t.Errorf("the robbed: %+v", v)
	}
	c.testEnd(n, key)
	if s := c.log.String(); strings.Contains(s, joinKey) || strings.Contains(s, c.key) {
		t.Error("a key stands in the log")
	}
}

// testEnd: the Node goes, and after the grace period, once it is away, so does its place in the tailnet.
func (c *cluster) testEnd(n headscale.Node, key string) {
	c.t.Helper()
	for _, name := range []string{"one", "thief"} {
		if err := c.client.Nodes().Delete(c.t.Context(), name, metav1.DeleteOptions{}); err != nil {
			c.t.Fatal(err)
		}
	}
	c.until("the Nodes are gone", func() bool { nodes, _ := c.snapshot(); return len(nodes) == 0 })
	c.must()
	c.now = func() time.Time { return time.Now().Add(2 * grace) }
	c.must()
	if _, err := c.api.NodeByKey(c.t.Context(), key); err != nil {
		c.t.Errorf("a node that is connected was removed: %v", err)
	}
	if n, err := c.api.Node(c.t.Context(), n.ID); err != nil || !slices.Equal(n.Approved, prefixes("192.168.7.0/24")) {
		c.t.Errorf("approved after the end: %v, %v", n.Approved, err)
	}
}

// TestJoinKey: rotation, a write that fails after the key was made, and a pre-auth key in place of an API key.
func TestJoinKey(t *testing.T) {
	w := realparts.New(t, 10*time.Millisecond)
	c := newTestCluster(t, w)
	c.must()
	first := c.joinKeyNow()
	c.must()
	if c.joinKeyNow() != first {
		t.Error("a fresh key was made anew")
	}
	c.now = func() time.Time { return time.Now().Add(joinKeyRenew + time.Minute) }
	fails := true
	c.client.(kubetest.Client).PrependReactor("update", "secrets", func(clienttesting.Action) (bool, runtime.Object, error) {
		return fails, nil, errors.New("the API server is away")
	})
	if _, err := c.pass(t.Context()); err == nil || !strings.Contains(err.Error(), "write Secret kube-system/headcni-join") {
		t.Errorf("a write that fails: %v", err)
	}
	if c.joinKeyNow() != first {
		t.Error("the old key is gone although it is still good")
	}
	fails = false
	c.must()
	second := c.joinKeyNow()
	if second == first {
		t.Error("the key was not renewed")
	}
	d := w.Node()
	d.CLI("up", "--login-server="+w.URL, "--auth-key="+second)

	c.key = w.AuthKey("tag:headcni", "--reusable")
	c.must()
	if c.joinKeyNow() != c.key {
		t.Error("a pre-auth key is not handed on")
	}
	if s := c.log.String(); strings.Contains(s, first) || strings.Contains(s, second) || strings.Contains(s, c.key) {
		t.Error("a key stands in the log")
	}
	c.key = "hskey-api-abcdefghijkl-wrong"
	if _, err := c.pass(t.Context()); !errors.Is(err, headscale.ErrUnauthorized) || strings.Contains(err.Error(), c.key) {
		t.Errorf("a wrong key: %v", err)
	}
}

// TestJoinKeyForgotten: a key that Headscale lost in a backup, or that somebody expired, is replaced within a minute, by one that
// nodes can join with; one that it knows is not.
func TestJoinKeyForgotten(t *testing.T) {
	w := realparts.New(t, 10*time.Millisecond)
	c := newTestCluster(t, w)
	later := time.Duration(0)
	c.now = func() time.Time { return time.Now().Add(later) }
	next := func() string { later += joinKeyLook; c.must(); return c.joinKeyNow() }
	restore := w.Backup()
	c.must()
	first := c.joinKeyNow()
	for range 3 {
		if next() != first {
			t.Fatal("a key that Headscale knows was replaced")
		}
	}
	restore()
	c.must()
	if c.joinKeyNow() != first {
		t.Error("looked for the key before a minute had passed")
	}
	// After the restore somebody else's key has the number of ours.
	w.AuthKey("tag:other")
	second := next()
	if second == first {
		t.Fatal("Headscale does not know the key any more, and it stays")
	}
	d := w.Node()
	d.CLI("up", "--login-server="+w.URL, "--auth-key="+second)
	if next() != second {
		t.Error("a key that Headscale knows was replaced after the restore")
	}
	if w.Since(28) {
		w.CLI("preauthkeys", "expire", "--id", c.joinSecret().Annotations[joinID], "--force")
		if next() == second {
			t.Error("a key that was expired stays")
		}
	}
}

// TestHeadscaleAway: nothing is undone while nobody can be asked.
func TestHeadscaleAway(t *testing.T) {
	w := realparts.New(t, 10*time.Millisecond)
	c := newTestCluster(t, w, kubeNode("one", "10.244.1.0/24"))
	c.must()
	d := w.Node()
	d.CLI("up", "--login-server="+w.URL, "--auth-key="+c.joinKeyNow(), "--advertise-routes=10.244.1.0/24")
	c.says("one", nodeKeyOf(t, d), config.ModeHost)
	c.until("one is routed", func() bool { c.must(); return c.state("one").State == kube.StateRouted })
	w.Headscale.Kill()
	if _, err := c.pass(t.Context()); !errors.Is(err, headscale.ErrUnreachable) {
		t.Errorf("without Headscale: %v", err)
	}
	if v := c.state("one"); v.State != kube.StateRouted {
		t.Errorf("the view changed: %+v", v)
	}
	w.Headscale.Start()
	c.must() // everybody counts as away just now
	if v := c.state("one"); v.State != kube.StateRouted {
		t.Errorf("the view changed when Headscale came back: %+v", v)
	}
}

// TestServicesOnRealHeadscale: of two Nodes with the label one leads to services, and the other when the first loses it; the third never.
func TestServicesOnRealHeadscale(t *testing.T) {
	w := realparts.New(t, 10*time.Millisecond)
	const label = "node-restriction.kubernetes.io/services"
	names := []string{"one", "two", "thief"}
	var nodes []runtime.Object
	for i, name := range names {
		n := kubeNode(name, fmt.Sprintf("10.244.%d.0/24", i+1))
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		if name != "thief" {
			n.Labels = map[string]string{label: "true"}
		}
		nodes = append(nodes, n)
	}
	c := newTestCluster(t, w, nodes...)
	c.cfg.Network.ServiceCIDRs = config.CIDRs{"10.96.0.0/16"}
	c.cfg.Network.AdvertiseServices.NodeSelector = map[string]string{label: "true"}
	for _, n := range nodes {
		n := n.(*corev1.Node)
		store := (*nodeStore)(c.Controller)
		store.SetNode(store.Trim(n)) // with the label's key, which the watch did not know when it began
	}
	c.must()
	keys := map[string]string{}
	for i, name := range names {
		d := w.Node()
		d.CLI("up", "--login-server="+w.URL, "--auth-key="+c.joinKeyNow(), "--hostname="+name, fmt.Sprintf("--advertise-routes=10.244.%d.0/24,10.96.0.0/16", i+1))
		keys[name] = nodeKeyOf(t, d)
		c.says(name, keys[name], config.ModeDaemon)
	}
	services := prefixes("10.96.0.0/16")[0]
	leads := func(approved ...string) (leader string) {
		t.Helper()
		c.until(fmt.Sprintf("services are approved for %v and one leads", approved), func() bool {
			c.must()
			leader = ""
			var have []string
			for _, name := range names {
				n, err := c.api.NodeByKey(t.Context(), keys[name])
				if err != nil {
					t.Fatal(err)
				}
				if slices.Contains(n.Approved, services) {
					have = append(have, name)
				}
				if slices.Contains(n.Primary, services) {
					leader = name
				}
			}
			return slices.Equal(have, approved) && slices.Contains(approved, leader)
		})
		return leader
	}
	first := leads("one", "two")
	other := map[string]string{"one": "two", "two": "one"}[first]
	if v := c.state(first); !slices.Equal(v.Services, prefixes("10.96.0.0/16")) || len(c.state("thief").Services) > 0 {
		t.Errorf("told to lead: %v %v, thief %v", first, v.Services, c.state("thief").Services)
	}
	if _, err := c.client.Nodes().Patch(t.Context(), first, "application/merge-patch+json", []byte(`{"metadata":{"labels":null}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := leads(other); got != other {
		t.Errorf("%s leads, want %s", got, other)
	}
}
