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

// fakePaths are paths to peers p0, p1, ... of which those in dead answer nobody.
type fakePaths struct {
	mu     sync.Mutex
	peers  []Peer
	dead   map[string]bool
	direct map[string]bool // those that answer directly although they were idle
	down   bool            // no tailscaled
	asked  []string
	made   []time.Duration // since the start
	start  time.Time
}

func (f *fakePaths) Status(context.Context) (Status, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down {
		return Status{}, ErrUnreachable
	}
	return Status{State: Running, Self: Peer{IPs: []netip.Addr{lowSelf}}, Peers: slices.Clone(f.peers)}, nil
}

func (f *fakePaths) reach(ctx context.Context, to netip.Addr) (relayed bool, err error) {
	f.mu.Lock()
	i := slices.IndexFunc(f.peers, func(p Peer) bool { return p.IPs[0] == to })
	name := f.peers[i].ID
	f.asked = append(f.asked, name)
	dead, direct := f.dead[name], f.direct[name]
	f.mu.Unlock()
	if !dead {
		return !direct, nil
	}
	<-ctx.Done()
	return false, ErrNoAnswer
}

func (f *fakePaths) reconnect(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.made = append(f.made, time.Since(f.start).Truncate(time.Second))
	return errors.New("a refusal changes nothing")
}

// move has bytes go to and come from a peer.
func (f *fakePaths) move(i int, sent, received int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.peers[i].Bytes += sent + received
	f.peers[i].Received += received
}

func (f *fakePaths) kill(names ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range names {
		f.dead[n] = true
	}
}

func (f *fakePaths) got() (asked int, made []time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.asked), slices.Clone(f.made)
}

// mendTest runs fn beside a mender of a node with peers, all relayed.
func mendTest(t *testing.T, peers int, fn func(t *testing.T, f *fakePaths)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := &fakePaths{dead: map[string]bool{}, direct: map[string]bool{}, start: time.Now()}
		for i := range peers {
			f.peers = append(f.peers, Peer{ID: fmt.Sprintf("p%d", i), Online: true, IPs: []netip.Addr{peerAddr(i)}, Routes: prefixes("10.244.0.0/24")})
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			m := newMender(f, MendOptions{})
			for ctx.Err() == nil {
				wait := m.look(ctx)
				select {
				case <-ctx.Done():
				case <-time.After(wait):
				}
			}
		})
		fn(t, f)
		cancel()
		wg.Wait()
	})
}

// traffic moves bytes of a peer each second.
func traffic(f *fakePaths, d time.Duration, i int, sent, received int64) {
	for range d / time.Second {
		f.move(i, sent, received)
		time.Sleep(time.Second)
	}
}

func TestMendWhoFallsSilent(t *testing.T) {
	mendTest(t, 3, func(t *testing.T, f *fakePaths) {
		traffic(f, 20*time.Second, 0, 100, 100)
		if asked, made := f.got(); asked != 0 || made != nil {
			t.Fatalf("asked %d and reconnected at %v while all was well", asked, made)
		}
		f.kill("p0", "p1", "p2")
		traffic(f, 10*time.Second, 0, 0, 0)
		if _, made := f.got(); len(made) != 1 {
			t.Fatalf("10 s after all fell silent: reconnected at %v", made)
		}
		traffic(f, 30*time.Minute, 0, 100, 0) // pods that go on sending
		_, made := f.got()
		for i := range made[1:] {
			if gap := made[i+1] - made[i]; gap < min(lostAgain<<i, lostAgainMost) {
				t.Errorf("reconnection %d came %v after the one before: %v", i+1, gap, made)
			}
		}
		if len(made) < 5 || len(made) > 10 {
			t.Errorf("in half an hour without an answer reconnected at %v", made)
		}
	})
}

// What is lost again a moment after it was mended, by a node that sends nothing, is mended when it may be.
func TestMendTwice(t *testing.T) {
	mendTest(t, 3, func(t *testing.T, f *fakePaths) {
		for range 2 {
			f.mu.Lock()
			clear(f.dead)
			f.mu.Unlock()
			traffic(f, 4*time.Second, 0, 0, 100)
			f.kill("p0", "p1", "p2")
			traffic(f, 8*time.Second, 0, 0, 0)
		}
		traffic(f, 12*time.Second, 0, 0, 0)
		if _, made := f.got(); len(made) < 2 || len(made) > 3 {
			t.Errorf("reconnected at %v", made)
		}
	})
}

func TestMendOneWay(t *testing.T) {
	mendTest(t, 1, func(t *testing.T, f *fakePaths) {
		f.kill("p0")
		traffic(f, 40*time.Second, 0, 100, 0)
		if _, made := f.got(); len(made) == 0 {
			t.Error("not reconnected although nothing came back for 40 s")
		}
	})
}

// One peer that is dead is no reason to reconnect while another one answers.
func TestMendSparesWhoIsWell(t *testing.T) {
	mendTest(t, 3, func(t *testing.T, f *fakePaths) {
		traffic(f, 5*time.Second, 0, 100, 100)
		f.kill("p0")
		traffic(f, 10*time.Minute, 0, 100, 0)
		asked, made := f.got()
		if made != nil {
			t.Errorf("reconnected at %v", made)
		}
		if per := 10 * time.Minute / lostSilence; asked < 10 || asked > int(per)*(1+lostWitnesses) {
			t.Errorf("asked %d times in 10 minutes", asked)
		}
	})
}

// An answer that comes directly says nothing of the relay.
func TestMendBesideDirectPaths(t *testing.T) {
	mendTest(t, 3, func(t *testing.T, f *fakePaths) {
		f.mu.Lock()
		f.direct["p1"], f.direct["p2"] = true, true
		f.mu.Unlock()
		traffic(f, 5*time.Second, 0, 100, 100)
		f.kill("p0")
		traffic(f, 12*time.Second, 0, 100, 0)
		if _, made := f.got(); len(made) != 1 {
			t.Errorf("reconnected at %v", made)
		}
	})
}

// Paths that tailscaled has are its own affair, and so is one that is down.
func TestMendLeavesDirectPathsAlone(t *testing.T) {
	mendTest(t, 2, func(t *testing.T, f *fakePaths) {
		f.mu.Lock()
		for i := range f.peers {
			f.peers[i].CurAddr = "192.0.2.1:41641"
		}
		f.mu.Unlock()
		traffic(f, 5*time.Second, 0, 100, 100)
		f.kill("p0", "p1")
		traffic(f, 5*time.Minute, 0, 100, 0)
		f.mu.Lock()
		f.down = true
		f.mu.Unlock()
		traffic(f, 5*time.Minute, 0, 0, 0)
		if asked, made := f.got(); asked != 0 || made != nil {
			t.Errorf("asked %d, reconnected at %v", asked, made)
		}
	})
}

// What it costs does not grow with the cluster: a node that hears nothing asks one peer after the other.
func TestMendIdle(t *testing.T) {
	mendTest(t, 500, func(t *testing.T, f *fakePaths) {
		time.Sleep(10 * time.Minute)
		asked, made := f.got()
		if made != nil || asked < 10 || asked > 20 {
			t.Errorf("asked %d in 10 minutes of silence, reconnected at %v", asked, made)
		}
		f.mu.Lock()
		seen := slices.Compact(slices.Sorted(slices.Values(f.asked)))
		f.mu.Unlock()
		if diff := cmp.Diff(asked, len(seen)); diff != "" {
			t.Error("the same one again:", diff)
		}
		var all []string
		for _, p := range f.peers {
			all = append(all, p.ID)
		}
		f.kill(all...)
		time.Sleep(2 * lostIdle)
		if _, made := f.got(); len(made) == 0 {
			t.Error("a node that is deaf and silent was not reconnected")
		}
	})
}
