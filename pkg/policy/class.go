package policy

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

const (
	// maxSetsOfGroup is how many sets of pods a chain asks one after the other. The peers of more are merged into one set: that is
	// what keeps a packet's cost the same.
	maxSetsOfGroup = 4
	// maxOverlaps bounds how many ranges, in all, the pieces of ranges that overlap may be in. Each piece has a set of all its peers:
	// some thousand ranges that overlap each other would make millions of elements.
	maxOverlaps = 20000
)

// class is what pods with the same rights in one direction need.
type class struct {
	chain   string // "" where they may do everything
	objects objects
	used    bool
}

// class makes the union of what policies grant a pod.
func (k *Compiler) class(dir Direction, pod *Pod, policies []*understood) *class {
	r := rights{dir: dir, exact: map[portRange]*peers{}, ranges: map[portRange]*peers{}, endpoints: map[string]endpoints{}}
	for _, u := range policies {
		if !u.isolates[dir] {
			continue
		}
		for i := range u.rules[dir] {
			r.add(&u.rules[dir][i], pod)
		}
	}
	c := &class{}
	if !r.all.any {
		c.chain = k.write(&r, &c.objects)
	}
	return c
}

// rights are what a pod's policies grant in one direction.
type rights struct {
	dir Direction
	// all may use every port and protocol.
	all peers
	// exact are the peers of single ports, and ranges those of more.
	exact  map[portRange]*peers
	ranges map[portRange]*peers
	// endpoints are egress' ports with names, each what a peer calls so.
	endpoints map[string]endpoints
}

func (r *rights) add(from *rule, pod *Pod) {
	if from.peers.empty() {
		return
	}
	if from.anyPort {
		r.all.add(from.peers)
		return
	}
	for _, p := range from.ranges {
		r.addRange(p, from.peers)
	}
	for _, p := range from.named {
		if r.dir == Egress {
			r.endpoints[p.Name+"/"+p.Protocol.String()+"|"+from.peers.key()] = endpoints{p, from.peers}
			continue
		}
		for _, n := range numbers(pod, p) {
			r.addRange(portRange{p.Protocol, n, n}, from.peers)
		}
	}
}

func (r *rights) addRange(p portRange, who *peers) {
	to := r.ranges
	if p.first == p.last {
		to = r.exact
	}
	if to[p] == nil {
		to[p] = &peers{}
	}
	to[p].add(who)
}

// write makes the class chain, which it names, and all that this refers to.
func (k *Compiler) write(r *rights, o *objects) string {
	chain := &Chain{Dir: r.dir, Class: true, Rules: slices.Clone(k.ask(&r.all, o))}
	var exact []PortElement
	for p, who := range r.exact {
		exact = append(exact, k.element(r.dir, p, who, o)...)
	}
	if m := o.addMap(r.dir, exact, false); m != "" {
		chain.Rules = append(chain.Rules, Rule{Kind: PortsOf, Ref: m})
	}
	for _, protocol := range []Protocol{TCP, UDP, SCTP} {
		for _, elements := range k.cut(r, protocol, o) {
			if m := o.addMap(r.dir, elements, true); m != "" {
				chain.Rules = append(chain.Rules, Rule{Kind: RangesOf, Ref: m, Protocol: protocol})
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(r.endpoints)) {
		for _, ipv6 := range k.cluster.families {
			set := k.live("n", Endpoints, ipv6, key, r.endpoints[key])
			o.live = append(o.live, set)
			chain.Rules = append(chain.Rules, Rule{Kind: EndpointIn, Ref: set, IPv6: ipv6})
		}
	}
	return o.addChain(chain)
}

// element is a port map's element that asks for peers; there is none where none can be.
func (k *Compiler) element(dir Direction, p portRange, who *peers, o *objects) []PortElement {
	e := PortElement{Protocol: p.protocol, First: p.first, Last: p.last}
	if who.any {
		return []PortElement{e}
	}
	rules := k.ask(who, o)
	if len(rules) == 0 {
		return nil
	}
	e.Jump = o.addChain(&Chain{Dir: dir, Rules: rules})
	return []PortElement{e}
}

// cut makes port maps of a protocol's ranges: one whose elements do not overlap, each with the peers of all ranges that it is in; or,
// where that would be too much, one for each group of peers, which a packet asks one after the other.
func (k *Compiler) cut(r *rights, protocol Protocol, o *objects) [][]PortElement {
	var ranges []portRange
	edges := map[int]bool{}
	for p := range r.ranges {
		if p.protocol == protocol {
			ranges = append(ranges, p)
			edges[int(p.first)], edges[int(p.last)+1] = true, true
		}
	}
	slices.SortFunc(ranges, portRange.compare)
	pieces, few := intervals(slices.Sorted(maps.Keys(edges)), ranges, k.overlaps)
	if !few {
		return k.each(r, ranges, o)
	}
	var out []PortElement
	for _, piece := range pieces {
		var who peers
		for _, i := range piece.in {
			who.add(r.ranges[ranges[i]])
		}
		if e := k.element(r.dir, portRange{protocol, piece.first, piece.last}, &who, o); len(e) > 0 {
			out = appendRange(out, e[0])
		}
	}
	return [][]PortElement{out}
}

// interval is a piece that no range begins or ends in.
type interval struct {
	first, last uint16
	in          []int // indexes of the ranges that it is in
}

// intervals cuts sorted ranges at all their edges, unless the pieces are in more ranges, in all, than so many.
func intervals(edges []int, ranges []portRange, limit int) (pieces []interval, few bool) {
	var active []int
	next, overlaps := 0, 0
	for i := range len(edges) - 1 {
		piece := interval{first: uint16(edges[i]), last: uint16(edges[i+1] - 1)}
		for ; next < len(ranges) && ranges[next].first <= piece.first; next++ {
			active = append(active, next)
		}
		active = slices.DeleteFunc(active, func(r int) bool { return ranges[r].last < piece.first })
		if overlaps += len(active); overlaps > limit {
			return nil, false
		}
		if len(active) > 0 {
			piece.in = slices.Clone(active)
			pieces = append(pieces, piece)
		}
	}
	return pieces, true
}

// appendRange joins a range with the one before it where both lead to the same.
func appendRange(list []PortElement, e PortElement) []PortElement {
	if n := len(list); n > 0 && list[n-1].Last+1 == e.First && list[n-1].Jump == e.Jump {
		list[n-1].Last = e.Last
		return list
	}
	return append(list, e)
}

// each makes a map of the ranges of each group of peers. ranges are sorted.
func (k *Compiler) each(r *rights, ranges []portRange, o *objects) (out [][]PortElement) {
	type ofPeers struct {
		who    *peers
		ranges []portRange
	}
	groups := map[string]*ofPeers{}
	for _, p := range ranges {
		who := r.ranges[p]
		g := groups[who.key()]
		if g == nil {
			g = &ofPeers{who: who}
			groups[who.key()] = g
		}
		if n := len(g.ranges); n > 0 && p.first <= g.ranges[n-1].last {
			g.ranges[n-1].last = max(g.ranges[n-1].last, p.last)
		} else {
			g.ranges = append(g.ranges, p)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(groups)) {
		var elements []PortElement
		for _, p := range groups[key].ranges {
			elements = append(elements, k.element(r.dir, p, groups[key].who, o)...)
		}
		out = append(out, elements)
	}
	return out
}

func (p portRange) compare(o portRange) int {
	return cmp.Or(cmp.Compare(p.protocol, o.protocol), cmp.Compare(p.first, o.first), cmp.Compare(p.last, o.last))
}

// ask makes the rules that accept certain peers.
func (k *Compiler) ask(who *peers, o *objects) (rules []Rule) {
	for _, ipv6 := range k.cluster.families {
		in := func(set string) { rules = append(rules, Rule{Kind: PeerIn, Ref: set, IPv6: ipv6}) }
		live := func(prefix, key string, from source) {
			set := k.live(prefix, Addresses, ipv6, key, from)
			o.live = append(o.live, set)
			in(set)
		}
		if keys := slices.Sorted(maps.Keys(who.pods)); len(keys) > maxSetsOfGroup {
			live("u", strings.Join(keys, "|"), unionOf(who.pods))
		} else {
			for _, key := range keys {
				live("s", key, who.pods[key])
			}
		}
		if set := who.blocks(ipv6); set != nil {
			o.blocks = append(o.blocks, set)
			in(set.Name)
		}
	}
	return rules
}

// blocks makes the set of all blocks, nil where they hold nothing of the family.
func (p *peers) blocks(ipv6 bool) *Set {
	var members []Member
	for _, r := range p.ranges() {
		if r.From().Is6() == ipv6 {
			members = append(members, Member{Addr: r.From(), Last: r.To()})
		}
	}
	if len(members) == 0 {
		return nil
	}
	return &Set{Name: setName("b", ipv6, fmt.Sprint(members)), Kind: Blocks, IPv6: ipv6, Members: members}
}

// addMap returns the name of the map with these elements, "" where there are none.
func (o *objects) addMap(dir Direction, elements []PortElement, ranges bool) string {
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
	o.maps = append(o.maps, &PortMap{Name: name, Ranges: ranges, Elements: elements})
	return name
}

// addChain adds a chain and returns its name.
func (o *objects) addChain(chain *Chain) string {
	kind := "g"
	if chain.Class {
		kind = "c"
	}
	chain.Name = kind + chain.Dir.String() + "-" + digest(strings.Join(chain.Text(), "\n"))
	o.chains = append(o.chains, chain)
	return chain.Name
}
