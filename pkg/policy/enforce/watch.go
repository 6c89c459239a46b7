package enforce

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/policy"
)

// settle lets the rest of what somebody does arrive.
const settle = 50 * time.Millisecond

// Changes signals soon after somebody else has written to the table, which makes the next Apply compare all of it, and at once where
// something was applied before and might have been changed since. Our own writes do not signal. The channel is closed when ctx ends or
// the kernel's events cannot be read any more.
func (t *Table) Changes(ctx context.Context) (<-chan struct{}, error) {
	t.mu.Lock()
	t.own.watchers++ // before the first event
	t.mu.Unlock()
	e := &events{wake: make(chan struct{}, 1)}
	end, err := nfnl.Transactions(ctx, policy.Table, e.take)
	if err != nil {
		t.unwatch()
		return nil, fmt.Errorf("watch the policy table: %w", t.explain(err))
	}
	out := make(chan struct{}, 1)
	t.mu.Lock()
	if t.have != nil {
		// Nobody watched since it was applied.
		t.have = nil
		out <- struct{}{}
	}
	t.mu.Unlock()
	go func() {
		defer close(out)
		defer t.unwatch()
		for {
			select {
			case <-end:
				return
			case <-e.wake:
			}
			time.Sleep(settle)
			if !t.foreign(e) {
				continue
			}
			select {
			case out <- struct{}{}:
			default: // one is waiting already
			}
		}
	}()
	return out, nil
}

func (t *Table) unwatch() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.own.watchers--
}

// foreign reports whether any of the transactions that touched our table was somebody else's. It waits for a write of ours to end,
// since only then is known which were ours.
func (t *Table) foreign(e *events) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	touched, last, lost := e.flush()
	if t.own.explains(touched, last) && !lost {
		return false
	}
	t.have = nil
	return true
}

// events gathers which transactions touched our table.
type events struct {
	wake    chan struct{}
	mu      sync.Mutex
	touched []uint32
	last    uint32
	lost    bool
}

func (e *events) take(tx nfnl.Transaction) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.last = tx.Generation
	if !tx.Touched && !tx.Lost {
		return
	}
	e.lost = e.lost || tx.Lost // then anything may have happened
	if tx.Touched {
		e.touched = append(e.touched, tx.Generation)
	}
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

func (e *events) flush() (touched []uint32, last uint32, lost bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	touched, last, lost = e.touched, e.last, e.lost
	e.touched, e.lost = nil, false
	return touched, last, lost
}

// ownWrites knows which transactions were ours: for each write the kernel's number of transactions before and after it. Where others
// wrote meanwhile, to any table, one of several was ours; then more than one that touched our table gives them away.
type ownWrites struct {
	watchers int
	list     []ownWrite
}

type ownWrite struct {
	before, after uint32
	touched       int
}

// maxOwnWrites bounds what is kept for a watcher that does not look.
const maxOwnWrites = 10000

// note has do write, and notes between which transactions.
func (o *ownWrites) note(c *nfnl.Conn, do func() error) error {
	if o.watchers == 0 {
		return do()
	}
	before, err := c.Generation()
	if err != nil {
		return err
	}
	err = do()
	after, genErr := c.Generation()
	if err == nil && genErr == nil && len(o.list) < maxOwnWrites {
		o.list = append(o.list, ownWrite{before: before, after: after})
	}
	return errors.Join(err, genErr)
}

// explains reports whether all of the transactions were ours, and forgets writes up to the last one, of which no more events come.
func (o *ownWrites) explains(touched []uint32, last uint32) bool {
	all := true
	for _, gen := range touched {
		i := slices.IndexFunc(o.list, func(w ownWrite) bool { return w.before < gen && gen <= w.after })
		if i < 0 {
			all = false
			continue
		}
		o.list[i].touched++
		all = all && o.list[i].touched == 1
	}
	o.list = slices.DeleteFunc(o.list, func(w ownWrite) bool { return w.after <= last })
	return all
}
