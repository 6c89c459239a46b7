// Package enforce keeps a policy.Ruleset in the kernel, as table inet headcni-policy of the network namespace of its callers.
//
// Rules are written by the nft program, which knows their encoding; elements of sets and maps by netlink, which costs a hundredth and
// knows no foreign table. A pod's start needs elements alone.
package enforce

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"sync"
	"time"

	"github.com/headcni/headcni/internal/nfcmd"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/policy"
)

// Table keeps the table. It is safe for concurrent use.
type Table struct {
	// Hold has each packet meet the table until release is called, where flows go past it else. It is called before an Apply writes what
	// may take rights away. Nil where each packet does.
	Hold func() (release func(), err error)

	file string

	mu   sync.Mutex
	nft  nfcmd.NFT
	conn nfnl.Conn
	// have is what the kernel holds as far as we know, nil where it has to be looked at.
	have *held
	// spare is what else it holds.
	spare spares
	keep  time.Duration
	// digests are of the rules of chains as the kernel listed them after we had written them.
	digests map[string]digest
	// recheck are the addresses in the sets of that name, each with the number of the Apply that put it there.
	recheck map[netip.Addr]uint64
	applies uint64
	own     ownWrites
	// last is what was applied last, whatever happened to the kernel since.
	last *held
	// counts are of denied packets, by set and address, and named those of counters.
	counts map[string]map[netip.Addr]tally
	named  map[string]tally
}

// held is what is applied.
type held struct {
	rules *policy.Ruleset
	opt   policy.Options
	// isolated are the addresses that are, in any direction.
	isolated map[netip.Addr]bool
	// doubt: there are addresses under recheck.
	doubt bool
}

// Change is what an Apply did.
type Change struct {
	// Sets and Chains are how many were made, and Deleted how many sets, maps and chains went.
	Sets, Chains, Deleted int
	// Added and Removed are elements of sets and maps.
	Added, Removed int
	// Rechecked are addresses whose established flows are judged again from now on.
	Rechecked int
	// Programs is how often the nft program ran.
	Programs int
	// Cold: there was no table.
	Cold bool
	// Repaired says what the kernel had otherwise than it should, where it was looked at. In a process's First it may be what changed
	// while there was none.
	Repaired []string
	First    bool
}

// New returns a Table that has touched nothing yet. In file it keeps what the kernel's rules looked like when it had written them, so that
// another process finds them as they are; without it, that process writes them anew. The folder must exist.
func New(file string) *Table {
	return &Table{file: file, nft: nfcmd.NFT{Modules: modules}, spare: noSpares(), keep: keepSpare}
}

// modules are the kernel's that the table needs.
const modules = "nf_tables, nf_conntrack, nft_ct, nft_limit, nft_log and nft_reject_inet"

func (t *Table) explain(err error) error { return t.nft.Explain(err) }

// Apply makes the table hold want. What packets meet changes in one step, from all that was applied before to all of want.
//
// The first Apply compares with what the kernel holds, and writes nothing where that is want already. Later ones write the difference
// to what was applied before, unless somebody else has changed the table (see Changes) or an Apply failed: then the first's way is
// taken again. After an error the kernel still enforces what it did.
func (t *Table) Apply(ctx context.Context, want *policy.Ruleset, opt policy.Options) (Change, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c, err := t.apply(ctx, want, opt)
	if errors.Is(err, errNotAsThought) {
		c, err = t.apply(ctx, want, opt)
	}
	return c, err
}

// errNotAsThought says that a difference could not be written, perhaps because the table is not what was applied before.
var errNotAsThought = errors.New("the policy table is not as it was left")

func (t *Table) apply(ctx context.Context, rules *policy.Ruleset, opt policy.Options) (Change, error) {
	t.applies++
	want := &held{rules: rules, opt: opt, isolated: isolated(rules)}
	p, err := t.plan(want)
	if err != nil {
		return Change{}, fmt.Errorf("look at the policy table: %w", t.explain(err))
	}
	p.change.First = t.last == nil
	if t.Hold != nil && p.takesRights() {
		release, err := t.Hold()
		if err != nil {
			return p.change, fmt.Errorf("have all packets meet the policy table: %w", err)
		}
		defer release()
	}
	had := t.have
	t.have = nil
	if err := t.execute(ctx, p, want); err != nil {
		err = fmt.Errorf("write the policy table: %w", t.explain(err))
		if had != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w: %w", errNotAsThought, err)
		}
		return p.change, err
	}
	t.last = want
	t.putRecheck(p)
	if had != nil {
		t.spare.update(had.rules, rules, time.Now())
	}
	t.sweep(p)
	if !p.leftovers {
		t.have = want
	}
	return p.change, nil
}

func (t *Table) plan(want *held) (*plan, error) {
	if t.have != nil {
		p := difference(t.have, want, t.spare)
		p.changeRecheck(want, t.recheck)
		if want.doubt != t.have.doubt {
			*p.set(policy.MapState) = elementChange(policy.MapState, states(t.have.doubt), states(want.doubt))
		}
		return p, nil
	}
	t.loadDigests()
	o, err := observe()
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(t.digests, func(name string, _ digest) bool { _, there := o.chains[name]; return !there })
	before := t.recheck
	t.recheck = map[netip.Addr]uint64{}
	for a := range o.recheck() {
		t.recheck[a] = t.applies
	}
	doubt := len(t.recheck) > 0
	want.doubt = doubt
	p := o.plan(want, t.digests)
	t.spare = p.spare
	for a := range before {
		if _, there := t.recheck[a]; !there && want.isolated[a] {
			p.repaired("%s was taken out of recheck", a)
		}
	}
	if p.change.Cold || len(p.change.Repaired) > 0 {
		for a := range want.isolated {
			p.recheck[a] = true
		}
	}
	p.changeRecheck(want, t.recheck)
	if _, missing := p.sets[policy.MapState]; missing {
		p.fill[policy.MapState] = states(want.doubt)
	} else if want.doubt != doubt {
		*p.set(policy.MapState) = elementChange(policy.MapState, o.elements[policy.MapState], states(want.doubt))
	}
	return p, nil
}

// putRecheck notes whom a plan that is in force has put into recheck, and whom it has taken out.
func (t *Table) putRecheck(p *plan) {
	for a := range p.recheck {
		t.recheck[a] = t.applies
	}
	maps.DeleteFunc(t.recheck, func(a netip.Addr, _ uint64) bool { return p.leave[a] })
}

// Doubt has the next Apply compare with what the kernel holds.
func (t *Table) Doubt() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.have = nil
}
