// Package hostfirewall deals with the firewall that the host has beside our tables: it keeps our accepts in a FORWARD chain that
// drops, by whichever iptables the host has, and finds what other programs' tables drop.
package hostfirewall

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/nfcmd"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/config/names"
)

// Firewall is that of the network namespace of its callers. The zero value works.
type Firewall struct {
	mu  sync.Mutex
	nft nfcmd.NFT

	// The generation and the accepts at which these were last found right.
	acceptGen uint32
	accepts   string
	acceptOK  bool

	// What was last found to drop, and at which generation.
	drops    []string
	dropsGen uint32
	dropsOK  bool
}

// Config is what the accepts are made from.
type Config struct {
	// TunName is tailscaled's interface, "" while it is not known.
	TunName string
}

// family is an address family of nf_tables.
type family struct {
	name   knftables.Family
	number uint8
}

// families are those that have a FORWARD chain of iptables.
var families = []family{{knftables.IPv4Family, unix.NFPROTO_IPV4}, {knftables.IPv6Family, unix.NFPROTO_IPV6}}

// New returns a Firewall that has touched nothing yet.
func New() *Firewall { return &Firewall{} }

// Sync puts accepts for pods' links and the tun at the head of each FORWARD chain that may drop, takes what is not needed out,
// and returns what it changed. It goes on past errors.
func (f *Firewall) Sync(ctx context.Context, cfg Config) ([]string, error) {
	if err := names.CheckTun(cfg.TunName); err != nil {
		return nil, fmt.Errorf("make accepts: %w", err)
	}
	return f.sync(ctx, acceptRules(cfg.TunName))
}

// Remove takes our accepts out of all chains. Twice is fine.
func (f *Firewall) Remove(ctx context.Context) error {
	_, err := f.sync(ctx, nil)
	return err
}

// sync puts want into each FORWARD chain that may drop; a nil want takes ours out of all.
func (f *Firewall) sync(ctx context.Context, want []accept) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	done, err := syncLegacy(ctx, want)
	errs := []error{err}
	gen, err := nfnl.Generation()
	if err != nil {
		return done, errors.Join(append(errs, nfcmd.Explain(err))...)
	}
	key := fmt.Sprint(want)
	if f.acceptOK && f.acceptGen == gen && f.accepts == key {
		return done, errors.Join(errs...)
	}
	ok := true
	for _, fam := range families {
		more, err := f.syncForward(ctx, fam, want)
		done = append(done, more...)
		if err != nil {
			errs = append(errs, fmt.Errorf("keep accepts in chain %s %s %s: %w", fam.name, filterTable, forwardChain, err))
		}
		// After a change, look again next time before trusting the generation.
		ok = ok && err == nil && len(more) == 0
	}
	f.acceptOK, f.acceptGen, f.accepts = ok, gen, key
	return done, errors.Join(errs...)
}

// Changes signals soon after anybody, ourselves included, changed the host's FORWARD chain, or made a chain that may drop. The
// channel is closed when ctx ends or the kernel's events cannot be read any more. iptables-legacy has no events and is looked at
// every few seconds.
func (f *Firewall) Changes(ctx context.Context) (<-chan struct{}, error) {
	ctx, cancel := context.WithCancel(ctx)
	events, err := nfnl.Watch(ctx, relevant)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("subscribe to nf_tables events: %w", nfcmd.Explain(err))
	}
	out := make(chan struct{}, 1)
	var wg sync.WaitGroup
	wg.Go(func() { pollLegacy(ctx, out) })
	wg.Go(func() {
		defer cancel()
		for range events {
			signal(out)
		}
	})
	go func() {
		wg.Wait()
		close(out)
	}()
	return out, nil
}

func signal(out chan<- struct{}) {
	select {
	case out <- struct{}{}:
	default: // one is waiting already
	}
}

// relevant looks at an event's table, which is attribute 1 of every kind of object, and for the host's filter table at the
// chain, so that kube-proxy's thousands of changes wake nobody. Of others, a new chain in the forward hook may be one that
// drops (ForeignDrops).
func relevant(msg int, attrs map[int][]byte) bool {
	switch nfnl.Text(attrs[unix.NFTA_RULE_TABLE]) {
	case names.NFTTable:
		return false // nft.Tables'
	case filterTable:
		// NFTA_RULE_CHAIN is 2, NFTA_CHAIN_NAME is 3; both as text only where they are what we take them for.
		return nfnl.Text(attrs[unix.NFTA_RULE_CHAIN]) == forwardChain || nfnl.Text(attrs[unix.NFTA_CHAIN_NAME]) == forwardChain
	}
	return msg == unix.NFT_MSG_NEWCHAIN && hooksForward(attrs)
}
