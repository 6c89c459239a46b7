package nfnl

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// eventBuffer holds the events of a transaction of some ten thousand elements. Only what is unread takes memory.
const eventBuffer = 32 << 20

// Transaction is one of anybody's.
type Transaction struct {
	// Generation is what Generation returned right after it.
	Generation uint32
	// Touched: it changed something in the table that was asked about.
	Touched bool
	// Lost: events of it or of others before were lost.
	Lost bool
}

// Transactions calls do after each transaction that anybody makes from now on, and says of each whether it touched a table of that
// name. The channel is closed when ctx ends or the kernel's events cannot be read any more.
func Transactions(ctx context.Context, table string, do func(Transaction)) (<-chan struct{}, error) {
	// Ask for permission first: where the library may not bind its socket, it closes the descriptor twice, once at a
	// time when it is somebody else's.
	gen, err := Generation()
	if err != nil {
		return nil, err
	}
	s, err := nl.Subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	if err != nil {
		return nil, fmt.Errorf("subscribe to nf_tables events: %w", err)
	}
	_ = s.SetReceiveBufferSize(eventBuffer, true) // whoever may not has what there is
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, s.Close)
	go func() {
		defer close(done)
		defer stop()
		defer s.Close()
		r := transactions{table: table, last: gen}
		for {
			msgs, _, err := s.Receive()
			if errors.Is(err, unix.ENOBUFS) {
				r.next.Lost = true
				do(Transaction{Generation: r.last, Lost: true}) // there may be none to come
				continue
			}
			if err != nil {
				return
			}
			for _, m := range msgs {
				if t, ends := r.take(int(m.Header.Type&0xff), m.Data); ends {
					do(t)
				}
			}
		}
	}()
	return done, nil
}

// transactions gathers messages, of which the last of each transaction has its number: one more than the transaction's before.
type transactions struct {
	table string
	last  uint32
	next  Transaction
}

func (r *transactions) take(msg int, b []byte) (t Transaction, ends bool) {
	if len(b) < headerLen {
		r.next.Lost = true
		return Transaction{}, false
	}
	b = b[headerLen:]
	if msg != unix.NFT_MSG_NEWGEN {
		// The table's name is attribute 1 of every kind of object.
		r.next.Touched = r.next.Touched || Text(Get(b, unix.NFTA_TABLE_NAME)) == r.table
		return Transaction{}, false
	}
	t, r.next = r.next, Transaction{}
	if id := Get(b, unix.NFTA_GEN_ID); len(id) == 4 {
		t.Generation = binary.BigEndian.Uint32(id)
	}
	t.Lost = t.Lost || t.Generation > r.last+1
	r.last = t.Generation
	return t, true
}
