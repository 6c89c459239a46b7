package controller

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clienttesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/internal/headscaletest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/dns/records"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

// TestLeads: who leads the tailnet to services, and who no longer does.
func TestLeads(t *testing.T) {
	const label = "node-restriction.kubernetes.io/services"
	const pods, services, one = "10.244.1.0/24", "10.96.0.0/12", "10.96.0.10/32"
	a, b := kn("a", "a", pods), kn("b", "b", "10.244.2.0/24")
	chosen := func(n node, fit bool) node { n.labels, n.fit = map[string]string{label: "true"}, fit; return n }
	otherValue := chosen(a, true)
	otherValue.labels = map[string]string{label: "false"}
	broken := chosen(a, true)
	broken.cidrs = prefixes("10.9.0.0/24") // not the cluster's
	leaving := chosen(a, true)
	leaving.leaving = true
	ta := func(approved ...string) headscale.Node {
		return ts(1, "a", []string{pods, services}, append(approved, pods)...)
	}
	tb := func(approved ...string) headscale.Node {
		return ts(2, "b", []string{"10.244.2.0/24", services}, append(approved, "10.244.2.0/24")...)
	}
	had := []member{{ID: 1, Node: "a", Routes: prefixes(pods), Services: prefixes(services)}}
	for name, c := range map[string]struct {
		nodes     []node
		tailnet   []headscale.Node
		memory    []member
		off       bool
		routes    []string // services by default
		approvals []string
		told      []string // Nodes that are told to advertise
	}{
		"a Node with the label":                       {nodes: []node{chosen(a, true), b}, tailnet: []headscale.Node{ta(), tb()}, approvals: []string{"1 +[10.244.1.0/24 10.96.0.0/12] -[]"}, told: []string{"a"}},
		"and has it already":                          {nodes: []node{chosen(a, true), b}, tailnet: []headscale.Node{ta(services), tb()}, told: []string{"a"}},
		"a stolen node that advertises":               {nodes: []node{chosen(a, true), b}, tailnet: []headscale.Node{ta(services), tb(services, one)}, approvals: []string{"2 +[10.244.2.0/24] -[10.96.0.0/12 10.96.0.10/32]"}, told: []string{"a"}},
		"another value":                               {nodes: []node{otherValue}, tailnet: []headscale.Node{ta(services)}, memory: had, approvals: []string{"1 +[10.244.1.0/24] -[10.96.0.0/12]"}},
		"the label has gone":                          {nodes: []node{a}, tailnet: []headscale.Node{ta(services)}, memory: had, approvals: []string{"1 +[10.244.1.0/24] -[10.96.0.0/12]"}},
		"a user's own wider route":                    {nodes: []node{a}, tailnet: []headscale.Node{ta("10.0.0.0/8", "192.168.1.0/24")}},
		"one is not fit":                              {nodes: []node{chosen(a, false), chosen(b, true)}, tailnet: []headscale.Node{ta(services), tb(services)}, approvals: []string{"1 +[10.244.1.0/24] -[10.96.0.0/12]"}, told: []string{"a", "b"}},
		"it comes back":                               {nodes: []node{chosen(a, true), chosen(b, true)}, tailnet: []headscale.Node{ta(), tb(services)}, approvals: []string{"1 +[10.244.1.0/24 10.96.0.0/12] -[]"}, told: []string{"a", "b"}},
		"none is fit":                                 {nodes: []node{chosen(a, false), chosen(b, false)}, tailnet: []headscale.Node{ta(services), tb(services)}, told: []string{"a", "b"}},
		"the only fit one is refused its pod range":   {nodes: []node{broken, chosen(b, false)}, tailnet: []headscale.Node{ts(1, "a", nil, services), tb(services)}, approvals: []string{"1 +[] -[10.96.0.0/12]"}, told: []string{"a", "b"}},
		"a Node that is uninstalled":                  {nodes: []node{leaving}, tailnet: []headscale.Node{ta(services)}, memory: had, approvals: []string{"1 +[] -[10.96.0.0/12]"}},
		"a Node that is gone":                         {nodes: []node{b}, tailnet: []headscale.Node{ta(services), tb()}, memory: had, approvals: []string{"1 +[] -[10.96.0.0/12]"}},
		"switched off, and it was ours":               {nodes: []node{chosen(a, true)}, tailnet: []headscale.Node{ta(services)}, memory: had, off: true, approvals: []string{"1 +[10.244.1.0/24] -[10.96.0.0/12]"}},
		"switched off, and it was not":                {nodes: []node{chosen(a, true)}, tailnet: []headscale.Node{ta(services)}, off: true},
		"single Services":                             {nodes: []node{chosen(a, true)}, tailnet: []headscale.Node{ta(services)}, routes: []string{one}, memory: had, approvals: []string{"1 +[10.244.1.0/24 10.96.0.10/32] -[10.96.0.0/12]"}, told: []string{"a"}},
		"no machine of the tailnet that is no Node's": {nodes: []node{chosen(a, true)}, tailnet: []headscale.Node{ta(services), ts(9, "router", []string{services}, services)}, told: []string{"a"}},
	} {
		t.Run(name, func(t *testing.T) {
			o := observation{now: now, grace: grace, tags: tags, ranges: prefixes("10.244.0.0/16"), nodes: c.nodes, tailnet: c.tailnet}
			if o.memory.Members = c.memory; !c.off {
				o.serve = serving{Ranges: prefixes(services), Routes: prefixes(services), By: config.AdvertiseServices{NodeSelector: map[string]string{label: "true"}}}
			}
			if c.routes != nil {
				o.serve.Routes = prefixes(c.routes...)
			}
			p := makePlan(o)
			var approvals, told []string
			for _, a := range p.approvals {
				approvals = append(approvals, a.node.ID.String()+" +"+text(a.own)+" -"+text(a.stale))
			}
			for _, n := range c.nodes {
				if v := p.views[n.name]; text(v.Services) == text(o.serve.Routes) && len(v.Services) > 0 {
					told = append(told, n.name)
				} else if len(v.Services) > 0 {
					t.Errorf("%s is told %v", n.name, v.Services)
				}
			}
			if diff := cmp.Diff([][]string{c.approvals, c.told}, [][]string{approvals, told}); diff != "" {
				t.Error(diff)
			}
			if len(c.approvals) == 0 {
				return
			}
			// What could not be taken back is tried again, also by a controller that only has the memory.
			o.memory = p.memory
			var again []string
			for _, a := range makePlan(o).approvals {
				again = append(again, a.node.ID.String()+" +"+text(a.own)+" -"+text(a.stale))
			}
			if diff := cmp.Diff(approvals, again); diff != "" {
				t.Errorf("again: %s", diff)
			}
		})
	}
}

// TestServing: what the tailnet is to reach, and that nothing is taken from it because somebody does not answer.
func TestServing(t *testing.T) {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a", Labels: map[string]string{"l": "v"}}}
	ranges := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/12", "fd00:96::/108"}}}
	was := serving{Ranges: prefixes("10.96.0.0/16"), Routes: prefixes("10.96.0.7/32")}
	web := records.Service{Namespace: "shop", Name: "web", Label: "web", IPs: []netip.Addr{netip.MustParseAddr("10.96.0.9"), netip.MustParseAddr("10.7.0.9")}}
	for name, c := range map[string]struct {
		set      func(*config.Network)
		have     bool // the ServiceCIDR
		services map[string]records.Service
		unread   bool
		want     string // the routes
		lacking  string
		unknown  bool
	}{
		"as Kubernetes says":        {have: true, want: "[10.96.0.0/12 fd00:96::/108]"},
		"as the configuration says": {set: func(n *config.Network) { n.ServiceCIDRs = config.CIDRs{"10.7.0.0/16"} }, have: true, want: "[10.7.0.0/16]"},
		"nobody says":               {want: "[10.96.0.0/16]", unknown: true},
		"over pods":                 {set: func(n *config.Network) { n.ServiceCIDRs = config.CIDRs{"10.244.0.0/24"} }, want: "[]", lacking: "overlaps the service CIDR"},
		"under another cluster's": {set: func(n *config.Network) {
			n.RemoteClusters = []config.RemoteCluster{{Name: "west", PodCIDRs: config.CIDRs{"10.244.0.0/16"}, ServiceCIDRs: config.CIDRs{"10.96.0.0/12"}}}
		}, have: true, want: "[10.96.0.0/12 fd00:96::/108]"},
		"over the tailnet":              {set: func(n *config.Network) { n.ServiceCIDRs = config.CIDRs{"100.64.0.0/16"} }, want: "[]", lacking: "the tailnet's own addresses"},
		"named ones only":               {set: func(n *config.Network) { n.AdvertiseServices.Only = config.OnlyNamed }, have: true, services: map[string]records.Service{"shop/web": web}, want: "[10.96.0.9/32]"},
		"named ones, which nobody read": {set: func(n *config.Network) { n.AdvertiseServices.Only = config.OnlyNamed }, have: true, unread: true, want: "[10.96.0.7/32]", unknown: true},
		"no Node has the label": {set: func(n *config.Network) { n.AdvertiseServices.NodeSelector["m"] = "w" }, have: true, want: "[10.96.0.0/12 fd00:96::/108]",
			lacking: "no Node has the labels l=v,m=w, so that the tailnet reaches no Service: kubectl label node NODE l=v m=w"},
		"not asked for": {set: func(n *config.Network) { n.AdvertiseServices.NodeSelector = nil }, have: true, want: "[]"},
	} {
		t.Run(name, func(t *testing.T) {
			c2, client, _ := world(t, headscaletest.New(t), "")
			c2.cfg.Network.AdvertiseServices.NodeSelector = map[string]string{"l": "v"}
			if c.set != nil {
				c.set(&c2.cfg.Network)
			}
			if c.have {
				if _, err := client.NetworkingV1().ServiceCIDRs().Create(t.Context(), ranges, metav1.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
			} else {
				client.PrependReactor("list", "servicecidrs", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, errors.New("away") })
			}
			if !c.unread {
				c2.services = map[string]records.Service{}
				for key, s := range c.services {
					c2.services[key] = s
				}
			}
			s, lacking, known := c2.serving(t.Context(), []node{nodeOf(trim(n, map[string]string{"l": "v"}))}, was)
			if text(s.Routes) != c.want || known == c.unknown {
				t.Errorf("%v known %v, want %s", s.Routes, known, c.want)
			}
			if (len(lacking) > 0) != (c.lacking != "") || len(lacking) > 0 && !strings.Contains(lacking[0].text, c.lacking) {
				t.Errorf("%v, want %q", lacking, c.lacking)
			}
		})
	}
}

// TestManyNamed: whoever makes Services gives the tailnet only so many routes, and the oldest stay.
func TestManyNamed(t *testing.T) {
	c, _, _ := world(t, headscaletest.New(t), "")
	c.services = map[string]records.Service{}
	at := netip.MustParseAddr("10.96.0.1")
	for i := range maxNamed + 7 {
		label := "s" + at.String()[len("10.96."):]
		c.services[label] = records.Service{Name: label, Label: strings.ReplaceAll(label, ".", "-"), IPs: []netip.Addr{at}, Created: now.Add(time.Duration(-i) * time.Second)}
		at = at.Next()
	}
	routes, more, ok := c.namedServices(t.Context(), prefixes("10.96.0.0/16"))
	if len(routes) != maxNamed || more != 7 || !ok {
		t.Errorf("%d routes, %d more, %v", len(routes), more, ok)
	}
	if routes[0] != netip.MustParsePrefix("10.96.0.8/32") {
		t.Errorf("the first is %s: the youngest seven should be missing", routes[0])
	}
}

// TestServicesByController: label, cordon and readiness as the API server tells them, down to Headscale, and the view that the daemon goes by.
func TestServicesByController(t *testing.T) {
	s := headscaletest.New(t)
	var keys []string
	for _, name := range []string{"a", "b"} {
		keys = append(keys, s.AddNode(headscaletest.Node{Name: name, GivenName: name, Online: true, CreatedAt: time.Now().Add(-time.Hour),
			Available: prefixes("10.96.0.0/12", map[string]string{"a": "10.244.1.0/24", "b": "10.244.2.0/24"}[name])}).NodeKey)
	}
	c, client, _ := world(t, s, s.APIKey())
	c.cfg.Network.ServiceCIDRs = config.CIDRs{"10.96.0.0/12"}
	c.cfg.Network.AdvertiseServices.NodeSelector = map[string]string{"l": "v"}
	nodeAt := func(name, key, cidr string, labelled, ready, cordoned bool) {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{kube.NodeKey: key}}}
		n.Spec.PodCIDRs, n.Spec.Unschedulable = []string{cidr}, cordoned
		if labelled {
			n.Labels = map[string]string{"l": "v", "other": "x"}
		}
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: map[bool]corev1.ConditionStatus{true: "True", false: "Unknown"}[ready]}}
		if _, err := client.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{}); err != nil {
			if _, err = client.CoreV1().Nodes().Update(t.Context(), n, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		store := (*nodeStore)(c)
		store.SetNode(store.Trim(n))
	}
	approved := func(want ...string) {
		t.Helper()
		if _, err := c.pass(t.Context()); err != nil {
			t.Fatal(err)
		}
		var got []string
		tailnet, err := c.api.Nodes(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range tailnet {
			for _, r := range n.Approved {
				if r.String() == "10.96.0.0/12" {
					got = append(got, n.Name)
				}
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	nodeAt("b", keys[1], "10.244.2.0/24", false, true, false)
	nodeAt("a", keys[0], "10.244.1.0/24", true, true, false)
	approved("a")
	nodeAt("b", keys[1], "10.244.2.0/24", true, true, false)
	approved("a", "b")
	nodeAt("a", keys[0], "10.244.1.0/24", true, true, true)
	approved("b")
	n, err := client.CoreV1().Nodes().Get(t.Context(), "a", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if v, _, err := kube.ViewOf(n); err != nil || text(v.Services) != "[10.96.0.0/12]" {
		t.Errorf("a cordoned Node is told %v, %v: it is to have the route again at once", v.Services, err)
	}
	nodeAt("a", keys[0], "10.244.1.0/24", true, true, false)
	nodeAt("b", keys[1], "10.244.2.0/24", true, false, false)
	approved("a")
	nodeAt("a", keys[0], "10.244.1.0/24", true, false, false)
	approved("a", "b")
	nodeAt("a", keys[0], "10.244.1.0/24", false, false, false)
	approved("b")
	c.cfg.Network.AdvertiseServices.NodeSelector = nil
	approved()
}
