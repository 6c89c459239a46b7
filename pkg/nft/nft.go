// Package nft keeps HeadCNI's nftables: anti-spoofing, the guard that lets no cluster traffic out in clear, and NAT, in
// the tables `ip headcni` and `ip6 headcni`.
//
// docs/architecture.md has the rules' reasons. Only expressions that kernel 4.19 and nft 1.0.1 know are used.
package nft

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/nfcmd"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/internal/procfs"
	"github.com/headcni/headcni/pkg/config/names"
)

// writeTries bounds the repeats of a write that others disturbed.
const writeTries = 3

// Tables keeps our tables as wanted in the network namespace of its callers. The zero value works.
type Tables struct {
	mu  sync.Mutex
	nft nfcmd.NFT
	// sockets tells whether the kernel takes ofSocket, nil before it was asked.
	sockets *bool

	// What was written last, what the kernel listed right after, and the generation at which it still held that.
	text    string
	written observed
	members []netip.Addr
	// ports are those of the last Sync.
	ports []Port

	// Who may reach which subnet, nil before anybody has said so, and how that is written.
	consent map[netip.Prefix][]int
	// The addresses that pods' links send from, nil before anybody has said so.
	sources map[int][]netip.Addr
	conn    nfnl.Conn

	// What was counted in all, by reason, and what each counter of the kernel said last, by family and reason.
	drops, seen map[string]uint64
}

// New returns a Tables that has touched nothing yet.
func New() *Tables { return &Tables{} }

// Sync makes our tables what cfg says, and returns what it changed. It writes nothing where the kernel still
// holds what the last Sync left: any change by hand, of any object in our tables, counts as a difference.
// The first Sync of a process always writes, in one transaction during which no packet goes unfiltered.
func (t *Tables) Sync(ctx context.Context, cfg Config) ([]string, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("make nft rules: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	cfg.noSockets = !t.takesSockets(ctx)
	want := rulesetOf(cfg)
	text := fmt.Sprint(want)
	if text == t.text {
		gen, err := nfnl.Generation()
		if err == nil && gen == t.written.gen && slices.Equal(t.members, cfg.Members) {
			return nil, nil // nobody has changed anything in any table
		}
	}
	first, err := observe()
	if err != nil {
		return nil, nfcmd.Explain(err)
	}
	if text == t.text && first.equal(t.written) {
		t.written.gen = first.gen
		return nil, t.writeMembers(cfg.Members)
	}
	gap := !first.equal(t.written) && (t.written.tables != nil || first.lacksRules())
	t.text = ""
	_ = t.tally() // a table that has to be made anew takes its counters along; they are not worth an unfiltered packet
	before := first
	for range writeTries {
		transactions, err := t.write(ctx, want, before)
		if err != nil {
			return changes(first, before), err
		}
		after, err := observe()
		if err != nil {
			return nil, nfcmd.Explain(err)
		}
		// Were it our transactions alone that made what we see? Else write again: two equal results are as good.
		sure := after.gen == before.gen+transactions || after.equal(t.written)
		t.written, before = after, after
		if sure {
			t.text = text
			break
		}
	}
	endStale(slices.Concat(t.ports, cfg.Ports), cfg, gap) // the new ones too: of those whose pod is gone a process before this may have known
	t.ports = slices.Clone(cfg.Ports)
	// A table that was made anew has lost them.
	_, consentErr := t.writeConsent()
	_, sourcesErr := t.writeSources()
	if errors.Is(sourcesErr, fs.ErrNotExist) {
		sourcesErr = nil // somebody has just taken it away
	}
	return changes(first, before), errors.Join(t.writeMembers(cfg.Members), consentErr, sourcesErr)
}

// takesSockets asks the kernel, and once it has answered no more. One that has no nft_socket, nor a way to load it, gets no rule with it.
func (t *Tables) takesSockets(ctx context.Context) bool {
	if t.sockets == nil && t.nft.Open() == nil {
		err := t.nft.Check(ctx, func(tx *knftables.Transaction) {
			try := table{family: knftables.IPv4Family, chains: []chain{{"try", knftables.FilterType, knftables.InputHook, prioGuard, []string{ofSocket + " accept"}}}}
			try.fill(tx, nil)
		})
		if takes := err == nil; takes || nfcmd.Lacks(err) {
			t.sockets = &takes
		}
	}
	return t.sockets != nil && *t.sockets
}

// write makes the tables hold want, both families at once where that works. It says how many transactions that took.
func (t *Tables) write(ctx context.Context, want []table, have observed) (transactions uint32, err error) {
	if err := t.nft.Open(); err != nil {
		return 0, err
	}
	transactions, err = t.transact(ctx, want, have.tables)
	if err == nil {
		return transactions, nil
	}
	var errs []error
	for _, w := range want {
		now, err := list(w.family) // somebody may have changed it meanwhile
		if err == nil {
			var more uint32
			more, err = t.transact(ctx, []table{w}, map[knftables.Family]listing{w.family: now})
			transactions += more
		}
		if err != nil {
			// Something stands in the way that was not seen, such as a chain of ours on another hook.
			err = t.nft.Write(ctx, w.recreate)
		}
		if err != nil && w.family == knftables.IPv6Family && !procfs.HasIPv6() {
			// A kernel without IPv6 may lack the parts. There is nothing to protect; ADD's gate asks for the table.
			err = t.nft.Write(ctx, func(tx *knftables.Transaction) { tx.Add(w.object()) })
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("write table %s %s: %w", w.family, names.NFTTable, err))
		}
	}
	return transactions, errors.Join(errs...)
}

// transact fills the sets that are not there, makes the tables hold want in one transaction, and then takes away chains that are not ours.
func (t *Tables) transact(ctx context.Context, want []table, have map[knftables.Family]listing) (transactions uint32, err error) {
	held := make([]map[string][]netip.Prefix, len(want))
	for i, w := range want {
		if w.mustRecreate(have[w.family]) {
			continue
		}
		if t.prepare(w, have[w.family]) {
			transactions++
		}
		if held[i], err = w.held(); err != nil {
			return transactions, nfcmd.Explain(err)
		}
	}
	err = t.nft.Write(ctx, func(tx *knftables.Transaction) {
		for i, w := range want {
			w.replace(tx, have[w.family], held[i])
		}
	})
	if err != nil {
		return transactions, err
	}
	transactions++
	// Not before ours stand: a packet that has passed one of these while it was empty must meet the others full.
	gone := false
	for i, w := range want {
		gone = gone || held[i] != nil && len(w.otherChains(have[w.family])) > 0
	}
	if !gone {
		return transactions, nil
	}
	err = t.nft.Write(ctx, func(tx *knftables.Transaction) {
		for i, w := range want {
			if held[i] != nil {
				w.deleteChains(tx, w.otherChains(have[w.family]))
			}
		}
	})
	if err == nil {
		transactions++
	}
	return transactions, err
}

// deleteChains deletes chains that may jump to each other, and that none of ours jumps to.
func (t table) deleteChains(tx *knftables.Transaction, chains []chain) {
	for _, c := range chains {
		tx.Flush(t.chain(c))
	}
	for _, c := range chains {
		tx.Delete(t.chain(c))
	}
}

// replace fills the table, or makes it anew where nothing is held: it has parts that filling cannot put right.
func (t table) replace(tx *knftables.Transaction, have listing, held map[string][]netip.Prefix) {
	if held == nil {
		t.recreate(tx)
		return
	}
	t.fill(tx, held)
	for _, name := range stale(t, have) {
		tx.Delete(t.set(set{name: name}))
	}
}

// recreate takes the whole table away and makes it again.
func (t table) recreate(tx *knftables.Transaction) {
	tx.Add(t.object()) // so that there is one to delete
	tx.Delete(t.object())
	t.fill(tx, nil)
}

// Remove deletes our tables and nothing else. Twice is fine.
func (t *Tables) Remove(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = ""
	have, err := observe()
	if err != nil {
		return nfcmd.Explain(err)
	}
	var errs []error
	for _, f := range families {
		if len(have.tables[f]) == 0 {
			continue
		}
		err := t.nft.Write(ctx, func(tx *knftables.Transaction) {
			table := &knftables.Table{Family: f, Name: names.NFTTable}
			tx.Add(table) // it may have gone: the nft of one who was killed at this place goes on
			tx.Delete(table)
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("delete table %s %s: %w", f, names.NFTTable, err))
		}
	}
	return errors.Join(errs...)
}

// Changes signals soon after anybody, ourselves included, changed our tables. The channel is closed when ctx ends or the
// kernel's events cannot be read any more.
func (t *Tables) Changes(ctx context.Context) (<-chan struct{}, error) {
	ch, err := nfnl.Watch(ctx, relevant)
	if err != nil {
		return nil, fmt.Errorf("subscribe to nf_tables events: %w", nfcmd.Explain(err))
	}
	return ch, nil
}

// relevant looks at an event's table, which is attribute 1 of every kind of object, so that kube-proxy's thousands of
// changes wake nobody.
func relevant(msg int, attrs map[int][]byte) bool {
	return nfnl.Text(attrs[unix.NFTA_RULE_TABLE]) == names.NFTTable && !ofConsent(msg, attrs) && !ofSources(msg, attrs)
}
