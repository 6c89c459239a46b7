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
	"testing/synctest"
	"time"
)

// simNet is a tailnet as far as this package sees one: nodes that learn of each other, and WireGuard's handshakes with
// their times and their refusals (device/noise-protocol.go, timers.go).
type simNet struct {
	mu      sync.Mutex
	ctx     context.Context
	oneWay  time.Duration
	nodes   []*simNode
	crossed int // handshakes that were refused because both sides had begun one
	pings   int
}

type simNode struct {
	net  *simNet
	peer Peer
	seen map[*simNode]*simSession // the network map
	r    *rearmer                 // nil: no daemon
	cfg  simOptions
}

// simSession is one end of a session.
type simSession struct {
	state       string
	lastSent    time.Time // of the last message of a handshake
	outstanding bool      // an initiation that has not been answered
	initiator   bool
	derived     time.Time // when keys were last derived
	confirmed   time.Time // when they were last confirmed
	usable      bool
	bytes       int64
	expiry      *time.Timer
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

func (n *simNet) add(o simOptions) *simNode {
	i := len(n.nodes)
	node := &simNode{net: n, cfg: o, seen: map[*simNode]*simSession{}, peer: Peer{
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
	a.r = newRearmer(a.net.ctx, a, RearmOptions{Pinged: func() { a.net.mu.Lock(); a.net.pings++; a.net.mu.Unlock() }})
	if login {
		a.r.observe(true, state(stateNeedsLogin))
		a.r.observe(false, state(stateRunning))
		return
	}
	first := sessionsAre(time.Hour, "somebody", sessionEstablished)
	first.State = state(stateRunning).State
	a.r.observe(true, first)
}

// learn tells a node of peers.
func (a *simNode) learn(peers ...*simNode) {
	a.net.mu.Lock()
	for _, b := range peers {
		if a != b && a.seen[b] == nil {
			s := &simSession{state: sessionNone}
			s.expiry = time.AfterFunc(time.Hour, func() { a.expired(b) })
			s.expiry.Stop()
			a.seen[b] = s
		}
	}
	a.net.mu.Unlock()
	a.tell(notify{PeersChanged: true})
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
	a.send(b)
	for range 200 {
		if a.usable(b) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return errors.New("no answer")
}

func (a *simNode) usable(b *simNode) bool {
	a.net.mu.Lock()
	defer a.net.mu.Unlock()
	s := a.seen[b]
	return s != nil && s.usable
}

// send sends one packet, which makes or renews the session where it has to.
func (a *simNode) send(b *simNode) {
	a.net.mu.Lock()
	s := a.seen[b]
	usable, old, initiator := s.usable, time.Since(s.derived) > renewable, s.initiator
	s.bytes += 100
	a.net.mu.Unlock()
	switch {
	case !usable, old && initiator:
		a.initiate(b)
	case old:
		a.later(func() { b.initiate(a) }) // its answer is the initiator's packet
	}
}

// later runs fn after one way, unless the net has ended.
func (a *simNode) later(fn func()) {
	time.AfterFunc(a.net.oneWay, func() {
		if a.net.ctx.Err() == nil {
			fn()
		}
	})
}

func (a *simNode) initiate(b *simNode) {
	a.net.mu.Lock()
	s := a.seen[b]
	if time.Since(s.lastSent) < 5*time.Second {
		a.net.mu.Unlock()
		return
	}
	s.lastSent, s.outstanding, s.initiator = time.Now(), true, true
	a.net.mu.Unlock()
	if !s.usable {
		a.enter(b, sessionHandshake)
	}
	a.later(func() { b.answer(a) })
	time.AfterFunc(5*time.Second+rand.N(334*time.Millisecond), func() {
		a.net.mu.Lock()
		again := s.outstanding && a.net.ctx.Err() == nil
		a.net.mu.Unlock()
		if again {
			a.initiate(b)
		}
	})
}

// answer takes an initiation: it overwrites the own one.
func (a *simNode) answer(b *simNode) {
	a.net.mu.Lock()
	s := a.seen[b]
	if s == nil {
		a.net.mu.Unlock()
		return // who is that?
	}
	s.lastSent, s.outstanding, s.initiator = time.Now(), false, false
	a.net.mu.Unlock()
	a.derive(b)
	a.later(func() { b.complete(a) })
}

// complete takes the answer to an initiation.
func (a *simNode) complete(b *simNode) {
	a.net.mu.Lock()
	s := a.seen[b]
	refused := !s.outstanding
	if refused {
		a.net.crossed++
	}
	s.outstanding = false
	a.net.mu.Unlock()
	if refused {
		return
	}
	a.derive(b)
	a.confirm(b)
	a.later(func() { b.confirm(a) })
}

func (a *simNode) derive(b *simNode) {
	a.net.mu.Lock()
	a.seen[b].derived = time.Now()
	a.seen[b].expiry.Reset(180 * time.Second)
	a.net.mu.Unlock()
	a.enter(b, sessionEstablished)
}

func (a *simNode) confirm(b *simNode) {
	a.net.mu.Lock()
	defer a.net.mu.Unlock()
	a.seen[b].confirmed, a.seen[b].usable = time.Now(), true
}

func (a *simNode) expired(b *simNode) {
	a.net.mu.Lock()
	a.seen[b].usable = false
	a.net.mu.Unlock()
	if a.net.ctx.Err() == nil {
		a.enter(b, sessionExpired)
	}
}

func (a *simNode) enter(b *simNode, state string) {
	a.net.mu.Lock()
	s := a.seen[b]
	changed := s.state != state
	s.state = state
	a.net.mu.Unlock()
	if changed {
		a.tell(sessionsAre(0, b.peer.ID, state))
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

// TestFirstContact: two nodes get a session soon after they have heard of each other, whoever comes first and however long
// the path is, and never by two handshakes at once. Without the order they do not.
func TestFirstContact(t *testing.T) {
	trial := func(t *testing.T, o simOptions) (took time.Duration, crossed int) {
		synctest.Test(t, func(t *testing.T) {
			n, stop := newSimNet(t, randomly(100*time.Millisecond))
			a, b := n.add(o), n.add(o)
			join(randomly(time.Second), a, b)
			took = connected(a, b)
			stop()
			crossed = n.crossed
			if n.pings > 2 && !o.blind {
				t.Errorf("%d pings", n.pings)
			}
		})
		return took, crossed
	}
	for range 300 {
		if took, crossed := trial(t, simOptions{}); crossed > 0 || took > 2*time.Second {
			t.Errorf("a session after %v, %d handshakes refused", took, crossed)
		}
	}
	crossings := 0
	for range 300 {
		_, crossed := trial(t, simOptions{blind: true})
		crossings += crossed
	}
	if crossings == 0 {
		t.Error("without the order none crossed: the test does not see what it is for")
	}
}

// TestFirstContactOfMany: ten nodes that join together, one ping for each pair.
func TestFirstContactOfMany(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			n, stop := newSimNet(t, randomly(100*time.Millisecond))
			for range 10 {
				n.add(simOptions{})
			}
			join(2*time.Second, n.nodes...)
			time.Sleep(5 * time.Second)
			for i, a := range n.nodes {
				for _, b := range n.nodes[:i] {
					if !a.usable(b) || !b.usable(a) {
						t.Errorf("%s and %s have no session", a.peer.Name, b.peer.Name)
					}
				}
			}
			if n.crossed > 0 || n.pings > 50 {
				t.Errorf("%d handshakes refused, %d pings for 45 pairs", n.crossed, n.pings)
			}
			stop()
		})
	}
}

// TestSecondGoes: where the node that should go first has no daemon, the other one makes the session and keeps it.
func TestSecondGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, stop := newSimNet(t, 40*time.Millisecond)
		a, b := n.add(simOptions{noDaemon: true, routes: true}), n.add(simOptions{routes: true})
		c := n.add(simOptions{noDaemon: true})
		b.start(false)
		a.learn(b)
		b.learn(c)
		time.Sleep(time.Second)
		b.learn(a)
		if took := connected(a, b); took < secondDelay || took > secondDelay+time.Second {
			t.Errorf("a session after %v", took)
		}
		time.Sleep(10 * time.Minute)
		if n.pings != 4 || !a.usable(b) {
			t.Errorf("%d pings in 10 minutes, a session: %v", n.pings, a.usable(b))
		}
		stop()
	})
}

// TestKeep: between few nodes there is a session at every moment, at the cost of one ping each 150 to 160 s, also where the
// daemon restarts.
func TestKeep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, stop := newSimNet(t, 40*time.Millisecond)
		a, b := n.add(simOptions{routes: true}), n.add(simOptions{routes: true})
		join(0, a, b)
		connected(a, b)
		before := n.pings
		for range 3600 {
			time.Sleep(time.Second)
			if !a.usable(b) || !b.usable(a) {
				t.Fatal("no session")
			}
		}
		if got := n.pings - before; got < 3600/160-1 || got > 3600/150+1 {
			t.Errorf("%d pings in an hour", got)
		}
		stop()
	})
}

// TestKeepOfMany: among 500 peers those sessions are kept that have traffic, for an hour.
func TestKeepOfMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const peers, busy = 500, 10
		n, stop := newSimNet(t, time.Millisecond)
		a := n.add(simOptions{routes: true})
		for range peers {
			n.add(simOptions{routes: true, noDaemon: true}).learn(a)
		}
		a.start(true)
		a.learn(n.nodes...)
		// The fastest second of the start: the limiter's.
		fastest, before := 0, 0
		for range 30 {
			time.Sleep(time.Second)
			fastest, before = max(fastest, n.pings-before), n.pings
		}
		if n.pings != peers || fastest > int(time.Second/rearmGap)+1 {
			t.Errorf("%d pings for %d peers, %d in a second", n.pings, peers, fastest)
		}
		traffic := func(d time.Duration) {
			for range d / time.Minute {
				time.Sleep(time.Minute)
				n.mu.Lock()
				for _, b := range n.nodes[1 : 1+busy] {
					a.seen[b].bytes += 10 * keepBytes
				}
				n.mu.Unlock()
			}
		}
		traffic(keepFor + 10*time.Minute)
		before = n.pings
		traffic(time.Hour)
		if got := n.pings - before; got < busy*3600/160-busy || got > busy*3600/150+busy {
			t.Errorf("%d pings in an hour for %d peers with traffic", got, busy)
		}
		for _, b := range n.nodes[1 : 1+busy] {
			if !a.usable(b) {
				t.Error("a session with traffic was not kept")
			}
		}
		// And at their end they have an hour.
		time.Sleep(keepFor + 10*time.Minute)
		before = n.pings
		time.Sleep(time.Hour)
		if got := n.pings - before; got != 0 {
			t.Errorf("%d pings in an hour for nobody", got)
		}
		stop()
	})
}

// TestUnconfirmed: a session that tailscaled takes for made, and of which nothing was ever heard, is made again.
func TestUnconfirmed(t *testing.T) {
	for name, tt := range map[string]struct {
		self      netip.Addr
		confirmed bool
		from, to  time.Duration
	}{
		"first":     {lowSelf, false, confirmDelay, confirmDelay + confirmJitter},
		"second":    {highSelf, false, confirmDelay + confirmSecond, confirmDelay + confirmSecond + confirmJitter},
		"confirmed": {lowSelf, true, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			rearmTest(t, 1, func(t *testing.T, f *fakeTailnet, r *rearmer) {
				f.self.IPs = []netip.Addr{tt.self}
				r.observe(false, notify{PeersChanged: true})
				time.Sleep(time.Minute)
				r.observe(false, sessionsAre(0, "p0", sessionExpired))
				r.observe(false, sessionsAre(0, "p0", sessionEstablished))
				if tt.confirmed {
					f.peers[0].Handshake = time.Now().Add(100 * time.Millisecond)
				}
				time.Sleep(tt.from - time.Millisecond)
				if got := f.sent(); len(got) != 0 {
					t.Errorf("too early: %v", got)
				}
				time.Sleep(tt.to - tt.from + statusGap + 2*time.Millisecond)
				if got := f.sent(); len(got) == 1 == tt.confirmed {
					t.Errorf("sent %v", got)
				}
				time.Sleep(time.Minute)
				if got := f.sent(); len(got) > 1 {
					t.Errorf("and again: %v", got)
				}
			})
		})
	}
}

// TestDeadPeerIsLeftAlone: a peer that is gone is tried once when its session has ended, and again when it is back.
func TestDeadPeerIsLeftAlone(t *testing.T) {
	rearmTest(t, 1, func(t *testing.T, f *fakeTailnet, r *rearmer) {
		r.observe(false, sessionsAre(0, "p0", sessionExpired))
		for range 20 { // WireGuard gives up after 90 s
			time.Sleep(time.Second)
			r.observe(false, sessionsAre(0, "p0", sessionHandshake))
			time.Sleep(90 * time.Second)
			r.observe(false, sessionsAre(0, "p0", sessionExpired))
		}
		if got := f.sent(); len(got) != 1 {
			t.Errorf("%d pings to a peer that is dead", len(got))
		}
		f.peers[0].Online = false
		r.observe(false, notify{PeersChanged: true})
		time.Sleep(time.Minute)
		if got := f.sent(); len(got) != 1 {
			t.Errorf("%d pings to a peer that is offline", len(got))
		}
	})
}

// TestBackOnline: where control lost sight of peers, as when Headscale restarts, only sessions that ended meanwhile are made.
func TestBackOnline(t *testing.T) {
	for state, want := range map[string]int{sessionEstablished: 0, sessionExpired: 1} {
		t.Run(state, func(t *testing.T) {
			rearmTest(t, 1, func(t *testing.T, f *fakeTailnet, r *rearmer) {
				online := func(yes bool) {
					f.peers[0].Online = yes
					r.observe(false, notify{PeersChanged: true})
					time.Sleep(time.Second)
				}
				online(false)
				if state != sessionEstablished {
					r.observe(false, sessionsAre(0, "p0", state))
				}
				time.Sleep(time.Minute)
				if got := f.sent(); len(got) != 0 {
					t.Errorf("%d pings while it is offline", len(got))
				}
				online(true)
				if got := f.sent(); len(got) != want {
					t.Errorf("%d pings when it is back", len(got))
				}
			})
		})
	}
}

// TestOldTailscaled: one that tells no sessions' states pings peers when it starts and when they come, and never again.
func TestOldTailscaled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTailnet(3)
		f.peers[0].Handshake, f.peers[2].Handshake = time.Time{}, time.Time{}
		ctx, cancel := context.WithCancel(t.Context())
		r := newRearmer(ctx, f, RearmOptions{})
		late := f.peers[2]
		f.peers = f.peers[:2]
		r.observe(true, state(stateRunning)) // p1 has a session
		time.Sleep(time.Minute)
		f.peers = append(f.peers, late)
		for i := range 10 {
			f.peers[0].Online = i%2 == 0
			r.observe(false, notify{NetMap: true})
			time.Sleep(time.Minute)
		}
		if got := f.sent(); !slices.Equal(got, []string{"p0", "p2"}) {
			t.Errorf("sent %v", got)
		}
		cancel()
		r.wait()
	})
}

// TestNewPeers: who is pinged when he comes.
func TestNewPeers(t *testing.T) {
	come := func(change func(p *Peer)) Peer {
		p := Peer{ID: "new", Name: "new", NodeKey: "nodekey:1", Online: true, IPs: []netip.Addr{peerAddr(9)}, Routes: prefixes("10.9.9.0/24")}
		change(&p)
		return p
	}
	for name, tt := range map[string]struct {
		peer Peer
		want int
	}{
		"with pods":               {come(func(*Peer) {}), 1},
		"without":                 {come(func(p *Peer) { p.Routes = nil }), 0},
		"soon to have some":       {come(func(p *Peer) { p.Routes, p.Tags = nil, []string{"tag:x", "tag:headcni"} }), 1},
		"offline":                 {come(func(p *Peer) { p.Online = false }), 0},
		"without an address":      {come(func(p *Peer) { p.IPs = nil }), 0},
		"known":                   {come(func(p *Peer) { p.ID, p.NodeKey, p.IPs = "p0", "nodekey:0", []netip.Addr{peerAddr(0)} }), 0},
		"known, with another key": {come(func(p *Peer) { p.ID = "p0" }), 1},
	} {
		t.Run(name, func(t *testing.T) {
			rearmTest(t, 1, func(t *testing.T, f *fakeTailnet, r *rearmer) {
				f.self.Tags = []string{"tag:headcni"}
				if tt.peer.ID == "p0" {
					f.peers = nil
					if tt.want > 0 { // tailscaled tells of the old one's end
						r.observe(false, sessionsAre(0, "p0", sessionExpired))
					}
				}
				f.peers = append(f.peers, tt.peer)
				for range 3 {
					r.observe(false, notify{PeersChanged: true})
					time.Sleep(10 * time.Second)
				}
				if got := f.sent(); len(got) != tt.want {
					t.Errorf("%d pings", len(got))
				}
				if tt.peer.Online {
					return
				}
				yes := true
				f.peers[1].Online = true
				r.observe(false, notify{PeerChangedPatch: []wirePeerPatch{{Online: &yes}}})
				time.Sleep(time.Second)
				if got := f.sent(); len(got) != 1 {
					t.Errorf("%d pings when it comes online", len(got))
				}
			})
		})
	}
}

// TestOrder: both nodes find the same order, with whatever families they have.
func TestOrder(t *testing.T) {
	node := func(addrs ...string) (p Peer) {
		for _, a := range addrs {
			p.IPs = append(p.IPs, netip.MustParseAddr(a))
		}
		return p
	}
	nodes := []Peer{ // in order
		node("fd7a:115c:a1e0::9", "100.64.0.2"),
		node("100.64.0.3"),
		node("100.64.0.20", "fd7a:115c:a1e0::1"),
		node("fd7a:115c:a1e0::4"),
		node("fd7a:115c:a1e0::5"),
	}
	for i, a := range nodes {
		for j, b := range nodes {
			if lower(a, b) != (i < j) {
				t.Errorf("%v before %v: %v", a.IPs, b.IPs, lower(a, b))
			}
		}
	}
}

// TestClockIsSet: a clock that jumps costs a ping or two and no session.
func TestClockIsSet(t *testing.T) {
	for _, jump := range []time.Duration{time.Hour, -time.Hour} {
		rearmTest(t, 1, func(t *testing.T, f *fakeTailnet, r *rearmer) {
			for range 20 {
				f.peers[0].Handshake = time.Now().Add(jump)
				r.observe(false, notify{PeersChanged: true})
				time.Sleep(30 * time.Second)
			}
			if got := f.sent(); len(got) > 5 {
				t.Errorf("a jump of %v: %d pings in 10 minutes", jump, len(got))
			}
		})
	}
}
