package nfnl

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nlwatch"
)

// Watch signals soon after anybody, ourselves included, changed an object that relevant accepts. msg is unix.NFT_MSG_*. The
// channel is closed when ctx ends or the kernel's events cannot be read any more.
func Watch(ctx context.Context, relevant func(msg int, attrs map[int][]byte) bool) (<-chan struct{}, error) {
	// Ask for permission first: where the library may not bind its socket, it closes the descriptor twice, once at a
	// time when it is somebody else's.
	if _, err := Generation(); err != nil {
		return nil, err
	}
	return nlwatch.Watch(ctx, unix.NETLINK_NETFILTER, nlwatch.Debounce, func(typ uint16, msg []byte) bool {
		return isRelevant(typ, msg, relevant)
	}, unix.NFNLGRP_NFTABLES)
}

// isRelevant counts what cannot be read as relevant.
func isRelevant(typ uint16, msg []byte, relevant func(msg int, attrs map[int][]byte) bool) bool {
	if len(msg) < headerLen {
		return false
	}
	attrs, err := Attributes(msg[headerLen:])
	return err != nil || relevant(int(typ&0xff), attrs)
}
