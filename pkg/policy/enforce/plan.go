package enforce

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/policy"
)

// plan is what to write, in this order. Nothing before switches is seen by a packet, but for repairs of chains.
type plan struct {
	// whole: the table is in a state in which parts cannot be put right: it is replaced in one transaction.
	whole bool
	// table and counters are to be made.
	table    bool
	counters []string
	// sets are the new sets and maps, and fill their elements.
	sets map[string]kind
	fill map[string][]nfnl.Element
	// chains are new; those with a priority, which meet packets, are written last.
	chains []chain
	// rewrite are there with other rules.
	rewrite []chain
	// switches are changes of sets that packets meet: one transaction.
	switches []setChange
	// drop is foreign, and nothing refers to it when the rest is done.
	drop drop
	// spare is what else is there, where the kernel was looked at.
	spare spares
	// recheck are the addresses whose established flows are to be judged again, and leave those that are no longer isolated.
	recheck, leave map[netip.Addr]bool
	// leftovers: something could not be deleted.
	leftovers bool
	change    Change
}

type drop struct {
	chains []string
	sets   []string
	// objects are counters and the like, by their name.
	objects map[string]uint32
}

// chain is a chain in nft's syntax. priority is that of a base chain.
type chain struct {
	name     string
	priority *int
	rules    []string
}

// setChange is a change of one set's elements: first all go, then some, then others come.
type setChange struct {
	set      string
	flush    bool
	del, add []nfnl.Element
}

func newPlan() *plan {
	return &plan{
		sets: map[string]kind{}, fill: map[string][]nfnl.Element{},
		drop: drop{objects: map[string]uint32{}}, spare: noSpares(), recheck: map[netip.Addr]bool{}, leave: map[netip.Addr]bool{},
	}
}

func (p *plan) empty() bool {
	return !p.whole && !p.table && len(p.counters)+len(p.sets)+len(p.chains)+len(p.rewrite)+len(p.switches) == 0 && p.drop.empty()
}

func (d drop) empty() bool { return len(d.chains)+len(d.sets)+len(d.objects) == 0 }

// chainsOf are all chains of a table, those before that others name.
func chainsOf(want *held) (out []chain) {
	for _, c := range policy.FixedChains(want.opt) {
		out = append(out, chain{c.Name, c.Priority, c.Rules})
	}
	for _, name := range sortedKeys(want.rules.Chains) {
		out = append(out, chain{name, nil, want.rules.Chains[name].Text()})
	}
	return out
}

// difference is what turns a table that holds old into one that holds want.
func difference(old, want *held, spare spares) *plan {
	p := newPlan()
	lost := p.setDifference(old.rules, want.rules, spare)
	p.chainDifference(old, want, spare)
	p.dispatchDifference(policy.MapIn, old.rules.In, want.rules.In)
	p.dispatchDifference(policy.MapOut, old.rules.Out, want.rules.Out)
	for a := range want.isolated {
		if !old.isolated[a] {
			p.isolate(a, func(c *setChange, e nfnl.Element) { c.add = append(c.add, e) })
		}
	}
	for a := range old.isolated {
		if !want.isolated[a] {
			p.isolate(a, func(c *setChange, e nfnl.Element) { c.del = append(c.del, e) })
		}
	}
	p.concerned(old.rules, want.rules, lost)
	return p
}

// isolate changes the sets of isolated addresses.
func (p *plan) isolate(a netip.Addr, change func(*setChange, nfnl.Element)) {
	key := addrKey(a)
	change(p.set(policy.SetIsolated+family(a)), nfnl.Element{Key: key})
	change(p.set(policy.SetSelf+family(a)), nfnl.Element{Key: key + key})
}

// set returns the change of a set, which is empty at first.
func (p *plan) set(name string) *setChange {
	i := slices.IndexFunc(p.switches, func(c setChange) bool { return c.set == name })
	if i < 0 {
		i = len(p.switches)
		p.switches = append(p.switches, setChange{set: name})
	}
	return &p.switches[i]
}

// setDifference plans the sets and maps that policies name, and returns those that lost elements.
func (p *plan) setDifference(old, want *policy.Ruleset, spare spares) (lost map[string]bool) {
	lost = map[string]bool{}
	for name, s := range want.Sets {
		left, isSpare := spare.sets[name]
		switch o := cmp.Or(old.Sets[name], left.set); {
		case o == s:
		case o == nil && isSpare: // nobody knows what it holds
			p.switches = append(p.switches, setChange{set: name, flush: true, add: membersOf(s)})
		case o == nil:
			p.sets[name], p.fill[name] = kindOf(s), membersOf(s)
		case s.Kind == policy.Blocks:
			if !slices.Equal(o.Members, s.Members) {
				p.switches = append(p.switches, setChange{set: name, flush: true, add: membersOf(s)})
				lost[name] = true
			}
		default:
			c := setChange{set: name}
			c.del, c.add = memberDifference(s.Kind, o.Members, s.Members)
			if len(c.del)+len(c.add) > 0 {
				p.switches = append(p.switches, c)
			}
			lost[name] = len(c.del) > 0
		}
	}
	for name, m := range want.Maps {
		left, isSpare := spare.sets[name]
		switch o := cmp.Or(old.Maps[name], left.ports); {
		case o == m:
		case o == nil && isSpare:
			p.switches = append(p.switches, setChange{set: name, flush: true, add: portsOf(m)})
		case o == nil:
			p.sets[name], p.fill[name] = kindOfMap(m), portsOf(m)
		case !slices.Equal(o.Elements, m.Elements):
			p.switches = append(p.switches, setChange{set: name, flush: true, add: portsOf(m)})
			lost[name] = true
		}
	}
	return lost
}

// memberDifference walks two sorted lists.
func memberDifference(k policy.SetKind, old, want []policy.Member) (del, add []nfnl.Element) {
	for len(old)+len(want) > 0 {
		c := -1 // an old one that is wanted no more
		switch {
		case len(old) == 0:
			c = 1
		case len(want) > 0:
			c = old[0].Compare(want[0])
		}
		if c < 0 {
			del = append(del, member(k, old[0]))
		}
		if c > 0 {
			add = append(add, member(k, want[0]))
		}
		if c <= 0 {
			old = old[1:]
		}
		if c >= 0 {
			want = want[1:]
		}
	}
	return del, add
}

// chainDifference plans chains. Those of policies never change: their names are their content.
func (p *plan) chainDifference(old, want *held, spare spares) {
	for name, c := range want.rules.Chains {
		if _, there := spare.chains[name]; !there && old.rules.Chains[name] == nil {
			p.chains = append(p.chains, chain{name, nil, c.Text()})
		}
	}
	slices.SortFunc(p.chains, func(a, b chain) int { return strings.Compare(a.name, b.name) })
	if old.opt == want.opt {
		return
	}
	before := policy.FixedChains(old.opt)
	for i, c := range policy.FixedChains(want.opt) {
		if !slices.Equal(before[i].Rules, c.Rules) {
			p.rewrite = append(p.rewrite, chain{c.Name, c.Priority, c.Rules})
		}
	}
}

func (p *plan) dispatchDifference(name string, old, want map[netip.Addr]string) {
	for a, chain := range want {
		was, there := old[a]
		if there && was == chain {
			continue
		}
		c := p.set(name + family(a))
		if there {
			c.del = append(c.del, dispatchOf(a, was))
		}
		c.add = append(c.add, dispatchOf(a, chain))
	}
	for a, chain := range old {
		if _, stays := want[a]; !stays {
			c := p.set(name + family(a))
			c.del = append(c.del, dispatchOf(a, chain))
		}
	}
}

// concerned plans to recheck whoever may have lost rights: who is isolated anew or by another class, and who has a class that looks
// into a set which lost elements.
func (p *plan) concerned(old, want *policy.Ruleset, lost map[string]bool) {
	u := users{want, lost, map[string]bool{}}
	for _, d := range []struct{ old, want map[netip.Addr]string }{{old.In, want.In}, {old.Out, want.Out}} {
		for a, chain := range d.want {
			if was, there := d.old[a]; !there || was != chain || u.of(chain) {
				p.recheck[a] = true
			}
		}
	}
}

// users finds the chains that look into sets or maps that lost elements.
type users struct {
	rules *policy.Ruleset
	lost  map[string]bool
	known map[string]bool
}

func (u users) of(name string) bool {
	if len(u.lost) == 0 {
		return false
	}
	if uses, known := u.known[name]; known {
		return uses
	}
	uses := false
	if c := u.rules.Chains[name]; c != nil {
		uses = slices.ContainsFunc(c.Rules, u.rule)
	}
	u.known[name] = uses
	return uses
}

func (u users) rule(r policy.Rule) bool {
	if u.lost[r.Ref] {
		return true
	}
	m := u.rules.Maps[r.Ref]
	return m != nil && slices.ContainsFunc(m.Elements, func(e policy.PortElement) bool { return e.Jump != "" && u.of(e.Jump) })
}

// changeRecheck plans the elements of the sets of that name. in are those that are there.
func (p *plan) changeRecheck(want *held, in map[netip.Addr]uint64) {
	for a := range p.recheck {
		if _, there := in[a]; !there {
			c := p.set(policy.SetRecheck + family(a))
			c.add = append(c.add, nfnl.Element{Key: addrKey(a)})
		}
	}
	p.change.Rechecked = len(p.recheck)
	want.doubt = len(p.recheck) > 0
	for a := range in {
		want.doubt = want.doubt || want.isolated[a]
		if !want.isolated[a] {
			p.leave[a] = true
			c := p.set(policy.SetRecheck + family(a))
			c.del = append(c.del, nfnl.Element{Key: addrKey(a)})
		}
	}
}

// takesRights: a flow that stands may be forbidden from now on.
func (p *plan) takesRights() bool {
	return p.change.Rechecked > 0 || p.change.Cold || len(p.change.Repaired) > 0
}

// said counts in words.
func said(n int, what string) string {
	if n == 1 {
		return "one " + what
	}
	return strconv.Itoa(n) + " " + what + "s"
}

func (p *plan) repaired(format string, args ...any) {
	p.change.Repaired = append(p.change.Repaired, fmt.Sprintf(format, args...))
}
