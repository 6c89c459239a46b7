package tailscale

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"
)

// simNet is a tailnet as far as this package sees one: nodes that learn of each other from Headscale, WireGuard's handshakes
// with their times and refusals (device/noise-protocol.go, send.go, timers.go), and what a new disco key does to sessions
// (docs/reliability.md). One lock is for all of it.
type simNet struct {
	mu      sync.Mutex
	ctx     context.Context
	oneWay  time.Duration
	nodes   []*simNode
	crossed int // answers that were refused because both sides had begun a handshake
	pings   int
	keys    int // handshakes so far
}

type simNode struct {
	net    *simNet
	peer   Peer
	seen   map[*simNode]*simSession // the network map
	r      *rearmer                 // nil: no daemon
	cfg    simOptions
	up     bool
	starts int // the disco key, too
	// settled is when the rearmer said so last, zero where it said that there is something to do.
	settled time.Time
}

// simSession is one end of a session. Keys are numbered by their handshake; 0 is none.
type simSession struct {
	state               string
	lastSent            time.Time // of the last message of a handshake
	outstanding         int       // the own initiation that has no answer yet
	initiator           bool
	current, next, last int
	derived, confirmed  time.Time // of the current keys
	unanswered          time.Time // since when nothing has come back for what was sent
	arrived             time.Time // of the last data
	disco               int       // the other's key, as far as known
	bytes               int64
	expiry              *time.Timer
}

func (s *simSession) accepts(key int) bool {
	return key != 0 && (key == s.current || key == s.next || key == s.last)
}

type simOptions struct {
	// blind has a node take itself for the lower one of every pair, as if there were no order.
	blind bool
	// noDaemon leaves the node without a rearmer.
	noDaemon bool
	routes   bool
}

func newSimNet(t *testing.T, oneWay time.Duration) (*simNet, func()) {
	ctx, cancel := context.WithCancel(t.Context())
	n := &simNet{ctx: ctx, oneWay: oneWay}
	return n, func() {
		cancel()
		for _, node := range n.nodes {
			if node.r != nil {
				node.r.wait()
			}
			for _, s := range node.seen {
				s.expiry.Stop()
			}
		}
	}
}

// pinged is how many pings there were, refused how many handshakes were.
func (n *simNet) pinged() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pings
}

func (n *simNet) refused() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.crossed
}

func (n *simNet) add(o simOptions) *simNode {
	i := len(n.nodes)
	node := &simNode{net: n, cfg: o, up: true, starts: 1, seen: map[*simNode]*simSession{}, peer: Peer{
		ID: fmt.Sprintf("n%d", i), Name: fmt.Sprintf("n%d", i), NodeKey: "nodekey:0", Online: true, IPs: []netip.Addr{peerAddr(i)}, Tags: []string{"tag:t"},
	}}
	if o.routes {
		node.peer.Routes = prefixes(fmt.Sprintf("10.%d.%d.0/24", i/256, i%256))
	}
	n.nodes = append(n.nodes, node)
	return node
}

// start starts the node's daemon: in a tailscaled that has to log in, or in one that has been up for long.
func (a *simNode) start(login bool) {
	if a.cfg.noDaemon {
		return
	}
	a.r = newRearmer(a.net.ctx, a, RearmOptions{Pinged: func() { a.net.mu.Lock(); a.net.pings++; a.net.mu.Unlock() }, Settled: a.settles})
	if login {
		a.r.observe(true, state(stateNeedsLogin))
		a.r.observe(false, state(stateRunning))
		return
	}
	first := sessionsAre(time.Hour, "somebody", sessionEstablished)
	first.State = state(stateRunning).State
	a.r.observe(true, first)
}

func (a *simNode) settles(now bool) {
	a.net.mu.Lock()
	defer a.net.mu.Unlock()
	if a.settled = (time.Time{}); now {
		a.settled = time.Now()
	}
}

// settledWith waits until a node takes its sessions for settled, and says how long after that with another node was made, or before.
func (a *simNode) settledWith(b *simNode) time.Duration {
	for since := time.Now(); time.Since(since) < time.Minute; time.Sleep(time.Millisecond) {
		a.net.mu.Lock()
		at, made := a.settled, a.seen[b].derived
		a.net.mu.Unlock()
		if !at.IsZero() {
			return at.Sub(made)
		}
	}
	return time.Hour
}

// learn tells a node of peers.
func (a *simNode) learn(peers ...*simNode) {
	a.net.mu.Lock()
	for _, b := range peers {
		if a != b && a.seen[b] == nil {
			s := &simSession{state: sessionNone, disco: b.starts}
			s.expiry = time.AfterFunc(time.Hour, func() { a.expired(b) })
			s.expiry.Stop()
			a.seen[b] = s
		}
	}
	a.net.mu.Unlock()
	a.tell(notify{PeersChanged: true})
}

// restart ends a node's tailscaled and starts another, which has its network map after a while. Headscale tells the others of
// its new disco key within its batch, and they drop their sessions then, unless a ping has told them before.
func (a *simNode) restart(took time.Duration) {
	n := a.net
	n.mu.Lock()
	a.up = false
	for b := range a.seen {
		a.drop(b)
	}
	n.mu.Unlock()
	a.r.forget()
	time.AfterFunc(took, func() {
		n.mu.Lock()
		a.starts++
		key := a.starts
		for b, s := range a.seen {
			s.disco = b.starts
			time.AfterFunc(n.oneWay+randomly(500*time.Millisecond), func() { b.rekeyed(a, key) })
		}
		n.mu.Unlock()
		time.AfterFunc(n.oneWay+randomly(50*time.Millisecond), func() {
			n.mu.Lock()
			a.up = true
			n.mu.Unlock()
			a.r.observe(true, state(stateStarting))
		})
	})
}

// rekeyed tells a node of a peer's new disco key.
func (a *simNode) rekeyed(b *simNode, key int) {
	a.net.mu.Lock()
	s := a.seen[b]
	if a.up && s.disco != key {
		s.disco = key
		a.drop(b)
	}
	a.net.mu.Unlock()
	a.tell(notify{PeersChanged: true})
}

// drop has a node forget a session. With the lock held.
func (a *simNode) drop(b *simNode) {
	s := a.seen[b]
	s.expiry.Stop()
	a.enter(b, sessionNone)
	*s = simSession{state: sessionNone, disco: s.disco, expiry: s.expiry, arrived: s.arrived}
}

func (a *simNode) tell(n notify) {
	if a.r != nil && a.net.ctx.Err() == nil {
		a.r.observe(false, n)
	}
}

// Status implements tailnet.
func (a *simNode) Status(context.Context) (Status, error) {
	a.net.mu.Lock()
	defer a.net.mu.Unlock()
	if !a.up {
		return Status{}, errors.New("tailscaled is down")
	}
	st := Status{State: Running, Self: a.peer}
	if a.cfg.blind {
		st.Self.IPs = []netip.Addr{lowSelf}
	}
	for b, s := range a.seen {
		p := b.peer
		p.Handshake, p.Bytes = s.confirmed, s.bytes
		st.Peers = append(st.Peers, p)
	}
	return st, nil
}

// ping implements tailnet.
func (a *simNode) ping(ctx context.Context, to netip.Addr) error {
	b := a.net.nodes[slices.IndexFunc(a.net.nodes, func(x *simNode) bool { return x.peer.IPs[0] == to })]
	for !a.send(b, false) { // the packet waits for the session
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

// usable reports whether what a sends to b is taken.
func (a *simNode) usable(b *simNode) bool {
	a.net.mu.Lock()
	defer a.net.mu.Unlock()
	s, o := a.seen[b], b.seen[a]
	return s != nil && o != nil && b.up && o.accepts(s.current)
}

// send sends a packet, a ping or data, or begins the handshake that it takes. It reports whether it was sent.
func (a *simNode) send(b *simNode, data bool) bool {
	a.net.mu.Lock()
	defer a.net.mu.Unlock()
	s := a.seen[b]
	if !a.up || s == nil {
		return false
	}
	if s.current == 0 {
		a.initiate(b)
		return false
	}
	s.bytes += 100
	if old := time.Since(s.derived) > renewable; old && s.initiator {
		a.initiate(b)
	} else if old { // its answer is the packet that has the initiator renew the keys
		a.later(func() { b.initiate(a) })
	}
	if s.unanswered.IsZero() {
		s.unanswered = time.Now()
	} else if time.Since(s.unanswered) > 15*time.Second {
		a.initiate(b)
	}
	key, disco := s.current, a.starts
	a.later(func() {
		if b.take(a, key) && data {
			b.seen[a].arrived = time.Now()
		} else if b.up && b.seen[a].accepts(key) {
			b.seen[a].disco = disco // a ping tells it, and is answered
			b.later(func() { a.take(b, key) })
		}
	})
	return true
}

// take takes a packet, whose keys it confirms. With the lock held.
func (a *simNode) take(b *simNode, key int) bool {
	s := a.seen[b]
	if !a.up || s == nil || !s.accepts(key) {
		return false
	}
	s.unanswered = time.Time{}
	if key == s.next {
		a.confirm(b, key)
	}
	return true
}

// later runs fn after one way, with the lock held, unless the net has ended.
func (a *simNode) later(fn func()) {
	time.AfterFunc(a.net.oneWay, func() {
		a.net.mu.Lock()
		defer a.net.mu.Unlock()
		if a.net.ctx.Err() == nil {
			fn()
		}
	})
}

// initiate begins a handshake, if it may. With the lock held.
func (a *simNode) initiate(b *simNode) {
	s := a.seen[b]
	if !a.up || time.Since(s.lastSent) < 5*time.Second {
		return
	}
	a.net.keys++
	key := a.net.keys
	s.lastSent, s.outstanding = time.Now(), key
	if s.state != sessionEstablished {
		a.enter(b, sessionHandshake)
	}
	a.later(func() { b.answer(a, key) })
	time.AfterFunc(5*time.Second+rand.N(334*time.Millisecond), func() {
		a.net.mu.Lock()
		defer a.net.mu.Unlock()
		if s.outstanding == key && a.net.ctx.Err() == nil {
			a.initiate(b)
		}
	})
}

// answer takes an initiation, which overwrites the own one. With the lock held.
func (a *simNode) answer(b *simNode, key int) {
	s := a.seen[b]
	if !a.up || s == nil {
		return // who is that?
	}
	s.lastSent, s.outstanding, s.initiator, s.next = time.Now(), 0, false, key
	a.derive(b)
	a.later(func() { b.complete(a, key) })
}

// complete takes the answer to an initiation. With the lock held.
func (a *simNode) complete(b *simNode, key int) {
	s := a.seen[b]
	if s.outstanding != key {
		if a.up && s.next != 0 {
			a.net.crossed++
		}
		return
	}
	s.outstanding, s.initiator = 0, true
	a.derive(b)
	a.confirm(b, key)
	a.later(func() { b.take(a, key) })
}

// derive has new keys made, which nobody has confirmed yet. With the lock held.
func (a *simNode) derive(b *simNode) {
	s := a.seen[b]
	s.derived = time.Now()
	s.expiry.Reset(180 * time.Second)
	a.enter(b, sessionEstablished)
}

// confirm has keys taken into use. With the lock held.
func (a *simNode) confirm(b *simNode, key int) {
	s := a.seen[b]
	s.last, s.current, s.next, s.confirmed, s.unanswered = s.current, key, 0, time.Now(), time.Time{}
}

func (a *simNode) expired(b *simNode) {
	a.net.mu.Lock()
	defer a.net.mu.Unlock()
	if a.net.ctx.Err() == nil {
		s := a.seen[b]
		s.current, s.next, s.last = 0, 0, 0
		a.enter(b, sessionExpired)
	}
}

// enter changes the state of a session, of which the bus tells. With the lock held.
func (a *simNode) enter(b *simNode, state string) {
	s := a.seen[b]
	if s.state == state {
		return
	}
	s.state = state
	if start := a.starts; a.up {
		time.AfterFunc(0, func() {
			a.net.mu.Lock()
			same := a.up && a.starts == start
			a.net.mu.Unlock()
			if same {
				a.tell(sessionsAre(0, b.peer.ID, state))
			}
		})
	}
}

// connected waits until two nodes can send to each other both ways and returns how long that took.
func connected(a, b *simNode) time.Duration {
	for since := time.Now(); ; time.Sleep(time.Millisecond) {
		if took := time.Since(since); a.usable(b) && b.usable(a) || took > time.Minute {
			return took
		}
	}
}

func randomly(d time.Duration) time.Duration { return rand.N(d + 1) }

// join has nodes log in within the given time, as Headscale does it: who logs in is told of all that are there, and they
// hear of it half a second later at most, with the other news of that time.
func join(within time.Duration, nodes ...*simNode) {
	nodes = slices.Clone(nodes)
	rand.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
	for i, a := range nodes {
		a.start(true)
		a.learn(nodes[:i]...)
		time.AfterFunc(randomly(500*time.Millisecond), func() {
			for _, b := range nodes[:i] {
				b.learn(a)
			}
		})
		time.Sleep(randomly(within / time.Duration(len(nodes))))
	}
}
