package membership

import (
	"context"
	"sync"
	"time"

	"github.com/headcni/headcni/pkg/reconcile"
	"github.com/headcni/headcni/pkg/tailscale"
)

// settlePatience bounds the wait for first sessions: a second until peers have heard of a node that joins, as much for a path, and another for a
// machine that does other things. A peer that does not answer is not waited for longer.
const settlePatience = 3 * time.Second

// Rearm keeps WireGuard sessions alive over restarts of tailscaled, here and on peers, and paths over what routers forget. It calls settled
// when somebody waits no longer, see Unsettled.
func (m *Member) Rearm(ctx context.Context, pinged, settled func()) {
	m.follow(ctx, func(ctx context.Context, c *tailscale.Client) error {
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() { _ = c.Mend(ctx, tailscale.MendOptions{Log: m.log}) }) // ctx's error, as of the other
		return c.Rearm(ctx, tailscale.RearmOptions{Log: m.log, Pinged: pinged, Settled: func(now bool) {
			m.mu.Lock()
			m.settled = now
			waited := time.Now().Before(m.settleBy)
			m.mu.Unlock()
			if now && waited { // each ping that keeps a session changes it
				settled()
			}
		}})
	})
}

// Unsettled is for a node on which no pod was started yet, and says to wait until there is a session with each node that is there: a packet that
// comes before a peer has heard of this node is lost, and WireGuard tries again after 5 s. It says so for settlePatience at most.
func (m *Member) Unsettled() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.settled {
		return nil
	}
	if m.settleBy.IsZero() {
		m.settleBy = time.Now().Add(settlePatience)
	}
	if left := time.Until(m.settleBy); left > 0 {
		return reconcile.Soon{Waiting: "makes sessions with the other nodes", In: left}
	}
	return nil
}
