package pathmtu

import (
	"context"
	"maps"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// wire is a path whose kernel knows an MTU of the underlay, and which carries so much inside the tunnel in one piece.
type wire struct{ known, carries int }

// fakeWider has routes of its own.
type fakeWider struct {
	now    map[netip.Prefix]int
	probes atomic.Int32 // now there
}

func (f *fakeWider) Now() (map[netip.Prefix]int, error) { return maps.Clone(f.now), nil }

func (f *fakeWider) AddProbe(string, netip.Addr, int, int) error {
	f.probes.Store(1)
	return nil
}

func (f *fakeWider) RemoveProbe(string, netip.Addr, int) error {
	f.probes.Store(0)
	return nil
}

func TestWide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now atomic.Pointer[wire]
		now.Store(&wire{1500, 1440})
		pods, others := netip.MustParsePrefix("10.244.2.0/24"), netip.MustParsePrefix("10.244.3.0/24")
		routes := &fakeWider{now: map[netip.Prefix]int{pods: 8912, others: 8912}}
		w := New(Path{})
		if w.Wide() != nil || w.State() != nil {
			t.Error("wide, and nobody asked for it")
		}
		w.Widen(routes)
		want := func(what string, want ...int) {
			t.Helper()
			got := w.Wide()
			if len(want) == 0 && len(got) == 0 {
				return
			}
			if len(want) != 1 || len(got) != 1 || got[pods] != want[0] {
				t.Errorf("%s: %v, want %v", what, got, want)
			}
		}
		if got := w.Wide(); !maps.Equal(got, routes.now) {
			t.Errorf("after a restart: %v", got)
		}
		var echoes atomic.Int32
		w.ask = func(netip.Addr) (int, error) { return now.Load().known, nil }
		w.echo = func(context.Context, string, netip.Addr, int) error { return nil }
		w.echoWide = func(_ context.Context, _ string, _ netip.Addr, size int) error {
			echoes.Add(1)
			if routes.probes.Load() == 0 || size > now.Load().carries {
				return errLost
			}
			return nil
		}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var changes atomic.Int32
		go w.Run(ctx, func() { changes.Add(1) })
		peer := Peer{Name: "b", Addr: netip.MustParseAddr("100.64.0.2"), Endpoint: netip.MustParseAddrPort("192.0.2.2:41641"), Pods: []netip.Prefix{pods}}
		// look goes on for so long with a Set each 10 s, as the daemon does it.
		look := func(what string, is wire, d time.Duration, most int32, bytes ...int) {
			t.Helper()
			now.Store(&is)
			echoes.Store(0)
			for range d / (10 * time.Second) {
				w.Set("tun", 1280, []Peer{peer})
				time.Sleep(10 * time.Second)
			}
			synctest.Wait()
			want(what, bytes...)
			if n := echoes.Load(); n > most {
				t.Errorf("%s: %d echoes in %s, want at most %d", what, n, d, most)
			}
		}
		look("another's are of no peer", wire{9000, 8928}, memory+time.Minute, 70, 8928)
		look("the kernel knows less", wire{1340, 1280}, 10*time.Second, 0)
		look("plain links", wire{1500, 1440}, time.Hour, 0)
		look("it carries less than the kernel thinks", wire{9000, 1440}, 10*time.Second, 3)
		look("nothing is asked each time", wire{9000, 1440}, time.Hour, 24)
		look("it carries it now", wire{9000, 8928}, 11*time.Minute, 69, 8928)
		now.Store(&wire{1500, 1440}) // a router has said so, or the link has changed
		time.Sleep(2 * glance)
		synctest.Wait()
		want("2 s after the kernel has learned that it carries less")
		look("it carries it again", wire{9000, 8928}, 11*time.Minute, 69, 8928)
		now.Store(&wire{4000, 3936})
		time.Sleep(2 * glance)
		synctest.Wait()
		want("2 s after the kernel has learned that it carries a part", 3936)
		look("it carries it again", wire{9000, 8928}, 11*time.Minute, 69, 8928)
		look("it vanishes in silence", wire{9000, 1440}, 10*time.Second, 3)
		look("and comes back", wire{9000, 8928}, 2*time.Minute, 9, 8928)
		peer.Endpoint = netip.MustParseAddrPort("192.0.2.3:41641")
		now.Store(&wire{9000, 1440})
		w.Set("tun", 1280, []Peer{peer})
		synctest.Wait()
		want("another endpoint, at once looked at")
		look("from which it is proven", wire{9000, 8928}, 11*time.Minute, 69, 8928)
		peer.Endpoint = netip.AddrPort{}
		look("idle", wire{9000, 1440}, time.Hour, 0, 8928)
		peer.Endpoint = netip.MustParseAddrPort("192.0.2.3:41641")
		look("larger than a switch carries", wire{65535, 65000}, 11*time.Minute, 69, Widest)
		if s := w.State(); s == nil || *s != (State{1, 1, Widest}) {
			t.Errorf("%+v", s)
		}
		before := changes.Load()
		look("and nothing changes", wire{65535, 65000}, time.Hour, 360, Widest)
		if n := changes.Load() - before; n != 0 {
			t.Errorf("%d changes where there is none", n)
		}
		peer.Addr = netip.MustParseAddr("fd7a:115c:a1e0::2")
		w.Set("tun", 1280, nil)
		time.Sleep(memory)
		look("a tailnet without IPv4", wire{9000, 8928}, time.Hour, 0)
	})
}

// A path that is dead for a moment is neither believed to be small nor left alone for long.
func TestWideAndDeadForAMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dead atomic.Bool
		dead.Store(true)
		lost := func(context.Context, string, netip.Addr, int) error {
			if dead.Load() {
				return errLost
			}
			return nil
		}
		w := New(Path{})
		w.Widen(&fakeWider{})
		w.ask, w.echo, w.echoWide = func(netip.Addr) (int, error) { return 9000, nil }, lost, lost
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go w.Run(ctx, func() {})
		pods := netip.MustParsePrefix("10.244.2.0/24")
		for _, dies := range []bool{true, false, true, false} {
			dead.Store(dies)
			for range 3 {
				w.Set("tun", 1280, []Peer{{Name: "b", Addr: netip.MustParseAddr("100.64.0.2"), Endpoint: netip.MustParseAddrPort("192.0.2.2:41641"), Pods: []netip.Prefix{pods}}})
				time.Sleep(10 * time.Second)
			}
			synctest.Wait()
			if got := w.Wide()[pods]; !dies && got != 8928 {
				t.Errorf("it is not dead any more, and carries %d", got)
			}
		}
		dead.Store(true)
		time.Sleep(time.Minute)
		if got := w.Wide()[pods]; got != 8928 {
			t.Errorf("dead, and believed to carry %d", got)
		}
	})
}

// A range that another peer has now, as when a node joined anew with its range or was replaced, goes by what was proven of that one's path.
func TestWideIsOfWhoHasTheRange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pods, second := netip.MustParsePrefix("10.244.2.0/24"), netip.MustParsePrefix("10.244.3.0/24")
		carries := map[netip.Addr]int{}
		w := New(Path{})
		w.Widen(&fakeWider{now: map[netip.Prefix]int{second: 8912}})
		w.ask = func(netip.Addr) (int, error) { return 9000, nil }
		w.echo = func(context.Context, string, netip.Addr, int) error { return nil }
		w.echoWide = func(_ context.Context, _ string, to netip.Addr, size int) error {
			if size > carries[to] {
				return errLost
			}
			return nil
		}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go w.Run(ctx, func() {})
		before := Peer{Name: "b", Addr: netip.MustParseAddr("100.64.0.2"), Endpoint: netip.MustParseAddrPort("192.0.2.2:41641"), Pods: []netip.Prefix{pods}}
		after := Peer{Name: "b", Addr: netip.MustParseAddr("100.64.0.3"), Endpoint: netip.MustParseAddrPort("192.0.2.3:41641"), Pods: []netip.Prefix{pods}}
		carries[before.Addr] = 8928
		want := func(what string, peer Peer, want map[netip.Prefix]int) {
			t.Helper()
			w.Set("tun", 1280, []Peer{peer})
			time.Sleep(10 * time.Second)
			synctest.Wait()
			if got := w.Wide(); !maps.Equal(got, want) {
				t.Errorf("%s: %v, want %v", what, got, want)
			}
		}
		want("a wide path, and one from before the start", before, map[netip.Prefix]int{pods: 8928, second: 8912})
		want("another has the range", after, map[netip.Prefix]int{second: 8912})
		after.Pods = append(after.Pods, second)
		want("and one from before the start", after, map[netip.Prefix]int{})
		after.Pods, before.Pods = []netip.Prefix{second}, []netip.Prefix{second}
		want("that one alone", after, map[netip.Prefix]int{})
		want("the first has it again", before, map[netip.Prefix]int{second: 8928})
	})
}
