package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"maps"
	"net/netip"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
)

// Compile says what the kernel must hold so that the own node's pods get what policies grant. The same snapshot gives the same
// Ruleset, whatever the order of its lists.
func Compile(s *Snapshot) *Ruleset { return NewCompiler().Compile(s) }

// Compiler compiles one snapshot after the other, and keeps of the last what is the same in the next: a change costs what it concerns.
type Compiler struct {
	cluster  *cluster
	policies map[*networkingv1.NetworkPolicy]*understood
	serial   uint64 // of the last understood
	pods     map[*Pod]*isolation
	classes  map[string]*class // by isolation.keys
	sets     map[string]*liveSet
	overlaps int // see maxOverlaps
}

// NewCompiler returns a Compiler that has seen nothing yet.
func NewCompiler() *Compiler { return &Compiler{cluster: newCluster(), overlaps: maxOverlaps} }

// Compile is what the function of that name is. Sets that did not change are the same *Set as in the last Ruleset.
func (k *Compiler) Compile(s *Snapshot) *Ruleset {
	ch := k.cluster.update(s)
	if ch.nodes || k.sets == nil {
		k.policies, k.pods = map[*networkingv1.NetworkPolicy]*understood{}, map[*Pod]*isolation{}
		k.classes, k.sets = map[string]*class{}, map[string]*liveSet{}
	}
	for _, p := range ch.policies {
		delete(k.policies, p)
	}
	for _, l := range k.sets {
		l.used = false
		l.renew(k.cluster, ch)
	}
	for _, c := range k.classes {
		c.used = false
	}
	c := &compiler{
		Compiler: k,
		out: &Ruleset{
			Sets: map[string]*Set{}, Maps: map[string]*PortMap{}, Chains: map[string]*Chain{},
			In: map[netip.Addr]string{}, Out: map[netip.Addr]string{},
		},
	}
	selecting := map[*understood]bool{}
	for p := range k.cluster.local {
		for _, u := range c.isolation(p).policies {
			selecting[u] = true
		}
		for _, a := range p.IPs {
			c.dispatch(a, k.cluster.owners(a))
		}
	}
	for u := range selecting {
		c.out.Faults = append(c.out.Faults, u.faults...)
	}
	slices.SortStableFunc(c.out.Faults, func(a, b Fault) int { return strings.Compare(a.Policy, b.Policy) })
	maps.DeleteFunc(k.pods, func(p *Pod, _ *isolation) bool { return !k.cluster.local[p] })
	maps.DeleteFunc(k.classes, func(_ string, c *class) bool { return !c.used })
	maps.DeleteFunc(k.sets, func(_ string, l *liveSet) bool { return !l.used })
	return c.out
}

// compiler makes one Ruleset.
type compiler struct {
	*Compiler
	out *Ruleset
}

// isolation is what isolates a pod.
type isolation struct {
	version  int           // of the namespace's policies
	policies []*understood // in order of name
	// keys stand, by Direction, for all that the pod's class depends on, "" where no policy isolates it.
	keys [2]string
}

// isolation reads the policies of a pod's namespace where they are others than the last time.
func (c *compiler) isolation(pod *Pod) *isolation {
	version := c.cluster.versions[pod.Namespace]
	if s := c.pods[pod]; s != nil && s.version == version {
		return s
	}
	s := &isolation{version: version}
	c.pods[pod] = s
	for _, p := range c.cluster.policies[pod.Namespace] {
		u := c.policies[p]
		if u == nil {
			c.serial++
			u = &understood{serial: c.serial, id: p.Namespace + "/" + p.Name, subject: newSelector(&p.Spec.PodSelector)}
			c.policies[p] = u
		}
		if u.subject.mayMatch(pod.Labels) {
			u.read(c.cluster, p)
			s.policies = append(s.policies, u)
		}
	}
	slices.SortFunc(s.policies, func(a, b *understood) int { return strings.Compare(a.id, b.id) })
	for dir := range s.keys {
		s.keys[dir] = classKey(pod, Direction(dir), s.policies)
	}
	return s
}

func classKey(pod *Pod, dir Direction, policies []*understood) string {
	var key []byte
	for _, u := range policies {
		if !u.isolates[dir] {
			continue
		}
		if key == nil {
			key = append(key, byte(dir))
		}
		key = binary.BigEndian.AppendUint64(key, u.serial)
		if dir == Egress {
			continue // a port's name is what the peer has by it
		}
		for _, r := range u.rules[dir] {
			for _, p := range r.named {
				ports := numbers(pod, p)
				key = binary.BigEndian.AppendUint16(key, uint16(len(ports)))
				for _, n := range ports {
					key = binary.BigEndian.AppendUint16(key, n)
				}
			}
		}
	}
	return string(key)
}

// dispatch gives an address of the own node's the class chains of its pod.
func (c *compiler) dispatch(a netip.Addr, owners []*Pod) {
	for dir, chains := range map[Direction]map[netip.Addr]string{Ingress: c.out.In, Egress: c.out.Out} {
		chain := ""
		if len(owners) == 1 {
			chain = c.chainOf(owners[0], dir)
		} else if slices.ContainsFunc(owners, func(p *Pod) bool { return c.isolation(p).keys[dir] != "" }) {
			chain = c.nobody(dir) // nobody can tell whose packets these are
		}
		if chain != "" {
			chains[a] = chain
		}
	}
}

// chainOf returns the name of the chain of a pod's class, "" where it may do everything.
func (c *compiler) chainOf(pod *Pod, dir Direction) string {
	s := c.isolation(pod)
	key := s.keys[dir]
	if key == "" {
		return ""
	}
	k := c.classes[key]
	if k == nil {
		k = c.class(dir, pod, s.policies)
		c.classes[key] = k
	}
	if !k.used {
		k.used = true
		c.use(&k.objects)
	}
	return k.chain
}

// nobody returns the name of the class chain that grants nothing.
func (c *compiler) nobody(dir Direction) string {
	var o objects
	chain := o.addChain(&Chain{Dir: dir, Class: true})
	c.use(&o)
	return chain
}

// objects are what a class consists of.
type objects struct {
	chains []*Chain
	maps   []*PortMap
	blocks []*Set
	live   []string // names of liveSets
}

// use puts objects into the Ruleset.
func (c *compiler) use(o *objects) {
	for _, chain := range o.chains {
		c.out.Chains[chain.Name] = chain
	}
	for _, m := range o.maps {
		c.out.Maps[m.Name] = m
	}
	for _, s := range o.blocks {
		c.out.Sets[s.Name] = s
	}
	for _, name := range o.live {
		l := c.sets[name]
		l.used = true
		c.out.Sets[name] = l.set
	}
}

// liveSet is a set whose members come and go.
type liveSet struct {
	source source
	set    *Set
	used   bool
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

// live returns the name, which is made of what it stands for, of a set that is there from now on.
func (k *Compiler) live(prefix string, kind SetKind, ipv6 bool, key string, from source) string {
	name := setName(prefix, ipv6, key)
	if k.sets[name] == nil {
		k.sets[name] = &liveSet{source: from, set: &Set{Name: name, Kind: kind, IPv6: ipv6, Members: from.members(k.cluster, ipv6)}}
	}
	return name
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
