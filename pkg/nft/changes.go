package nft

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/headcni/headcni/pkg/config/names"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// settle gathers the events of one transaction, or of one person's commands, into one signal.
const settle = 50 * time.Millisecond

// Changes signals soon after anybody, ourselves included, changed our tables or the host's FORWARD chain. The channel
// is closed when ctx ends or the kernel's events cannot be read any more. iptables-legacy has no events and is looked at every few seconds.
func (t *Tables) Changes(ctx context.Context) (<-chan struct{}, error) {
	// Ask for permission first: where the library may not bind its socket, it closes the descriptor twice, once at a
	// time when it is somebody else's.
	if _, err := generation(); err != nil {
		return nil, fmt.Errorf("subscribe to nf_tables events: %w", explain(err))
	}
	s, err := nl.Subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	if err != nil {
		return nil, fmt.Errorf("subscribe to nf_tables events: %w", explain(err))
	}
	ctx, cancel := context.WithCancel(ctx)
	out := make(chan struct{}, 1)
	stop := context.AfterFunc(ctx, s.Close)
	var wg sync.WaitGroup
	wg.Go(func() { pollLegacy(ctx, out) })
	wg.Go(func() {
		defer cancel()
		defer stop()
		defer s.Close()
		receive(ctx, s, out)
	})
	go func() {
		wg.Wait()
		close(out)
	}()
	return out, nil
}

// receive signals events of nftables until they cannot be read any more.
func receive(ctx context.Context, s *nl.NetlinkSocket, out chan<- struct{}) {
	for {
		msgs, _, err := s.Receive()
		concerns := errors.Is(err, unix.ENOBUFS) // events were lost: it may have been anything
		if err != nil && !concerns {
			return
		}
		for _, m := range msgs {
			concerns = concerns || concernsUs(m.Header.Type, m.Data)
		}
		if concerns {
			signalLater(ctx, out)
		}
	}
}

// pollLegacy signals changes of the FORWARD chains of iptables-legacy, of which the kernel tells nobody.
func pollLegacy(ctx context.Context, out chan<- struct{}) {
	tick := time.NewTicker(legacyPoll)
	defer tick.Stop()
	last := legacyChains(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if now := legacyChains(ctx); now != last && ctx.Err() == nil {
			last = now
			signalLater(ctx, out)
		}
	}
}

// signalLater lets more events of the same cause arrive in the socket's buffer first.
func signalLater(ctx context.Context, out chan<- struct{}) {
	select {
	case <-time.After(settle):
	case <-ctx.Done():
		return
	}
	select {
	case out <- struct{}{}:
	default: // one is waiting already
	}
}

// concernsUs looks at an event's table, which is attribute 1 of every kind of object, and for the host's filter table at
// the chain, so that kube-proxy's thousands of changes wake nobody. Of others, a new chain in the forward hook may be one
// that drops (ForeignDrops).
func concernsUs(typ uint16, msg []byte) bool {
	if len(msg) < 4 {
		return false
	}
	a, err := attributes(msg[4:])
	if err != nil {
		return true
	}
	switch zstring(a[unix.NFTA_RULE_TABLE]) {
	case names.NFTTable:
		return true
	case filterTable:
		// NFTA_RULE_CHAIN is 2, NFTA_CHAIN_NAME is 3; both as text only where they are what we take them for.
		return zstring(a[unix.NFTA_RULE_CHAIN]) == forwardChain || zstring(a[unix.NFTA_CHAIN_NAME]) == forwardChain
	}
	return typ&0xff == unix.NFT_MSG_NEWCHAIN && inForward(a)
}
