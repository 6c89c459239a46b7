package tailscale

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"time"
)

// Why sessions need re-arming, measured on tailscaled 1.102.5 (docs/reliability.md). A restarted tailscaled has a new
// disco key. Three traps follow, in which one side waits for a timer of WireGuard:
//
//  1. A peer learns the new key from control only after the restarted node has made a session with it, and throws that
//     session away. The restarted node goes on using it: what it sends is lost for 15 s. A packet from the peer heals.
//  2. The peer's own first packet starts a handshake that the restarted node cannot answer, having no netmap yet: 5 s.
//     A handshake from the restarted node heals.
//  3. Both sides start a handshake at once and refuse each other's answer: 5 s. Hence the delay with a random part.
//
// The cure is one TSMP ping, which makes a handshake and passes no packet filter, at the right moment on each side.
const (
	// rearmDelay and rearmJitter: after 150 to 250 ms the session is there, if the other side has started one.
	rearmDelay  = 150 * time.Millisecond
	rearmJitter = 100 * time.Millisecond
	// rearmTimeout bounds the status and the ping of one peer. No retry: nothing that heals starts within 5 s.
	rearmTimeout = 2 * time.Second
	// rearmInterval is the least time between two pings to one peer.
	rearmInterval = 2 * time.Second
	// rearmParallel bounds the pings in flight.
	rearmParallel = 8
	// announceGap is between two announcements.
	announceGap = 10 * time.Millisecond
	// oldSession is the age of a session from which on tailscaled itself cannot be fresh: only the daemon is.
	oldSession = 10 * time.Second
)

// Session states on the bus (ipn.PeerWireGuardState).
const (
	sessionNone        = "none"
	sessionHandshake   = "handshake"
	sessionEstablished = "established"
)

// RearmOptions are the parts of Rearm that a caller may set; the zero value works.
type RearmOptions struct {
	// Pinged is called for each ping that is sent.
	Pinged func()
	// Log tells of pings at debug level. nil logs nothing.
	Log *slog.Logger
}

// Rearm heals WireGuard sessions after a restart of tailscaled on this node or on a peer, until ctx ends. It never
// polls: with nothing restarting it sends nothing. It returns ctx's error.
func (c *Client) Rearm(ctx context.Context, o RearmOptions) error {
	r := newRearmer(ctx, c, o)
	defer r.wait()
	return c.follow(ctx, notifyInitialState|notifyPeerWireGuard, r.observe, func(error) { r.forget() })
}

// tailnet is what the rearmer needs of the LocalAPI.
type tailnet interface {
	Status(context.Context) (Status, error)
	// ping sends one TSMP ping; an answer is not needed for the effect.
	ping(ctx context.Context, to netip.Addr) error
}

func (c *Client) ping(ctx context.Context, to netip.Addr) error {
	q := url.Values{"ip": {to.String()}, "type": {"TSMP"}}
	err := c.call(ctx, "POST", "ping?"+q.Encode(), nil, nil)
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("ping %s: no answer", to)
	case err != nil:
		return fmt.Errorf("ping %s: %w", to, err)
	}
	return nil
}

// sessions is the decision of what to ping, without doing it.
type sessions struct {
	state     map[string]string
	announced bool
}

// observe takes one message and returns the peers that have just lost their session, and whether tailscaled has just
// started, so that this node has to announce itself. first marks the first message of a connection, which holds the
// state of all peers.
func (s *sessions) observe(first bool, n notify, now time.Time) (lost []string, announce bool) {
	if s.state == nil {
		s.state = map[string]string{}
	}
	for id, p := range n.PeerState {
		if s.state[id] == sessionEstablished && p.PeerWireGuardState == sessionNone {
			lost = append(lost, id)
		}
		s.state[id] = p.PeerWireGuardState
		if first && p.PeerWireGuardState == sessionEstablished && now.Sub(p.PeerWireGuardStateAt) > oldSession {
			s.announced = true
		}
		if p.PeerWireGuardState == sessionNone {
			delete(s.state, id) // so that peers that are gone are not kept
		}
	}
	slices.Sort(lost)
	if n.State != nil && *n.State >= stateStarting && !s.announced {
		s.announced, announce = true, true
	}
	return lost, announce
}

// needs reports whether a peer has neither a session nor one in the making.
func (s *sessions) needs(id string) bool {
	return s.state[id] != sessionEstablished && s.state[id] != sessionHandshake
}

// announceTo picks whom a restarted node pings: all that own routes and have no session, in random order so that nodes
// that restart together do not all begin with the same one, those that control sees online first.
func (s *sessions) announceTo(peers []Peer) []Peer {
	var out []Peer
	for _, p := range peers {
		if len(p.Routes) > 0 && len(p.IPs) > 0 && s.needs(p.ID) {
			out = append(out, p)
		}
	}
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	slices.SortStableFunc(out, func(a, b Peer) int {
		switch {
		case a.Online == b.Online:
			return 0
		case a.Online:
			return -1
		}
		return 1
	})
	return out
}

// rearmer acts on the decisions of sessions.
type rearmer struct {
	net    tailnet
	opts   RearmOptions
	slots  chan struct{}
	ctx    context.Context // ends with Rearm
	mu     sync.Mutex
	s      sessions
	last   map[string]time.Time // of the last ping by peer
	conn   context.Context      // ends with the connection to the bus
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func newRearmer(ctx context.Context, net tailnet, o RearmOptions) *rearmer {
	if o.Pinged == nil {
		o.Pinged = func() {}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	r := &rearmer{net: net, opts: o, slots: make(chan struct{}, rearmParallel), ctx: ctx, last: map[string]time.Time{}}
	r.conn, r.cancel = context.WithCancel(ctx)
	return r
}

// forget drops everything: the bus has ended, and what comes next is another tailscaled. The times of the last pings
// stay, they bound what we send.
func (r *rearmer) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cancel()
	r.conn, r.cancel = context.WithCancel(r.ctx)
	r.s = sessions{}
	for id, t := range r.last {
		if time.Since(t) > rearmInterval {
			delete(r.last, id)
		}
	}
}

func (r *rearmer) wait() {
	r.mu.Lock()
	r.cancel()
	r.mu.Unlock()
	r.wg.Wait()
}

func (r *rearmer) observe(first bool, n notify) {
	r.mu.Lock()
	defer r.mu.Unlock()
	lost, announce := r.s.observe(first, n, time.Now())
	for _, id := range lost {
		r.later(func(ctx context.Context) { r.heal(ctx, id) })
	}
	if announce {
		r.later(r.announce)
	}
}

// later runs fn after the delay unless the connection ends before.
func (r *rearmer) later(fn func(context.Context)) {
	ctx := r.conn
	r.wg.Go(func() {
		select {
		case <-time.After(rearmDelay + rand.N(rearmJitter)):
			fn(ctx)
		case <-ctx.Done():
		}
	})
}

// heal pings a peer that has forgotten its session, unless there is a new one by now or too much is going on.
func (r *rearmer) heal(ctx context.Context, id string) {
	if !r.due(id) {
		return
	}
	select {
	case r.slots <- struct{}{}:
	default:
		return
	}
	defer func() { <-r.slots }()
	ctx, cancel := context.WithTimeout(ctx, rearmTimeout)
	defer cancel()
	st, err := r.net.Status(ctx)
	if err != nil {
		return // tailscaled is gone, and with it what there was to heal
	}
	p, ok := st.PeerByID(id)
	if ok && len(p.IPs) > 0 {
		r.ping(ctx, p, "peer restarted")
	}
}

// announce pings the peers that this node's fresh tailscaled has no session with.
func (r *rearmer) announce(ctx context.Context) {
	stCtx, cancel := context.WithTimeout(ctx, rearmTimeout)
	st, err := r.net.Status(stCtx)
	cancel()
	if err != nil {
		return // as in heal
	}
	r.mu.Lock()
	peers := r.s.announceTo(st.Peers)
	r.mu.Unlock()
	for _, p := range peers {
		select {
		case r.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		r.wg.Go(func() {
			defer func() { <-r.slots }()
			ctx, cancel := context.WithTimeout(ctx, rearmTimeout)
			defer cancel()
			r.ping(ctx, p, "tailscaled started")
		})
		select {
		case <-time.After(announceGap):
		case <-ctx.Done():
			return
		}
	}
}

// due reports whether a peer still needs a ping and may have one.
func (r *rearmer) due(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.s.needs(id) && time.Since(r.last[id]) >= rearmInterval
}

// claim is due, and counts as the ping.
func (r *rearmer) claim(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.s.needs(id) || time.Since(r.last[id]) < rearmInterval {
		return false
	}
	r.last[id] = time.Now()
	return true
}

// ping pings a peer if it still needs it.
func (r *rearmer) ping(ctx context.Context, p Peer, why string) {
	if !r.claim(p.ID) {
		return
	}
	r.opts.Pinged()
	err := r.net.ping(ctx, p.IPs[0])
	r.opts.Log.Debug("session re-armed", "node", p.Name, "why", why, "err", err)
}
