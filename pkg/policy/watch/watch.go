// Package watch keeps what NetworkPolicies depend on as the API server has it (Pods, Namespaces, NetworkPolicies and Nodes), cut down
// to what counts, and makes snapshots of it.
package watch

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/policy"
)

// Watch follows the cluster. Make it with New.
type Watch struct {
	client kube.Client
	node   string
	nodes  func() (nodes []nodeview.Node, all bool)

	mu         sync.Mutex
	changed    func()
	pods       pods
	namespaces map[string]policy.Namespace
	policies   map[types.NamespacedName]*networkingv1.NetworkPolicy
	// These are made of the above when they are asked for, and nil after a change: the same order makes it cheap to compare.
	list   []*networkingv1.NetworkPolicy
	spaces []policy.Namespace
	// places are the nodes' addresses that count, of the nodes that ranges are of.
	places []policy.Node

	synced    map[string]bool // by kind
	away      map[string]error
	awaySince time.Time // zero while the API server can be asked for everything
	since     time.Time // of the first change that no snapshot has, zero where there is none
	ranges    *ranges
}

// The kinds that are followed here. Nodes are followed by nodeview.
const (
	kindPods       = "pods"
	kindNamespaces = "namespaces"
	kindPolicies   = "networkpolicies"
)

// New makes the watch of the node of this name. nodes are those of a nodeview.Watch.
func New(client kube.Client, node string, nodes func() ([]nodeview.Node, bool)) *Watch {
	return &Watch{
		client: client, node: node, nodes: nodes, changed: func() {}, pods: newPods(), namespaces: map[string]policy.Namespace{},
		policies: map[types.NamespacedName]*networkingv1.NetworkPolicy{}, synced: map[string]bool{}, away: map[string]error{},
	}
}

// Run follows until ctx ends. It calls changed soon after each change that a snapshot shows, or that Away does.
func (w *Watch) Run(ctx context.Context, changed func()) {
	w.mu.Lock()
	w.changed = changed // Nodes may be followed already
	w.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() {
		kube.Follow(ctx, w.client, w.client.Pods(""), &corev1.Pod{}, kube.Feed[*corev1.Pod, pod]{
			Trim: w.trimPod, Answered: w.answered(kindPods),
			Replace: func(all []pod) { w.replaced(kindPods, func() { w.pods.replace(all) }) },
			Set:     func(p pod) { w.change(func() bool { return w.pods.set(p) }) },
			Remove:  func(p pod) { w.change(func() bool { return w.pods.remove(nameOfPod(p.Pod)) }) },
		})
	})
	wg.Go(func() {
		kube.Follow(ctx, w.client, w.client.Namespaces(), &corev1.Namespace{}, kube.Feed[*corev1.Namespace, policy.Namespace]{
			Trim: func(n *corev1.Namespace) policy.Namespace { return policy.Namespace{Name: n.Name, Labels: n.Labels} }, Answered: w.answered(kindNamespaces),
			Replace: func(all []policy.Namespace) { w.replaced(kindNamespaces, func() { w.replaceNamespaces(all) }) },
			Set:     func(n policy.Namespace) { w.change(func() bool { return w.setNamespace(n) }) },
			Remove: func(n policy.Namespace) {
				w.change(func() bool { w.spaces = nil; return drop(w.namespaces, n.Name) })
			},
		})
	})
	wg.Go(func() {
		kube.Follow(ctx, w.client, w.client.NetworkPolicies(""), &networkingv1.NetworkPolicy{}, kube.Feed[*networkingv1.NetworkPolicy, *networkingv1.NetworkPolicy]{
			Trim: w.trimPolicy, Answered: w.answered(kindPolicies),
			Replace: func(all []*networkingv1.NetworkPolicy) { w.replaced(kindPolicies, func() { w.replacePolicies(all) }) },
			Set:     func(p *networkingv1.NetworkPolicy) { w.change(func() bool { return w.setPolicy(p) }) },
			Remove: func(p *networkingv1.NetworkPolicy) {
				w.change(func() bool { w.list = nil; return drop(w.policies, nameOf(p)) })
			},
		})
	})
	wg.Wait()
}

// NodesChanged is to be called when what the function nodes returns has changed.
func (w *Watch) NodesChanged() { w.change(func() bool { return true }) }

// change does what changes the caches, and tells of it where it reports that it did.
func (w *Watch) change(do func() bool) {
	w.mu.Lock()
	news := do()
	if news && w.since.IsZero() {
		w.since = time.Now()
	}
	changed := w.changed
	w.mu.Unlock()
	if news {
		changed()
	}
}

func (w *Watch) replaced(kind string, do func()) {
	w.change(func() bool {
		do()
		w.synced[kind] = true
		return true
	})
}

// answered records whether the API server answers for a kind.
func (w *Watch) answered(kind string) func(error) {
	return func(err error) {
		if errors.Is(err, context.Canceled) || apierrors.IsResourceExpired(err) || apierrors.IsInvalid(err) {
			return // we are being stopped; or the library asks in another way next
		}
		if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
			err = fmt.Errorf("%w; the service account %s must be allowed to list and watch %s (see the chart's ClusterRole)", err, kube.DaemonAccount, kind)
		}
		w.mu.Lock()
		news := (err == nil) != (w.away[kind] == nil)
		w.away[kind] = err
		if err == nil {
			delete(w.away, kind)
		}
		switch {
		case len(w.away) == 0:
			w.awaySince = time.Time{}
		case w.awaySince.IsZero():
			w.awaySince = time.Now()
		}
		w.mu.Unlock()
		if news {
			w.changed()
		}
	}
}

// Revoked reports whether the API server lets us read no policies any more, although it knows what we may do: a version that enforces
// none takes our place, as after helm rollback.
func (w *Watch) Revoked(ctx context.Context) bool {
	_, err := w.client.NetworkPolicies("").List(ctx, metav1.ListOptions{Limit: 1})
	if !apierrors.IsForbidden(err) {
		return false
	}
	// An API server that has just started denies everything until it has read its RBAC rules.
	_, err = w.client.Nodes().Get(ctx, w.node, metav1.GetOptions{})
	return err == nil
}

// Away says why the API server cannot be asked for all that is followed, and since when; nil while it can.
func (w *Watch) Away() (since time.Time, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, kind := range []string{kindPods, kindNamespaces, kindPolicies} {
		if err := w.away[kind]; err != nil {
			return w.awaySince, fmt.Errorf("read %s: %w", kind, err)
		}
	}
	return time.Time{}, nil
}

// Cluster is what is known of the cluster at one moment.
type Cluster struct {
	// Snapshot has the addresses that pods' statuses name, those of the own node's pods too.
	*policy.Snapshot
	// Static is the UID by which kubelet and the runtime know a static pod of the own node, by that of its mirror in the API.
	Static map[types.UID]types.UID
	// Since is when the first change came that no snapshot before this one had, zero where there was none.
	Since time.Time
}

// Snapshot returns nil until everything of every kind has been read: of half a cluster nobody can tell who is allowed what.
func (w *Watch) Snapshot() *Cluster {
	nodes, all := w.nodes()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !all || !w.synced[kindPods] || !w.synced[kindNamespaces] || !w.synced[kindPolicies] {
		return nil
	}
	if w.spaces == nil {
		w.spaces = slices.AppendSeq(make([]policy.Namespace, 0, len(w.namespaces)), maps.Values(w.namespaces))
	}
	if w.list == nil {
		w.list = slices.AppendSeq(make([]*networkingv1.NetworkPolicy, 0, len(w.policies)), maps.Values(w.policies))
	}
	c := &Cluster{Snapshot: &policy.Snapshot{Node: w.node, Namespaces: w.spaces, Policies: w.list}, Static: map[types.UID]types.UID{}, Since: w.since}
	w.place(c, nodes)
	for p, uid := range w.pods.static {
		c.Static[p.UID] = uid
	}
	w.since = time.Time{}
	return c
}

// place fills in who has which addresses. What one node says of itself and its pods takes nothing from another: a pod's address
// does not count where it is in another Node's range, and a node's not where it is in any.
func (w *Watch) place(c *Cluster, nodes []nodeview.Node) {
	all := &w.pods
	if w.ranges == nil || !w.ranges.areOf(nodes) {
		w.ranges = newRanges(nodes)
		clear(all.placed)
		clear(all.beside)
		w.places = make([]policy.Node, 0, len(nodes))
		for _, n := range nodes {
			w.places = append(w.places, policy.Node{Name: n.Name, Addrs: slices.DeleteFunc(slices.Clone(n.Addrs), w.ranges.hold)})
		}
	}
	for i, p := range all.placed {
		if p != nil {
			continue
		}
		placed, beside := w.ranges.place(all.list[i])
		if all.placed[i] = placed; beside != nil {
			all.beside[all.list[i]] = beside
		}
	}
	c.Pods, c.Nodes, c.PodCIDRs = slices.Clone(all.placed), w.places, w.ranges.union
	if len(all.beside) > 0 {
		c.PodCIDRs = netset.Union(w.ranges.union, slices.Concat(slices.Collect(maps.Values(all.beside))...))
	}
}

// ranges finds whose pod CIDR an address is in.
type ranges struct {
	nodes   []nodeview.Node
	union   []netip.Prefix
	lens    [2][]int // lengths that occur, longest first, for IPv4 and IPv6
	holders map[netip.Prefix]string
}

func newRanges(nodes []nodeview.Node) *ranges {
	r := &ranges{nodes: nodes, holders: map[netip.Prefix]string{}}
	var all []netip.Prefix
	for _, n := range nodes {
		for _, p := range n.PodCIDRs {
			if _, taken := r.holders[p]; taken {
				continue // who had it first cannot be told here; the controller does
			}
			r.holders[p] = n.Name
			all = append(all, p)
			lens := &r.lens[family(p.Addr())]
			if !slices.Contains(*lens, p.Bits()) {
				*lens = append(*lens, p.Bits())
			}
		}
	}
	for i := range r.lens {
		slices.SortFunc(r.lens[i], func(a, b int) int { return b - a })
	}
	r.union = netset.Union(all)
	return r
}

// areOf reports whether they are those of nodes. Lists that did not change are the same ones.
func (r *ranges) areOf(nodes []nodeview.Node) bool {
	if len(nodes) > 0 && len(nodes) == len(r.nodes) && &nodes[0] == &r.nodes[0] {
		return true
	}
	return slices.EqualFunc(r.nodes, nodes, func(a, b nodeview.Node) bool {
		return a.Name == b.Name && slices.Equal(a.PodCIDRs, b.PodCIDRs) && slices.Equal(a.Addrs, b.Addrs)
	})
}

// place returns a pod with the addresses that no other Node holds, and those that none does: its Node had their range before, or
// another plugin gave them.
func (r *ranges) place(p *policy.Pod) (placed *policy.Pod, beside []netip.Prefix) {
	foreign := func(a netip.Addr) bool {
		holder, held := r.holder(a)
		return held && holder != p.Node
	}
	for _, a := range p.IPs {
		if !r.hold(a) {
			beside = append(beside, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	if !slices.ContainsFunc(p.IPs, foreign) {
		return p, beside
	}
	own := *p
	own.IPs = slices.DeleteFunc(slices.Clone(p.IPs), foreign)
	return &own, beside
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

func (r *ranges) hold(a netip.Addr) bool {
	_, held := r.holder(a)
	return held
}

func (r *ranges) holder(a netip.Addr) (node string, held bool) {
	for _, bits := range r.lens[family(a)] {
		p, err := a.Prefix(bits)
		if err != nil {
			continue // an address that is none has no range
		}
		if node, held = r.holders[p]; held {
			return node, true
		}
	}
	return "", false
}

// trimPod and trimPolicy cut down what is kept as it is read: until all are, a cluster has as many copies of labels as pods.
func (w *Watch) trimPod(p *corev1.Pod) pod {
	out := trimPod(p, w.node)
	w.pods.shared.pod(out.Pod)
	return out
}

func (w *Watch) trimPolicy(p *networkingv1.NetworkPolicy) *networkingv1.NetworkPolicy {
	out := trimPolicy(p)
	w.pods.shared.policy(out)
	return out
}

func (w *Watch) replaceNamespaces(all []policy.Namespace) {
	clear(w.namespaces)
	w.spaces = nil
	for _, n := range all {
		w.namespaces[n.Name] = n
	}
}

func (w *Watch) setNamespace(n policy.Namespace) bool {
	before, had := w.namespaces[n.Name]
	w.namespaces[n.Name] = n
	w.spaces = nil
	return !had || !equalLabels(before.Labels, n.Labels)
}

func (w *Watch) replacePolicies(all []*networkingv1.NetworkPolicy) {
	clear(w.policies)
	w.list = nil
	for _, p := range all {
		w.policies[nameOf(p)] = p
	}
}

func (w *Watch) setPolicy(p *networkingv1.NetworkPolicy) bool {
	before := w.policies[nameOf(p)]
	w.policies[nameOf(p)] = p
	w.list = nil
	return before == nil || before.UID != p.UID || before.Generation != p.Generation || !equalSpecs(before, p)
}

func drop[K comparable, V any](m map[K]V, key K) bool {
	_, had := m[key]
	delete(m, key)
	return had
}

func nameOf(p *networkingv1.NetworkPolicy) types.NamespacedName {
	return types.NamespacedName{Namespace: p.Namespace, Name: p.Name}
}
