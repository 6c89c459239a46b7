package policy

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"go4.org/netipx"
	networkingv1 "k8s.io/api/networking/v1"
)

// cluster is the last snapshot, with what the compiler looks up in it.
type cluster struct {
	*Snapshot
	families []bool                       // is it IPv6?
	spaces   map[string]map[string]string // namespaces' labels by name
	// addrs are all nodes' addresses, sorted.
	addrs   []nodeAddr
	podNets *netipx.IPSet

	local       map[*Pod]bool // the own node's
	claims      claims
	byNamespace map[string][]*Pod
	// byLabel has the pods with a label, by key and value, for the keys that were asked for.
	byLabel map[string]map[string][]*Pod
	// byPort has the pods with a named port, by its name.
	byPort map[string][]*Pod
	// policies are those of a namespace, and versions how often they have changed.
	policies map[string][]*networkingv1.NetworkPolicy
	versions map[string]int
}

type nodeAddr struct {
	addr netip.Addr
	node *Node
}

// claims are the pods that say that an address is theirs. It is one each, so that one pointer is kept for each address and not a list: of
// all that is known of a cluster they are the most.
type claims struct {
	four map[[4]byte]*Pod
	six  map[[16]byte]*Pod
	// several are all the pods of an address that more than one says is its own.
	several map[netip.Addr][]*Pod
}

func newClaims() claims {
	return claims{four: map[[4]byte]*Pod{}, six: map[[16]byte]*Pod{}, several: map[netip.Addr][]*Pod{}}
}

// sole is the one pod that says so, nil where there is none or several do.
func (c claims) sole(a netip.Addr) *Pod {
	if a.Is4() {
		return c.four[a.As4()]
	}
	return c.six[a.As16()]
}

func (c claims) setSole(a netip.Addr, p *Pod) {
	switch {
	case a.Is4() && p != nil:
		c.four[a.As4()] = p
	case a.Is4():
		delete(c.four, a.As4())
	case p != nil:
		c.six[a.As16()] = p
	default:
		delete(c.six, a.As16())
	}
}

// of are all that say so.
func (c claims) of(a netip.Addr) []*Pod {
	if p := c.sole(a); p != nil {
		return []*Pod{p}
	}
	return c.several[a]
}

func (c claims) add(a netip.Addr, p *Pod)    { c.set(a, append(c.of(a), p)) }
func (c claims) remove(a netip.Addr, p *Pod) { c.set(a, without(c.of(a), p)) }

func (c claims) set(a netip.Addr, all []*Pod) {
	switch len(all) {
	case 0:
		c.setSole(a, nil)
	case 1:
		delete(c.several, a)
		c.setSole(a, all[0])
	default:
		c.setSole(a, nil)
		c.several[a] = all
	}
}

// changes are what the last update did to a cluster.
type changes struct {
	// nodes: what blocks and the cluster's ranges mean may be different. Then everything is compiled anew, and no pods are listed.
	nodes bool
	// pods are those that came, went, or share an address with one that did, and addrs the addresses of these.
	pods  []*Pod
	addrs map[netip.Addr]bool
	// policies are those that went.
	policies []*networkingv1.NetworkPolicy
	// spaces are the labels, before and after, of the namespaces where they are different, nil where there was or is none.
	spaces [][2]map[string]string
}

func newCluster() *cluster {
	return &cluster{
		Snapshot: &Snapshot{}, local: map[*Pod]bool{}, policies: map[string][]*networkingv1.NetworkPolicy{}, versions: map[string]int{}, claims: newClaims(), byNamespace: map[string][]*Pod{},
		byLabel: map[string]map[string][]*Pod{}, byPort: map[string][]*Pod{},
	}
}

// update makes c what s is.
func (c *cluster) update(s *Snapshot) (ch changes) {
	old := c.Snapshot
	c.Snapshot = s
	ch.nodes = old.Node != s.Node || !slices.Equal(old.PodCIDRs, s.PodCIDRs) ||
		!slices.EqualFunc(old.Nodes, s.Nodes, func(a, b Node) bool { return a.Name == b.Name && slices.Equal(a.Addrs, b.Addrs) })
	if old.Node != s.Node {
		old = &Snapshot{}
		*c = *newCluster()
		c.Snapshot = s
	}
	if ch.nodes || c.podNets == nil {
		c.setNodes()
	}
	ch.pods, ch.addrs = c.setPods(old.Pods, s.Pods, !ch.nodes)
	ch.policies = c.setPolicies(old.Policies, s.Policies)
	spaces := make(map[string]map[string]string, len(s.Namespaces))
	for _, n := range s.Namespaces {
		labels := n.Labels
		if labels == nil {
			labels = map[string]string{} // known, and without labels
		}
		spaces[n.Name] = labels
	}
	for name, before := range c.spaces {
		if now := spaces[name]; now == nil || !maps.Equal(before, now) {
			ch.spaces = append(ch.spaces, [2]map[string]string{before, now})
		}
	}
	for name, now := range spaces {
		if c.spaces[name] == nil {
			ch.spaces = append(ch.spaces, [2]map[string]string{nil, now})
		}
	}
	c.spaces = spaces
	return ch
}

func (c *cluster) setPolicies(old, now []*networkingv1.NetworkPolicy) (gone []*networkingv1.NetworkPolicy) {
	gone, come := difference(old, now)
	for _, p := range gone {
		put(c.policies, p.Namespace, p, without)
		c.versions[p.Namespace]++
	}
	for _, p := range come {
		put(c.policies, p.Namespace, p, with)
		c.versions[p.Namespace]++
	}
	return gone
}

func (c *cluster) setNodes() {
	var nets netipx.IPSetBuilder
	var ipv4, ipv6 bool
	for _, p := range c.PodCIDRs {
		nets.AddPrefix(p)
		ipv4, ipv6 = ipv4 || p.Addr().Is4(), ipv6 || p.Addr().Is6()
	}
	c.podNets, _ = nets.IPSet() // it cannot hold a prefix that is none
	c.families = nil
	if ipv4 || !ipv6 {
		c.families = append(c.families, false)
	}
	if ipv6 || !ipv4 {
		c.families = append(c.families, true)
	}
	c.addrs = nil
	for i := range c.Nodes {
		for _, a := range c.Nodes[i].Addrs {
			c.addrs = append(c.addrs, nodeAddr{a, &c.Nodes[i]})
		}
	}
	slices.SortFunc(c.addrs, func(a, b nodeAddr) int { return a.addr.Compare(b.addr) })
}

// setPods takes out the pods that are not there any more and adds the new ones. It lists them where tell is set.
func (c *cluster) setPods(old, now []*Pod, tell bool) (changed []*Pod, addrs map[netip.Addr]bool) {
	addrs = map[netip.Addr]bool{}
	change := func(list []*Pod, change func([]*Pod, *Pod) []*Pod, claim func(netip.Addr, *Pod)) {
		for _, p := range list {
			if !p.networked() {
				continue
			}
			c.index(p, change, claim)
			if !tell {
				continue
			}
			changed = append(changed, p)
			for _, a := range p.IPs {
				addrs[a] = true
			}
		}
	}
	gone, come := difference(old, now)
	change(gone, without, c.claims.remove)
	change(come, with, c.claims.add)
	for _, p := range gone {
		delete(c.local, p)
	}
	for _, p := range come {
		if p.Node == c.Node && p.networked() {
			c.local[p] = true
		}
	}
	for a := range addrs {
		changed = append(changed, c.claims.of(a)...)
	}
	return changed, addrs
}

// difference finds what is in one list only. It is fast where most of them are at the same place in both.
func difference[T comparable](old, now []T) (gone, come []T) {
	in := map[T]int{}
	for i := range max(len(old), len(now)) {
		if i < len(old) && i < len(now) && old[i] == now[i] {
			continue
		}
		if i < len(old) {
			in[old[i]]--
		}
		if i < len(now) {
			in[now[i]]++
		}
	}
	var none T
	for v, n := range in {
		switch {
		case v == none:
		case n < 0:
			gone = append(gone, v)
		case n > 0:
			come = append(come, v)
		}
	}
	return gone, come
}

func with[T any](list []T, v T) []T { return append(list, v) }

func without[T comparable](list []T, v T) []T {
	i := slices.Index(list, v)
	list[i] = list[len(list)-1]
	return slices.Delete(list, len(list)-1, len(list))
}

// index puts a pod into all indexes, or takes it out.
func (c *cluster) index(p *Pod, list func([]*Pod, *Pod) []*Pod, claim func(netip.Addr, *Pod)) {
	put(c.byNamespace, p.Namespace, p, list)
	for label, index := range c.byLabel {
		if v, has := p.Labels[label]; has {
			put(index, v, p, list)
		}
	}
	for i, port := range p.Ports {
		if !slices.ContainsFunc(p.Ports[:i], func(o NamedPort) bool { return o.Name == port.Name }) {
			put(c.byPort, port.Name, p, list)
		}
	}
	for i, a := range p.IPs {
		if !slices.Contains(p.IPs[:i], a) {
			claim(a, p)
		}
	}
}

func put[K comparable, V any](index map[K][]V, key K, v V, list func([]V, V) []V) {
	if now := list(index[key], v); len(now) > 0 {
		index[key] = now
	} else {
		delete(index, key)
	}
}

// owners are the pods whose address it is: one, or several where nobody can tell.
func (c *cluster) owners(a netip.Addr) []*Pod {
	claims := c.claims.of(a)
	if len(claims) < 2 {
		return claims
	}
	best := slices.MaxFunc(claims, func(a, b *Pod) int { return c.rank(a) - c.rank(b) })
	var out []*Pod
	for _, p := range claims {
		if c.rank(p) == c.rank(best) {
			out = append(out, p)
		}
	}
	return out
}

// rank says who of several pods has an address: a pod of the own node has its link here, and one that does not terminate came later.
func (c *cluster) rank(p *Pod) int {
	switch {
	case p.Node == c.Node && !p.Terminating:
		return 3
	case p.Node == c.Node:
		return 2
	case !p.Terminating:
		return 1
	}
	return 0
}

// withLabel returns the pods that have one of the values of a label.
func (c *cluster) withLabel(label string, values map[string]bool) (pods []*Pod) {
	index, done := c.byLabel[label]
	if !done {
		index = map[string][]*Pod{}
		for _, p := range c.Pods {
			if v, has := p.Labels[label]; has && p.networked() {
				index[v] = append(index[v], p)
			}
		}
		c.byLabel[label] = index
	}
	for v := range values {
		pods = append(pods, index[v]...)
	}
	return pods
}

// nodesIn adds the nodes that have an address in a prefix.
func (c *cluster) nodesIn(p netip.Prefix, nodes map[*Node]bool) {
	r := netipx.RangeOfPrefix(p)
	i, _ := slices.BinarySearchFunc(c.addrs, r.From(), func(n nodeAddr, a netip.Addr) int { return n.addr.Compare(a) })
	for ; i < len(c.addrs) && r.Contains(c.addrs[i].addr); i++ {
		nodes[c.addrs[i].node] = true
	}
}

// podPeer selects pods of one namespace, or of those that a selector selects.
type podPeer struct {
	key        string
	namespace  string // "" where namespaces is asked
	namespaces selector
	pods       selector
}

func newPodPeer(namespace string, namespaces *selector, pods selector) *podPeer {
	p := &podPeer{namespace: namespace, pods: pods}
	if namespaces != nil {
		p.namespace, p.namespaces = "", *namespaces
	}
	p.key = strings.Join([]string{p.namespace, p.namespaces.key, p.pods.key}, ";")
	return p
}

func (p *podPeer) matches(c *cluster, pod *Pod) bool {
	if p.namespace != "" && pod.Namespace != p.namespace {
		return false
	}
	return p.pods.matches(pod.Labels) && (p.namespace != "" || p.namespaces.empty() || p.inNamespace(c.spaces[pod.Namespace]))
}

// inNamespace: a namespace that is not known (yet) has no labels to ask, which is not the same as to lack them.
func (p *podPeer) inNamespace(labels map[string]string) bool {
	return labels != nil && p.namespaces.matches(labels)
}

// changed reports whether the peer's members may be others than before, and whether more than those with a changed address.
func (p *podPeer) changed(c *cluster, ch changes) (some, all bool) {
	all = p.namespace == "" && !p.namespaces.empty() && slices.ContainsFunc(ch.spaces, func(l [2]map[string]string) bool {
		return p.inNamespace(l[0]) || p.inNamespace(l[1])
	})
	return all || slices.ContainsFunc(ch.pods, func(pod *Pod) bool { return p.matches(c, pod) }), all
}

// at returns the address if it is a selected pod's. One that several pods claim is one only if all of them are selected.
func (p *podPeer) at(c *cluster, a netip.Addr) []Member {
	owners := c.owners(a)
	if len(owners) == 0 || slices.ContainsFunc(owners, func(o *Pod) bool { return !p.matches(c, o) }) {
		return nil
	}
	return []Member{{Addr: a}}
}

// members lists the addresses of a family's pods that the peer selects.
func (p *podPeer) members(c *cluster, ipv6 bool) (out []Member) {
	for _, pod := range p.candidates(c) {
		if !p.matches(c, pod) {
			continue
		}
		for _, a := range pod.IPs {
			switch {
			case a.Is6() != ipv6:
			case c.claims.sole(a) != nil: // as nearly always
				out = append(out, Member{Addr: a})
			default:
				out = append(out, p.at(c, a)...)
			}
		}
	}
	return sortMembers(out)
}

// candidates are the fewest pods that are easily found and among which all are that the peer selects.
func (p *podPeer) candidates(c *cluster) []*Pod {
	var lists [][]*Pod
	switch {
	case p.namespace != "":
		lists = append(lists, c.byNamespace[p.namespace])
	case !p.namespaces.empty():
		var pods []*Pod
		for name, labels := range c.spaces {
			if p.namespaces.matches(labels) {
				pods = append(pods, c.byNamespace[name]...)
			}
		}
		lists = append(lists, pods)
	}
	for _, r := range p.pods.reqs {
		if r.values != nil && !r.negate {
			lists = append(lists, c.withLabel(r.label, r.values))
		}
	}
	if len(lists) == 0 {
		return slices.DeleteFunc(slices.Clone(c.Pods), func(p *Pod) bool { return !p.networked() })
	}
	return slices.MinFunc(lists, func(a, b []*Pod) int { return len(a) - len(b) })
}

// sortMembers gives nil for none.
func sortMembers(m []Member) []Member {
	if len(m) == 0 {
		return nil
	}
	slices.SortFunc(m, Member.Compare)
	return slices.CompactFunc(m, func(a, b Member) bool { return a.Compare(b) == 0 })
}
