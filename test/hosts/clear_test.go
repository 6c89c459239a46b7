package hosts

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// wire is a world with traffic to look at, and a machine that lures it.
type wire struct {
	*world
	lure    *lab.Node
	streams []*lab.Stream
	replies []*reply
}

// testNeverInClear breaks nodes in every way and looks at the wire.
func testNeverInClear(t *testing.T, bin string) {
	w := newWorld(t, lab.Options{Nodes: 3, Spare: 1, Modes: []string{host, daemon, host}, Bin: bin})
	w.works(t)
	c := &wire{world: w, lure: w.Nodes[2]}
	for _, pair := range [][2]*lab.Pod{{w.a1, w.b1}, {w.b1, w.a1}} {
		for _, v6 := range []bool{false, true} {
			s, err := lab.StartStream(labtest.Within(t), fmt.Sprintf("%s to %s, %s", pair[0].Name, pair[1].Name, family(v6)), pair[0], pair[1], pair[1].Addr(v6))
			if err != nil {
				t.Fatal(err)
			}
			c.streams = append(c.streams, s)
		}
	}
	for _, to := range []*lab.Pod{w.a1, w.b1} {
		for _, v6 := range []bool{false, true} {
			from := w.b
			if to.Node == w.b {
				from = w.a
			}
			c.replies = append(c.replies, askForReplies(t, from, to, v6))
		}
	}
	defer c.stop()
	labtest.StartTailscaled(t, c.lure)
	up(t, c.Lab, c.lure)
	for _, f := range []struct {
		name string
		test func(*testing.T)
	}{
		{"daemon stopped", c.testDaemonStopped},
		{"rules flushed", c.testRulesFlushed},
		{"table 52 flushed", c.testTableFlushed},
		{"tun deleted", c.testTunDeleted},
		{"wider routes", c.testWiderRoutes},
		{"own range advertised elsewhere", c.testTaken},
		{"only nftables and the last route left", func(t *testing.T) { c.testLeft(t, true, false, true) }},
		{"only the rules left", func(t *testing.T) { c.testLeft(t, false, true, false) }},
		{"only nftables left", func(t *testing.T) { c.testLeft(t, true, false, false) }},
		{"only the last route left", func(t *testing.T) { c.testLeft(t, false, false, true) }},
		{"nothing left", c.testNothingLeft},
	} {
		t.Run(f.name, f.test)
	}
}

func (c *wire) stop() {
	for _, s := range c.streams {
		s.Stop()
	}
	c.streams = nil
	for _, r := range c.replies {
		r.stop()
	}
	c.replies = nil
}

// reply is a pod that goes on answering a process of another node, which its node knows by its tailnet address.
type reply struct {
	name     string
	pod      net.PacketConn
	to       net.Addr
	question net.Conn
	quiet    atomic.Bool
	ended    chan struct{}
}

func askForReplies(t *testing.T, from *lab.Node, to *lab.Pod, v6 bool) *reply {
	t.Helper()
	r := &reply{name: fmt.Sprintf("%s to a process of %s, %s", to.Name, from.Name, family(v6)), ended: make(chan struct{})}
	err := to.Do(func() (err error) {
		r.pod, err = net.ListenPacket("udp", netip.AddrPortFrom(to.Addr(v6), 0).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if r.question, err = from.Dial(t.Context(), "udp", r.pod.LocalAddr().String()); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, r.name, func() error {
		_, _ = r.question.Write([]byte("say something")) // lost is no worse
		if err := r.pod.SetReadDeadline(time.Now().Add(moment)); err != nil {
			return err
		}
		_, r.to, err = r.pod.ReadFrom(make([]byte, 64))
		return err
	})
	go func() {
		defer close(r.ended)
		for {
			if !r.quiet.Load() {
				if _, err := r.pod.WriteTo([]byte("secret"), r.to); errors.Is(err, net.ErrClosed) {
					return
				}
			}
			time.Sleep(lab.Beat)
		}
	}()
	return r
}

func (r *reply) stop() {
	r.quiet.Store(false) // to notice
	r.pod.Close()
	<-r.ended
	r.question.Close()
}

// never looks at the wire while do breaks something and for a while after, in which pods and nodes send more.
func (c *wire) never(t *testing.T, do func()) {
	t.Helper()
	got := c.watch(t, do, func() {
		for _, v6 := range []bool{false, true} {
			for _, f := range c.senders() {
				f.burst(t.Context(), v6)
			}
		}
	})
	if got.Clear > 0 || got.Total == 0 {
		t.Errorf("%d of %d packets in clear: %v", got.Clear, got.Total, got.Examples)
	}
}

func (c *wire) watch(t *testing.T, do, send func()) lab.Captured {
	t.Helper()
	capture, err := c.CaptureUnderlay()
	if err != nil {
		t.Fatal(err)
	}
	do()
	for end := time.Now().Add(moment); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		send()
	}
	got, err := capture.Stop()
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// sender sends to a pod of the other node.
type sender struct {
	name string
	from lab.Place
	to   *lab.Pod
}

func (c *wire) senders() []sender {
	return []sender{{"a pod", c.a1, c.b1}, {"a node", c.a, c.b1}, {"a pod", c.b1, c.a1}, {"a node", c.b, c.a1}}
}

// burst sends from new sockets, for which nothing is decided yet, to a pod and to addresses of the cluster's that nobody
// has.
func (s sender) burst(ctx context.Context, v6 bool) {
	nobody := [][]netip.Addr{
		{netip.MustParseAddr("10.244.1.250"), netip.MustParseAddr("fd00:244:1::fa")},
		{netip.MustParseAddr("10.244.200.1"), netip.MustParseAddr("fd00:244:c8::1")},
	}
	for _, to := range []netip.Addr{s.to.Addr(v6), nobody[0][index(v6)], nobody[1][index(v6)]} {
		conn, err := s.from.Dial(ctx, "udp", netip.AddrPortFrom(to, lab.EchoPort).String())
		if err != nil {
			continue // "network is unreachable" is as good as nothing on the wire
		}
		_, _ = conn.Write([]byte("secret")) // the same
		conn.Close()
	}
}

// dark says that the fault was one: nothing flows.
func (c *wire) dark(t *testing.T, since time.Time) {
	t.Helper()
	for _, s := range c.streams {
		if back, ok := s.Back(since.Add(moment / 2)); ok { // what was on its way is no matter
			t.Errorf("%s flows, after %v", s.Name, back)
		}
	}
}

// flows waits until all flows that is sent from now on.
func (c *wire) flows(t *testing.T) {
	t.Helper()
	for _, s := range c.streams {
		if _, err := s.WaitBack(labtest.Within(t), time.Now()); err != nil {
			t.Error(err)
		}
	}
}

// mend starts what is dead and waits until all is as it was.
func (c *wire) mend(t *testing.T) {
	t.Helper()
	for _, n := range c.nodes() {
		if !n.Tailscaled.Alive() {
			labtest.StartTailscaled(t, n)
		}
		if !n.Daemon.Alive() {
			if err := n.StartDaemon(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, n := range c.nodes() {
		labtest.Ready(t, n)
	}
	c.flows(t)
	c.works(t)
}

func (c *wire) each(t *testing.T, format string, args ...any) {
	t.Helper()
	for _, n := range c.nodes() {
		sh(t, n.Machine, format, args...)
	}
}

func (c *wire) testDaemonStopped(t *testing.T) {
	c.never(t, func() {
		for _, n := range c.nodes() {
			if err := n.Daemon.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
	})
	c.flows(t)
	c.never(t, func() { c.mend(t) })
}

const (
	flushRules  = `for f in -4 -6; do for pref in 5188 5189 519{1..5}; do while ip $f rule delete pref $pref 2>/dev/null; do :; done; done; done`
	flushTables = `for f in ip ip6; do nft delete table $f headcni; done`
	flushRoutes = `for f in -4 -6; do ip $f route flush metric 4278 type unreachable; done`
)

func (c *wire) testRulesFlushed(t *testing.T) {
	before := sh(t, c.a.Machine, "ip rule; ip -6 rule")
	c.never(t, func() {
		c.each(t, "%s", flushRules)
		labtest.Eventually(t, "wait for the rules", func() error {
			if now := sh(t, c.a.Machine, "ip rule; ip -6 rule"); now != before {
				return fmt.Errorf("before:\n%s\nnow:\n%s", before, now)
			}
			return nil
		})
	})
	c.mend(t)
}

// tailscaled makes its routes once. The daemon puts back what it still speaks of.
func (c *wire) testTableFlushed(t *testing.T) {
	before := map[*lab.Node]string{}
	for _, n := range c.nodes() {
		before[n] = tunnelTable(t, n)
	}
	flush := func() { c.each(t, "ip route flush table 52; ip -6 route flush table 52") }
	c.never(t, func() {
		for _, n := range c.nodes() {
			kill(t, n.Daemon)
		}
		flush()
		since := time.Now()
		time.Sleep(moment)
		c.dark(t, since)
	})
	back := func() {
		for _, n := range c.nodes() {
			labtest.Eventually(t, "wait for tailscaled's routes on "+n.Name, func() error {
				if now := tunnelTable(t, n); now != before[n] {
					return fmt.Errorf("before:\n%s\nnow:\n%s", before[n], now)
				}
				return nil
			})
		}
		c.flows(t)
	}
	c.never(t, func() {
		c.mend(t)
		back()
	})
	c.never(t, func() {
		flush()
		back()
	})
	c.mend(t)
}

// tunnelTable is tailscaled's routing table.
func tunnelTable(t *testing.T, n *lab.Node) string {
	t.Helper()
	return sh(t, n.Machine, "ip -4 -d route show table 52 | sort; ip -6 -d route show table 52 | sort")
}

func (c *wire) testTunDeleted(t *testing.T) {
	c.never(t, func() {
		for _, n := range c.nodes() {
			sh(t, n.Machine, "ip link delete %s", n.Tun)
		}
		since := time.Now()
		time.Sleep(moment)
		c.dark(t, since)
		for _, n := range c.nodes() {
			kill(t, n.Tailscaled) // where it has not ended by itself
		}
	})
	c.never(t, func() { c.mend(t) })
}

// A route in main that is wider than ours, by a neighbour, does not get what it covers: with a tunnel or without.
func (c *wire) testWiderRoutes(t *testing.T) {
	for i, v6 := range []bool{false, true} {
		c.each(t, "%s route add %s via %s", ip(v6), []string{"10.0.0.0/8", "fd00::/8"}[i], c.lure.Underlay[i])
	}
	c.never(t, func() { c.works(t) })
	c.never(t, func() {
		for _, n := range c.nodes() {
			kill(t, n.Tailscaled)
		}
		since := time.Now()
		time.Sleep(moment)
		c.dark(t, since)
	})
	c.never(t, func() { c.mend(t) })
	for i, v6 := range []bool{false, true} {
		c.each(t, "%s route delete %s", ip(v6), []string{"10.0.0.0/8", "fd00::/8"}[i])
	}
}

// A peer that advertises a part of a node's range gets nothing of the node's own traffic. What others send is Headscale's
// decision, which approved it; it still stays in the tunnel.
func (c *wire) testTaken(t *testing.T) {
	parts := []string{"10.244.1.0/25", "fd00:244:1::/65"}
	c.never(t, func() {
		advertise(t, c.Lab, c.lure, parts...)
		accepted(t, c.a, parts...)
		for i, v6 := range []bool{false, true} {
			wants(t, "pod to pod of its node", c.a1, echo(c.a2, v6), c.a1.Addr(v6))
			wants(t, "node to its pod", c.a, echo(c.a1, v6), c.a.Underlay[i])
		}
	})
	if _, err := c.lure.Run(labtest.Within(t), "tailscale", "set", "--advertise-routes="); err != nil {
		t.Fatal(err)
	}
	c.mend(t)
}

// testLeft leaves some of our defences while the daemon and the tunnel are dead. Only nftables can tell a pod's answer to a
// tailnet device from what it sends to others at such an address.
func (c *wire) testLeft(t *testing.T, tables, rules, routes bool) {
	hush := func(quiet bool) {
		for _, r := range c.replies {
			r.quiet.Store(quiet)
		}
	}
	hush(!tables)
	c.never(t, func() { c.strip(t, tables, rules, routes) })
	c.never(t, func() { c.mend(t) })
	hush(false)
}

// strip takes the daemon, the tunnel and the other defences away. The tunnel goes last.
func (c *wire) strip(t *testing.T, tables, rules, routes bool) {
	t.Helper()
	for _, n := range c.nodes() {
		kill(t, n.Daemon)
		for _, d := range []struct {
			stays bool
			flush string
		}{{rules, flushRules}, {tables, flushTables}, {routes, flushRoutes}} {
			if !d.stays {
				sh(t, n.Machine, "%s", d.flush)
			}
		}
	}
	for _, n := range c.nodes() {
		kill(t, n.Tailscaled)
	}
	since := time.Now()
	time.Sleep(moment)
	c.dark(t, since)
}

// The proof that all the captures above would have seen something, in both families, from pods and from nodes.
func (c *wire) testNothingLeft(t *testing.T) {
	c.strip(t, false, false, false)
	replies := c.replies
	c.replies = nil // to go on
	c.stop()
	for _, r := range replies {
		got := c.watch(t, func() {}, func() {})
		if got.Clear == 0 {
			t.Errorf("%s: none of %d packets is in clear", r.name, got.Total)
		}
		r.stop()
	}
	for _, s := range c.senders() {
		for _, v6 := range []bool{false, true} {
			got := c.watch(t, func() {}, func() { s.burst(t.Context(), v6) })
			if got.Clear == 0 {
				t.Errorf("from %s to a pod of %s, %s: none of %d packets is in clear", s.name, s.to.Node.Name, family(v6), got.Total)
			}
		}
	}
}
