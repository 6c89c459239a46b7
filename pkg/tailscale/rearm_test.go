package tailscale

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fakeTailnet counts pings. Its peers are p0, p1, ... at 100.64.0.<n>. This node is lower than they are, at 100.63.0.1.
type fakeTailnet struct {
	mu      sync.Mutex
	self    Peer
	peers   []Peer
	took    time.Duration // of a ping
	pings   []string      // "<peer> <ms since the start>"
	asked   int
	flying  int
	highest int
	start   time.Time
}

func newFakeTailnet(peers int) *fakeTailnet {
	f := &fakeTailnet{start: time.Now(), self: Peer{ID: "self", IPs: []netip.Addr{lowSelf}}}
	for i := range peers {
		f.peers = append(f.peers, Peer{
			ID: fmt.Sprintf("p%d", i), Name: fmt.Sprintf("p%d", i), Online: true, IPs: []netip.Addr{peerAddr(i)},
			Routes: prefixes(fmt.Sprintf("10.244.%d.0/24", i%256)), NodeKey: "nodekey:0", Handshake: time.Now(),
		})
	}
	return f
}

// lowSelf and highSelf are addresses of this node that have it go first and second.
var lowSelf, highSelf = netip.MustParseAddr("100.63.0.1"), netip.MustParseAddr("100.65.0.1")

func peerAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{100, 64, byte(i / 256), byte(i)}) }

func (f *fakeTailnet) Status(context.Context) (Status, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	return Status{State: Running, Self: f.self, Peers: slices.Clone(f.peers)}, nil
}

func (f *fakeTailnet) ping(ctx context.Context, to netip.Addr) error {
	f.mu.Lock()
	a := to.As4()
	f.pings = append(f.pings, fmt.Sprintf("p%d", int(a[2])*256+int(a[3])))
	f.flying++
	f.highest = max(f.highest, f.flying)
	took := f.took
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.flying--
		f.mu.Unlock()
	}()
	select {
	case <-time.After(took):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// restart is another tailscaled: it knows of no session.
func (f *fakeTailnet) restart() {
	f.set(func() {
		for i := range f.peers {
			f.peers[i].Handshake = time.Time{}
		}
	})
}

// set changes it while a rearmer uses it.
func (f *fakeTailnet) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeTailnet) sent() []string {
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.pings)
}

func state(n int) notify { return notify{State: &n} }

// sessionsAre is a message with peers' states, entered age ago.
func sessionsAre(age time.Duration, pairs ...string) notify {
	n := notify{PeerState: map[string]wirePeerState{}}
	for i := 0; i < len(pairs); i += 2 {
		n.PeerState[pairs[i]] = wirePeerState{pairs[i+1], time.Now().Add(-age)}
	}
	return n
}

// rearmTest runs fn with a rearmer whose tailscaled has been running for long, with an established session with each peer.
func rearmTest(t *testing.T, peers int, fn func(t *testing.T, f *fakeTailnet, r *rearmer)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTailnet(peers)
		counted := 0
		var mu sync.Mutex
		ctx, cancel := context.WithCancel(t.Context())
		r := newRearmer(ctx, f, RearmOptions{Pinged: func() { mu.Lock(); counted++; mu.Unlock() }})
		var all []string
		for _, p := range f.peers {
			all = append(all, p.ID, sessionEstablished)
		}
		first := sessionsAre(time.Hour, all...)
		first.State = state(stateRunning).State
		r.observe(true, first)
		time.Sleep(time.Second)
		fn(t, f, r)
		cancel()
		r.wait()
		if counted != len(f.pings) {
			t.Errorf("%d pings, %d counted", len(f.pings), counted)
		}
	})
}

func TestHealLostSession(t *testing.T) {
	rearmTest(t, 2, func(t *testing.T, f *fakeTailnet, r *rearmer) {
		time.Sleep(time.Minute)
		if got := f.sent(); len(got) != 0 || f.asked != 1 {
			t.Fatalf("idle, but sent %v and asked %d times", got, f.asked)
		}
		r.observe(false, sessionsAre(0, "p0", sessionNone))
		time.Sleep(rearmDelay - time.Millisecond)
		if got := f.sent(); len(got) != 0 {
			t.Errorf("pinged at once: the other side may be starting a handshake: %v", got)
		}
		time.Sleep(rearmJitter + 2*time.Millisecond)
		if got := f.sent(); !slices.Equal(got, []string{"p0"}) {
			t.Errorf("sent %v", got)
		}
		time.Sleep(time.Minute)
		if got := f.sent(); len(got) != 1 {
			t.Errorf("retried: %v", got)
		}
	})
}

func TestNoPingWhenNotNeeded(t *testing.T) {
	for name, messages := range map[string][]notify{
		"new session in time":   {sessionsAre(0, "p0", sessionNone), sessionsAre(0, "p0", sessionEstablished)},
		"handshake in time":     {sessionsAre(0, "p0", sessionNone), sessionsAre(0, "p0", sessionHandshake)},
		"new peer":              {sessionsAre(0, "p9", sessionHandshake), sessionsAre(0, "p9", sessionEstablished)},
		"handshake that failed": {sessionsAre(0, "p9", sessionHandshake), sessionsAre(0, "p9", sessionNone)},
		"peer never seen":       {sessionsAre(0, "p9", sessionNone)},
		"peer that is gone":     {sessionsAre(0, "p9", sessionEstablished), sessionsAre(0, "p9", sessionNone)},
		"state flaps":           {state(stateStarting), state(4), state(stateStarting), state(stateRunning)},
	} {
		t.Run(name, func(t *testing.T) {
			rearmTest(t, 2, func(t *testing.T, f *fakeTailnet, r *rearmer) {
				for _, n := range messages {
					r.observe(false, n)
				}
				f.set(func() { f.peers[0].Handshake = time.Now().AddDate(100, 0, 0) }) // whatever comes is confirmed
				time.Sleep(10 * time.Second)
				if got := f.sent(); len(got) != 0 {
					t.Errorf("sent %v", got)
				}
			})
		})
	}
}

func TestOnePingPerInterval(t *testing.T) {
	rearmTest(t, 1, func(t *testing.T, f *fakeTailnet, r *rearmer) {
		// A peer that restarts in a loop: a session comes and goes every 300 ms for 10 s.
		for range 33 {
			r.observe(false, sessionsAre(0, "p0", sessionEstablished))
			r.observe(false, sessionsAre(0, "p0", sessionNone))
			time.Sleep(300 * time.Millisecond)
		}
		if got := len(f.sent()); got < 2 || got > 5 {
			t.Errorf("%d pings in 10 s", got)
		}
	})
}

func TestHealingIsBounded(t *testing.T) {
	rearmTest(t, 300, func(t *testing.T, f *fakeTailnet, r *rearmer) {
		f.set(func() { f.took = time.Hour }) // nobody answers
		var all, none []string
		for _, p := range f.peers {
			all, none = append(all, p.ID, sessionEstablished), append(none, p.ID, sessionNone)
		}
		r.observe(false, sessionsAre(0, all...))
		r.observe(false, sessionsAre(0, none...))
		time.Sleep(time.Second)
		if got := len(f.sent()); got != rearmParallel {
			t.Errorf("%d pings within a second to peers that do not answer", got)
		}
		time.Sleep(time.Minute)
		if got := f.sent(); len(got) != 300 || f.highest > rearmParallel {
			t.Errorf("%d pings, %d at once", len(got), f.highest)
		}
	})
}

func TestAnnounce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTailnet(12)
		f.peers[0].Routes = nil   // no pods behind it
		f.peers[1].Online = false // last
		f.peers[2].IPs = nil
		f.took = 100 * time.Millisecond
		ctx, cancel := context.WithCancel(t.Context())
		r := newRearmer(ctx, f, RearmOptions{})
		r.observe(true, state(0))
		time.Sleep(10 * time.Second)
		if got := f.sent(); len(got) != 0 {
			t.Fatalf("before there is a network map: %v", got)
		}
		r.observe(false, state(stateStarting))
		r.observe(false, sessionsAre(0, "p3", sessionHandshake, "p4", sessionEstablished))
		f.set(func() { f.peers[4].Handshake = time.Now() })
		r.observe(false, state(stateRunning))
		time.Sleep(rearmDelay - time.Millisecond)
		if got := f.sent(); len(got) != 0 {
			t.Errorf("announced at once: %v", got)
		}
		time.Sleep(10 * time.Second)
		got := f.sent()
		if len(got) > 0 && got[len(got)-1] != "p1" {
			t.Errorf("the peer that is offline is not the last: %v", got)
		}
		slices.Sort(got)
		if diff := cmp.Diff([]string{"p1", "p10", "p11", "p5", "p6", "p7", "p8", "p9"}, got); diff != "" {
			t.Error(diff)
		}
		r.observe(false, state(stateRunning))
		time.Sleep(10 * time.Second)
		if n := len(f.sent()); n != len(got) {
			t.Errorf("announced again: %d", n)
		}
		// tailscale down and up: it has forgotten its sessions, its peers have not.
		r.observe(false, sessionsAre(0, "p3", sessionEstablished, "p5", sessionEstablished))
		f.set(func() { f.peers[3].Handshake, f.peers[5].Handshake = time.Now(), time.Now() })
		r.observe(false, state(4))
		r.observe(false, sessionsAre(0, "p3", sessionNone, "p4", sessionNone))
		time.Sleep(10 * time.Second)
		r.observe(false, state(stateStarting))
		time.Sleep(10 * time.Second)
		if n := len(f.sent()); n != len(got)+9 {
			t.Errorf("after down and up %d more pings", n-len(got))
		}
		got = f.sent()
		// tailscaled restarts: the bus ends and comes back.
		r.forget()
		f.restart()
		time.Sleep(50 * time.Millisecond)
		r.observe(true, state(stateStarting))
		time.Sleep(10 * time.Second)
		if n := len(f.sent()); n != len(got)+10 {
			t.Errorf("after a restart with no session at all: %d more", n-len(got))
		}
		cancel()
		r.wait()
	})
}

func TestAnnounceWaitsForSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeTailnet(100)
		f.restart()
		f.took = time.Hour // dead peers
		ctx, cancel := context.WithCancel(t.Context())
		r := newRearmer(ctx, f, RearmOptions{})
		r.observe(true, state(stateRunning))
		time.Sleep(time.Minute)
		if got := len(f.sent()); got != 100 || f.highest != rearmParallel {
			t.Errorf("%d of 100 pinged, %d at once", got, f.highest)
		}
		cancel()
		r.wait()
	})
}

// TestDaemonRestart: sessions that are older than the connection tell that tailscaled has not restarted.
func TestDaemonRestart(t *testing.T) {
	for name, tt := range map[string]struct {
		age   time.Duration
		peers []string
		want  int
	}{
		"only the daemon":                      {time.Minute, []string{"p0", sessionEstablished, "p1", sessionEstablished, "p2", sessionHandshake}, 0},
		"only the daemon, where sessions lack": {time.Minute, []string{"p0", sessionEstablished, "p1", sessionExpired}, 2},
		"both":                                 {time.Second, []string{"p0", sessionEstablished}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeTailnet(3)
				ctx, cancel := context.WithCancel(t.Context())
				r := newRearmer(ctx, f, RearmOptions{})
				n := sessionsAre(tt.age, tt.peers...)
				n.State = state(stateRunning).State
				r.observe(true, n)
				time.Sleep(11 * time.Second)
				if got := f.sent(); len(got) != tt.want {
					t.Errorf("sent %v", got)
				}
				cancel()
				r.wait()
			})
		})
	}
}

// TestBusEnds: what was due is forgotten with the tailscaled that it was about.
func TestBusEnds(t *testing.T) {
	rearmTest(t, 1, func(t *testing.T, f *fakeTailnet, r *rearmer) {
		r.observe(false, sessionsAre(0, "p0", sessionNone))
		time.Sleep(50 * time.Millisecond)
		r.forget()
		time.Sleep(10 * time.Second)
		if got := f.sent(); len(got) != 0 {
			t.Errorf("sent %v", got)
		}
	})
}

func TestRearmEndsWithItsContext(t *testing.T) {
	c := New("/nowhere/tailscaled.sock")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := c.Rearm(ctx, RearmOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}
