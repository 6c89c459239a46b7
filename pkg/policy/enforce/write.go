package enforce

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/policy"
)

const (
	// linesAtOnce bounds what nft is given at once, and with that its memory, where nothing refers to it yet.
	linesAtOnce = 3000
	// elementsAtOnce bounds a transaction of elements of sets that nothing refers to yet.
	elementsAtOnce = 5000
	// captureTries bounds how often chains are written until nobody else wrote at the same time.
	captureTries = 3
)

// execute writes a plan. Each step leaves a table that enforces what it did before or what is wanted, and that a later comparison
// can go on from.
func (t *Table) execute(ctx context.Context, p *plan, want *held) error {
	if p.whole {
		return t.replace(ctx, p, want)
	}
	isBase := func(c chain) bool { return c.priority != nil }
	others := slices.DeleteFunc(slices.Clone(p.chains), isBase)
	bases := slices.DeleteFunc(slices.Clone(p.chains), func(c chain) bool { return !isBase(c) })
	p.change.Sets, p.change.Chains = len(p.sets), len(p.chains)
	if err := t.define(ctx, p, others); err != nil {
		return err
	}
	if err := t.fill(p); err != nil {
		return err
	}
	if len(p.rewrite) > 0 {
		if err := t.writeChains(ctx, p, p.rewrite, nil, true); err != nil {
			return err
		}
	}
	if err := t.switchOver(p); err != nil {
		return err
	}
	if len(bases) > 0 {
		if err := t.writeChains(ctx, p, bases, nil, false); err != nil {
			return err
		}
	}
	if len(p.chains)+len(p.rewrite) > 0 {
		t.saveDigests()
	}
	return nil
}

// define makes the table, sets and maps without elements, and chains that no packet meets: in one run of nft where that is little.
func (t *Table) define(ctx context.Context, p *plan, chains []chain) error {
	names, table := sortedKeys(p.sets), p.table || len(p.counters) > 0
	for table || len(names)+len(chains) > 0 {
		sets := names[:min(len(names), linesAtOnce)]
		n, lines := 0, len(sets)
		for n < len(chains) && lines+len(chains[n].rules) < linesAtOnce {
			lines += 1 + len(chains[n].rules)
			n++
		}
		if n == 0 && len(sets) == 0 && len(chains) > 0 {
			n = 1 // a huge one
		}
		definitions := func(tx *knftables.Transaction) {
			if table {
				defineTable(tx)
			}
			for _, name := range sets {
				defineSet(tx, name, p.sets[name])
			}
		}
		if err := t.writeChains(ctx, p, chains[:n], definitions, false); err != nil {
			return err
		}
		names, chains, table = names[len(sets):], chains[n:], false
	}
	return nil
}

// run runs nft once.
func (t *Table) run(ctx context.Context, p *plan, fill func(tx *knftables.Transaction)) error {
	p.change.Programs++
	return t.own.note(&t.conn, func() error { return t.nft.Write(ctx, fill) })
}

// send sends a batch.
func (t *Table) send(b *nfnl.Batch) error {
	return t.own.note(&t.conn, func() error { return t.conn.Run(b) })
}

func defineTable(tx *knftables.Transaction) {
	tx.Add(&knftables.Table{Family: knftables.InetFamily, Name: policy.Table})
	for _, name := range counters {
		tx.Add(&knftables.Counter{Family: knftables.InetFamily, Table: policy.Table, Name: name})
	}
}

func defineSet(tx *knftables.Transaction, name string, k kind) {
	var flags []knftables.SetFlag
	var size *uint64
	if k.interval {
		flags = append(flags, knftables.IntervalFlag)
	}
	if k.counts {
		flags = append(flags, knftables.DynamicFlag, knftables.TimeoutFlag) // nft's update asks for both
		size = knftables.PtrTo(uint64(maxCounted))
	}
	if k.verdict {
		tx.Add(&knftables.Map{Family: knftables.InetFamily, Table: policy.Table, Name: name, Type: k.typeText(), Flags: flags})
		return
	}
	tx.Add(&knftables.Set{Family: knftables.InetFamily, Table: policy.Table, Name: name, Type: k.typeText(), Flags: flags, Size: size})
}

// defineChains writes chains, and empties them before where they are there.
func defineChains(tx *knftables.Transaction, chains []chain, flush bool) {
	for _, c := range chains {
		object := &knftables.Chain{Family: knftables.InetFamily, Table: policy.Table, Name: c.name}
		if c.priority != nil {
			object.Type, object.Hook = knftables.PtrTo(knftables.FilterType), knftables.PtrTo(knftables.ForwardHook)
			object.Priority = knftables.PtrTo(knftables.BaseChainPriority(strconv.Itoa(*c.priority)))
			object.Policy = knftables.PtrTo(knftables.AcceptPolicy)
		}
		tx.Add(object)
		if flush {
			tx.Flush(object)
		}
	}
	for _, c := range chains {
		for _, r := range c.rules {
			tx.Add(&knftables.Rule{Family: knftables.InetFamily, Table: policy.Table, Chain: c.name, Rule: r})
		}
	}
}

// writeChains writes chains in one transaction, after what they refer to, and notes how the kernel lists their rules.
func (t *Table) writeChains(ctx context.Context, p *plan, chains []chain, before func(*knftables.Transaction), flush bool) error {
	return t.capture(chains, func(again bool) error {
		return t.run(ctx, p, func(tx *knftables.Transaction) {
			if before != nil {
				before(tx)
			}
			defineChains(tx, chains, flush || again)
		})
	})
}

// capture has chains written, and notes how the kernel lists their rules. Where somebody else wrote at the same time, what is listed may
// be his, and they are written again: two equal listings are as good.
func (t *Table) capture(chains []chain, write func(again bool) error) error {
	if len(chains) == 0 {
		return write(false)
	}
	names := make([]string, 0, len(chains))
	for _, c := range chains {
		names = append(names, c.name)
		delete(t.digests, c.name)
	}
	var last map[string]string
	for try := range captureTries {
		before, err := t.conn.Generation()
		if err != nil {
			return err
		}
		if err := write(try > 0); err != nil {
			return err
		}
		listed, err := ruleDigests(names...)
		if err != nil {
			return err
		}
		after, err := t.conn.Generation()
		if err != nil {
			return err
		}
		if after == before+1 || last != nil && maps.Equal(listed, last) {
			for _, c := range chains {
				t.digests[c.name] = digest{textDigest(c.rules), listed[c.name]}
			}
			return nil
		}
		last = listed
	}
	return nil // the next comparison writes them again
}

// fill puts elements into sets that nothing refers to yet.
func (t *Table) fill(p *plan) error {
	b, n := nfnl.NewBatch(unix.NFPROTO_INET), 0
	for _, name := range sortedKeys(p.fill) {
		for list := range slices.Chunk(p.fill[name], elementsAtOnce) {
			b.AddElements(policy.Table, name, list)
			p.change.Added += len(list)
			if n += len(list); n >= elementsAtOnce {
				if err := t.send(b); err != nil {
					return err
				}
				b, n = nfnl.NewBatch(unix.NFPROTO_INET), 0
			}
		}
	}
	if b.Len() == 0 {
		return nil
	}
	return t.send(b)
}

// switchOver changes all that packets meet in one transaction.
func (t *Table) switchOver(p *plan) error {
	b := nfnl.NewBatch(unix.NFPROTO_INET)
	for _, c := range p.switches {
		if c.flush {
			b.FlushSet(policy.Table, c.set)
		}
		b.DelElements(policy.Table, c.set, c.del)
		p.change.Removed += len(c.del)
	}
	for _, c := range p.switches {
		b.AddElements(policy.Table, c.set, c.add)
		p.change.Added += len(c.add)
	}
	if b.Len() == 0 {
		return nil
	}
	return t.send(b)
}

// sweep deletes what is foreign, and what has been spare for long, once no packet is on its way through it: a packet that is in a chain
// when that is emptied by the transaction after the next falls out at its end, which is accept. It is no failure of the change where
// that fails: the next Apply finds what is left.
func (t *Table) sweep(p *plan) {
	old := t.spare.expire(time.Now(), t.keep)
	p.drop.sets, p.drop.chains = append(p.drop.sets, old.sets...), append(p.drop.chains, old.chains...)
	if p.drop.empty() {
		return
	}
	p.change.Deleted = len(p.drop.chains) + len(p.drop.sets) + len(p.drop.objects)
	nfnl.AwaitPackets()
	b := nfnl.NewBatch(unix.NFPROTO_INET)
	table := nfnl.Name(unix.NFTA_CHAIN_TABLE, policy.Table) // 1 in all kinds of messages
	for _, name := range p.drop.chains {
		b.Add(unix.NFT_MSG_DELRULE, 0, table, nfnl.Name(unix.NFTA_RULE_CHAIN, name))
	}
	for _, name := range p.drop.sets {
		b.FlushSet(policy.Table, name) // older kernels forget a map's hold on chains else
		b.Add(unix.NFT_MSG_DELSET, 0, table, nfnl.Name(unix.NFTA_SET_NAME, name))
	}
	for _, name := range p.drop.chains {
		b.Add(unix.NFT_MSG_DELCHAIN, 0, table, nfnl.Name(unix.NFTA_CHAIN_NAME, name))
	}
	for _, name := range sortedKeys(p.drop.objects) {
		b.Add(unix.NFT_MSG_DELOBJ, 0, table, nfnl.Name(unix.NFTA_OBJ_NAME, name), nfnl.Uint32(unix.NFTA_OBJ_TYPE, p.drop.objects[name]))
	}
	p.leftovers = t.send(b) != nil
	for _, name := range p.drop.chains {
		delete(t.digests, name)
	}
}

// replace takes the table away and makes it anew in one transaction, with elements in nft's syntax. That costs nft's memory, and a packet
// that is on its way through the old base chains meets neither: seen with one of 900,000 in 100 times. So this is for tables that
// do not enforce any more as they should.
func (t *Table) replace(ctx context.Context, p *plan, want *held) error {
	kinds, elements := kindsOf(want.rules), elementsOf(want)
	for a := range p.recheck {
		name := policy.SetRecheck + family(a)
		elements[name] = append(elements[name], nfnl.Element{Key: addrKey(a)})
	}
	chains := chainsOf(want)
	p.change.Sets, p.change.Chains = len(kinds), len(chains)
	err := t.capture(chains, func(bool) error {
		return t.run(ctx, p, func(tx *knftables.Transaction) {
			table := &knftables.Table{Family: knftables.InetFamily, Name: policy.Table}
			tx.Add(table) // so that there is one to delete
			tx.Delete(table)
			defineTable(tx)
			for _, name := range sortedKeys(kinds) {
				defineSet(tx, name, kinds[name])
			}
			defineChains(tx, chains, false)
			for _, name := range sortedKeys(kinds) {
				addElements(tx, name, kinds[name], elements[name])
				p.change.Added += len(elements[name])
			}
		})
	})
	if err != nil {
		return err
	}
	t.spare, p.drop = noSpares(), drop{}
	t.saveDigests()
	return nil
}

func addElements(tx *knftables.Transaction, name string, k kind, elements []nfnl.Element) {
	for _, e := range k.elementTexts(elements) {
		object := &knftables.Element{Family: knftables.InetFamily, Table: policy.Table, Key: []string{e[0]}}
		if k.verdict {
			object.Map, object.Value = name, []string{e[1]}
		} else {
			object.Set = name
		}
		tx.Add(object)
	}
}

// Remove deletes the table. Twice is fine.
func (t *Table) Remove(context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.have, t.last, t.spare = nil, nil, noSpares()
	b := nfnl.NewBatch(unix.NFPROTO_INET)
	b.Add(unix.NFT_MSG_DELTABLE, 0, nfnl.Name(unix.NFTA_TABLE_NAME, policy.Table))
	if err := t.send(b); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete table inet %s: %w", policy.Table, t.explain(err))
	}
	return nil
}
