package enforce

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/policy"
)

// Denied is how many packets were denied since the process began.
type Denied struct {
	// In and Out are by the local pod's address: what came to it, and what it began.
	In, Out map[netip.Addr]uint64
	// Unknown were of pods whose policies were not known yet, and Stateless of isolated pods and of no connection.
	Unknown, Stateless uint64
}

// tally is a count that outlives the kernel's: one that says less than before has begun anew.
type tally struct{ total, seen uint64 }

func (c tally) add(now uint64) tally {
	if now < c.seen {
		c.seen = 0
	}
	return tally{c.total + now - c.seen, now}
}

// Denied reads the kernel's counts. Those of addresses that are no longer isolated it returns once more, and forgets them.
func (t *Table) Denied(context.Context) (Denied, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.counts == nil {
		t.counts = map[string]map[netip.Addr]tally{policy.SetDeniedIn: {}, policy.SetDeniedOut: {}}
		t.named = map[string]tally{}
	}
	gone, err := t.count()
	if err != nil {
		return Denied{}, fmt.Errorf("read what was denied: %w", t.explain(err))
	}
	d := Denied{
		In: totals(t.counts[policy.SetDeniedIn]), Out: totals(t.counts[policy.SetDeniedOut]),
		Unknown: t.named[policy.CounterUnknown].total, Stateless: t.named[policy.CounterStateless].total,
	}
	t.forget(gone)
	return d, nil
}

func totals(counts map[netip.Addr]tally) map[netip.Addr]uint64 {
	out := make(map[netip.Addr]uint64, len(counts))
	for a, c := range counts {
		out[a] = c.total
	}
	return out
}

// count returns the sets' elements whose address is no longer isolated.
func (t *Table) count() (gone map[string][]nfnl.Element, err error) {
	gone = map[string][]nfnl.Element{}
	var is map[netip.Addr]bool
	if t.last != nil {
		is = t.last.isolated
	}
	for name, counts := range t.counts {
		now := map[netip.Addr]uint64{}
		for _, f := range []string{"4", "6"} {
			err := nfnl.EachElement(set(name+f), func(attrs []byte) error {
				key := nfnl.Get(nfnl.Get(attrs, unix.NFTA_SET_ELEM_KEY), unix.NFTA_DATA_VALUE)
				if a, ok := netip.AddrFromSlice(key); ok {
					now[a] = packets(nfnl.Get(nfnl.Get(attrs, unix.NFTA_SET_ELEM_EXPR), nftaExprData))
					if is != nil && !is[a] {
						gone[name+f] = append(gone[name+f], nfnl.Element{Key: string(key)})
					}
				}
				return nil
			})
			if err != nil && !errors.Is(err, unix.ENOENT) { // without a table nothing is denied
				return nil, err
			}
		}
		for a := range counts {
			if _, there := now[a]; !there {
				now[a] = 0
			}
		}
		for a, n := range now {
			counts[a] = counts[a].add(n)
		}
	}
	return gone, t.countNamed()
}

func (t *Table) countNamed() error {
	objects, err := dump(unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	now := map[string]uint64{}
	for _, a := range objects {
		now[nfnl.Text(a[unix.NFTA_OBJ_NAME])] = packets(a[unix.NFTA_OBJ_DATA])
	}
	for _, name := range counters {
		t.named[name] = t.named[name].add(now[name])
	}
	return nil
}

// forget deletes counts of addresses that are not isolated. Where that fails they are deleted the next time.
func (t *Table) forget(gone map[string][]nfnl.Element) {
	if t.last != nil {
		for _, counts := range t.counts {
			maps.DeleteFunc(counts, func(a netip.Addr, _ tally) bool { return !t.last.isolated[a] })
		}
	}
	b := nfnl.NewBatch(unix.NFPROTO_INET)
	for _, name := range sortedKeys(gone) {
		b.DelElements(policy.Table, name, gone[name])
	}
	if b.Len() > 0 {
		_ = t.send(b)
	}
}

// nftaExprData is NFTA_EXPR_DATA.
const nftaExprData = 2

// packets are those of a counter's attributes.
func packets(counter []byte) uint64 {
	if n := nfnl.Get(counter, unix.NFTA_COUNTER_PACKETS); len(n) == 8 {
		return binary.BigEndian.Uint64(n)
	}
	return 0
}

// Stats is how large the table is.
type Stats struct {
	Sets, Maps, Chains int
	// Elements are those of sets and maps.
	Elements int
	// Recheck is how many addresses have their established flows judged again.
	Recheck int
}

// Stats returns the size of what was applied last.
func (t *Table) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.last == nil {
		return Stats{}
	}
	r := t.last.rules
	s := Stats{Recheck: len(t.recheck), Chains: len(policy.FixedChains(t.last.opt)) + len(r.Chains)}
	for _, k := range kindsOf(r) {
		if k.verdict {
			s.Maps++
		} else {
			s.Sets++
		}
	}
	for _, set := range r.Sets {
		s.Elements += len(set.Members)
	}
	for _, m := range r.Maps {
		s.Elements += len(m.Elements)
	}
	s.Elements += len(r.In) + len(r.Out) + 2*len(t.last.isolated) + len(t.recheck)
	return s
}
