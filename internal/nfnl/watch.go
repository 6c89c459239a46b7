package nfnl

import (
	"context"
	"errors"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// debounce gathers the events of one transaction, or of one person's commands, into one signal.
const debounce = 50 * time.Millisecond

// Watch signals soon after anybody, ourselves included, changed an object that relevant accepts. msg is unix.NFT_MSG_*. The
// channel is closed when ctx ends or the kernel's events cannot be read any more.
func Watch(ctx context.Context, relevant func(msg int, attrs map[int][]byte) bool) (<-chan struct{}, error) {
	// Ask for permission first: where the library may not bind its socket, it closes the descriptor twice, once at a
	// time when it is somebody else's.
	if _, err := Generation(); err != nil {
		return nil, err
	}
	s, err := nl.Subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	if err != nil {
		return nil, err
	}
	out := make(chan struct{}, 1)
	stop := context.AfterFunc(ctx, s.Close)
	go func() {
		defer close(out)
		defer stop()
		defer s.Close()
		receive(ctx, s, relevant, out)
	}()
	return out, nil
}

// receive signals events until they cannot be read any more.
func receive(ctx context.Context, s *nl.NetlinkSocket, relevant func(msg int, attrs map[int][]byte) bool, out chan<- struct{}) {
	for {
		msgs, _, err := s.Receive()
		wanted := errors.Is(err, unix.ENOBUFS) // events were lost: it may have been anything
		if err != nil && !wanted {
			return
		}
		for _, m := range msgs {
			wanted = wanted || isRelevant(m.Header.Type, m.Data, relevant)
		}
		if wanted {
			signalLater(ctx, out)
		}
	}
}

// isRelevant counts what cannot be read as relevant.
func isRelevant(typ uint16, msg []byte, relevant func(msg int, attrs map[int][]byte) bool) bool {
	if len(msg) < headerLen {
		return false
	}
	attrs, err := Attributes(msg[headerLen:])
	return err != nil || relevant(int(typ&0xff), attrs)
}

// signalLater lets more events of the same cause arrive in the socket's buffer first.
func signalLater(ctx context.Context, out chan<- struct{}) {
	select {
	case <-time.After(debounce):
	case <-ctx.Done():
		return
	}
	select {
	case out <- struct{}{}:
	default: // one is waiting already
	}
}
