package hosts

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/nstest"
)

// wire is a world with traffic to look at, and a machine that lures it.
type wire struct {
	*world
	lure    *lab.Node
	flows   labtest.Flows
	replies []*reply
	// quiet is true while nothing is to be sent to tailnet addresses.
	quiet bool
}

// neverInClear is a world whose tests break nodes in every way and look at the wire.
var neverInClear = labtest.OneByOne(func(t testing.TB) *wire {
	w := newWorld(t, lab.Options{Nodes: 3, Spare: 1, Modes: []string{host, daemon, host}})
	w.works(t)
	c := &wire{world: w, lure: w.Nodes[2]}
	t.Cleanup(c.stop)
	for _, pair := range [][2]*lab.Pod{{w.a1, w.b1}, {w.b1, w.a1}} {
		c.flows = append(c.flows, labtest.StartFlows(t, pair[0], pair[1])...)
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
	labtest.StartTailscaled(t, c.lure)
	labtest.Up(t, c.Lab, c.lure, labtest.AuthKey(t, c.Lab))
	return c
})

func (c *wire) stop() {
	c.flows.Stop()
	c.flows = nil
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

func askForReplies(t testing.TB, from *lab.Node, to *lab.Pod, v6 bool) *reply {
	t.Helper()
	r := &reply{name: fmt.Sprintf("%s to a process of %s, %s", to.Name, from.Name, labtest.Family(v6)), ended: make(chan struct{})}
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
		if err := r.pod.SetReadDeadline(time.Now().Add(labtest.Moment)); err != nil {
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
				f.burst(t, v6)
			}
		}
	})
	labtest.NoneInClear(t, got)
	if got.Asked > 0 && !c.quiet {
		t.Errorf("%d packets to tailscaled's resolver on the wire", got.Asked)
	}
}

func (c *wire) watch(t *testing.T, do, send func()) lab.Captured {
	t.Helper()
	stop := labtest.Capture(t, c.Lab)
	do()
	for end := time.Now().Add(labtest.Moment); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		send()
	}
	return stop()
}

// sender sends to a pod of the other node, and to what else is for the tunnel alone: a pod to all that a tailnet has, a node to its
// tailscaled's resolver.
type sender struct {
	name string
	from lab.Place
	to   *lab.Pod
	also func(v6 bool) []netip.Addr
}

func (c *wire) senders() []sender {
	ofPods, ofNodes := labtest.OfTailnet, labtest.Resolver
	if c.quiet {
		ofPods, ofNodes = nil, nil
	}
	return []sender{{"a pod", c.a1, c.b1, ofPods}, {"a node", c.a, c.b1, ofNodes}, {"a pod", c.b1, c.a1, ofPods}, {"a node", c.b, c.a1, ofNodes}}
}

// burst sends to a pod and to addresses of the cluster's that nobody has.
func (s sender) burst(t *testing.T, v6 bool) {
	t.Helper()
	to := append(labtest.OfNobody(v6), s.to.Addr(v6))
	if s.also != nil {
		to = append(to, s.also(v6)...)
	}
	if err := labtest.Scatter(s.from, to...); err != nil {
		t.Fatal(err)
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
	c.flows.WaitBack(t, time.Now())
	c.works(t)
}

func (c *wire) each(t *testing.T, format string, args ...any) {
	t.Helper()
	for _, n := range c.nodes() {
		labtest.Sh(t, n.Machine, format, args...)
	}
}

func TestNeverInClearDaemonStopped(t *testing.T) {
	c := neverInClear.Enter(t)
	c.never(t, func() {
		for _, n := range c.nodes() {
			labtest.Stop(t, n.Daemon)
		}
	})
	c.flows.WaitBack(t, time.Now())
	c.never(t, func() { c.mend(t) })
}

func TestNeverInClearRulesFlushed(t *testing.T) {
	c := neverInClear.Enter(t)
	before := labtest.Sh(t, c.a.Machine, "ip rule; ip -6 rule")
	c.never(t, func() {
		c.each(t, "%s", labtest.FlushRules)
		labtest.Eventually(t, "wait for the rules", func() error {
			if now := labtest.Sh(t, c.a.Machine, "ip rule; ip -6 rule"); now != before {
				return fmt.Errorf("before:\n%s\nnow:\n%s", before, now)
			}
			return nil
		})
	})
	c.mend(t)
}

// tailscaled makes its routes once. The daemon puts back what it still speaks of.
func TestNeverInClearTableFlushed(t *testing.T) {
	c := neverInClear.Enter(t)
	before := map[*lab.Node]string{}
	for _, n := range c.nodes() {
		before[n] = tunnelTable(t, n)
	}
	flush := func() { c.each(t, "ip route flush table 52; ip -6 route flush table 52") }
	c.never(t, func() {
		for _, n := range c.nodes() {
			labtest.Kill(t, n.Daemon)
		}
		flush()
		since := time.Now()
		time.Sleep(labtest.Moment)
		c.flows.Dark(t, since)
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
		c.flows.WaitBack(t, time.Now())
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
	return labtest.Sh(t, n.Machine, "ip -4 -d route show table 52 | sort; ip -6 -d route show table 52 | sort")
}

func TestNeverInClearTunDeleted(t *testing.T) {
	c := neverInClear.Enter(t)
	c.never(t, func() {
		for _, n := range c.nodes() {
			labtest.Sh(t, n.Machine, "ip link delete %s", n.Tun)
		}
		since := time.Now()
		time.Sleep(labtest.Moment)
		c.flows.Dark(t, since)
		for _, n := range c.nodes() {
			labtest.Kill(t, n.Tailscaled) // where it has not ended by itself
		}
	})
	c.never(t, func() { c.mend(t) })
}

// A route in main that is wider than ours, by a neighbour, does not get what it covers: with a tunnel or without.
func TestNeverInClearWiderRoutes(t *testing.T) {
	c := neverInClear.Enter(t)
	for i, v6 := range []bool{false, true} {
		c.each(t, "%s route add %s via %s", ip(v6), []string{"10.0.0.0/8", "fd00::/8"}[i], c.lure.Underlay[i])
	}
	c.never(t, func() { c.works(t) })
	c.never(t, func() {
		for _, n := range c.nodes() {
			labtest.Kill(t, n.Tailscaled)
		}
		since := time.Now()
		time.Sleep(labtest.Moment)
		c.flows.Dark(t, since)
	})
	c.never(t, func() { c.mend(t) })
	for i, v6 := range []bool{false, true} {
		c.each(t, "%s route delete %s", ip(v6), []string{"10.0.0.0/8", "fd00::/8"}[i])
	}
}

// A node that is given a pod range outside the cluster's, which the others would send to in clear, refuses it, and what it was before goes
// on: its pods, and the rules that keep them from the wire.
func TestNeverInClearRangeOutside(t *testing.T) {
	c := neverInClear.Enter(t)
	n := c.a
	configure := func(podCIDRs any) {
		t.Helper()
		err := n.ConfigureDaemon(func(n *lab.Node, cfg map[string]any) {
			withServices(n, cfg)
			labtest.Section(cfg, "network")["podCIDRs"] = podCIDRs
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	c.never(t, func() {
		configure([]string{"10.99.1.0/24", "fd00:99:1::/64"})
		labtest.Kill(t, n.Daemon)
		if err := n.StartDaemon(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-n.Daemon.Done():
		case <-labtest.Within(t).Done():
			t.Error("the daemon goes on")
		}
		c.flows.WaitBack(t, time.Now())
	})
	node, err := labtest.Registered(t, c.Lab, n)
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(node.Primary, netip.Prefix.Compare)
	if !slices.Equal(node.Primary, n.PodCIDRs) {
		t.Errorf("Headscale routes %v to the node, want %v", node.Primary, n.PodCIDRs)
	}
	configure(n.PodCIDRs)
	c.never(t, func() { c.mend(t) })
}

// A peer that advertises a part of a node's range gets nothing of the node's own traffic. What others send is Headscale's
// decision, which approved it; it still stays in the tunnel.
func TestNeverInClearRangeTaken(t *testing.T) {
	c := neverInClear.Enter(t)
	parts := []string{"10.244.1.0/25", "fd00:244:1::/65"}
	c.never(t, func() {
		advertise(t, c.Lab, c.lure, parts...)
		accepted(t, c.a, parts...)
		for i, v6 := range []bool{false, true} {
			labtest.WantTCP(t, "pod to pod of its node", c.a1, labtest.Echo(c.a2, v6), c.a1.Addr(v6))
			labtest.WantTCP(t, "node to its pod", c.a, labtest.Echo(c.a1, v6), c.a.Underlay[i])
		}
	})
	if _, err := c.lure.Run(labtest.Within(t), "tailscale", "set", "--advertise-routes="); err != nil {
		t.Fatal(err)
	}
	c.mend(t)
}

// Each of our defences does alone what it can.
func TestNeverInClearLeft(t *testing.T) {
	c := neverInClear.Enter(t)
	for _, f := range []struct {
		name                  string
		tables, rules, routes bool
	}{
		{"only nftables and the last route", true, false, true},
		{"only the rules", false, true, false},
		{"only nftables", true, false, false},
		{"only the last route", false, false, true},
	} {
		t.Run(f.name, func(t *testing.T) { c.testLeft(t, f.tables, f.rules, f.routes) })
	}
}

// testLeft leaves some of our defences while the daemon and the tunnel are dead. The last route knows nothing of tailnet addresses.
func (c *wire) testLeft(t *testing.T, tables, rules, routes bool) {
	hush := func(quiet bool) {
		for _, r := range c.replies {
			r.quiet.Store(quiet)
		}
		c.quiet = quiet
	}
	hush(!tables && !rules)
	c.never(t, func() { c.strip(t, tables, rules, routes) })
	c.never(t, func() { c.mend(t) })
	hush(false)
}

// strip takes the daemon, the tunnel and the other defences away. The tunnel goes last.
func (c *wire) strip(t *testing.T, tables, rules, routes bool) {
	t.Helper()
	for _, n := range c.nodes() {
		labtest.Kill(t, n.Daemon)
		for _, d := range []struct {
			stays bool
			flush string
		}{{rules, labtest.FlushRules}, {tables, labtest.FlushTables}, {routes, labtest.FlushRoutes}} {
			if !d.stays {
				labtest.Sh(t, n.Machine, "%s", d.flush)
			}
		}
	}
	for _, n := range c.nodes() {
		labtest.Kill(t, n.Tailscaled)
	}
	since := time.Now()
	time.Sleep(labtest.Moment)
	c.flows.Dark(t, since)
}

// Packets of every shape, to the outside, to services that nobody has and to the tailnet, with and without what conntrack knew, and by
// a node whose conntrack somebody keeps away from its pods.
func TestNeverInClearShapes(t *testing.T) {
	c := neverInClear.Enter(t)
	send := func() { c.shapes(t) }
	none := func(what string, do func()) {
		t.Helper()
		if got := c.watch(t, do, send); got.Clear > 0 || got.Total == 0 {
			t.Errorf("%s: %d of %d packets in clear: %v", what, got.Clear, got.Total, got.Examples)
		}
	}
	none("as it is", func() {})
	for _, n := range c.nodes() {
		labtest.Kill(t, n.Daemon)
	}
	none("without the daemon, and conntrack emptied", func() { c.each(t, "conntrack -F 2>/dev/null") })
	for _, f := range families {
		c.each(t, `nft 'table %s foreign { chain c { type filter hook prerouting priority -310; iifname "hc*" notrack; }; }'`, f)
	}
	none("without conntrack", func() {})
	for _, f := range families {
		c.each(t, "nft delete table %s foreign", f)
	}
	none("without tailscaled", func() {
		for _, n := range c.nodes() {
			labtest.Kill(t, n.Tailscaled)
		}
	})
	c.never(t, func() { c.mend(t) })
}

// shapes has a pod of each node send packets of all shapes.
func (c *wire) shapes(t *testing.T) {
	t.Helper()
	for i, v6 := range []bool{false, true} {
		to := append([]netip.Addr{c.outside[i].Addr(), clusterIPs[i].Addr(), lab.ServiceCIDRs[i].Addr().Next()}, labtest.OfTailnet(v6)...)
		for _, p := range []*lab.Pod{c.a1, c.b1} {
			err := p.Do(func() error {
				for _, dst := range to {
					for _, packet := range nstest.Shapes(p.Addr(v6), dst, uint16(30000+rand.N(30000))) {
						if err := nstest.Send(packet); err != nil && !errors.Is(err, unix.ENETUNREACH) {
							return err
						}
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// The proof that all the captures above would have seen something, in both families, from pods and from nodes.
func TestNeverInClearNegativeControl(t *testing.T) {
	c := neverInClear.EnterLast(t)
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
	if got := c.watch(t, func() { c.shapes(t) }, func() {}); got.Clear < 100 {
		t.Errorf("packets of all shapes: %d of %d are in clear", got.Clear, got.Total)
	}
	for _, s := range c.senders() {
		for _, v6 := range []bool{false, true} {
			got := c.watch(t, func() {}, func() { s.burst(t, v6) })
			if got.Clear == 0 || got.Asked == 0 && !v6 {
				t.Errorf("from %s to a pod of %s, %s: %d of %d packets are in clear, %d to the resolver", s.name, s.to.Node.Name, labtest.Family(v6), got.Clear, got.Total, got.Asked)
			}
		}
	}
}
