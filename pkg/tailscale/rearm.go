package tailscale

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

// Why sessions need help, measured on tailscaled 1.102.5 (docs/reliability.md, docs/adr/0016-first-contact.md). A restarted
// tailscaled has a new disco key. In each of these traps one side waits for a timer of WireGuard:
//
//  1. A peer learns the new key from control only after the restarted node has made a session with it, and throws that
//     session away. The restarted node goes on using it: what it sends is lost for 15 s. A packet from the peer heals.
//  2. The peer's own first packet starts a handshake that the restarted node cannot answer, having no netmap yet: 5 s.
//     A handshake from the restarted node heals.
//  3. Both sides start a handshake at once and refuse each other's answer: 5 s, and again, for as long as both have packets
//     to send, since both clocks began at once. Two nodes whose pods begin to talk at the same moment meet it on first
//     contact and whenever their session has expired, without any restart.
//
// The cure is one TSMP ping, which makes a handshake and passes no packet filter, at the right moment and by one side:
// before pods talk (taskArm), before the session ends (taskKeep), after a restart (taskAnnounce, taskHeal), and where
// nobody has confirmed the session (taskConfirm).
const (
	// rearmTimeout bounds a status and a ping. No retry: nothing that heals starts within 5 s.
	rearmTimeout = 2 * time.Second
	// rearmInterval is the least time between a ping to a peer and the last but one: a node that has pinged a peer may
	// have to heal the session at once, when it hears that the peer has restarted too.
	rearmInterval = 5 * time.Second
	// rearmParallel bounds the pings in flight, rearmGap is between two pings: 500 peers take 5 s where all answer.
	rearmParallel = 32
	rearmGap      = 10 * time.Millisecond
	// statusGap is between two statuses, which cost tailscaled some milliseconds where there are hundreds of peers.
	statusGap = 50 * time.Millisecond
)

// RearmOptions are the parts of Rearm that a caller may set; the zero value works.
type RearmOptions struct {
	// Pinged is called for each ping that is sent.
	Pinged func()
	// Settled is called with true once each peer that is online has a session, or was tried in vain, and with false when that has changed, as
	// when a node joins. It is not settled in the beginning.
	Settled func(bool)
	// Log tells of pings at debug level. nil logs nothing.
	Log *slog.Logger
}

// Rearm sees to it that this node has a WireGuard session with each node that has pods, until ctx ends: it makes one
// before pods use it, renews it before it ends, and heals it after a restart of tailscaled here or there. It never polls:
// where nothing happens and no session ends it sends and asks nothing. It returns ctx's error.
func (c *Client) Rearm(ctx context.Context, o RearmOptions) error {
	r := newRearmer(ctx, c, o)
	defer r.wait()
	mask := notifyInitialState | notifyPeerChanges | notifyPeerPatches | notifyPeerWireGuard
	return c.follow(ctx, mask, r.observe, func(error) { r.forget() })
}

// tailnet is what the rearmer needs of the LocalAPI.
type tailnet interface {
	Status(context.Context) (Status, error)
	// ping sends one TSMP ping; an answer is not needed for the effect.
	ping(ctx context.Context, to netip.Addr) error
}

func (c *Client) ping(ctx context.Context, to netip.Addr) error {
	_, err := c.sendPing(ctx, pingTSMP, to, 0)
	return err
}

// rearmer acts on the decisions of sessions.
type rearmer struct {
	net   tailnet
	opts  RearmOptions
	ctx   context.Context // ends with Rearm
	limit limiter
	wake  chan struct{} // holds a token where there may be something new to do
	wg    sync.WaitGroup

	mu     sync.Mutex
	s      sessions
	last   map[string][2]time.Time // of the last but one and the last ping by peer
	conn   context.Context         // ends with the connection to the bus
	cancel context.CancelFunc
	// pinging are the pings in flight, settled what was told last.
	pinging int
	settled bool
}

func newRearmer(ctx context.Context, net tailnet, o RearmOptions) *rearmer {
	if o.Pinged == nil {
		o.Pinged = func() {}
	}
	if o.Settled == nil {
		o.Settled = func(bool) {}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	r := &rearmer{
		net: net, opts: o, ctx: ctx, limit: limiter{slots: make(chan struct{}, rearmParallel)},
		wake: make(chan struct{}, 1), last: map[string][2]time.Time{},
	}
	r.conn, r.cancel = context.WithCancel(ctx)
	r.wg.Go(r.run)
	return r
}

// wait ends what is under way once ctx has ended.
func (r *rearmer) wait() {
	r.mu.Lock()
	r.cancel()
	r.mu.Unlock()
	r.wg.Wait()
}

// forget drops everything: the bus has ended, and what comes next is another tailscaled. The times of the last pings
// stay, they bound what we send.
func (r *rearmer) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cancel()
	r.conn, r.cancel = context.WithCancel(r.ctx)
	r.s = sessions{}
	r.tell()
	for id, t := range r.last {
		if time.Since(t[1]) > rearmInterval {
			delete(r.last, id)
		}
	}
}

func (r *rearmer) observe(first bool, n notify) {
	r.mu.Lock()
	r.s.observe(first, n, time.Now())
	r.tell()
	r.mu.Unlock()
	r.poke()
}

// run asks for the status when something is due, and for nothing else.
func (r *rearmer) run() {
	var asked time.Time
	for {
		r.mu.Lock()
		next, conn := r.s.next(), r.conn
		r.mu.Unlock()
		var due <-chan time.Time // never, where nothing is planned
		if !next.IsZero() {
			due = time.After(max(time.Until(next), statusGap-time.Since(asked)))
		}
		select {
		case <-r.ctx.Done():
			return
		case <-r.wake:
		case <-due:
			r.look(conn)
			asked = time.Now()
		}
	}
}

// look asks for the status and sends the pings that are due.
func (r *rearmer) look(conn context.Context) {
	ctx, cancel := context.WithTimeout(conn, rearmTimeout)
	defer cancel()
	st, err := r.net.Status(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	if conn.Err() != nil {
		return // the status is of a tailscaled that is gone
	}
	if err != nil {
		r.s.postpone(time.Now().Add(rearmTimeout)) // if tailscaled is gone, the bus will end
		return
	}
	for _, p := range r.s.act(st, time.Now()) {
		r.pinging++
		r.wg.Go(func() {
			r.ping(conn, p)
			r.mu.Lock()
			defer r.mu.Unlock()
			r.pinging--
			r.tell()
		})
	}
	r.tell()
}

// tell says whether sessions are settled where that has changed.
func (r *rearmer) tell() {
	if now := r.pinging == 0 && r.s.settled(); now != r.settled {
		r.settled = now
		r.opts.Settled(now)
	}
}

// ping pings a peer when its turn comes, if it still needs it then.
func (r *rearmer) ping(conn context.Context, p ping) {
	if r.limit.take(conn) != nil {
		return
	}
	defer r.limit.release()
	if !r.claim(conn, p) {
		return
	}
	r.opts.Pinged()
	ctx, cancel := context.WithTimeout(conn, rearmTimeout)
	defer cancel()
	err := r.net.ping(ctx, p.to)
	r.opts.Log.Debug("session re-armed", "node", p.name, "why", p.why, "err", err)
}

// claim reports whether a peer still needs its ping and may have one, and counts it. Where it is too soon it is put off.
func (r *rearmer) claim(conn context.Context, p ping) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if conn.Err() != nil || !r.s.wants(p) {
		return false
	}
	last := r.last[p.id]
	if again := last[0].Add(rearmInterval); time.Until(again) > 0 {
		r.s.putOff(p, again)
		r.poke()
		return false
	}
	r.last[p.id] = [2]time.Time{last[1], time.Now()}
	return true
}

// poke has run look for what is due next.
func (r *rearmer) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// limiter bounds pings, whatever they are for: how many are in flight and how soon one follows another.
type limiter struct {
	slots chan struct{}
	mu    sync.Mutex
	next  time.Time
}

// take waits for a turn. The caller releases it.
func (l *limiter) take(ctx context.Context) error {
	select {
	case l.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	l.mu.Lock()
	wait := max(time.Until(l.next), 0)
	l.next = time.Now().Add(wait + rearmGap)
	l.mu.Unlock()
	select {
	case <-time.After(wait):
		return nil
	case <-ctx.Done():
		l.release()
		return ctx.Err()
	}
}

func (l *limiter) release() { <-l.slots }
