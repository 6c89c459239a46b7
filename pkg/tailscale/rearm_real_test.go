package tailscale

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/realparts"
	"github.com/headcni/headcni/pkg/config/secret"
)

// excessLimit is what only an uncured trap can cost: 5 or 15 s against some tenths.
const excessLimit = 3 * time.Second

// headscaleBatch is Headscale's default. Its later updates to peers are what springs the traps.
const headscaleBatch = 500 * time.Millisecond

// rearmNode is a node whose sessions are re-armed.
type rearmNode struct {
	*realparts.Tailscaled
	addr  netip.Addr
	pings atomic.Int64
}

// TestRealRearm restarts tailscaled between two flows that each go one way only: two-way traffic would hide the traps.
func TestRealRearm(t *testing.T) {
	w := realparts.New(t, headscaleBatch)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	key := secret.New(w.AuthKey("tag:headcni", "--reusable"))
	var nodes [3]*rearmNode
	for i := range nodes {
		nodes[i] = newRearmNode(ctx, t, w, key, i+1)
	}
	a, b, c := nodes[0], nodes[1], nodes[2]
	var wg sync.WaitGroup
	rearmCtx, stop := context.WithCancel(ctx)
	for _, n := range nodes {
		o := RearmOptions{Pinged: func() { n.pings.Add(1) }, Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})).With("at", n.addr)}
		wg.Go(func() { _ = New(n.Socket).Rearm(rearmCtx, o) })
	}
	defer wg.Wait()
	defer stop()
	out, in := newFlow(t, a, b, 7001), newFlow(t, c, a, 7002)
	out.await(t, time.Now())
	in.await(t, time.Now())
	total := func() (n int64) {
		for _, x := range nodes {
			n += x.pings.Load()
		}
		return n
	}
	// Restarts come one by one: pings to one peer are at least rearmInterval apart.
	settle := func() { time.Sleep(rearmInterval + time.Second) }
	settle()
	const restarts = 3
	slow := 0
	for range restarts {
		before := total()
		a.Kill()
		since := time.Now()
		time.Sleep(50 * time.Millisecond) // packets under way
		a.Start()
		up := awaitRunning(ctx, t, a, since)
		gapIn, gapOut := in.await(t, since), out.await(t, since)
		settle()
		n := total() - before
		t.Logf("up after %s; dark: in %s, out %s; %d pings", up, gapIn, gapOut, n)
		// How long tailscaled takes to start is the machine's business.
		if max(gapIn, gapOut)-up > excessLimit {
			slow++
		}
		if n > 6 {
			t.Errorf("%d pings for one restart among three nodes", n)
		}
	}
	// Without the cure all are (24 of 24 flows, 4.5 to 5 s). With it one restart in about forty still is.
	if slow > 1 {
		t.Errorf("after %d of %d restarts a flow was dark for %s longer than tailscaled", slow, restarts, excessLimit)
	}
	t.Run("a restart of Headscale needs no ping", func(t *testing.T) {
		before := total()
		w.Kill()
		time.Sleep(time.Second)
		w.Start()
		time.Sleep(5 * time.Second)
		if n := total() - before; n != 0 {
			t.Errorf("%d pings", n)
		}
	})
}

// awaitRunning waits until a restarted tailscaled has its network map and returns how long that took.
func awaitRunning(ctx context.Context, t *testing.T, n *rearmNode, since time.Time) time.Duration {
	t.Helper()
	for {
		st, err := New(n.Socket).StatusWithoutPeers(ctx)
		if err == nil && st.State == Running {
			return time.Since(since)
		}
		if ctx.Err() != nil {
			t.Fatalf("not running: %v, %v", st.State, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func newRearmNode(ctx context.Context, t *testing.T, w *realparts.World, key secret.Secret, i int) *rearmNode {
	t.Helper()
	n := &rearmNode{Tailscaled: w.Node()}
	c := New(n.Socket)
	cidr := fmt.Sprintf("10.244.%d.0/24", i)
	no := false
	if _, err := c.EnsurePrefs(ctx, PrefsSpec{AdvertiseRoutes: prefixes(cidr), CorpDNS: &no}); err != nil {
		t.Fatal(err)
	}
	if err := c.Login(ctx, LoginOptions{ControlURL: w.URL, AuthKey: key, Hostname: fmt.Sprintf("n%d", i)}); err != nil {
		t.Fatal(err)
	}
	st, err := c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	n.addr = st.Self.IPs[0]
	w.CLI("nodes", "approve-routes", "--identifier", fmt.Sprint(i), "--routes", cidr)
	return n
}

// flow sends a numbered packet each 10 ms from one node to another and nothing back.
type flow struct {
	last atomic.Int64 // sending time of the newest packet that arrived, ns
}

func newFlow(t *testing.T, from, to *rearmNode, port int) *flow {
	t.Helper()
	f := &flow{}
	recv := listen(t, to.NS, port)
	send := listen(t, from.NS, 0)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	t.Cleanup(func() { close(stop); recv.Close(); send.Close(); wg.Wait() })
	wg.Go(func() {
		buf := make([]byte, 64)
		for {
			n, _, err := recv.ReadFrom(buf)
			if err != nil {
				return
			}
			var sent int64
			if _, err := fmt.Sscan(string(buf[:n]), &sent); err == nil {
				f.last.Store(sent)
			}
		}
	})
	target := net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.addr, uint16(port)))
	wg.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				_, _ = send.WriteTo([]byte(fmt.Sprint(time.Now().UnixNano())), target) // no route while tailscaled is dead
			}
		}
	})
	return f
}

func listen(t *testing.T, ns *nstest.NS, port int) net.PacketConn {
	t.Helper()
	var c net.PacketConn
	ns.Do(t, func() (err error) {
		c, err = net.ListenPacket("udp4", fmt.Sprintf(":%d", port))
		return err
	})
	return c
}

// await waits for a packet sent after since and returns how long that took.
func (f *flow) await(t *testing.T, since time.Time) time.Duration {
	t.Helper()
	for time.Since(since) < 45*time.Second {
		if sent := f.last.Load(); sent > since.UnixNano() {
			return time.Unix(0, sent).Sub(since)
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("the flow stays dark")
	return 0
}
