// Package nft keeps HeadCNI's nftables: anti-spoofing, the guard that lets no cluster traffic out in clear, and NAT, in
// the tables `ip headcni` and `ip6 headcni`; and our accepts in a host's FORWARD chain that drops.
//
// docs/architecture.md has the rules' reasons. Only expressions that kernel 4.19 and nft 1.0.1 know are used.
package nft

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/headcni/headcni/pkg/config/names"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"
)

const (
	// execTimeout bounds one run of nft or iptables: milliseconds, but seconds where another program has huge tables.
	execTimeout = 30 * time.Second
	// writeTries bounds the repeats of a write that others disturbed.
	writeTries = 3
)

// Tables keeps our tables as wanted in the network namespace of its callers. The zero value works.
type Tables struct {
	mu  sync.Mutex
	nft knftables.Interface // nil until the nft program was found and may be used

	// What was written last, what the kernel listed right after, and the generation at which it still held that.
	text    string
	written observed

	// The generation and configuration at which the accepts were last found right.
	acceptGen uint32
	acceptTun string
	acceptOK  bool

	// What was last found to drop, and at which generation.
	drops    []string
	dropsGen uint32
	dropsOK  bool
}

// New returns a Tables that has touched nothing yet.
func New() *Tables { return &Tables{} }

// Sync makes our tables and accepts what cfg says, and returns what it changed. It writes nothing where the kernel still
// holds what the last Sync left: any change by hand, of any object in our tables, counts as a difference.
// The first Sync of a process always writes, in one transaction during which no packet goes unfiltered.
func (t *Tables) Sync(ctx context.Context, cfg Config) ([]string, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("make nft rules: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	done, err := t.syncTables(ctx, rulesetOf(cfg))
	more, err2 := t.syncAccepts(ctx, acceptRules(cfg.TunName))
	return append(done, more...), errors.Join(err, err2)
}

func (t *Tables) syncTables(ctx context.Context, want []table) ([]string, error) {
	text := fmt.Sprint(want)
	if text == t.text {
		gen, err := generation()
		if err == nil && gen == t.written.gen {
			return nil, nil // nobody has changed anything in any table
		}
	}
	first, err := observe()
	if err != nil {
		return nil, explain(err)
	}
	if text == t.text && first.equal(t.written) {
		t.written.gen = first.gen
		return nil, nil
	}
	t.text = ""
	before := first
	for range writeTries {
		if err := t.write(ctx, want, before); err != nil {
			return changes(first, before), err
		}
		after, err := observe()
		if err != nil {
			return nil, explain(err)
		}
		// Was it our transaction alone that made what we see? Else write again: two equal results are as good.
		sure := after.gen == before.gen+1 || after.equal(t.written)
		t.written, before = after, after
		if sure {
			t.text = text
			break
		}
	}
	return changes(first, before), nil
}

// write makes the tables hold want, in one transaction for both families where that works.
func (t *Tables) write(ctx context.Context, want []table, have observed) error {
	if err := t.open(); err != nil {
		return err
	}
	tx := t.nft.NewTransaction()
	for _, w := range want {
		w.replace(tx, have.tables[w.family])
	}
	if t.run(ctx, tx) == nil {
		return nil
	}
	var errs []error
	for _, w := range want {
		tx := t.nft.NewTransaction()
		w.replace(tx, have.tables[w.family])
		err := t.run(ctx, tx)
		if err != nil {
			// Something stands in the way that was not seen, such as a chain of ours on another hook.
			tx = t.nft.NewTransaction()
			w.recreate(tx)
			err = t.run(ctx, tx)
		}
		if err != nil && w.family == knftables.IPv6Family && !hasIPv6() {
			// A kernel without IPv6 may lack the parts. There is nothing to protect; ADD's gate asks for the table.
			tx = t.nft.NewTransaction()
			tx.Add(w.object())
			err = t.run(ctx, tx)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("write table %s %s: %w", w.family, names.NFTTable, err))
		}
	}
	return errors.Join(errs...)
}

// replace fills the table, or makes it anew where it has foreign parts.
func (t table) replace(tx *knftables.Transaction, have listing) {
	if t.foreign(have) {
		t.recreate(tx)
		return
	}
	t.fill(tx)
}

// recreate takes the whole table away and makes it again.
func (t table) recreate(tx *knftables.Transaction) {
	tx.Add(t.object()) // so that there is one to delete
	tx.Delete(t.object())
	t.fill(tx)
}

// Remove deletes our tables and accepts and nothing else. Twice is fine.
func (t *Tables) Remove(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text, t.acceptOK = "", false
	have, err := observe()
	if err != nil {
		return explain(err)
	}
	var errs []error
	for _, f := range families {
		if len(have.tables[f]) == 0 {
			continue
		}
		err := t.open()
		if err == nil {
			tx := t.nft.NewTransaction()
			table := &knftables.Table{Family: f, Name: names.NFTTable}
			tx.Add(table) // it may have gone: the nft of one who was killed at this place goes on
			tx.Delete(table)
			err = t.run(ctx, tx)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("delete table %s %s: %w", f, names.NFTTable, err))
		}
	}
	_, err = t.syncAccepts(ctx, nil)
	return errors.Join(append(errs, err)...)
}

// open finds the nft program. It is looked for again at each need, since an admin may install it in the meantime.
func (t *Tables) open() error {
	if t.nft != nil {
		return nil
	}
	n, err := knftables.New("", "", knftables.NoObjectCommentEmulation)
	if err != nil {
		return explain(err)
	}
	t.nft = n
	return nil
}

func (t *Tables) run(ctx context.Context, tx *knftables.Transaction) error {
	ctx, cancel := context.WithTimeout(ctx, execTimeout)
	defer cancel()
	if err := t.nft.Run(ctx, tx); err != nil {
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
			t.nft = nil // it went away
		}
		return explain(err)
	}
	return nil
}

// explain makes one line of an error of nft and says what to do about it.
func explain(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	has := func(s string) bool { return strings.Contains(text, s) }
	switch {
	case errors.Is(err, exec.ErrNotFound), has("executable file not found"):
		return fmt.Errorf("the program nft is missing (%w): install the package nftables, version 1.0.1 or later", oneLine{err})
	case errors.Is(err, unix.EPERM), has("Operation not permitted"):
		return fmt.Errorf("%w: run as root or with CAP_NET_ADMIN", oneLine{err})
	case errors.Is(err, unix.EPROTONOSUPPORT):
		return fmt.Errorf("%w: this kernel has no nf_tables: load the module nf_tables", oneLine{err})
	case has("must be v1.0.1 or later"):
		return fmt.Errorf("%w: upgrade the package nftables", oneLine{err})
	case has("Operation not supported"), has("Could not process rule: No such file or directory"):
		return fmt.Errorf("%w: the kernel may lack a part: load the modules nf_tables, nft_fib_ipv4, nft_fib_ipv6, "+
			"nft_chain_nat, nft_masq and nft_nat", oneLine{err})
	}
	return oneLine{err}
}

// oneLine prints an error's lines as one, without nft's underlining.
type oneLine struct{ error }

func (e oneLine) Unwrap() error { return e.error }

func (e oneLine) Error() string {
	var parts []string
	for l := range strings.Lines(e.error.Error()) {
		if l = strings.TrimSpace(l); strings.Trim(l, "^~ ") != "" {
			parts = append(parts, l)
		}
		if len(parts) == 2 { // what is wrong, and with which command: more of them say the same
			break
		}
	}
	return strings.Join(parts, ": ")
}

// hasIPv6 is false on a host that was started with ipv6.disable=1 or has no IPv6 in its kernel.
func hasIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}
