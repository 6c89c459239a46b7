package tailnet

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// moment is how long a fault lasts.
const moment = 700 * time.Millisecond

// flows are streams between two pods in both directions and families.
type flows []*lab.Stream

func startFlows(t *testing.T, a, b *lab.Pod) flows {
	t.Helper()
	// From one side alone: where both sides begin at once, WireGuard takes 5 s or a multiple of it to agree.
	wantTCP(t, "the first contact", a, echo(b, false), a.Addr(false))
	var f flows
	for _, pair := range [][2]*lab.Pod{{a, b}, {b, a}} {
		for _, v6 := range []bool{false, true} {
			name := fmt.Sprintf("%s to %s, %s", pair[0].Name, pair[1].Name, family(v6))
			s, err := lab.StartStream(labtest.Within(t), name, pair[0], pair[1], pair[1].Addr(v6))
			if err != nil {
				t.Fatal(err)
			}
			f = append(f, s)
		}
	}
	f.waitBack(t, time.Now())
	return f
}

// waitBack waits until all flow again.
func (f flows) waitBack(t *testing.T, since time.Time) {
	t.Helper()
	for _, s := range f {
		if _, err := s.WaitBack(labtest.Within(t), since); err != nil {
			t.Error(err)
		}
	}
}

// noneLost ends the flows, of which not one datagram may be missing.
func (f flows) noneLost(t *testing.T) {
	t.Helper()
	for _, s := range f {
		if r := s.Stop(); r.Lost > 0 || r.Sent < 10 {
			t.Errorf("%s: lost %d of %d", s.Name, r.Lost, r.Sent)
		}
	}
}

func (f flows) stop() {
	for _, s := range f {
		s.Stop()
	}
}

// testFaults breaks one thing after the other.
func testFaults(t *testing.T, l *lab.Lab) {
	a, b := addPod(t, l.Nodes[0], "a", lab.PodOptions{}), addPod(t, l.Nodes[1], "b", lab.PodOptions{})
	for _, p := range []*lab.Pod{a, b} {
		t.Run("daemon dead, "+p.Node.Mode, func(t *testing.T) { testDaemonDead(t, p.Node, a, b) })
	}
	t.Run("Headscale dead", func(t *testing.T) { testHeadscaleDead(t, l, a, b) })
	t.Run("tailscaled dead", func(t *testing.T) { testTailscaledDead(t, l, a, b) })
	for _, p := range []*lab.Pod{a, b} {
		t.Run("gate, "+p.Node.Mode, func(t *testing.T) { testGate(t, p.Node, types.ErrLimitedConnectivity) })
		t.Run("flush, "+p.Node.Mode, func(t *testing.T) { testFlush(t, l, p.Node, a, b) })
	}
	t.Run("gate, without pods", func(t *testing.T) { testGate(t, l.Nodes[2], types.ErrPluginNotAvailable) })
	// Last, because it does what must never happen.
	t.Run("a leak is seen", func(t *testing.T) { testLeakIsSeen(t, l, a, b) })
}

// The daemon's death, its absence and its return touch no packet, and pods start without it.
func testDaemonDead(t *testing.T, n *lab.Node, a, b *lab.Pod) {
	f := startFlows(t, a, b)
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		from := logSize(t, n)
		if err := n.Daemon.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if said := logSince(t, n, from); sig == syscall.SIGTERM && !strings.Contains(said, "the network stays in force") {
			t.Errorf("SIGTERM: said %q", said)
		}
		time.Sleep(moment)
		newPodTalks(t, n, a, b)
		startDaemon(t, n)
	}
	f.noneLost(t)
}

// newPodTalks makes a pod that reaches others, and removes it.
func newPodTalks(t *testing.T, n *lab.Node, others ...*lab.Pod) {
	t.Helper()
	p, err := n.AddPod(labtest.Within(t), "new", lab.PodOptions{})
	if err != nil {
		t.Error(err)
		return
	}
	for _, o := range others {
		for _, v6 := range []bool{false, true} {
			wantTCP(t, fmt.Sprintf("new pod to %s, %s", o.Name, family(v6)), p, echo(o, v6), p.Addr(v6))
			wantTCP(t, fmt.Sprintf("%s to new pod, %s", o.Name, family(v6)), o, echo(p, v6), o.Addr(v6))
		}
	}
	if err := p.Remove(labtest.Within(t)); err != nil {
		t.Error(err)
	}
}

// Nothing needs Headscale but a node that is to join; it joins as labtest.Soon as Headscale is back.
func testHeadscaleDead(t *testing.T, l *lab.Lab, a, b *lab.Pod) {
	f := startFlows(t, a, b)
	if err := l.Control.Headscale.Kill(); err != nil {
		t.Fatal(err)
	}
	stranger := l.Nodes[2]
	labtest.Start(t, stranger, nil)
	for _, p := range []*lab.Pod{a, b} {
		newPodTalks(t, p.Node, a, b)
		// A daemon that is started now knows nothing of Headscale.
		if err := p.Node.Daemon.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := p.Node.StartDaemon(); err != nil {
			t.Fatal(err)
		}
		newPodTalks(t, p.Node, a, b)
	}
	complains(t, stranger, "tailnet", "cannot reach Headscale")
	noConflist(t, stranger)
	f.noneLost(t)
	f = startFlows(t, a, b)
	if err := l.Control.StartHeadscale(labtest.Within(t)); err != nil {
		t.Fatal(err)
	}
	for _, n := range l.Nodes {
		labtest.Ready(t, n)
	}
	f.noneLost(t)
	if err := stranger.WaitRoutes(labtest.Within(t)); err != nil {
		t.Fatal(err)
	}
	for _, cidr := range stranger.PodCIDRs {
		if err := a.Node.WaitRoute(labtest.Within(t), cidr.Addr().Next()); err != nil {
			t.Fatal(err)
		}
	}
	newPodTalks(t, stranger, a)
}

// Whatever way tailscaled ends, nothing leaves a node in clear, and when it is back so is the traffic.
func testTailscaledDead(t *testing.T, l *lab.Lab, a, b *lab.Pod) {
	f := startFlows(t, a, b)
	defer f.stop()
	for _, p := range []*lab.Pod{a, b} {
		for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
			t.Run(fmt.Sprintf("%s, %v", p.Node.Mode, sig), func(t *testing.T) {
				inClear := capture(t, l)
				began := time.Now()
				if err := p.Node.Tailscaled.Signal(sig); err != nil {
					t.Fatal(err)
				}
				time.Sleep(moment)
				for _, s := range f {
					// Only what was on its way can have come.
					if back, ok := s.Back(began.Add(moment / 2)); ok {
						t.Errorf("%s flows without tailscaled, after %v", s.Name, back)
					}
				}
				newPodStarts(t, p.Node)
				labtest.StartTailscaled(t, p.Node)
				f.waitBack(t, time.Now())
				labtest.Ready(t, p.Node)
				newPodTalks(t, p.Node, a, b)
				if c := inClear(); c.Clear > 0 || c.Total == 0 {
					t.Errorf("%d of %d packets in clear: %v", c.Clear, c.Total, c.Examples)
				}
			})
		}
	}
}

// newPodStarts makes a pod that reaches its node, and removes it.
func newPodStarts(t *testing.T, n *lab.Node) {
	t.Helper()
	p, err := n.AddPod(labtest.Within(t), "new", lab.PodOptions{})
	if err != nil {
		t.Error(err)
		return
	}
	wantTCP(t, "node to new pod", n, echo(p, false), n.Underlay[0])
	if err := p.Remove(labtest.Within(t)); err != nil {
		t.Error(err)
	}
}

// capture looks at the underlay until the function that it returns is called.
func capture(t *testing.T, l *lab.Lab) (stop func() lab.Captured) {
	t.Helper()
	c, err := l.CaptureUnderlay()
	if err != nil {
		t.Fatal(err)
	}
	return func() lab.Captured {
		t.Helper()
		got, err := c.Stop()
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
}

// The proof that the captures above would have seen a packet in clear: without all that we put in its way there are some.
func testLeakIsSeen(t *testing.T, l *lab.Lab, a, b *lab.Pod) {
	f := startFlows(t, a, b)
	defer f.stop()
	for _, p := range []*lab.Process{a.Node.Daemon, a.Node.Tailscaled} {
		if err := p.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	inClear := capture(t, l)
	flush(t, a.Node)
	time.Sleep(moment)
	if c := inClear(); c.Clear == 0 {
		t.Errorf("none of %d packets is in clear", c.Total)
	}
	labtest.StartTailscaled(t, a.Node)
	startDaemon(t, a.Node)
	f.waitBack(t, time.Now())
}

// flush takes away everything that we keep in the node's kernel.
func flush(t *testing.T, n *lab.Node) {
	t.Helper()
	for _, f := range []string{"ip", "ip6"} {
		if _, err := n.Run(labtest.Within(t), "nft", "delete", "table", f, "headcni"); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"-4", "-6"} {
		for _, line := range ourRules(t, n, f) {
			pref, _, _ := strings.Cut(line, ":")
			if _, err := n.Run(labtest.Within(t), "ip", f, "rule", "del", "pref", pref); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := n.Run(labtest.Within(t), "ip", f, "route", "flush", "metric", "4278", "type", "unreachable"); err != nil {
			t.Fatal(err)
		}
	}
}

// ourRules are the lines of `ip rule` with our numbers.
func ourRules(t *testing.T, n *lab.Node, f string) []string {
	t.Helper()
	out, err := n.Run(labtest.Within(t), "ip", f, "rule")
	if err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile(`(?m)^51(8|9)\d:.*$`).FindAllString(out, -1)
}

// ours is everything that we keep in the node's kernel.
func ours(t *testing.T, n *lab.Node) (string, error) {
	t.Helper()
	var all strings.Builder
	for _, f := range []string{"-4", "-6"} {
		all.WriteString(strings.Join(ourRules(t, n, f), "\n"))
		out, err := n.Run(labtest.Within(t), "ip", f, "route", "show", "type", "unreachable")
		if err != nil {
			return "", err
		}
		all.WriteString("\n" + out)
	}
	for _, f := range []string{"ip", "ip6"} {
		out, err := n.Run(labtest.Within(t), "nft", "-s", "list", "table", f, "headcni")
		if err != nil {
			return "", err
		}
		all.WriteString(out)
	}
	return all.String(), nil
}

// While the node is not programmed and nobody is there to do it, no pod starts, with the codes of the CNI specification
// 1.1.0, section 5: ADD's is 11 "try again later"; STATUS's 50 "not available", or 51 where running pods may be cut off.
func testGate(t *testing.T, n *lab.Node, status uint) {
	if err := n.Daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	list, err := n.Conflist()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.CNI().GetStatusNetworkList(labtest.Within(t), list); err != nil {
		t.Errorf("STATUS of a programmed node: %v", err)
	}
	flush(t, n)
	links := podLinks(t, n)
	_, err = n.AddPod(labtest.Within(t), "refused", lab.PodOptions{})
	wantCode(t, "ADD", err, types.ErrTryAgainLater)
	wantCode(t, "STATUS", n.CNI().GetStatusNetworkList(labtest.Within(t), list), status)
	if now := podLinks(t, n); len(now) != len(links) {
		t.Errorf("links before %v, after %v", links, now)
	}
	startDaemon(t, n)
	if err := n.CNI().GetStatusNetworkList(labtest.Within(t), list); err != nil {
		t.Errorf("STATUS of a node that is programmed again: %v", err)
	}
	newPodStarts(t, n)
}

func wantCode(t *testing.T, what string, err error, code uint) {
	t.Helper()
	var e *types.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Errorf("%s: %v, want code %d", what, err, code)
	}
}

// What is taken away under a living daemon is back labtest.Soon, and nothing was in clear in the meantime.
func testFlush(t *testing.T, l *lab.Lab, n *lab.Node, a, b *lab.Pod) {
	before, err := ours(t, n)
	if err != nil {
		t.Fatal(err)
	}
	inClear := capture(t, l)
	f := startFlows(t, a, b)
	defer f.stop()
	flush(t, n)
	back := func() error {
		now, err := ours(t, n)
		if err == nil && now != before {
			err = fmt.Errorf("before:\n%s\nnow:\n%s", before, now)
		}
		return err
	}
	labtest.Eventually(t, "wait for what was flushed", back)
	// As `systemctl restart nftables` does it.
	if _, err := n.Run(labtest.Within(t), "nft", "flush", "ruleset"); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "wait for the tables", back)
	f.waitBack(t, time.Now())
	labtest.Ready(t, n)
	if c := inClear(); c.Clear > 0 {
		t.Errorf("%d of %d packets in clear: %v", c.Clear, c.Total, c.Examples)
	}
}
