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
func Compile(s *Snapshot) *Ruleset {
	c := &compiler{
		cluster: newCluster(s), classes: map[string]string{}, groups: map[string][]Rule{},
		out: &Ruleset{
			Sets: map[string]*Set{}, Maps: map[string]*PortMap{}, Chains: map[string]*Chain{},
			In: map[netip.Addr]string{}, Out: map[netip.Addr]string{},
		},
	}
	policies := c.understand()
	for a, owners := range c.owners {
		if owners[0].Node == s.Node {
			c.dispatch(a, owners, policies)
		}
	}
	slices.SortStableFunc(c.out.Faults, func(a, b Fault) int { return strings.Compare(a.Policy, b.Policy) })
	return c.out
}

type compiler struct {
	*cluster
	out *Ruleset
	// classes are the class chains' names ("" accepts all) by direction, policies and what these names as ports of the pod.
	classes map[string]string
	// groups are the rules that ask for peers, by the peers' key.
	groups map[string][]Rule
}

// understood is a policy made ready for the pods that it selects.
type understood struct {
	id       string // NAMESPACE/NAME
	subject  selector
	isolates [2]bool // by Direction
	rules    [2][]rule
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

// understand reads the policies that select pods of the own node, by namespace and in order of name.
func (c *compiler) understand() map[string][]*understood {
	local := map[string][]*Pod{}
	for ns, pods := range c.byNamespace {
		for _, p := range pods {
			if p.Node == c.Node {
				local[ns] = append(local[ns], p)
			}
		}
	}
	out := map[string][]*understood{}
	for _, p := range c.Policies {
		if p == nil || len(local[p.Namespace]) == 0 {
			continue
		}
		subject := newSelector(&p.Spec.PodSelector)
		if slices.ContainsFunc(local[p.Namespace], func(pod *Pod) bool { return subject.mayMatch(pod.Labels) }) {
			out[p.Namespace] = append(out[p.Namespace], c.policy(p, subject))
		}
	}
	for _, list := range out {
		slices.SortFunc(list, func(a, b *understood) int { return strings.Compare(a.id, b.id) })
	}
	return out
}

// policy understands one policy. What it cannot understand isolates whom it may have meant and grants nothing.
func (c *compiler) policy(p *networkingv1.NetworkPolicy, subject selector) *understood {
	u := &understood{id: p.Namespace + "/" + p.Name, subject: subject}
	fault := func(format string, args ...any) {
		c.out.Faults = append(c.out.Faults, Fault{u.id, fmt.Sprintf(format, args...)})
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
	if subject.unclear != nil {
		fault("podSelector: %v: every pod that it may have meant is isolated, and the policy grants nothing", subject.unclear)
		return u
	}
	if u.isolates[Ingress] {
		for i, r := range p.Spec.Ingress {
			u.rules[Ingress] = append(u.rules[Ingress], c.rule(p.Namespace, r.From, r.Ports, func(format string, args ...any) {
				fault("ingress rule %d: "+format, append([]any{i + 1}, args...)...)
			}))
		}
	}
	if u.isolates[Egress] {
		for i, r := range p.Spec.Egress {
			u.rules[Egress] = append(u.rules[Egress], c.rule(p.Namespace, r.To, r.Ports, func(format string, args ...any) {
				fault("egress rule %d: "+format, append([]any{i + 1}, args...)...)
			}))
		}
	}
	return u
}

func (c *compiler) rule(namespace string, list []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort, fault func(string, ...any)) rule {
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
	// endpoints are egress' ports with names: they are what each peer calls so.
	endpoints map[string]endpoints
}

type endpoints struct {
	port  NamedPort
	peers *peers
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
		chain.Rules = append(chain.Rules, c.askEndpoints(key, k.endpoints[key])...)
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
	for _, ipv6 := range c.families() {
		if len(who.pods) > maxSetsOfGroup {
			rules = append(rules, Rule{Kind: PeerIn, Ref: c.union(who, ipv6), IPv6: ipv6})
		} else {
			for _, k := range slices.Sorted(maps.Keys(who.pods)) {
				rules = append(rules, Rule{Kind: PeerIn, Ref: c.podSet(who.pods[k], ipv6), IPv6: ipv6})
			}
		}
		if name := c.blocks(who, ipv6); name != "" {
			rules = append(rules, Rule{Kind: PeerIn, Ref: name, IPv6: ipv6})
		}
	}
	c.groups[key] = rules
	return rules
}

func (c *compiler) families() (ipv6 []bool) {
	if c.ipv4 {
		ipv6 = append(ipv6, false)
	}
	if c.ipv6 {
		ipv6 = append(ipv6, true)
	}
	return ipv6
}

// podSet returns the name of the set of a peer's pods.
func (c *compiler) podSet(p *podPeer, ipv6 bool) string {
	name := setName("s", ipv6, p.key)
	if c.out.Sets[name] == nil {
		c.out.Sets[name] = &Set{Name: name, Kind: Addresses, IPv6: ipv6, Members: p.members(c.cluster, ipv6)}
	}
	return name
}

// union returns the name of the set of all pods of several peers.
func (c *compiler) union(who *peers, ipv6 bool) string {
	name := setName("u", ipv6, strings.Join(slices.Sorted(maps.Keys(who.pods)), "|"))
	if c.out.Sets[name] == nil {
		var members []Member
		for _, p := range who.pods {
			members = append(members, p.members(c.cluster, ipv6)...)
		}
		c.out.Sets[name] = &Set{Name: name, Kind: Addresses, IPv6: ipv6, Members: sortMembers(members)}
	}
	return name
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

// askEndpoints makes the rules for a port's name: the peers that have such a port, each with its own number.
func (c *compiler) askEndpoints(key string, e endpoints) (rules []Rule) {
	for _, ipv6 := range c.families() {
		name := setName("n", ipv6, key)
		if c.out.Sets[name] == nil {
			var members []Member
			for _, pod := range c.byPort[e.port.Name] {
				for _, a := range pod.IPs {
					if owners := c.owners[a]; a.Is6() != ipv6 || len(owners) != 1 || owners[0] != pod || !e.peers.includes(c.cluster, pod, a) {
						continue
					}
					for _, n := range numbers(pod, e.port) {
						members = append(members, Member{Addr: a, Protocol: e.port.Protocol, Port: n})
					}
				}
			}
			c.out.Sets[name] = &Set{Name: name, Kind: Endpoints, IPv6: ipv6, Members: sortMembers(members)}
		}
		rules = append(rules, Rule{Kind: EndpointIn, Ref: name, IPv6: ipv6})
	}
	return rules
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
