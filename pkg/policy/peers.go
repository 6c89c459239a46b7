package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"go4.org/netipx"
	networkingv1 "k8s.io/api/networking/v1"
)

// peers is a union of peers. The zero value is nobody.
type peers struct {
	any  bool
	pods map[string]*podPeer // by key
	nets []*netipx.IPSet
}

// add makes p the union of both.
func (p *peers) add(o *peers) {
	p.any = p.any || o.any
	for key, peer := range o.pods {
		if p.pods == nil {
			p.pods = map[string]*podPeer{}
		}
		p.pods[key] = peer
	}
	p.nets = append(p.nets, o.nets...)
}

func (p *peers) empty() bool { return !p.any && len(p.pods) == 0 && len(p.nets) == 0 }

// ranges are all blocks' addresses.
func (p *peers) ranges() []netipx.IPRange {
	if len(p.nets) == 1 {
		return p.nets[0].Ranges()
	}
	var b netipx.IPSetBuilder
	for _, n := range p.nets {
		b.AddSet(n)
	}
	set, _ := b.IPSet() // sets hold only what is valid
	return set.Ranges()
}

// key is the same for the same peers.
func (p *peers) key() string {
	if p.any {
		return "any"
	}
	keys := make([]string, 0, len(p.pods))
	for k := range p.pods {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	if len(p.nets) > 0 {
		keys = append(keys, fmt.Sprint(p.ranges()))
	}
	return strings.Join(keys, "|")
}

// includes reports whether they are peers of whom an address of one certain pod is.
func (p *peers) includes(c *cluster, pod *Pod, a netip.Addr) bool {
	if p.any || slices.ContainsFunc(p.nets, func(n *netipx.IPSet) bool { return n.Contains(a) }) {
		return true
	}
	for _, peer := range p.pods {
		if peer.matches(c, pod) {
			return true
		}
	}
	return false
}

// unionOf are the pods of several peers, by key.
type unionOf map[string]*podPeer

func (u unionOf) changed(c *cluster, ch changes) (some, all bool) {
	for _, p := range u {
		one, more := p.changed(c, ch)
		some, all = some || one, all || more
	}
	return some, all
}

func (u unionOf) at(c *cluster, a netip.Addr) []Member {
	for _, p := range u {
		if m := p.at(c, a); m != nil {
			return m
		}
	}
	return nil
}

func (u unionOf) members(c *cluster, ipv6 bool) (out []Member) {
	for _, p := range u {
		out = append(out, p.members(c, ipv6)...)
	}
	return sortMembers(out)
}

// endpoints are what peers' pods call a port.
type endpoints struct {
	port  NamedPort // without a number
	peers *peers
}

func (e endpoints) changed(c *cluster, ch changes) (some, all bool) {
	some, all = unionOf(e.peers.pods).changed(c, ch)
	return some || slices.ContainsFunc(ch.pods, func(p *Pod) bool { return len(numbers(p, e.port)) > 0 }), all
}

func (e endpoints) at(c *cluster, a netip.Addr) (out []Member) {
	owners := c.owners(a)
	if len(owners) != 1 || !e.peers.includes(c, owners[0], a) {
		return nil
	}
	for _, n := range numbers(owners[0], e.port) {
		out = append(out, Member{Addr: a, Protocol: e.port.Protocol, Port: n})
	}
	return out
}

func (e endpoints) members(c *cluster, ipv6 bool) (out []Member) {
	for _, pod := range c.byPort[e.port.Name] {
		for _, a := range pod.IPs {
			if a.Is6() == ipv6 {
				out = append(out, e.at(c, a)...)
			}
		}
	}
	return sortMembers(out)
}

// peersOf understands the peers of one rule of a policy.
func (c *cluster) peersOf(namespace string, list []networkingv1.NetworkPolicyPeer, fault func(string, ...any)) *peers {
	if len(list) == 0 {
		return &peers{any: true}
	}
	var out peers
	for i := range list {
		one, err := c.peerOf(namespace, &list[i])
		if err != nil {
			fault("peer %d: %v: it stands for nobody", i+1, err)
			continue
		}
		out.add(one)
	}
	return &out
}

func (c *cluster) peerOf(namespace string, p *networkingv1.NetworkPolicyPeer) (*peers, error) {
	switch {
	case p.IPBlock != nil && (p.PodSelector != nil || p.NamespaceSelector != nil):
		return nil, fmt.Errorf("ipBlock together with a selector")
	case p.IPBlock != nil:
		nets, err := c.block(p.IPBlock)
		return &peers{nets: []*netipx.IPSet{nets}}, err
	case p.PodSelector == nil && p.NamespaceSelector == nil:
		return nil, fmt.Errorf("neither a selector nor an ipBlock")
	}
	var pods selector
	if p.PodSelector != nil {
		pods = newSelector(p.PodSelector)
	}
	if pods.unclear != nil {
		return nil, fmt.Errorf("podSelector: %w", pods.unclear)
	}
	if p.NamespaceSelector == nil {
		one := newPodPeer(namespace, nil, pods)
		return &peers{pods: map[string]*podPeer{one.key: one}}, nil
	}
	namespaces := newSelector(p.NamespaceSelector)
	if namespaces.unclear != nil {
		return nil, fmt.Errorf("namespaceSelector: %w", namespaces.unclear)
	}
	if namespaces.empty() && pods.empty() {
		// All pods of the cluster need no list, and one that is not seen yet is one of them.
		return &peers{nets: []*netipx.IPSet{c.podNets}}, nil
	}
	one := newPodPeer("", &namespaces, pods)
	return &peers{pods: map[string]*podPeer{one.key: one}}, nil
}

// block is what an ipBlock holds. A node is known by all its addresses: if the block excepts one, it excepts all of them, else if it holds
// one, it holds all.
func (c *cluster) block(b *networkingv1.IPBlock) (*netipx.IPSet, error) {
	cidr, err := parseBlock(b.CIDR)
	if err != nil {
		return nil, fmt.Errorf("ipBlock: cidr: %w", err)
	}
	var set netipx.IPSetBuilder
	set.AddPrefix(cidr)
	in, out := map[*Node]bool{}, map[*Node]bool{}
	c.nodesIn(cidr, in)
	for _, text := range b.Except {
		except, err := parseBlock(text)
		if err != nil {
			return nil, fmt.Errorf("ipBlock: except: %w", err)
		}
		set.RemovePrefix(except)
		c.nodesIn(except, out)
	}
	for n := range in {
		for _, a := range n.Addrs {
			set.Add(a)
		}
	}
	for n := range out {
		for _, a := range n.Addrs {
			set.Remove(a)
		}
	}
	return set.IPSet()
}

func parseBlock(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err == nil && p.Addr().Is4In6() {
		err = fmt.Errorf("%q is IPv4 written as IPv6", text)
	}
	return p.Masked(), err
}
