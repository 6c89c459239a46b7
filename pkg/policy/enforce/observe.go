package enforce

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/policy"
)

// observeTries bounds the repeats of a look that others disturbed.
const observeTries = 5

// observed is what the kernel holds of our table. Sets that belong to one rule are left out: nobody can change them.
type observed struct {
	table, dormant bool
	sets           map[string]definition
	elements       map[string][]nfnl.Element
	chains         map[string]observedChain
	objects        map[string]uint32
	flowtables     int
}

type observedChain struct {
	base  base
	rules string // a digest
}

// base is what makes a chain meet packets; the zero value is of one that others jump to.
type base struct {
	typ            string
	hook, priority uint32
	policy         uint32
	flags          uint32
}

func baseOf(priority *int) base {
	if priority == nil {
		return base{}
	}
	return base{"filter", unix.NF_INET_FORWARD, uint32(*priority), nfAccept, chainBase}
}

// place is what cannot be changed of a chain that is there.
func (b base) place() base {
	b.policy = 0
	return b
}

const (
	nfAccept = 1
	// chainBase is NFT_CHAIN_BASE.
	chainBase = 1
	// Attribute numbers that golang.org/x/sys lacks.
	nftaChainFlags = 10
	// tableDormant is NFT_TABLE_F_DORMANT.
	tableDormant = 1
)

// observe looks at one generation. Where others write all the time, it takes what it got: a mixture cannot equal what is wanted
// unless each part did, and events tell of what changes meanwhile.
func observe() (*observed, error) {
	for try := 1; ; try++ {
		gen, err := nfnl.Generation()
		if err != nil {
			return nil, err
		}
		o, err := look()
		if errors.Is(err, unix.ENOENT) && try < observeTries {
			continue // it went while we looked
		}
		if err != nil {
			return nil, err
		}
		now, err := nfnl.Generation()
		if err != nil {
			return nil, err
		}
		if now == gen || try == observeTries {
			return o, nil
		}
	}
}

func look() (*observed, error) {
	o := &observed{sets: map[string]definition{}, elements: map[string][]nfnl.Element{}, chains: map[string]observedChain{}, objects: map[string]uint32{}}
	res, err := nfnl.Request(unix.NFPROTO_INET, unix.NFT_MSG_GETTABLE, 0, nfnl.Name(unix.NFTA_TABLE_NAME, policy.Table))
	if errors.Is(err, unix.ENOENT) {
		return o, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find table inet %s: %w", policy.Table, err)
	}
	for _, r := range res {
		a, err := nfnl.Attributes(r)
		if err != nil {
			return nil, err
		}
		o.table, o.dormant = true, number(a[unix.NFTA_TABLE_FLAGS])&tableDormant != 0
	}
	for _, part := range []func() error{o.lookAtSets, o.lookAtChains, o.lookAtObjects} {
		if err := part(); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// number is 0 for what is no number of 32 bits.
func number(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func (o *observed) lookAtSets() error {
	sets, err := dump(unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE)
	if err != nil {
		return fmt.Errorf("list the sets of table inet %s: %w", policy.Table, err)
	}
	for _, a := range sets {
		name := nfnl.Text(a[unix.NFTA_SET_NAME])
		flags := number(a[unix.NFTA_SET_FLAGS])
		if flags&setAnonymous != 0 {
			continue
		}
		desc, err := nfnl.Attributes(a[unix.NFTA_SET_DESC])
		if err != nil {
			return err
		}
		d := definition{
			flags:   flags & (setConstant | setInterval | setMap | setTimeout | setEval | setObject),
			keyType: number(a[unix.NFTA_SET_KEY_TYPE]), keyLen: number(a[unix.NFTA_SET_KEY_LEN]),
			dataType: number(a[unix.NFTA_SET_DATA_TYPE]), size: number(desc[unix.NFTA_SET_DESC_SIZE]),
			timeout: a[unix.NFTA_SET_TIMEOUT] != nil,
		}
		o.sets[name] = d
		if d.flags&setEval != 0 {
			continue // the kernel fills it
		}
		if o.elements[name], err = nfnl.Elements(set(name)); err != nil {
			return err
		}
	}
	return nil
}

// dump lists objects of our table. Not every kernel filters by table.
func dump(msg, tableAttr int, filter ...nfnl.Attr) ([]map[int][]byte, error) {
	res, err := nfnl.Request(unix.NFPROTO_INET, msg, unix.NLM_F_DUMP, append(filter, nfnl.Name(tableAttr, policy.Table))...)
	if err != nil {
		return nil, err
	}
	out := make([]map[int][]byte, 0, len(res))
	for _, r := range res {
		a, err := nfnl.Attributes(r)
		if err != nil {
			return nil, err
		}
		if nfnl.Text(a[tableAttr]) == policy.Table {
			out = append(out, a)
		}
	}
	return out, nil
}

func (o *observed) lookAtChains() error {
	chains, err := dump(unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE)
	if err != nil {
		return fmt.Errorf("list the chains of table inet %s: %w", policy.Table, err)
	}
	digests, err := ruleDigests()
	if err != nil {
		return err
	}
	for _, a := range chains {
		name := nfnl.Text(a[unix.NFTA_CHAIN_NAME])
		c := observedChain{rules: digests[name]}
		if hook := a[unix.NFTA_CHAIN_HOOK]; hook != nil {
			h, err := nfnl.Attributes(hook)
			if err != nil {
				return err
			}
			c.base = base{
				typ: nfnl.Text(a[unix.NFTA_CHAIN_TYPE]), hook: number(h[unix.NFTA_HOOK_HOOKNUM]), priority: number(h[unix.NFTA_HOOK_PRIORITY]),
				policy: number(a[unix.NFTA_CHAIN_POLICY]), flags: number(a[nftaChainFlags]) | chainBase, // older kernels do not say
			}
		}
		o.chains[name] = c
	}
	return nil
}

func (o *observed) lookAtObjects() error {
	objects, err := dump(unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE)
	if err != nil {
		return fmt.Errorf("list the counters of table inet %s: %w", policy.Table, err)
	}
	for _, a := range objects {
		o.objects[nfnl.Text(a[unix.NFTA_OBJ_NAME])] = number(a[unix.NFTA_OBJ_TYPE])
	}
	flowtables, err := dump(unix.NFT_MSG_GETFLOWTABLE, nftaFlowtableTable)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) { // a kernel without them
		return fmt.Errorf("list the flow tables of table inet %s: %w", policy.Table, err)
	}
	o.flowtables = len(flowtables)
	return nil
}

// nftaFlowtableTable is NFTA_FLOWTABLE_TABLE.
const nftaFlowtableTable = 1

// recheck are the addresses in the sets of that name.
func (o *observed) recheck() map[netip.Addr]bool {
	out := map[netip.Addr]bool{}
	for _, f := range []string{"4", "6"} {
		for _, e := range o.elements[policy.SetRecheck+f] {
			if a, ok := netip.AddrFromSlice([]byte(e.Key)); ok {
				out[a] = true
			}
		}
	}
	return out
}

// plan is what turns a table that holds o into one that holds want, but for recheck.
func (o *observed) plan(want *held, digests map[string]digest) *plan {
	p := newPlan()
	p.table, p.change.Cold = !o.table, !o.table
	kinds, elements := kindsOf(want.rules), elementsOf(want)
	o.planSets(p, kinds, elements)
	o.planChains(p, chainsOf(want), digests)
	o.planObjects(p)
	if o.dormant {
		p.whole = true
		p.repaired("table inet %s is dormant", policy.Table)
	}
	if o.flowtables > 0 {
		p.whole = true
		p.repaired("%s in table inet %s", said(o.flowtables, "foreign flow table"), policy.Table)
	}
	if p.change.Cold {
		p.change.Repaired = nil
	}
	return p
}

func (o *observed) planSets(p *plan, kinds map[string]kind, elements map[string][]nfnl.Element) {
	for _, name := range sortedKeys(kinds) {
		k := kinds[name]
		switch d, there := o.sets[name]; {
		case !there:
			p.sets[name], p.fill[name] = k, elements[name]
			p.repaired("set %s was missing", name)
		case d != k.definition():
			p.whole = true
			p.repaired("set %s was of another kind", name)
		case k.counts || isRecheck(name):
		default:
			p.compareElements(name, k, o.elements[name], elements[name])
		}
	}
	for _, name := range sortedKeys(o.sets) {
		if _, wanted := kinds[name]; !wanted {
			p.spare.sets[name] = spareSet{since: time.Now()} // or somebody's that nothing of ours refers to
		}
	}
}

func isRecheck(name string) bool {
	return name == policy.SetRecheck+"4" || name == policy.SetRecheck+"6"
}

func (p *plan) compareElements(name string, k kind, have, want []nfnl.Element) {
	c := elementChange(name, have, want)
	if k.interval && len(c.add) == 0 && endsOnly(c.del) {
		return
	}
	if len(c.del)+len(c.add) == 0 {
		return
	}
	p.repaired("set %s: %s missing, %d foreign", name, said(len(c.add), "element"), len(c.del))
	if k.interval { // their ends belong together
		c = setChange{set: name, flush: true, add: want}
	}
	p.switches = append(p.switches, c)
}

func elementChange(name string, have, want []nfnl.Element) setChange {
	wanted := make(map[nfnl.Element]bool, len(want))
	for _, e := range want {
		wanted[e] = true
	}
	c := setChange{set: name}
	for _, e := range have {
		if wanted[e] {
			delete(wanted, e)
		} else {
			c.del = append(c.del, e)
		}
	}
	for _, e := range want {
		if wanted[e] {
			c.add = append(c.add, e)
		}
	}
	return c
}

// endsOnly reports whether all are ends at address 0, which mean nothing: nft adds one to a set of intervals that it fills.
func endsOnly(list []nfnl.Element) bool {
	for _, e := range list {
		if e.Flags != nfnl.ElemEnd || len(bytes.Trim([]byte(e.Key), "\x00")) > 0 {
			return false
		}
	}
	return true
}

func (o *observed) planChains(p *plan, chains []chain, digests map[string]digest) {
	wanted := map[string]bool{}
	for _, c := range chains {
		wanted[c.name] = true
		d := digests[c.name]
		switch have, there := o.chains[c.name]; {
		case !there:
			p.chains = append(p.chains, c)
			p.repaired("chain %s was missing", c.name)
		case have.base.place() != baseOf(c.priority).place():
			p.whole = true
			p.repaired("chain %s was of another kind", c.name)
		case have.base != baseOf(c.priority) || d.Text != textDigest(c.rules) || d.Rules != have.rules || d.Rules == "":
			p.rewrite = append(p.rewrite, c)
			p.repaired("chain %s may have had other rules", c.name)
		}
	}
	for _, name := range sortedKeys(o.chains) {
		if wanted[name] {
			continue
		}
		switch c := o.chains[name]; {
		case c.base != (base{}):
			p.repaired("chain %s met packets", name)
			p.drop.chains = append(p.drop.chains, name)
		case c.rules == "" || c.rules != digests[name].Rules:
			p.drop.chains = append(p.drop.chains, name) // somebody else's
		default:
			p.spare.chains[name] = time.Now()
		}
	}
	if len(p.drop.chains) > 0 { // what is spare may refer to them
		d := p.spare.expire(time.Now(), 0)
		p.drop.chains, p.drop.sets = append(p.drop.chains, d.chains...), append(p.drop.sets, d.sets...)
	}
}

func (o *observed) planObjects(p *plan) {
	for _, name := range counters {
		switch typ, there := o.objects[name]; {
		case !there:
			p.counters = append(p.counters, name)
			p.repaired("counter %s was missing", name)
		case typ != objCounter:
			p.whole = true
			p.repaired("object %s was no counter", name)
		}
	}
	for name, typ := range o.objects {
		if name != policy.CounterUnknown && name != policy.CounterStateless {
			p.drop.objects[name] = typ
		}
	}
}

// counters are those with a name.
var counters = []string{policy.CounterUnknown, policy.CounterStateless}
