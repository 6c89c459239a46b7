package controller

import (
	"bytes"
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/headscaletest"
	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

// A stolen node writes the key of somebody's laptop on its own Node (public keys of peers are known to all), then its own
// again. Ten minutes later, while the laptop sleeps, it must not be deleted from Headscale.
func TestForeignMachineIsNotRemoved(t *testing.T) {
	laptop := headscale.Node{ID: 7, Name: "laptop", NodeKey: "nodekey:laptop", User: "alice", Method: "REGISTER_METHOD_OIDC"}
	own := headscale.Node{ID: 1, Name: "b", NodeKey: "nodekey:b", Online: true, Tags: tags, Method: "REGISTER_METHOD_AUTH_KEY"}
	b := node{name: "b", key: "nodekey:laptop", mode: config.ModeDaemon, cidrs: prefixes("10.244.2.0/24"), created: now}
	o := observation{now: now, grace: grace, tags: tags, ranges: prefixes("10.244.0.0/16"), nodes: []node{b}, tailnet: []headscale.Node{laptop, own}}
	p := makePlan(o)
	b.key = "nodekey:b"
	o.nodes, o.memory = []node{b}, p.memory
	p = makePlan(o)
	for range 2 { // looks
		o.memory, o.now = p.memory, o.now.Add(grace+secondLook)
		p = makePlan(o)
	}
	if slices.ContainsFunc(p.remove, func(t headscale.Node) bool { return t.ID == 7 }) {
		t.Errorf("the laptop is deleted from Headscale: %+v", p.remove)
	}
}

// `headscale nodes expire` is how an administrator shuts a stolen node out. It must stay out.
func TestExpiredNodeStaysOut(t *testing.T) {
	stolen := headscale.Node{ID: 1, Name: "b", NodeKey: "nodekey:b", Tags: tags, Method: "REGISTER_METHOD_AUTH_KEY", Expiry: now.Add(-time.Second)}
	b := node{name: "b", key: "nodekey:b", mode: config.ModeDaemon, cidrs: prefixes("10.244.2.0/24"), created: now}
	p := makePlan(observation{now: now, tags: tags, ranges: prefixes("10.244.0.0/16"), nodes: []node{b}, tailnet: []headscale.Node{stolen}})
	if len(p.disableExpiry) > 0 {
		t.Error("the expired node's key is made to last for ever")
	}
}

// The same by a node that claims somebody's laptop.
func TestForeignExpiryStays(t *testing.T) {
	laptop := headscale.Node{ID: 7, Name: "laptop", NodeKey: "nodekey:laptop", User: "alice", Method: "REGISTER_METHOD_OIDC", Online: true, Expiry: now.Add(time.Hour)}
	b := node{name: "b", key: "nodekey:laptop", mode: config.ModeDaemon, cidrs: prefixes("10.244.2.0/24"), created: now}
	p := makePlan(observation{now: now, tags: tags, ranges: prefixes("10.244.0.0/16"), nodes: []node{b}, tailnet: []headscale.Node{laptop}})
	if len(p.disableExpiry) > 0 {
		t.Error("the laptop's key is made to last for ever")
	}
}

// A stolen node claims the key of a machine that has joined and has no Node yet: it loses it to that Node when it comes, and until
// then the machine gets no route but the thief's own. Where the thief drops the claim again, nobody's machine is removed for it.
func TestClaimBeforeItsNode(t *testing.T) {
	fresh := headscale.Node{ID: 7, Name: "fresh", Hostname: "fresh.example", NodeKey: "nodekey:f", Online: true, Tags: tags, Method: methodAuthKey}
	thief := kn("thief", "f", "10.244.2.0/24")
	o := observation{now: now, grace: grace, tags: tags, ranges: prefixes("10.244.0.0/16"), nodes: []node{thief}, tailnet: []headscale.Node{fresh}}
	p := makePlan(o)
	for _, a := range p.approvals {
		if text(a.own) != "[10.244.2.0/24]" {
			t.Errorf("approved: %v", a.own)
		}
	}
	o.memory = p.memory
	came := o
	came.nodes = []node{thief, {name: "fresh.example", mode: config.ModeDaemon, cidrs: prefixes("10.244.3.0/24"), created: now}}
	if p := makePlan(came); p.views["thief"].State != kube.StateRefused || !strings.Contains(p.views["thief"].Message, "calls itself") {
		t.Errorf("before that Node says what it is: %+v", p.views["thief"])
	}
	came.nodes[1].key = "nodekey:f"
	p = makePlan(came)
	if p.views["thief"].State != kube.StateRefused || p.views["fresh.example"].State != kube.StatePending || len(p.approvals) != 1 || text(p.approvals[0].own) != "[10.244.3.0/24]" {
		t.Errorf("both claim it: %+v, %+v", p.views, p.approvals)
	}
	// Dropped, while the machine sleeps.
	o.nodes, o.tailnet[0].Online = nil, false
	for range 3 {
		p = makePlan(o)
		o.memory, o.now = p.memory, o.now.Add(grace+secondLook)
		if len(p.remove) > 0 {
			t.Fatalf("removed: %+v", p.remove)
		}
	}
}

// A Node whose kubelet registered it with spec.podCIDR 0.0.0.0/0, without network.clusterCIDRs: others keep the routes
// that their users gave them.
func TestMadRangeTakesNothing(t *testing.T) {
	a := node{name: "a", key: "nodekey:a", mode: config.ModeHost, cidrs: prefixes("10.244.1.0/24"), created: now}
	b := node{name: "b", key: "nodekey:b", mode: config.ModeHost, cidrs: prefixes("0.0.0.0/0"), created: now}
	ta := headscale.Node{ID: 1, Name: "a", NodeKey: "nodekey:a", Online: true, Approved: prefixes("10.244.1.0/24", "192.168.7.0/24", "0.0.0.0/0")}
	tb := headscale.Node{ID: 2, Name: "b", NodeKey: "nodekey:b", Online: true}
	p := makePlan(observation{now: now, tags: tags, nodes: []node{a, b}, tailnet: []headscale.Node{ta, tb}})
	for _, x := range p.approvals {
		if x.node.ID == 1 && len(x.stale) > 0 {
			t.Errorf("a loses %v", x.stale)
		}
	}
}

// world is a controller between a Headscale and an API server that are only imitated.
func world(t *testing.T, s *headscaletest.Server, key string, nodes ...*corev1.Node) (*Controller, kubetest.Client, *bytes.Buffer) {
	t.Setenv("HEADSCALE_API_KEY", "")
	cfg := config.Default()
	cfg.Headscale.URL = s.URL
	cfg.Network.ClusterCIDRs = config.CIDRs{"10.244.0.0/16"}
	client := kubetest.New()
	var log bytes.Buffer
	env := func(name string) string {
		if name == "HEADSCALE_API_KEY" {
			return key
		}
		return ""
	}
	c := newController(cfg, slog.New(slog.NewTextHandler(&log, nil)), env, client, "test")
	for _, n := range nodes {
		if _, err := client.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		c.setNode(nodeOf(n))
	}
	c.synced = true
	return c, client, &log
}

// A wrong or expired API key (with the prefix of 0.28 and later) must be told by an Event and the metric.
func TestWrongKeyIsTold(t *testing.T) {
	c, client, _ := world(t, headscaletest.New(t), "hskey-api-000000000000-"+strings.Repeat("0", 64))
	if _, err := c.pass(t.Context()); err == nil {
		t.Fatal("no error")
	}
	events, err := client.EventsV1().Events("").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(events.Items) == 0 {
		t.Errorf("no Event: %v", err)
	}
}

// minted are the join keys that a Headscale was asked for.
func minted(s *headscaletest.Server) int { return len(s.Calls("POST /api/v1/preauthkey")) }

// With kubelet's credentials a stolen node may write any annotation on its own Node. That must not stop the controller
// for everybody.
func TestOneNodesUninstallStopsNobodyElse(t *testing.T) {
	s := headscaletest.New(t)
	b := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "b", Annotations: map[string]string{"headcni.io/uninstall": "true"}}}
	c, client, _ := world(t, s, s.APIKey(), b, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}})
	if _, err := c.pass(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().Secrets(c.namespace).Get(t.Context(), "headcni-join", metav1.GetOptions{}); err != nil {
		t.Errorf("no join key is made any more: %v", err)
	}
}

// Tags are what a joined node may do: a key minted with others must not stay.
func TestTagsChangeMakesAnotherKey(t *testing.T) {
	s := headscaletest.New(t)
	c, _, _ := world(t, s, s.APIKey())
	if _, err := c.pass(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.cfg.Tailscale.Tags = []string{"tag:other"}
	if _, err := c.pass(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := minted(s); n != 2 {
		t.Errorf("%d keys made, want another for the new tags", n)
	}
}

// A pre-auth key: Nodes without pod CIDRs are given some all the same, as the API server needs no Headscale for it.
func TestPreAuthAllocates(t *testing.T) {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a", CreationTimestamp: metav1.NewTime(time.Now().Add(-time.Hour))}}
	c, client, _ := world(t, headscaletest.New(t), "hskey-auth-x", n)
	if _, err := c.pass(t.Context()); err != nil {
		t.Fatal(err)
	}
	got, err := client.CoreV1().Nodes().Get(t.Context(), "a", metav1.GetOptions{})
	if err != nil || len(got.Spec.PodCIDRs) == 0 {
		t.Errorf("no pod CIDR: %v", err)
	}
}

// Headscale before 0.29 refuses a policy with nodeAttrs: nobody may be told to write one there.
func TestNoAdviceThatBreaksOldServers(t *testing.T) {
	found, err := checkPolicy("{}", needs{ranges: prefixes("10.244.0.0/16"), tags: tags, sharing: []string{"a"}, starCovers: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		if strings.Contains(f.text, "nodeAttrs") {
			t.Errorf("0.28 is advised: %s", f.text)
		}
	}
}

// A Node whose key Headscale does not know (powered off for good, say) must not make it asked every 2 s for ever.
func TestUnknownForeverIsNotPending(t *testing.T) {
	n := node{name: "a", key: "nodekey:gone", cidrs: prefixes("10.244.1.0/24"), created: now.Add(-24 * time.Hour)}
	p := makePlan(observation{now: now, tags: tags, nodes: []node{n}})
	n.view = p.views["a"]
	n.viewText = n.view.String()
	if p = makePlan(observation{now: now, tags: tags, nodes: []node{n}}); p.pending {
		t.Error("still pending, with nothing to do")
	}
}

// A thousand Nodes without pod CIDRs at once.
func TestAllocateThousand(t *testing.T) {
	o := observation{now: now, tags: tags, ranges: prefixes("10.240.0.0/12", "fd00:240::/32")}
	for i := range 1000 {
		o.nodes = append(o.nodes, node{name: "n" + string(rune('a'+i%26)) + time.Duration(i).String(), created: now.Add(-time.Hour)})
	}
	start := time.Now()
	got, err := o.allocate()
	if d := time.Since(start); err != nil || len(got) != 1000 || d > time.Second {
		t.Errorf("%d in %v, %v", len(got), d, err)
	}
}

// A Headscale that was set up anew has another API key and knows none of the join keys that the old one made.
func TestAnotherAPIKeyMakesAnotherJoinKey(t *testing.T) {
	hs := headscaletest.New(t)
	c, client, _ := world(t, hs, hs.APIKey())
	for range 2 {
		if _, err := c.pass(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	other, _, _ := world(t, hs, hs.APIKey())
	other.client = client
	if _, err := other.pass(t.Context()); err != nil {
		t.Fatal(err)
	}
	s, err := client.CoreV1().Secrets(c.namespace).Get(t.Context(), "headcni-join", metav1.GetOptions{})
	if n := minted(hs); err != nil || n != 2 || len(s.Annotations[joinMinter]) != 16 {
		t.Errorf("%d keys made, want one for each API key; made with %q, %v", n, s.Annotations[joinMinter], err)
	}
}

// Where no join key can be made any more, the metric goes on telling when the last one expires: the alert needs it.
func TestJoinKeyMetricOutlivesHeadscale(t *testing.T) {
	s := headscaletest.New(t)
	c, _, _ := world(t, s, s.APIKey())
	if _, err := c.pass(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := gauge(t, c, "headcni_join_key_expiry_timestamp_seconds")
	s.Break(headscaletest.Refuse())
	if _, err := c.pass(t.Context()); err == nil {
		t.Fatal("no error")
	}
	if got := gauge(t, c, "headcni_join_key_expiry_timestamp_seconds"); got != want || want == 0 {
		t.Errorf("the metric says %v, want %v", got, want)
	}
	if up := gauge(t, c, "headcni_controller_headscale_up"); up != 0 {
		t.Error("Headscale is up")
	}
}

// With kubelet's credentials a stolen node may write what it likes on its own Node. None of that gets into events, logs or
// metrics, and none of it makes a pass fail.
func TestNothingOfANodesOwnIsRepeated(t *testing.T) {
	const bad = "evil-words"
	on := func(name string, annotations map[string]string) *corev1.Node {
		n := kubeNode(name, "10.244.1.0/24")
		n.Annotations = annotations
		return n
	}
	view := `{"nodeKey":"nodekey:x","state":"` + bad + `","message":"` + bad + `"}`
	refused := `{"nodeKey":"nodekey:x","state":"refused","message":"` + bad + `"}`
	s := headscaletest.New(t)
	for _, key := range []string{s.APIKey(), "hskey-auth-x"} {
		c, client, log := world(t, s, key,
			on("a", map[string]string{kube.NodeKey: "nodekey:x", kube.Headscale: view}), on("b", map[string]string{kube.NodeKey: "nodekey:x", kube.Headscale: refused}),
			on("c", map[string]string{kube.Headscale: refused}), on("d", map[string]string{kube.NodeKey: "nodekey:d", kube.Uninstall: "true", kube.Headscale: view}),
			on("e", map[string]string{kube.NodeKey: strings.Repeat("k", 200<<10)}))
		if _, err := c.pass(t.Context()); err != nil {
			t.Fatal(err)
		}
		families, err := c.metrics.registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if strings.Contains(f.String(), bad) {
				t.Errorf("in a metric: %s", f)
			}
		}
		events, err := client.EventsV1().Events("").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events.Items {
			if strings.Contains(e.Note, bad) {
				t.Errorf("in an event: %s", e.Note)
			}
		}
		if strings.Contains(log.String(), bad) || strings.Contains(log.String(), "kkkk") {
			t.Errorf("in the log: %.2000s", log)
		}
		if n, err := client.CoreV1().Nodes().Get(t.Context(), "e", metav1.GetOptions{}); err != nil || n.Annotations[kube.Headscale] != "" {
			t.Errorf("the long key is written back: %v", err)
		}
	}
}

// What stays under way for good, such as a route that another cluster's node has, is looked at less and less often.
func TestPendingForLongIsLookedAtLess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// Its Nodes were never read: every pass is pending.
		c := newController(config.Default(), slog.New(slog.DiscardHandler), func(string) string { return "" }, kubetest.New(), "test")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		c.lead(ctx)
		if n := counter(t, c, "headcni_controller_passes_total"); n < 20 || n > 40 {
			t.Errorf("%v passes in ten minutes", n)
		}
	})
}

// Answers that are none change nothing.
func TestGarbage(t *testing.T) {
	for _, body := range []string{"<html>hello</html>", "[]", `{"nodes":3}`, `{"nodes":[{"id":"x"}]}`, `{"nodes":[{"id":"1","nodeKey":"nodekey:a","approvedRoutes":["all"]}]}`} {
		s := headscaletest.New(t)
		s.Break(headscaletest.Except("POST /api/v1/preauthkey", headscaletest.Answer(200, body)))
		n := kubeNode("a", "10.244.1.0/24")
		was := `{"nodeKey":"nodekey:a","state":"routed","routes":["10.244.1.0/24"]}`
		n.Annotations = map[string]string{kube.NodeKey: "nodekey:a", kube.Headscale: was}
		c, client, _ := world(t, s, s.APIKey(), n)
		if _, err := c.pass(t.Context()); err == nil || !strings.Contains(err.Error(), "check headscale.url") {
			t.Errorf("%s: %v", body, err)
		}
		if n, err := client.CoreV1().Nodes().Get(t.Context(), "a", metav1.GetOptions{}); err != nil || n.Annotations[kube.Headscale] != was {
			t.Errorf("%s: the view is now %s, %v", body, n.Annotations[kube.Headscale], err)
		}
	}
}
