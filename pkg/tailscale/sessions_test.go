package tailscale

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestFirstContact: two nodes get a session soon after they have heard of each other, whoever comes first and however long
// the path is, and never by two handshakes at once. Without the order they do not.
func TestFirstContact(t *testing.T) {
	trial := func(t *testing.T, o simOptions) (took time.Duration, crossed int) {
		synctest.Test(t, func(t *testing.T) {
			n, stop := newSimNet(t, randomly(100*time.Millisecond))
			a, b := n.add(o), n.add(o)
			join(randomly(time.Second), a, b)
			took = connected(a, b)
			for _, pair := range [][2]*simNode{{a, b}, {b, a}} {
				if d := pair[0].settledWith(pair[1]); !o.blind && (d < 0 || d > 3*time.Second) {
					t.Errorf("%s takes itself for settled %v after its session was made", pair[0].peer.Name, d)
				}
			}
			stop()
			crossed = n.refused()
			if n.pinged() > 2 && !o.blind {
				t.Errorf("%d pings", n.pinged())
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
			if n.refused() > 0 || n.pinged() > 50 {
				t.Errorf("%d handshakes refused, %d pings for 45 pairs", n.refused(), n.pinged())
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
		if n.pinged() != 4 || !a.usable(b) {
			t.Errorf("%d pings in 10 minutes, a session: %v", n.pinged(), a.usable(b))
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
		before := n.pinged()
		for range 3600 {
			time.Sleep(time.Second)
			if !a.usable(b) || !b.usable(a) {
				t.Fatal("no session")
			}
		}
		if got := n.pinged() - before; got < 3600/160-1 || got > 3600/150+1 {
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
			fastest, before = max(fastest, n.pinged()-before), n.pinged()
		}
		if n.pinged() != peers || fastest > int(time.Second/rearmGap)+1 {
			t.Errorf("%d pings for %d peers, %d in a second", n.pinged(), peers, fastest)
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
		before = n.pinged()
		traffic(time.Hour)
		if got := n.pinged() - before; got < busy*3600/160-busy || got > busy*3600/150+busy {
			t.Errorf("%d pings in an hour for %d peers with traffic", got, busy)
		}
		for _, b := range n.nodes[1 : 1+busy] {
			if !a.usable(b) {
				t.Error("a session with traffic was not kept")
			}
		}
		// And at their end they have an hour.
		time.Sleep(keepFor + 10*time.Minute)
		before = n.pinged()
		time.Sleep(time.Hour)
		if got := n.pinged() - before; got != 0 {
			t.Errorf("%d pings in an hour for nobody", got)
		}
		stop()
	})
}

// TestRestarts: after a restart of one tailscaled or both in the same moment, a stream one way is back at once, however the
// pings of the two sides and Headscale's news of the new keys meet. Where both ways have packets all the time, these make
// handshakes by themselves, and no ping helps.
func TestRestarts(t *testing.T) {
	for _, both := range []bool{false, true} {
		trapped := 0
		const trials = 150
		for i := range trials {
			synctest.Test(t, func(t *testing.T) {
				n, stop := newSimNet(t, []time.Duration{time.Millisecond, 40 * time.Millisecond}[i%2])
				a, b := n.add(simOptions{routes: true}), n.add(simOptions{routes: true})
				if i/2%2 == 1 {
					a, b = b, a
				}
				a.learn(b)
				b.learn(a)
				a.start(false)
				b.start(false)
				if restartUnderStream(n, a, b, both, i/4%2 == 1) > 4*time.Second {
					trapped++
				}
				stop()
			})
		}
		if trapped > trials/50 {
			t.Errorf("both restarted: %v: in %d of %d trials the stream was dark for more than 4 s", both, trapped, trials)
		}
	}
}

// restartUnderStream restarts a, or both, while data goes from a to b or back, and returns how long it was dark at worst from
// when the later one had begun to start.
func restartUnderStream(n *simNet, a, b *simNode, both, back bool) (dark time.Duration) {
	from, to := a, b
	if back {
		from, to = b, a
	}
	ctx, cancel := context.WithCancel(n.ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		for ctx.Err() == nil {
			from.send(to, true)
			time.Sleep(10 * time.Millisecond)
		}
	})
	time.Sleep(10*time.Second + randomly(10*time.Millisecond))
	took := 700*time.Millisecond + randomly(600*time.Millisecond)
	a.restart(took)
	if both {
		other := 700*time.Millisecond + randomly(600*time.Millisecond)
		b.restart(other)
		took = max(took, other)
	}
	time.Sleep(took)
	last := time.Now()
	for range 800 {
		time.Sleep(10 * time.Millisecond)
		n.mu.Lock()
		if at := to.seen[from].arrived; at.After(last) {
			last = at
		}
		n.mu.Unlock()
		dark = max(dark, time.Since(last))
	}
	return dark
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
				f.set(func() { f.self.IPs = []netip.Addr{tt.self} })
				r.observe(false, notify{PeersChanged: true})
				time.Sleep(time.Minute)
				r.observe(false, sessionsAre(0, "p0", sessionExpired))
				r.observe(false, sessionsAre(0, "p0", sessionEstablished))
				if tt.confirmed {
					f.set(func() { f.peers[0].Handshake = time.Now().Add(100 * time.Millisecond) })
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
		f.set(func() { f.peers[0].Online = false })
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
					f.set(func() { f.peers[0].Online = yes })
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
		f.set(func() { f.peers = append(f.peers, late) })
		for i := range 10 {
			f.set(func() { f.peers[0].Online = i%2 == 0 })
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
				f.set(func() { f.self.Tags = []string{"tag:headcni"} })
				if tt.peer.ID == "p0" {
					f.set(func() { f.peers = nil })
					if tt.want > 0 { // tailscaled tells of the old one's end
						r.observe(false, sessionsAre(0, "p0", sessionExpired))
					}
				}
				f.set(func() { f.peers = append(f.peers, tt.peer) })
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
				f.set(func() { f.peers[1].Online = true })
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
				f.set(func() { f.peers[0].Handshake = time.Now().Add(jump) })
				r.observe(false, notify{PeersChanged: true})
				time.Sleep(30 * time.Second)
			}
			if got := f.sent(); len(got) > 5 {
				t.Errorf("a jump of %v: %d pings in 10 minutes", jump, len(got))
			}
		})
	}
}
