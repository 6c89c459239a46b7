package pathmtu

import (
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// path is a wire to one peer: what the kernel knows of it, and what it carries inside the tunnel.
type path struct {
	known, carries int
	dead           bool
}

var errLost = errors.New("lost")

func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var wire atomic.Pointer[path]
		wire.Store(&path{known: 1300, carries: 1232})
		var probes atomic.Int32
		w := New(Path{"b", 1100, false})
		if got, _ := w.Smallest(); got.Bytes != 1100 {
			t.Errorf("after a restart: %v", got)
		}
		w.ask = func(netip.Addr) (int, error) {
			if known := wire.Load().known; known != 0 {
				return known, nil
			}
			return 0, errors.New("no route")
		}
		w.echo = func(_ context.Context, _ string, _ netip.Addr, size int) error {
			probes.Add(1)
			if p := wire.Load(); p.dead || size > p.carries {
				return errLost
			}
			return nil
		}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go w.Run(ctx, func() {})
		peer := Peer{Name: "b", Addr: netip.MustParseAddr("100.64.0.2"), Endpoint: netip.MustParseAddrPort("192.0.2.2:41641")}
		look := func(what string, p path, want Path, most int32) {
			t.Helper()
			wire.Store(&p)
			probes.Store(0)
			for range 30 { // half an hour
				time.Sleep(time.Minute)
				w.Set("tun", 1280, []Peer{peer})
				synctest.Wait()
			}
			if got, _ := w.Smallest(); got != want {
				t.Errorf("%s: %v, want %v", what, got, want)
			}
			if n := probes.Load(); n > most {
				t.Errorf("%s: %d probes in half an hour, want at most %d", what, n, most)
			}
		}
		// Of three rounds in half an hour each has up to three echoes of full size, one of Floor, two of each size that vanishes, one of the next,
		// and two more of full size.
		look("the kernel knows", path{known: 1300, carries: 1232}, Path{"b", 1232, false}, 0)
		look("it forgets, and nothing answers", path{1500, 1232, true}, Path{"b", 1232, false}, 3*4)
		whole := path{known: 1500, carries: 1280}
		look("it carries all again", whole, Path{}, 3)
		look("and goes on to", whole, Path{}, 3)
		wire.Store(&path{known: 1300, carries: 1232})
		time.Sleep(2 * glance) // and no Set
		if got, _ := w.Smallest(); got != (Path{"b", 1232, false}) {
			t.Errorf("2 s after the kernel has learned that it is small: %v", got)
		}
		look("and large again", whole, Path{}, 3)
		look("it shrinks, routers are silent", path{known: 1500, carries: 1180}, Path{"b", 1152, true}, 3*9)
		peer.Endpoint = netip.MustParseAddrPort("192.0.2.3:41641")
		look("another endpoint, routers are silent", path{known: 1500, carries: 1100}, Path{"b", 1024, true}, 3*11)
		w.Set("tun", 1280, nil) // Headscale's restart
		synctest.Wait()
		if got, _ := w.Smallest(); got != (Path{"b", 1024, true}) {
			t.Errorf("its routes are gone for a moment: %v", got)
		}
		peer.Endpoint = netip.AddrPort{}
		look("idle", path{known: 1500, carries: 1100}, Path{"b", 1024, true}, 0)
		peer.Endpoint = netip.MustParseAddrPort("192.0.2.3:41641")
		look("a router lies", path{known: 68, carries: 1100}, Path{"b", Floor, false}, 0)
		peer.Endpoint = netip.MustParseAddrPort("192.0.2.2:41641")
		look("back", whole, Path{}, 3)
		look("small again", path{known: 1300, carries: 1280}, Path{"b", 1232, false}, 0)
		time.Sleep(memory)
		w.Set("tun", 1280, nil)
		if got, _ := w.Smallest(); got != (Path{}) {
			t.Errorf("the peer is gone for good: %v", got)
		}
	})
}

func TestInside(t *testing.T) {
	for _, test := range []struct {
		mtu  int
		ipv6 bool
		want int
	}{{1500, false, 1440}, {1340, false, 1280}, {1339, false, 1264}, {1300, false, 1232}, {1360, true, 1280}, {1280, true, 1200}, {68, false, Floor}} {
		if got := Inside(test.mtu, test.ipv6); got != test.want {
			t.Errorf("Inside(%d, IPv6 %v) = %d, want %d", test.mtu, test.ipv6, got, test.want)
		}
	}
}

// TestDeadForAMoment: a path on which all was lost while the first echoes were under way is not a small one.
func TestDeadForAMoment(t *testing.T) {
	for lost := range 12 {
		synctest.Test(t, func(t *testing.T) {
			w := New(Path{})
			w.ask = func(netip.Addr) (int, error) { return 1500, nil }
			sent := 0
			w.echo = func(context.Context, string, netip.Addr, int) error {
				if sent++; sent <= lost {
					return errLost
				}
				return nil
			}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			go w.Run(ctx, func() {})
			w.Set("tun", 1280, []Peer{{Name: "b", Addr: netip.MustParseAddr("100.64.0.2"), Endpoint: netip.MustParseAddrPort("192.0.2.2:41641")}})
			synctest.Wait()
			if got, small := w.Smallest(); small {
				t.Errorf("the first %d echoes were lost: %v", lost, got)
			}
		})
	}
}

// TestShrunkTun: what the tun itself does not take, since somebody has given it another MTU, says nothing of the path.
func TestShrunkTun(t *testing.T) {
	peers := []Peer{{Name: "b", Addr: netip.MustParseAddr("192.0.2.2"), Endpoint: netip.MustParseAddrPort("192.0.2.2:41641")}}
	for before := range 9 { // echoes that are lost before it shrinks
		synctest.Test(t, func(t *testing.T) {
			w := New(Path{})
			w.ask = func(netip.Addr) (int, error) { return 1500, nil }
			sent := 0
			w.echo = func(_ context.Context, _ string, _ netip.Addr, size int) error {
				switch sent++; {
				case size <= 1200:
					return nil
				case sent > before:
					return unix.EMSGSIZE
				}
				return errLost
			}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			go w.Run(ctx, func() {})
			w.Set("tun", 1280, peers)
			synctest.Wait()
			if got, small := w.Smallest(); small {
				t.Errorf("the tun shrank after %d echoes: %v", before, got)
			}
		})
	}

	ns := nstest.New(t)
	ns.Run(t, "ip", "link", "add", "tun0", "mtu", "1200", "type", "veth", "peer", "name", "far")
	ns.Run(t, "bash", "-c", "ip addr add 192.0.2.1/24 dev tun0; ip link set tun0 up; ip link set far up")
	ns.Do(t, func() error {
		if err := echo(t.Context(), "tun0", peers[0].Addr, 1280); !errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("an echo of 1280 bytes through a tun of 1200: %v, want EMSGSIZE", err)
		}
		return nil
	})
}
