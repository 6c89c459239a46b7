// Package nlwatch signals that something changed, by netlink's multicast groups.
package nlwatch

import (
	"context"
	"errors"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Debounce gathers the events of one cause (a link that goes takes its routes along; a transaction; a person's commands) into one
// signal.
const Debounce = 50 * time.Millisecond

// Watch signals, wait after the first of some messages, that there were such as are relevant. protocol is unix.NETLINK_*. The
// channel is closed when ctx ends or the kernel's events cannot be read any more.
func Watch(
	ctx context.Context, protocol int, wait time.Duration, relevant func(typ uint16, msg []byte) bool, groups ...uint,
) (<-chan struct{}, error) {
	s, err := nl.Subscribe(protocol, groups...)
	if err != nil {
		return nil, err
	}
	out := make(chan struct{}, 1)
	stop := context.AfterFunc(ctx, s.Close)
	go func() {
		defer close(out)
		defer stop()
		defer s.Close()
		for {
			wanted, err := receive(s, relevant)
			if err != nil {
				return
			}
			if wanted {
				signalLater(ctx, wait, out)
			}
		}
	}()
	return out, nil
}

// receive waits for messages, and reports whether any of them is relevant.
func receive(s *nl.NetlinkSocket, relevant func(typ uint16, msg []byte) bool) (bool, error) {
	msgs, _, err := s.Receive()
	if errors.Is(err, unix.ENOBUFS) {
		return true, nil // events were lost: it may have been anything
	}
	if err != nil {
		return false, err
	}
	for _, m := range msgs {
		if relevant(m.Header.Type, m.Data) {
			return true, nil
		}
	}
	return false, nil
}

// signalLater lets more events of the same cause arrive in the socket's buffer first.
func signalLater(ctx context.Context, wait time.Duration, out chan<- struct{}) {
	select {
	case <-time.After(wait):
	case <-ctx.Done():
		return
	}
	select {
	case out <- struct{}{}:
	default: // one is waiting already
	}
}
