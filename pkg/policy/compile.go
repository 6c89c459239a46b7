package policy

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// maxSetsOfGroup is how many sets of pods a chain asks one after the other. The peers of more are merged into one set: that is what
// keeps a packet's cost the same.
const maxSetsOfGroup = 4

// Compile says what the kernel must hold so that the own node's pods get what policies grant. The same snapshot gives the same
// Ruleset, whatever the order of its lists.
func Compile(s *Snapshot) *Ruleset { return NewCompiler().Compile(s) }

// Compiler compiles one snapshot after the other, and keeps of the last what is the same in the next.
type Compiler struct {
	cluster  *cluster
	policies map[*networkingv1.NetworkPolicy]*understood
	sets     map[string]*liveSet
}

// NewCompiler returns a Compiler that has seen nothing yet.
func NewCompiler() *Compiler { return &Compiler{cluster: newCluster()} }

// Compile is what the function of that name is. Sets that did not change are the same *Set as in the last Ruleset.
func (k *Compiler) Compile(s *Snapshot) *Ruleset {
	ch := k.cluster.update(s)
	if ch.nodes || k.sets == nil {
		k.policies, k.sets = map[*networkingv1.NetworkPolicy]*understood{}, map[string]*liveSet{}
	}
	for _, l := range k.sets {
		l.used = false
		l.renew(k.cluster, ch)
	}
	for _, u := range k.policies {
		u.used = false
	}
	c := &compiler{
		Compiler: k, classes: map[string]string{}, groups: map[string][]Rule{},
		out: &Ruleset{
			Sets: map[string]*Set{}, Maps: map[string]*PortMap{}, Chains: map[string]*Chain{},
			In: map[netip.Addr]string{}, Out: map[netip.Addr]string{},
		},
	}
	policies := c.understand()
	for p := range k.cluster.local {
		for _, a := range p.IPs {
			c.dispatch(a, k.cluster.owners(a), policies)
		}
	}
	maps.DeleteFunc(k.sets, func(_ string, l *liveSet) bool { return !l.used })
	maps.DeleteFunc(k.policies, func(_ *networkingv1.NetworkPolicy, u *understood) bool { return !u.used })
	slices.SortStableFunc(c.out.Faults, func(a, b Fault) int { return strings.Compare(a.Policy, b.Policy) })
	return c.out
}

// compiler makes one Ruleset.
type compiler struct {
	*Compiler
	out *Ruleset
	// classes are the class chains' names ("" accepts all) by direction, policies and what these names as ports of the pod.
	classes map[string]string
	// groups are the rules that ask for peers, by the peers' key.
	groups map[string][]Rule
}

// liveSet is a set whose members come and go.
type liveSet struct {
	source source
	set    *Set
	used   bool
}

// renew brings the set up to date. Only the members with a changed address are looked at where that is enough.
func (l *liveSet) renew(c *cluster, ch changes) {
	some, all := l.source.changed(c, ch)
	if !some {
		return
	}
	var now []Member
	if all {
		now = l.source.members(c, l.set.IPv6)
	} else {
		now = slices.DeleteFunc(slices.Clone(l.set.Members), func(m Member) bool { return ch.addrs[m.Addr] })
		for a := range ch.addrs {
			if a.Is6() == l.set.IPv6 {
				now = append(now, l.source.at(c, a)...)
			}
		}
		now = sortMembers(now)
	}
	if !slices.Equal(l.set.Members, now) {
		l.set = &Set{Name: l.set.Name, Kind: l.set.Kind, IPv6: l.set.IPv6, Members: now}
	}
}

// source is what a set stands for.
type source interface {
	// changed reports whether the members may be others than before, and whether more than those with a changed address.
	changed(*cluster, changes) (some, all bool)
	// at lists the members with an address.
	at(*cluster, netip.Addr) []Member
	// members lists all of a family, sorted.
	members(c *cluster, ipv6 bool) []Member
}

// live adds a set to the ruleset and returns its name, which is made of what it stands for.
func (c *compiler) live(prefix string, kind SetKind, ipv6 bool, key string, from source) string {
	name := setName(prefix, ipv6, key)
	l := c.sets[name]
	if l == nil {
		l = &liveSet{source: from, set: &Set{Name: name, Kind: kind, IPv6: ipv6, Members: from.members(c.cluster, ipv6)}}
		c.sets[name] = l
	}
	l.used = true
	c.out.Sets[name] = l.set
	return name
}

// understood is a policy made ready for the pods that it selects.
type understood struct {
	id       string // NAMESPACE/NAME
	subject  selector
	isolates [2]bool // by Direction
	rules    [2][]rule
	faults   []Fault

	done, used bool
}

// rule grants a flow that is one of its ports' and whose other end is one of its peers.
type rule struct {
	peers *peers
	// anyPort: ports are not asked, nor is the protocol.
	anyPort bool
	ranges  []portRange
	named   []NamedPort // with Port 0
}

type portRange struct {
	protocol    Protocol
	first, last uint16
}

// understand returns the policies that select pods of the own node, by namespace and in order of name.
func (c *compiler) understand() map[string][]*understood {
	local := map[string][]*Pod{}
	for p := range c.cluster.local {
		local[p.Namespace] = append(local[p.Namespace], p)
	}
	out := map[string][]*understood{}
	for ns, pods := range local {
		for _, p := range c.cluster.policies[ns] {
			u := c.policies[p]
			if u == nil {
				u = &understood{id: p.Namespace + "/" + p.Name, subject: newSelector(&p.Spec.PodSelector)}
				c.policies[p] = u
			}
			u.used = true
			if slices.ContainsFunc(pods, func(pod *Pod) bool { return u.subject.mayMatch(pod.Labels) }) {
				u.read(c.cluster, p)
				c.out.Faults = append(c.out.Faults, u.faults...)
				out[ns] = append(out[ns], u)
			}
		}
		slices.SortFunc(out[ns], func(a, b *understood) int { return strings.Compare(a.id, b.id) })
	}
	return out
}

// read understands the rules of a policy, once. What cannot be understood isolates whom it may have meant and grants nothing.
func (u *understood) read(c *cluster, p *networkingv1.NetworkPolicy) {
	if u.done {
		return
	}
	u.done = true
	fault := func(format string, args ...any) {
		u.faults = append(u.faults, Fault{u.id, fmt.Sprintf(format, args...)})
	}
	u.isolates[Ingress] = len(p.Spec.PolicyTypes) == 0
	u.isolates[Egress] = len(p.Spec.PolicyTypes) == 0 && len(p.Spec.Egress) > 0
	for _, t := range p.Spec.PolicyTypes {
		u.isolates[Ingress] = u.isolates[Ingress] || t != networkingv1.PolicyTypeEgress
		u.isolates[Egress] = u.isolates[Egress] || t != networkingv1.PolicyTypeIngress
		if t != networkingv1.PolicyTypeIngress && t != networkingv1.PolicyTypeEgress {
			fault("policyTypes: %q: known are Ingress and Egress: it isolates both ways", t)
		}
	}
	if u.subject.unclear != nil {
		fault("podSelector: %v: every pod that it may have meant is isolated, and the policy grants nothing", u.subject.unclear)
		return
	}
	inRule := func(dir string, i int) func(string, ...any) {
		return func(format string, args ...any) { fault(dir+" rule %d: "+format, append([]any{i + 1}, args...)...) }
	}
	if u.isolates[Ingress] {
		for i, r := range p.Spec.Ingress {
			u.rules[Ingress] = append(u.rules[Ingress], c.rule(p.Namespace, r.From, r.Ports, inRule("ingress", i)))
		}
	}
	if u.isolates[Egress] {
		for i, r := range p.Spec.Egress {
			u.rules[Egress] = append(u.rules[Egress], c.rule(p.Namespace, r.To, r.Ports, inRule("egress", i)))
		}
	}
}

func (c *cluster) rule(namespace string, list []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort, fault func(string, ...any)) rule {
	r := rule{peers: c.peersOf(namespace, list, fault), anyPort: len(ports) == 0}
	for i := range ports {
		if err := r.addPort(&ports[i]); err != nil {
			fault("port %d: %v: it stands for no port", i+1, err)
		}
	}
	return r
}

func (r *rule) addPort(p *networkingv1.NetworkPolicyPort) error {
	protocol := TCP
	if p.Protocol != nil {
		var known bool
		protocol, known = map[corev1.Protocol]Protocol{corev1.ProtocolTCP: TCP, corev1.ProtocolUDP: UDP, corev1.ProtocolSCTP: SCTP}[*p.Protocol]
		if !known {
			return fmt.Errorf("protocol %q: known are TCP, UDP and SCTP", *p.Protocol)
		}
	}
	switch {
	case p.Port == nil && p.EndPort != nil:
		return fmt.Errorf("endPort without port")
	case p.Port == nil:
		r.ranges = append(r.ranges, portRange{protocol, 0, 65535})
	case p.Port.Type == intstr.Int:
		first, last := p.Port.IntVal, p.Port.IntVal
		if p.EndPort != nil {
			last = *p.EndPort
		}
		if first < 1 || last > 65535 || last < first {
			return fmt.Errorf("%d to %d: want 1 to 65535, the first not above the last", first, last)
		}
		r.ranges = append(r.ranges, portRange{protocol, uint16(first), uint16(last)})
	case p.EndPort != nil:
		return fmt.Errorf("endPort with a port's name")
	case p.Port.Type == intstr.String:
		r.named = append(r.named, NamedPort{Name: p.Port.StrVal, Protocol: protocol})
	default:
		return fmt.Errorf("neither a number nor a name")
	}
	return nil
}

// dispatch gives an address of the own node's the class chains of its pod.
func (c *compiler) dispatch(a netip.Addr, owners []*Pod, all map[string][]*understood) {
	for _, dir := range []Direction{Ingress, Egress} {
		var policies []*understood
		for _, pod := range owners {
			for _, u := range all[pod.Namespace] {
				if u.isolates[dir] && u.subject.mayMatch(pod.Labels) {
					policies = append(policies, u)
				}
			}
		}
		if len(policies) == 0 {
			continue
		}
		chain := ""
		if len(owners) > 1 {
			chain = c.chain(&Chain{Dir: dir, Class: true}) // nobody can tell whose packets these are
		} else {
			chain = c.classOf(owners[0], dir, policies)
		}
		if chain == "" {
			continue
		}
		if dir == Ingress {
			c.out.In[a] = chain
		} else {
			c.out.Out[a] = chain
		}
	}
}

// classOf returns the name of the class chain that is the union of what policies grant, "" where that is everything.
func (c *compiler) classOf(pod *Pod, dir Direction, policies []*understood) string {
	key := dir.String()
	for _, u := range policies {
		key += "|" + u.id
		for _, r := range u.rules[dir] {
			if dir == Ingress {
				for _, p := range r.named {
					key += fmt.Sprint(numbers(pod, p))
				}
			}
		}
	}
	name, done := c.classes[key]
	if !done {
		k := newClass(dir)
		for _, u := range policies {
			for i := range u.rules[dir] {
				k.add(c, &u.rules[dir][i], pod)
			}
		}
		name = c.class(k)
		c.classes[key] = name
	}
	return name
}

// numbers are a pod's ports of a name and protocol.
func numbers(pod *Pod, want NamedPort) (out []uint16) {
	for _, p := range pod.Ports {
		if p.Name == want.Name && p.Protocol == want.Protocol {
			out = append(out, p.Port)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// class gathers what a pod's policies grant in one direction.
type class struct {
	dir Direction
	// all may use every port and protocol.
	all peers
	// exact are the peers of single ports, and ranges those of more.
	exact  map[portRange]*peers
	ranges map[portRange]*peers
	// endpoints are egress' ports with names, each what a peer calls so.
	endpoints map[string]endpoints
}

func newClass(dir Direction) *class {
	return &class{dir: dir, exact: map[portRange]*peers{}, ranges: map[portRange]*peers{}, endpoints: map[string]endpoints{}}
}

func (k *class) add(c *compiler, r *rule, pod *Pod) {
	if r.peers.empty() {
		return
	}
	if r.anyPort {
		k.all.add(r.peers)
		return
	}
	ranges := r.ranges
	for _, p := range r.named {
		if k.dir == Egress {
			k.endpoints[p.Name+"/"+p.Protocol.String()+"|"+r.peers.key()] = endpoints{p, r.peers}
			continue
		}
		for _, n := range numbers(pod, p) {
			ranges = append(ranges[:len(ranges):len(ranges)], portRange{p.Protocol, n, n})
		}
	}
	for _, p := range ranges {
		to := k.ranges
		if p.first == p.last {
			to = k.exact
		}
		if to[p] == nil {
			to[p] = &peers{}
		}
		to[p].add(r.peers)
	}
}

// class makes the chain of a class and all that it names.
func (c *compiler) class(k *class) string {
	if k.all.any {
		return ""
	}
	chain := &Chain{Dir: k.dir, Class: true, Rules: slices.Clone(c.ask(k.dir, &k.all))}
	var exact []PortElement
	for p, who := range k.exact {
		exact = append(exact, c.element(k.dir, p, who)...)
	}
	if m := c.portMap(k.dir, exact, false); m != "" {
		chain.Rules = append(chain.Rules, Rule{Kind: PortsOf, Ref: m})
	}
	for _, protocol := range []Protocol{TCP, UDP, SCTP} {
		if m := c.portMap(k.dir, c.cut(k, protocol), true); m != "" {
			chain.Rules = append(chain.Rules, Rule{Kind: RangesOf, Ref: m, Protocol: protocol})
		}
	}
	for _, key := range slices.Sorted(maps.Keys(k.endpoints)) {
		for _, ipv6 := range c.cluster.families {
			set := c.live("n", Endpoints, ipv6, key, k.endpoints[key])
			chain.Rules = append(chain.Rules, Rule{Kind: EndpointIn, Ref: set, IPv6: ipv6})
		}
	}
	return c.chain(chain)
}

// element is a port map's element that asks for peers; there is none where none can be.
func (c *compiler) element(dir Direction, p portRange, who *peers) []PortElement {
	e := PortElement{Protocol: p.protocol, First: p.first, Last: p.last}
	if who.any {
		return []PortElement{e}
	}
	rules := c.ask(dir, who)
	if len(rules) == 0 {
		return nil
	}
	e.Jump = c.chain(&Chain{Dir: dir, Rules: rules})
	return []PortElement{e}
}

// cut makes intervals that do not overlap of a protocol's ranges, each with the peers of all ranges that it is in.
func (c *compiler) cut(k *class, protocol Protocol) (out []PortElement) {
	var ranges []portRange
	edges := map[int]bool{}
	for p := range k.ranges {
		if p.protocol == protocol {
			ranges = append(ranges, p)
			edges[int(p.first)], edges[int(p.last)+1] = true, true
		}
	}
	slices.SortFunc(ranges, portRange.compare)
	starts := slices.Sorted(maps.Keys(edges))
	for i := range len(starts) - 1 {
		piece := portRange{protocol, uint16(starts[i]), uint16(starts[i+1] - 1)}
		var who peers
		for _, r := range ranges {
			if r.first > piece.first {
				break
			}
			if r.last >= piece.last {
				who.add(k.ranges[r])
			}
		}
		if who.empty() {
			continue
		}
		for _, e := range c.element(k.dir, piece, &who) {
			if n := len(out); n > 0 && out[n-1].Last+1 == e.First && out[n-1].Jump == e.Jump {
				out[n-1].Last = e.Last
			} else {
				out = append(out, e)
			}
		}
	}
	return out
}

func (p portRange) compare(o portRange) int {
	return cmp.Or(cmp.Compare(p.protocol, o.protocol), cmp.Compare(p.first, o.first), cmp.Compare(p.last, o.last))
}

// portMap returns the name of the map with these elements, "" where there are none.
func (c *compiler) portMap(dir Direction, elements []PortElement, ranges bool) string {
	if len(elements) == 0 {
		return ""
	}
	slices.SortFunc(elements, func(a, b PortElement) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.First, b.First))
	})
	prefix := "p" + dir.String()
	if ranges {
		prefix = "r" + dir.String()
	}
	name := prefix + "-" + digest(fmt.Sprint(elements))
	c.out.Maps[name] = &PortMap{Name: name, Ranges: ranges, Elements: elements}
	return name
}

// chain adds a chain and returns its name.
func (c *compiler) chain(chain *Chain) string {
	kind := "g"
	if chain.Class {
		kind = "c"
	}
	chain.Name = kind + chain.Dir.String() + "-" + digest(strings.Join(chain.Text(), "\n"))
	c.out.Chains[chain.Name] = chain
	return chain.Name
}

// ask makes the rules that accept certain peers.
func (c *compiler) ask(dir Direction, who *peers) []Rule {
	key := who.key()
	rules, done := c.groups[key]
	if done {
		return rules
	}
	for _, ipv6 := range c.cluster.families {
		in := func(set string) { rules = append(rules, Rule{Kind: PeerIn, Ref: set, IPv6: ipv6}) }
		if keys := slices.Sorted(maps.Keys(who.pods)); len(keys) > maxSetsOfGroup {
			in(c.live("u", Addresses, ipv6, strings.Join(keys, "|"), unionOf(who.pods)))
		} else {
			for _, k := range keys {
				in(c.live("s", Addresses, ipv6, k, who.pods[k]))
			}
		}
		if name := c.blocks(who, ipv6); name != "" {
			in(name)
		}
	}
	c.groups[key] = rules
	return rules
}

// blocks returns the name of the set of all blocks, "" where they hold nothing of the family.
func (c *compiler) blocks(who *peers, ipv6 bool) string {
	var members []Member
	for _, r := range who.ranges() {
		if r.From().Is6() == ipv6 {
			members = append(members, Member{Addr: r.From(), Last: r.To()})
		}
	}
	if len(members) == 0 {
		return ""
	}
	name := setName("b", ipv6, fmt.Sprint(members))
	c.out.Sets[name] = &Set{Name: name, Kind: Blocks, IPv6: ipv6, Members: members}
	return name
}

func setName(kind string, ipv6 bool, key string) string {
	family := "4"
	if ipv6 {
		family = "6"
	}
	return kind + family + "-" + digest(key)
}

// digest has 80 bits: nobody finds two policies on purpose whose names are one.
func digest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:10])
}
