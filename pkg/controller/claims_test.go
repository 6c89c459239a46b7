package controller

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/headscaletest"
	"github.com/headcni/headcni/pkg/headscale"
)

// TestForeignClaims: whoever advertises pods of another is named, and nobody who does not.
func TestForeignClaims(t *testing.T) {
	a, b := kn("a", "a", "10.244.1.0/24"), kn("b", "b", "10.244.2.0/24")
	plain := func(id headscale.ID, key string, advertised ...string) headscale.Node { return ts(id, key, advertised) }
	named := func(t headscale.Node, name string) headscale.Node { t.Hostname = name; return t }
	off := plain(3, "x", "10.244.2.0/24")
	off.Online = false
	fresh := plain(3, "x", "10.244.2.0/24")
	fresh.Created = now.Add(-time.Second)
	for name, c := range map[string]struct {
		tailnet []headscale.Node
		memory  []member
		open    bool   // network.clusterCIDRs are not set
		want    string // "": nobody
	}{
		"each its own":                      {[]headscale.Node{plain(1, "a", "10.244.1.0/24"), plain(2, "b", "10.244.2.0/24")}, nil, false, ""},
		"another Node's":                    {[]headscale.Node{plain(1, "a", "10.244.1.0/24", "10.244.2.0/24"), plain(2, "b", "10.244.2.0/24")}, nil, false, "node 1 (a) advertises [10.244.2.0/24]"},
		"a piece of it":                     {[]headscale.Node{plain(1, "a", "10.244.2.128/25"), plain(2, "b", "10.244.2.0/24")}, nil, true, "node 1 (a) advertises [10.244.2.128/25]"},
		"nobody's, in the cluster's":        {[]headscale.Node{plain(1, "a", "10.244.9.0/24")}, nil, false, "node 1 (a)"},
		"nobody's, and no ranges are known": {[]headscale.Node{plain(1, "a", "10.244.9.0/24")}, nil, true, ""},
		"the whole cluster":                 {[]headscale.Node{plain(1, "a", "10.244.0.0/16")}, nil, false, "[10.244.0.0/16]"},
		"no Node":                           {[]headscale.Node{named(plain(3, "thief\x1b", "10.244.2.0/24"), "thief")}, nil, false, `node 3 (thief\x1b)`},
		"no Node, away":                     {[]headscale.Node{off}, nil, false, ""},
		"one that is about to be a Node":    {[]headscale.Node{named(plain(3, "new", "10.244.2.0/24"), "b")}, nil, false, ""},
		"no Node yet":                       {[]headscale.Node{fresh}, nil, false, ""},
		"one that was a Node":               {[]headscale.Node{plain(3, "old", "10.244.7.0/24")}, []member{{ID: 3, Node: "old", Routes: prefixes("10.244.7.0/24")}}, false, ""},
		"an exit, and a user's network":     {[]headscale.Node{plain(1, "a", "0.0.0.0/0", "::/0", "192.168.1.0/24", "10.0.0.0/8")}, nil, false, ""},
	} {
		o := observation{now: now, grace: grace, tags: tags, nodes: []node{a, b}, tailnet: c.tailnet, ranges: prefixes("10.244.0.0/16")}
		if o.memory.Members = c.memory; c.open {
			o.ranges = nil
		}
		got := makePlan(o).claimed
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) || strings.Contains(got, "\x1b") {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// TestGrantWithoutMemory: where the controller's memory is lost, what Headscale has approved for a Node stays with it, whichever Node
// asks for the same and is older.
func TestGrantWithoutMemory(t *testing.T) {
	old, b := node{name: "a", cidrs: prefixes("10.244.0.0/17"), created: now.AddDate(-1, 0, 0)}, kn("b", "b", "10.244.2.0/24")
	o := observation{now: now, grace: grace, tags: tags, nodes: []node{old, b}, tailnet: []headscale.Node{ts(2, "b", []string{"10.244.2.0/24"}, "10.244.2.0/24")}}
	p := makePlan(o)
	if len(p.approvals) > 0 {
		t.Errorf("%+v", p.approvals)
	}
	if v := p.views["b"]; v.State != "routed" {
		t.Errorf("b is %+v", v)
	}
}

// TestClaimsAreTold: each refusal is an Event of whom it is about, and a metric: a range that no Node may have, another's node key, a name
// of another, pods of another.
func TestClaimsAreTold(t *testing.T) {
	s := headscaletest.New(t)
	at := func(name string, routes ...string) headscaletest.Node {
		return s.AddNode(headscaletest.Node{Name: name, GivenName: name, Online: true, Available: prefixes(routes...), CreatedAt: time.Now().Add(-time.Hour)})
	}
	kube := func(name, key, cidr string) *corev1.Node {
		n := &corev1.Node{}
		n.Name, n.Annotations = name, map[string]string{"headcni.io/node-key": key}
		n.Spec.PodCIDRs = []string{cidr}
		return n
	}
	good, wide := at("good", "10.244.1.0/24"), at("wide", "10.244.0.0/16")
	thief, other := at("thief", "10.244.1.0/24"), at("other")
	c, client, _ := world(t, s, s.APIKey(),
		kube("good", good.NodeKey, "10.244.1.0/24"), kube("wide", wide.NodeKey, "10.9.0.0/24"), // not the cluster's
		kube("poser", good.NodeKey, "10.244.3.0/24"), kube("other", other.NodeKey, "10.244.1.0/25"), kube("tnode", thief.NodeKey, "10.244.4.0/24"))
	for range 2 { // what a pass writes, the next tells
		if _, err := c.pass(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	events, err := client.EventsV1().Events("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	about := map[string]string{}
	for _, e := range events.Items {
		about[e.Regarding.Name] += e.Note + "\n"
	}
	for name, words := range map[string]string{
		"wide": "is not within network.clusterCIDRs", "poser": "is not what it says it is", "other": "overlaps another Node's pod CIDR",
		"headcni-controller": "(thief) advertises [10.244.1.0/24]",
	} {
		if !strings.Contains(about[name], words) {
			t.Errorf("%s: %q, want %q", name, about[name], words)
		}
	}
	if about["good"] != "" {
		t.Errorf("good: %s", about["good"])
	}
	families, err := c.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				got[f.GetName()+" "+l.GetValue()] = m.GetGauge().GetValue()
			}
		}
	}
	for name, want := range map[string]float64{"headcni_controller_nodes refused": 3, "headcni_policy_findings claims": 1} {
		if got[name] != want {
			t.Errorf("%s: %v, want %v", name, got[name], want)
		}
	}
}
