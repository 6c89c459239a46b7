package policy

import (
	"net/netip"
	"slices"
	"strings"

	"go4.org/netipx"
)

// cluster is a snapshot with what the compiler looks up in it.
type cluster struct {
	*Snapshot
	ipv4, ipv6 bool
	namespaces map[string]map[string]string // labels by name
	// owners are the pods whose address it is, of the first rank only: one, but where nobody can tell.
	owners map[netip.Addr][]*Pod
	// addrs are all nodes' addresses, sorted.
	addrs   []nodeAddr
	podNets *netipx.IPSet

	byNamespace map[string][]*Pod
	// byLabel has the pods with a label, by key and value, for the keys that were asked for.
	byLabel map[string]map[string][]*Pod
	// byPort has the pods with a named port, by its name.
	byPort map[string][]*Pod
}

type nodeAddr struct {
	addr netip.Addr
	node *Node
}

func newCluster(s *Snapshot) *cluster {
	c := &cluster{
		Snapshot:    s,
		namespaces:  make(map[string]map[string]string, len(s.Namespaces)),
		owners:      make(map[netip.Addr][]*Pod, 2*len(s.Pods)),
		byNamespace: make(map[string][]*Pod, len(s.Namespaces)),
		byLabel:     map[string]map[string][]*Pod{},
		byPort:      map[string][]*Pod{},
	}
	for _, n := range s.Namespaces {
		c.namespaces[n.Name] = n.Labels
	}
	var nets netipx.IPSetBuilder
	for _, p := range s.PodCIDRs {
		nets.AddPrefix(p)
		c.ipv4 = c.ipv4 || p.Addr().Is4()
		c.ipv6 = c.ipv6 || p.Addr().Is6()
	}
	if !c.ipv4 && !c.ipv6 {
		c.ipv4, c.ipv6 = true, true
	}
	c.podNets, _ = nets.IPSet() // it cannot hold a prefix that is none
	for i := range s.Pods {
		c.addPod(&s.Pods[i])
	}
	for i := range s.Nodes {
		for _, a := range s.Nodes[i].Addrs {
			c.addrs = append(c.addrs, nodeAddr{a, &s.Nodes[i]})
		}
	}
	slices.SortFunc(c.addrs, func(a, b nodeAddr) int { return a.addr.Compare(b.addr) })
	return c
}

func (c *cluster) addPod(p *Pod) {
	if !p.networked() {
		return
	}
	c.byNamespace[p.Namespace] = append(c.byNamespace[p.Namespace], p)
	for i, port := range p.Ports {
		if !slices.ContainsFunc(p.Ports[:i], func(o NamedPort) bool { return o.Name == port.Name }) {
			c.byPort[port.Name] = append(c.byPort[port.Name], p)
		}
	}
	for i, a := range p.IPs {
		if slices.Contains(p.IPs[:i], a) {
			continue
		}
		switch have := c.owners[a]; {
		case len(have) == 0 || c.rank(p) > c.rank(have[0]):
			c.owners[a] = []*Pod{p}
		case c.rank(p) == c.rank(have[0]):
			c.owners[a] = append(have, p)
		}
	}
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
		for i := range c.Pods {
			if v, has := c.Pods[i].Labels[label]; has && c.Pods[i].networked() {
				index[v] = append(index[v], &c.Pods[i])
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
	if p.namespace != "" {
		return pod.Namespace == p.namespace && p.pods.matches(pod.Labels)
	}
	if !p.namespaces.empty() {
		labels, known := c.namespaces[pod.Namespace]
		if !known || !p.namespaces.matches(labels) {
			return false
		}
	}
	return p.pods.matches(pod.Labels)
}

// members lists the addresses of a family's pods that the peer selects. An address that several pods claim is one only if all of
// them are selected.
func (p *podPeer) members(c *cluster, ipv6 bool) []Member {
	var out []Member
	for _, pod := range p.candidates(c) {
		if !p.matches(c, pod) {
			continue
		}
		for _, a := range pod.IPs {
			if a.Is6() != ipv6 {
				continue
			}
			owners := c.owners[a]
			if slices.Contains(owners, pod) && !slices.ContainsFunc(owners, func(o *Pod) bool { return o != pod && !p.matches(c, o) }) {
				out = append(out, Member{Addr: a})
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
		for name, labels := range c.namespaces {
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
		all := make([]*Pod, 0, len(c.Pods))
		for i := range c.Pods {
			if c.Pods[i].networked() {
				all = append(all, &c.Pods[i])
			}
		}
		return all
	}
	return slices.MinFunc(lists, func(a, b []*Pod) int { return len(a) - len(b) })
}

func sortMembers(m []Member) []Member {
	slices.SortFunc(m, Member.compare)
	return slices.CompactFunc(m, func(a, b Member) bool { return a.compare(b) == 0 })
}
