package controller

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

const grace = 10 * time.Minute

var now = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

// kn is a Node in daemon mode, an hour old, with node key nodekey:<key>.
func kn(name, key string, cidrs ...string) node {
	return node{name: name, key: "nodekey:" + key, mode: "daemon", cidrs: prefixes(cidrs...), created: now.Add(-time.Hour)}
}

var tags = []string{"tag:headcni"}

// ts is a node of the tailnet that advertises routes, which of them are approved, and is primary for those.
func ts(id headscale.ID, key string, advertised []string, approved ...string) headscale.Node {
	return headscale.Node{
		ID: id, Name: key, NodeKey: "nodekey:" + key, Online: true, Available: prefixes(advertised...),
		Approved: prefixes(approved...), Primary: prefixes(approved...), Tags: tags, Method: methodAuthKey,
	}
}

func TestPlan(t *testing.T) {
	young := kn("young", "y", "10.244.1.0/24")
	young.created = now.Add(-time.Second)
	host := kn("one", "a", "10.244.1.0/24")
	host.mode = "host"
	offline := ts(1, "a", []string{"10.244.1.0/24"}, "10.244.1.0/24")
	offline.Online, offline.Primary = false, nil
	second := ts(1, "a", []string{"10.244.1.0/24"}, "10.244.1.0/24")
	second.Primary = nil
	named := func(n headscale.Node, name string) headscale.Node { n.Name = name; return n }
	was := kn("one", "a", "10.244.1.0/24")
	was.view = kube.View{NodeKey: "nodekey:a", State: kube.StateRouted, Routes: prefixes("10.244.1.0/24")}
	was.viewText = was.view.String()
	expiring := ts(1, "a", []string{"10.244.1.0/24"}, "10.244.1.0/24")
	expiring.Expiry = now.Add(time.Hour)

	tests := []struct {
		name    string
		nodes   []node
		tailnet []headscale.Node
		memory  []member
		ranges  []string
		// What follows: the state and a part of the message by Node; approvals as text; what is removed and made to last.
		views         map[string]string
		approvals     []string
		remove        []headscale.ID
		disableExpiry []headscale.ID
	}{
		{
			name: "own routes are approved, the user's stay", nodes: []node{kn("one", "a", "10.244.1.0/24", "fd00:244:1::/64")},
			tailnet:   []headscale.Node{ts(1, "a", []string{"10.244.1.0/24", "fd00:244:1::/64", "0.0.0.0/0"}, "192.168.7.0/24", "0.0.0.0/0")},
			views:     map[string]string{"one": "pending about to be approved"},
			approvals: []string{"1 +[10.244.1.0/24 fd00:244:1::/64] -[]"},
		},
		{
			name: "routed", nodes: []node{kn("one", "a", "10.244.1.0/24")}, tailnet: []headscale.Node{ts(1, "a", []string{"10.244.1.0/24"}, "10.244.1.0/24")},
			views: map[string]string{"one": "routed"},
		},
		{
			name: "nothing to write where it says so already", nodes: []node{was}, tailnet: []headscale.Node{ts(1, "a", []string{"10.244.1.0/24"}, "10.244.1.0/24")},
		},
		{name: "away for a while is no news", nodes: []node{was}, tailnet: []headscale.Node{offline}},
		{
			name: "a node that was broken into and asks for more", ranges: []string{"10.244.0.0/16"},
			nodes:     []node{kn("one", "a", "10.244.1.0/24"), kn("two", "b", "10.244.2.0/24")},
			tailnet:   []headscale.Node{ts(1, "a", []string{"10.244.0.0/16", "10.244.2.0/24"}, "10.244.1.0/24", "10.244.2.0/24", "10.244.0.0/16"), ts(2, "b", nil, "10.244.2.0/24")},
			views:     map[string]string{"one": "routed", "two": "routed"},
			approvals: []string{"1 +[10.244.1.0/24] -[10.244.2.0/24 10.244.0.0/16]"},
		},
		{
			name: "another's node key", nodes: []node{kn("one", "a", "10.244.1.0/24"), kn("thief", "a", "10.244.9.0/24")},
			tailnet: []headscale.Node{ts(1, "a", []string{"10.244.1.0/24"}, "10.244.1.0/24")},
			memory:  []member{{ID: 1, Node: "one", Daemon: true, Routes: prefixes("10.244.1.0/24")}},
			views:   map[string]string{"one": "routed", "thief": "refused Nodes one and thief have the same node key"},
		},
		{
			name: "one node key for two, and nobody had it first", nodes: []node{kn("one", "a", "10.244.1.0/24"), kn("two", "a", "10.244.2.0/24")},
			tailnet: []headscale.Node{ts(1, "a", nil)},
			views:   map[string]string{"one": "refused same node key", "two": "refused same node key"},
		},
		{
			name: "a Node made with another's range", nodes: []node{young, kn("old", "o", "10.244.1.0/24")},
			tailnet:   []headscale.Node{ts(1, "y", []string{"10.244.1.0/24"}), ts(2, "o", []string{"10.244.1.0/24"}, "10.244.1.0/24")},
			views:     map[string]string{"young": "refused overlaps another Node's", "old": "routed"},
			approvals: nil,
		},
		{
			name: "a Node made with a wider range keeps nothing", ranges: []string{"10.244.0.0/16"},
			nodes:     []node{kn("one", "a", "10.244.1.0/24"), {name: "wide", key: "nodekey:w", mode: "daemon", cidrs: prefixes("10.244.0.0/17"), created: now}},
			tailnet:   []headscale.Node{ts(1, "a", nil, "10.244.1.0/24"), ts(2, "w", nil, "10.244.0.0/17")},
			views:     map[string]string{"one": "routed", "wide": "refused overlaps"},
			approvals: []string{"2 +[] -[10.244.0.0/17]"},
		},
		{
			name: "the whole of it", ranges: []string{"10.244.0.0/16"},
			nodes:   []node{{name: "new", cidrs: nil, created: now}, kn("one", "a", "10.244.0.0/16")},
			tailnet: []headscale.Node{ts(1, "a", nil)}, views: map[string]string{"one": "refused whole cluster range"},
		},
		{
			name: "outside", ranges: []string{"10.244.0.0/16"}, nodes: []node{kn("one", "a", "10.0.0.0/24")},
			tailnet: []headscale.Node{ts(1, "a", nil)}, views: map[string]string{"one": "refused network.clusterCIDRs"},
		},
		{
			name: "the tailnet's own addresses", nodes: []node{kn("one", "a", "100.64.7.0/24")},
			tailnet: []headscale.Node{ts(1, "a", nil)}, views: map[string]string{"one": "refused tailnet's own"},
		},
		{name: "not in Headscale", nodes: []node{kn("one", "a", "10.244.1.0/24")}, views: map[string]string{"one": "unknown"}},
		{
			name: "no pod CIDR yet", nodes: []node{kn("one", "a")}, tailnet: []headscale.Node{ts(1, "a", nil)},
			views: map[string]string{"one": "pending no pod CIDR yet"},
		},
		{
			name: "joined anew: the old place loses the range at once, and goes later", nodes: []node{kn("one", "b", "10.244.1.0/24")},
			tailnet:   []headscale.Node{ts(1, "a", nil, "10.244.1.0/24"), ts(2, "b", []string{"10.244.1.0/24"})},
			memory:    []member{{ID: 1, Node: "one", Daemon: true, Routes: prefixes("10.244.1.0/24")}},
			views:     map[string]string{"one": "pending"},
			approvals: []string{"2 +[10.244.1.0/24] -[]", "1 +[] -[10.244.1.0/24]"},
		},
		{
			name: "a Node that was renamed, before the old one is deleted", nodes: []node{was, kn("new", "a", "10.244.9.0/24")},
			tailnet: []headscale.Node{ts(1, "a", []string{"10.244.1.0/24"}, "10.244.1.0/24")},
			memory:  []member{{ID: 1, Node: "one", Daemon: true, Routes: prefixes("10.244.1.0/24")}},
			views:   map[string]string{"new": "refused kubectl delete node"},
		},
		{
			name: "and after that", nodes: []node{kn("new", "a", "10.244.9.0/24")}, ranges: []string{"10.244.0.0/16"},
			tailnet:   []headscale.Node{ts(1, "a", []string{"10.244.1.0/24", "10.244.9.0/24"}, "10.244.1.0/24")},
			memory:    []member{{ID: 1, Node: "one", Daemon: true, Routes: prefixes("10.244.1.0/24")}},
			views:     map[string]string{"new": "pending"},
			approvals: []string{"1 +[10.244.9.0/24] -[10.244.1.0/24]"},
		},
		{
			name: "two clusters, one range: what another's node serves is not taken, and said", nodes: []node{kn("one", "a", "10.244.1.0/24")},
			tailnet:   []headscale.Node{ts(1, "a", []string{"10.244.1.0/24"}), ts(2, "other", []string{"10.244.1.0/24"}, "10.244.1.0/24")},
			views:     map[string]string{"one": "pending about to be approved"},
			approvals: []string{"1 +[10.244.1.0/24] -[]"},
		},
		{
			name: "and then by name", nodes: []node{kn("one", "a", "10.244.1.0/24")},
			tailnet: []headscale.Node{second, named(ts(2, "other", []string{"10.244.1.0/24"}, "10.244.1.0/24"), "far")},
			views:   map[string]string{"one": "pending but node far (2) advertises it too"},
		},
		{
			name: "a Node is gone for a while", tailnet: []headscale.Node{offline},
			memory: []member{{ID: 1, Node: "one", Daemon: true, Routes: prefixes("10.244.1.0/24"), Gone: now.Add(-time.Minute)}},
		},
		{
			name: "a Node is gone for good", tailnet: []headscale.Node{offline},
			memory: []member{{ID: 1, Node: "one", Daemon: true, Routes: prefixes("10.244.1.0/24"), Gone: now.Add(-grace), Due: now.Add(-secondLook)}},
			remove: []headscale.ID{1},
		},
		{
			name: "a Node is gone for good, at the first look", tailnet: []headscale.Node{offline},
			memory: []member{{ID: 1, Node: "one", Daemon: true, Routes: prefixes("10.244.1.0/24"), Gone: now.Add(-grace)}},
		},
		{
			name: "a person's machine stays", tailnet: []headscale.Node{offline},
			memory:    []member{{ID: 1, Node: "one", Routes: prefixes("10.244.1.0/24"), Gone: now.Add(-grace)}},
			approvals: []string{"1 +[] -[10.244.1.0/24]"},
		},
		{
			name: "nodes that were never ours", tailnet: []headscale.Node{ts(5, "laptop", []string{"10.244.3.0/24"}, "10.244.3.0/24")},
		},
		{
			name: "a node key that ends", nodes: []node{kn("one", "a", "10.244.1.0/24")}, tailnet: []headscale.Node{expiring},
			views: map[string]string{"one": "routed"}, disableExpiry: []headscale.ID{1},
		},
		{
			name: "a person's node key is theirs", nodes: []node{host}, tailnet: []headscale.Node{expiring}, views: map[string]string{"one": "routed"},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := makePlan(observation{
				now: now, grace: grace, ranges: prefixes(test.ranges...), tags: tags, nodes: test.nodes, tailnet: test.tailnet, memory: memory{Members: test.memory},
			})
			for name, want := range test.views {
				state, part, _ := strings.Cut(want, " ")
				if v := p.views[name]; v.State != state || !strings.Contains(v.Message, part) {
					t.Errorf("view of %s: %s %q, want %s", name, v.State, v.Message, want)
				}
			}
			if len(p.views) != len(test.views) {
				t.Errorf("views: %v", p.views)
			}
			var approvals []string
			for _, a := range p.approvals {
				approvals = append(approvals, strings.Join([]string{a.node.ID.String(), "+" + text(a.own), "-" + text(a.stale)}, " "))
			}
			if diff := cmp.Diff(test.approvals, approvals); diff != "" {
				t.Error(diff)
			}
			var removed []headscale.ID
			for _, t := range p.remove {
				removed = append(removed, t.ID)
			}
			if diff := cmp.Diff([][]headscale.ID{test.remove, test.disableExpiry}, [][]headscale.ID{removed, p.disableExpiry}); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func text(list []netip.Prefix) string {
	var out []string
	for _, p := range list {
		out = append(out, p.String())
	}
	return "[" + strings.Join(out, " ") + "]"
}

// TestMemory: a place in the tailnet is remembered from the first claim on, and until it is really gone.
func TestMemory(t *testing.T) {
	o := observation{now: now, grace: grace, tags: tags, nodes: []node{kn("one", "a", "10.244.1.0/24")}, tailnet: []headscale.Node{ts(1, "a", []string{"10.244.1.0/24"})}}
	o.tailnet[0].Hostname = "one"
	o.memory = makePlan(o).memory
	claimed := memory{Members: []member{{ID: 1, Node: "one", Daemon: true, Routes: prefixes("10.244.1.0/24")}}}
	prefixEqual := cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
	if diff := cmp.Diff(claimed, o.memory, prefixEqual); diff != "" {
		t.Error(diff)
	}
	o.nodes, o.tailnet[0].Online = nil, false
	o.memory = makePlan(o).memory
	if m := o.memory.Members; len(m) != 1 || !m[0].Gone.Equal(now) {
		t.Errorf("gone: %+v", m)
	}
	o.now = now.Add(grace)
	first := makePlan(o)
	if len(first.remove) != 0 || !first.pending {
		t.Errorf("removed at the first look: %+v", first)
	}
	o.memory, o.now = first.memory, o.now.Add(secondLook)
	back := o
	back.tailnet = []headscale.Node{ts(1, "a", nil)} // online
	if p := makePlan(back); len(p.remove) != 0 || !p.memory.Members[0].Due.IsZero() {
		t.Errorf("a node that is online again at the second look: %+v", p)
	}
	p := makePlan(o)
	if len(p.remove) != 1 || len(p.memory.Members) != 1 || len(p.memory.Removed) != 1 {
		t.Errorf("to be removed: %+v", p)
	}
	// One list without it may be odd.
	o.tailnet, o.memory = nil, p.memory
	p = makePlan(o)
	if m := p.memory.Members; len(m) != 1 || !m[0].Missing.Equal(o.now) {
		t.Errorf("removed: %+v", p.memory)
	}
	o.memory, o.now = p.memory, o.now.Add(secondLook)
	if p := makePlan(o); len(p.memory.Members) != 0 {
		t.Errorf("missing at the second look: %+v", p.memory)
	}
	// A Node that comes back in time is no stranger.
	o.tailnet = []headscale.Node{ts(1, "a", nil, "10.244.1.0/24")}
	o.nodes = []node{kn("one", "a", "10.244.1.0/24")}
	if p := makePlan(o); len(p.remove) != 0 || !p.memory.Members[0].Gone.IsZero() {
		t.Errorf("back: %+v", p)
	}
}

// TestManyAreStale: when many nodes look stale at once, some are removed within an hour, and the finding tells of the others.
// A node that could not be removed is tried again, and not counted twice.
func TestManyAreStale(t *testing.T) {
	const stale = 25
	o := observation{now: now, grace: grace, tags: tags}
	for i := range stale {
		n := ts(headscale.ID(i+1), fmt.Sprint(i), nil)
		n.Online = false
		o.tailnet = append(o.tailnet, n)
		o.memory.Members = append(o.memory.Members, member{ID: n.ID, Node: fmt.Sprint(i), Daemon: true, Gone: now.Add(-grace), Due: now.Add(-secondLook)})
	}
	for pass := range 3 {
		p := makePlan(o)
		if len(p.remove) != removals || p.held != stale-removals || len(p.memory.Removed) != removals {
			t.Fatalf("pass %d: %d removed, %d held, %d remembered", pass, len(p.remove), p.held, len(p.memory.Removed))
		}
		if text := p.heldText(o); !strings.Contains(text, "15 more nodes") {
			t.Error(text)
		}
		o.memory, o.now = p.memory, o.now.Add(time.Minute)
	}
	o.tailnet, o.now = o.tailnet[removals:], now.Add(time.Hour)
	if p := makePlan(o); len(p.remove) != removals || p.remove[0].ID != removals+1 {
		t.Errorf("an hour later: %d are removed", len(p.remove))
	}
}

func TestAllocate(t *testing.T) {
	old := now.Add(-time.Hour)
	theirs := node{name: "theirs", cidrs: prefixes("10.244.0.0/24"), created: old}
	ours := node{name: "ours", cidrs: prefixes("10.244.0.0/24", "fd00:244::/64"), created: old, allocated: true}
	bare := node{name: "bare", created: old}
	tests := []struct {
		name    string
		ranges  []string
		nodes   []node
		tailnet []headscale.Node
		want    map[string]string
		full    string
	}{
		{"both families, the lowest that is free", []string{"10.244.0.0/16", "fd00:244::/48"}, []node{ours, bare}, nil, map[string]string{"bare": "[10.244.1.0/24 fd00:244:0:1::/64]"}, ""},
		{"two at once", []string{"10.244.0.0/16"}, []node{bare, {name: "other", created: old}}, nil, map[string]string{"bare": "[10.244.0.0/24]", "other": "[10.244.1.0/24]"}, ""},
		{"not beside another allocator", []string{"10.244.0.0/16"}, []node{theirs, bare}, nil, map[string]string{}, "Nodes without a pod CIDR (bare) get none: theirs has one"},
		{"not before Kubernetes had its time", []string{"10.244.0.0/16"}, []node{{name: "new", created: now}}, nil, map[string]string{}, ""},
		{"not without clusterCIDRs", nil, []node{bare}, nil, map[string]string{}, ""},
		{"around what the tailnet routes", []string{"10.244.0.0/16"}, []node{bare}, []headscale.Node{ts(1, "x", nil, "10.244.0.0/23")}, map[string]string{"bare": "[10.244.2.0/24]"}, ""},
		{"full", []string{"10.244.0.0/23"}, []node{ours, {name: "a", created: old}, {name: "b", created: old}}, nil, map[string]string{"a": "[10.244.1.0/24]"}, "Node b"},
		{"smaller than one node", []string{"10.244.0.0/25"}, []node{bare}, nil, map[string]string{}, "no free /24"},
		{"at the end of the addresses", []string{"255.255.254.0/23"}, []node{bare, {name: "b", created: old}, {name: "c", created: old}}, nil, map[string]string{"bare": "[255.255.254.0/24]", "b": "[255.255.255.0/24]"}, "Node c"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			given, full := observation{now: now, ranges: prefixes(test.ranges...), nodes: test.nodes, tailnet: test.tailnet}.allocate()
			got := map[string]string{}
			for name, cidrs := range given {
				got[name] = text(cidrs)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
			if (full != nil) != (test.full != "") || full != nil && !strings.Contains(full.Error(), test.full) {
				t.Errorf("full: %v, want %q", full, test.full)
			}
		})
	}
}

// BenchmarkMakePlan plans for clusters of several sizes, at rest and when every Node has just joined. The time for one Node should
// not grow with their number.
func BenchmarkMakePlan(b *testing.B) {
	for _, size := range []int{250, 1000, 4000} {
		rest := manyNodes(size)
		rest.memory = makePlan(rest).memory
		joining := manyNodes(size)
		for i := range joining.tailnet {
			joining.tailnet[i].Approved, joining.tailnet[i].Primary = prefixes("192.168.0.0/24"), nil
		}
		for name, o := range map[string]observation{"rest": rest, "joining": joining} {
			b.Run(fmt.Sprintf("%s/nodes=%d", name, size), func(b *testing.B) {
				for b.Loop() {
					makePlan(o)
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*size), "ns/node")
			})
		}
	}
}

// manyNodes are Nodes with a range of each family, which Headscale has and routes.
func manyNodes(n int) observation {
	o := observation{now: now, grace: grace, tags: tags}
	for i := range n {
		v4, v6 := fmt.Sprintf("10.%d.%d.0/24", i>>8, i&255), fmt.Sprintf("fd00:0:0:%x::/64", i)
		key := fmt.Sprint(i)
		o.nodes = append(o.nodes, kn("node-"+key, key, v4, v6))
		o.tailnet = append(o.tailnet, ts(headscale.ID(i+1), key, []string{v4, v6}, v4, v6))
	}
	return o
}
