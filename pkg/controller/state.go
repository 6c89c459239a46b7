package controller

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

// node is what the plan needs of a Node.
type node struct {
	name string
	// key and mode are what the node's own daemon says; "" before it has joined.
	key, mode string
	// domain is the tailnet's, as the node's own daemon says; "" before it has joined.
	domain  string
	cidrs   []netip.Prefix
	cidrErr error
	// shared are its addresses in the tailnet's IPv4 range, be they the tailnet's or another network's.
	shared  []netip.Addr
	created time.Time
	// allocated: the CIDRs are from us, not from Kubernetes.
	allocated bool
	leaving   bool // is being uninstalled
	// labels are those that network.advertiseServices chooses by. fit: the Node is ready and nobody keeps pods away from it.
	labels   map[string]string
	fit      bool
	view     kube.View
	viewText string // as it stands on the Node, "" = none
}

// maxKey is longer than any node key. We write the key back, and a Node takes 256 kB of annotations: whoever has a node must
// not make our writes fail.
const maxKey = 128

func nodeOf(n *corev1.Node) node {
	out := node{
		name: n.Name, key: n.Annotations[kube.NodeKey], mode: n.Annotations[kube.Mode], created: n.CreationTimestamp.Time,
		allocated: n.Annotations[kube.Allocated] == "true", leaving: n.Annotations[kube.Uninstall] == "true",
		viewText: n.Annotations[kube.Headscale],
	}
	if len(out.key) > maxKey {
		out.key = ""
	}
	out.cidrs, out.cidrErr = kube.PodCIDRs(n)
	for _, a := range n.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil && netset.TailnetIPv4.Contains(ip) {
			out.shared = append(out.shared, ip)
		}
	}
	out.domain = n.Annotations[kube.TailnetDomain]
	out.labels, out.fit = n.Labels, !n.Spec.Unschedulable && slices.ContainsFunc(n.Status.Conditions, isReady)
	out.view, _, _ = kube.ViewOf(n) // a damaged one is written anew
	return out
}

func isReady(c corev1.NodeCondition) bool {
	return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
}

// withViews are nodes with the views that we give them. What stands on a Node, whoever has the node can write too: it must
// get into no event and no metric.
func withViews(nodes []node, changed map[string]kube.View) []node {
	out := slices.Clone(nodes)
	for i, n := range out {
		if v, ok := changed[n.name]; ok {
			out[i].view = v
		} else if n.key == "" || n.leaving {
			out[i].view = kube.View{} // not looked at
		}
	}
	return out
}

// observation is what a plan is made from.
type observation struct {
	now time.Time
	// grace is kubernetes.nodeGrace.
	grace time.Duration
	// ranges are network.clusterCIDRs; none means that the Nodes' pod CIDRs are all there is.
	ranges []netip.Prefix
	// services are network.serviceCIDRs.
	services []netip.Prefix
	// serve is what the tailnet is to reach of them.
	serve serving
	// tags are those that our nodes join with.
	tags    []string
	nodes   []node
	tailnet []headscale.Node
	memory  memory
}

// memory is what the controller must know of the past: which node of the tailnet was which Node.
type memory struct {
	Members []member `json:"members,omitempty"`
	// Removed are the nodes that were removed from Headscale within the last hour.
	Removed []removal `json:"removed,omitempty"`
	// Serve is what was last known of services that the tailnet reaches.
	Serve serving `json:"serve,omitzero"`
}

// removal is the first try to remove a node from Headscale.
type removal struct {
	ID headscale.ID `json:"id"`
	At time.Time    `json:"at"`
}

// member is a node of the tailnet that a Node has claimed by its node key.
type member struct {
	ID   headscale.ID `json:"id"`
	Node string       `json:"node"`
	// Daemon: it joined for us, in daemon mode, under the Node's name. Others may be people's machines and are never removed.
	Daemon bool `json:"daemon,omitempty"`
	// Routes are what we approved for it.
	Routes []netip.Prefix `json:"routes,omitempty"`
	// Services are the routes to services that we approved for it and have not seen taken back.
	Services []netip.Prefix `json:"services,omitempty"`
	// Created is when it joined. Headscale gives numbers anew: with another database, and with SQLite that of the last node
	// that was deleted. Zero in what older versions wrote.
	Created time.Time `json:"created,omitzero"`
	// Gone is since when no Node claims it, zero while one does.
	Gone time.Time `json:"gone,omitzero"`
	// Due is since when it is to be removed, Missing since when Headscale does not list it. Zero where that is not so.
	Due     time.Time `json:"due,omitzero"`
	Missing time.Time `json:"missing,omitzero"`
}

// sharing names the Nodes that have an address in the tailnet's range which is not the tailnet's.
func (o observation) sharing() []string {
	known := map[string]bool{}
	of := map[netip.Addr]bool{}
	for _, t := range o.tailnet {
		known[t.NodeKey] = true
		for _, ip := range t.IPs {
			of[ip] = true
		}
	}
	var out []string
	for _, n := range o.nodes {
		if known[n.key] && slices.ContainsFunc(n.shared, func(ip netip.Addr) bool { return !of[ip] }) {
			out = append(out, n.name)
		}
	}
	return out
}

// joined reports whether a node of the tailnet has joined for us: by a key, with our tags. A Node's annotations are what
// its daemon says, and anybody's node key can be read from a tailnet: a node that was broken into could say that it is
// somebody's laptop in daemon mode, and have that removed.
func (o observation) joined(t headscale.Node) bool {
	return t.Method == methodAuthKey && len(o.tags) > 0 && !slices.ContainsFunc(o.tags, func(tag string) bool { return !slices.Contains(t.Tags, tag) })
}

// methodAuthKey is Headscale's word for a node that joined with a pre-auth key.
const methodAuthKey = "REGISTER_METHOD_AUTH_KEY"

// is reports whether t is the one that is remembered, and not another with its number.
func (m member) is(t headscale.Node) bool {
	return m.ID == t.ID && (m.Created.IsZero() || m.Created.Equal(t.Created))
}

// memberIndex finds members by their number.
type memberIndex map[headscale.ID][]member

func (m memory) index() memberIndex {
	out := memberIndex{}
	for _, e := range m.Members {
		out[e.ID] = append(out[e.ID], e)
	}
	return out
}

// of is what is remembered of a node of the tailnet.
func (x memberIndex) of(t headscale.Node) (member, bool) {
	for _, e := range x[t.ID] {
		if e.is(t) {
			return e, true
		}
	}
	return member{}, false
}

func sortMembers(members []member) {
	slices.SortFunc(members, func(a, b member) int { return cmp.Compare(a.ID, b.ID) })
}
