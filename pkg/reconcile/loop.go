package reconcile

import (
	"context"
	"time"
)

// Loop makes one pass after another: at the start, soon after each Wake, and whenever one is due. Make it with NewLoop.
type Loop struct {
	wake chan struct{}
	// Pass makes one. woken is true where Wake asked for it. It returns when the next one is due at the latest.
	Pass func(ctx context.Context, woken bool) time.Duration
	// Settle is how long a burst of events is gathered before a pass that they ask for. took is how long the last pass took.
	Settle func(took time.Duration) time.Duration
}

// NewLoop returns a Loop that Wake may be called for. Its fields are set before Run.
func NewLoop() *Loop { return &Loop{wake: make(chan struct{}, 1)} }

// Wake asks for a pass. It never blocks: one that is asked for already will see everything.
func (l *Loop) Wake() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Run makes passes until ctx ends.
func (l *Loop) Run(ctx context.Context) {
	for woken := false; ctx.Err() == nil; {
		began := time.Now()
		next := l.Pass(ctx, woken)
		took := time.Since(began)
		select {
		case <-ctx.Done():
		case <-time.After(next):
			woken = false
		case <-l.wake:
			woken = true
			Sleep(ctx, l.Settle(took))
			select { // what was asked for meanwhile is seen by the pass that comes now
			case <-l.wake:
			default:
			}
		}
	}
}

// Sleep waits for d, or until ctx ends.
func Sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
