package tailnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/tailscale"
)

// broken is a lab with a pod on each of two nodes, in which one thing after the other is broken.
type broken struct {
	*lab.Lab
	a, b *lab.Pod
}

// Machines of the lab of faults beside those of the pods. They are left alone until a test takes them.
const (
	stranger = iota + 2
	bare
	faultsNodes
)

// faults is a world whose tests break it and mend it.
var faults = labtest.OneByOne(func(t testing.TB) *broken {
	l := labtest.New(t, lab.Options{Nodes: faultsNodes, Spare: faultsNodes - 2, Modes: []string{host, daemon, host, host}, Bin: labtest.Programs(t)})
	return &broken{l, labtest.AddPod(t, l.Nodes[0], "a", lab.PodOptions{}), labtest.AddPod(t, l.Nodes[1], "b", lab.PodOptions{})}
})

// pods are one of each mode.
func (w *broken) pods() []*lab.Pod { return []*lab.Pod{w.a, w.b} }

// startFlows starts flows between the pods, in both directions, which flow.
func (w *broken) startFlows(t *testing.T) labtest.Flows {
	t.Helper()
	// From one side alone: where both sides begin at once, WireGuard takes 5 s or a multiple of it to agree.
	labtest.WantTCP(t, "the first contact", w.a, labtest.Echo(w.b, false), w.a.Addr(false))
	// And once they have left the relay: what is under way by it then may be lost, whatever the daemon does.
	for _, way := range [][2]*lab.Pod{{w.a, w.b}, {w.b, w.a}} {
		from, to := way[0], way[1]
		api := tailscale.New(from.Node.Path(strings.TrimPrefix(from.Node.Socket(), "/var")))
		labtest.Eventually(t, "a direct path from "+from.Name, func() error {
			if _, _, err := lab.Echo(t.Context(), from, to.Addr(false), 64); err != nil {
				return err
			}
			st, err := api.Status(t.Context())
			if err != nil {
				return err
			}
			if !slices.ContainsFunc(st.Peers, func(p tailscale.Peer) bool { return p.Name == to.Node.Name && p.CurAddr != "" }) {
				return errors.New("it goes by the relay")
			}
			return nil
		})
	}
	// And once their nodes have all their addresses: for each new one tailscaled binds its sockets anew.
	for _, p := range w.pods() {
		labtest.Eventually(t, "the answerer's address on "+p.Node.Name, func() error {
			out, err := p.Node.Run(t.Context(), "ip", "-brief", "address", "show", "dev", "lo")
			if err == nil && !(strings.Contains(out, netset.AnswererIPv4.String()) && strings.Contains(out, netset.AnswererIPv6.String())) {
				err = errors.New(out)
			}
			return err
		})
	}
	f := slices.Concat(labtest.StartFlows(t, w.a, w.b), labtest.StartFlows(t, w.b, w.a))
	f.WaitBack(t, time.Now())
	return f
}

// The daemon's death, its absence and its return touch no packet, and pods start without it.
func TestDaemonDead(t *testing.T) {
	w := faults.Enter(t)
	for _, p := range w.pods() {
		t.Run(p.Node.Mode, func(t *testing.T) { w.testDaemonDead(t, p.Node) })
	}
}

func (w *broken) testDaemonDead(t *testing.T, n *lab.Node) {
	f := w.startFlows(t)
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		from := logSize(t, n)
		if err := n.Daemon.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if said := logSince(t, n, from); sig == syscall.SIGTERM && !strings.Contains(said, "the network stays in force") {
			t.Errorf("SIGTERM: said %q", said)
		}
		time.Sleep(labtest.Moment)
		newPodTalks(t, n, w.a, w.b)
		labtest.StartDaemon(t, n)
	}
	f.NoneLost(t)
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
			labtest.WantTCP(t, fmt.Sprintf("new pod to %s, %s", o.Name, labtest.Family(v6)), p, labtest.Echo(o, v6), p.Addr(v6))
			labtest.WantTCP(t, fmt.Sprintf("%s to new pod, %s", o.Name, labtest.Family(v6)), o, labtest.Echo(p, v6), o.Addr(v6))
		}
	}
	if err := p.Remove(labtest.Within(t)); err != nil {
		t.Error(err)
	}
}

// Nothing needs Headscale but a node that is to join; it joins as soon as Headscale is back, and traffic goes on.
func TestHeadscaleDead(t *testing.T) {
	w := faults.Enter(t)
	f := w.startFlows(t)
	labtest.Kill(t, w.Control.Headscale)
	n := w.Nodes[stranger]
	labtest.Start(t, n, nil)
	for _, p := range w.pods() {
		newPodTalks(t, p.Node, w.a, w.b)
		// A daemon that is started now knows nothing of Headscale.
		labtest.Kill(t, p.Node.Daemon)
		if err := p.Node.StartDaemon(); err != nil {
			t.Fatal(err)
		}
		newPodTalks(t, p.Node, w.a, w.b)
	}
	complains(t, n, "tailnet", "cannot reach Headscale")
	noConflist(t, n)
	f.NoneLost(t)
	f = w.startFlows(t)
	if err := w.Control.StartHeadscale(labtest.Within(t)); err != nil {
		t.Fatal(err)
	}
	for _, ready := range []*lab.Node{w.a.Node, w.b.Node, n} {
		labtest.Ready(t, ready)
	}
	// Headscale that has just started gives routes only to who is connected again, so its return may cost a moment.
	f.WaitBack(t, time.Now())
	f.Stop()
	if err := n.WaitRoutes(labtest.Within(t)); err != nil {
		t.Fatal(err)
	}
	for _, cidr := range n.PodCIDRs {
		if err := w.a.Node.WaitRoute(labtest.Within(t), cidr.Addr().Next()); err != nil {
			t.Fatal(err)
		}
	}
	newPodTalks(t, n, w.a)
}

// Whatever way tailscaled ends, nothing leaves a node in clear, and when it is back so is the traffic.
func TestTailscaledDead(t *testing.T) {
	w := faults.Enter(t)
	f := w.startFlows(t)
	defer f.Stop()
	for _, p := range w.pods() {
		for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
			t.Run(fmt.Sprintf("%s, %v", p.Node.Mode, sig), func(t *testing.T) {
				peers := w.tailnetAddrs(t, p.Node)
				inClear := labtest.Capture(t, w.Lab)
				began := time.Now()
				if err := p.Node.Tailscaled.Signal(sig); err != nil {
					t.Fatal(err)
				}
				for range 10 {
					tell(t, p.Node, peers)
					time.Sleep(labtest.Moment / 10)
				}
				f.Dark(t, began)
				newPodStarts(t, p.Node)
				labtest.StartTailscaled(t, p.Node)
				f.WaitBack(t, time.Now())
				labtest.Ready(t, p.Node)
				newPodTalks(t, p.Node, w.a, w.b)
				labtest.NoneInClear(t, inClear())
			})
		}
	}
}

// tailnetAddrs are those of the other node with pods.
func (w *broken) tailnetAddrs(t *testing.T, n *lab.Node) []netip.Addr {
	t.Helper()
	for _, p := range w.pods() {
		if p.Node != n {
			addrs, err := p.Node.TailnetAddrs()
			if err != nil || len(addrs) == 0 {
				t.Fatalf("%s has %v in the tailnet: %v", p.Node.Name, addrs, err)
			}
			return addrs
		}
	}
	return nil
}

// tell has a process of the node send datagrams, which may well have no way.
func tell(t *testing.T, n *lab.Node, to []netip.Addr) {
	t.Helper()
	err := n.Do(func() error {
		for _, a := range to {
			if c, err := net.Dial("udp", netip.AddrPortFrom(a, 9).String()); err == nil {
				_, _ = c.Write([]byte("x"))
				c.Close()
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
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
	labtest.WantTCP(t, "node to new pod", n, labtest.Echo(p, false), n.Underlay[0])
	if err := p.Remove(labtest.Within(t)); err != nil {
		t.Error(err)
	}
}

// The proof that the captures above would have seen a packet in clear: without all that we put in its way there are some.
func TestLeakIsSeen(t *testing.T) {
	w := faults.EnterLast(t)
	f := w.startFlows(t)
	defer f.Stop()
	labtest.Kill(t, w.a.Node.Daemon, w.a.Node.Tailscaled)
	inClear := labtest.Capture(t, w.Lab)
	labtest.Flush(t, w.a.Node)
	time.Sleep(labtest.Moment)
	if c := inClear(); c.Clear == 0 {
		t.Errorf("none of %d packets is in clear", c.Total)
	}
	labtest.StartTailscaled(t, w.a.Node)
	labtest.StartDaemon(t, w.a.Node)
	f.WaitBack(t, time.Now())
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
func TestGate(t *testing.T) {
	w := faults.Enter(t)
	for _, p := range w.pods() {
		t.Run(p.Node.Mode, func(t *testing.T) { testGate(t, p.Node, types.ErrLimitedConnectivity) })
	}
	t.Run("without pods", func(t *testing.T) {
		n := w.Nodes[bare]
		labtest.Start(t, n, nil)
		labtest.Ready(t, n)
		testGate(t, n, types.ErrPluginNotAvailable)
	})
}

func testGate(t *testing.T, n *lab.Node, status uint) {
	labtest.Kill(t, n.Daemon)
	list, err := n.Conflist()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.CNI().GetStatusNetworkList(labtest.Within(t), list); err != nil {
		t.Errorf("STATUS of a programmed node: %v", err)
	}
	labtest.Sh(t, n.Machine, "nft flush table ip headcni") // which leaves chains and sets
	_, err = n.AddPod(labtest.Within(t), "refused", lab.PodOptions{})
	wantCode(t, "ADD without rules", err, types.ErrTryAgainLater)
	labtest.Flush(t, n)
	links := podLinks(t, n)
	_, err = n.AddPod(labtest.Within(t), "refused", lab.PodOptions{})
	wantCode(t, "ADD", err, types.ErrTryAgainLater)
	wantCode(t, "STATUS", n.CNI().GetStatusNetworkList(labtest.Within(t), list), status)
	if now := podLinks(t, n); len(now) != len(links) {
		t.Errorf("links before %v, after %v", links, now)
	}
	labtest.StartDaemon(t, n)
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

// What is taken away under a living daemon is back soon, and nothing was in clear in the meantime.
func TestFlush(t *testing.T) {
	w := faults.Enter(t)
	for _, p := range w.pods() {
		t.Run(p.Node.Mode, func(t *testing.T) { w.testFlush(t, p.Node) })
	}
}

func (w *broken) testFlush(t *testing.T, n *lab.Node) {
	before, err := ours(t, n)
	if err != nil {
		t.Fatal(err)
	}
	inClear := labtest.Capture(t, w.Lab)
	f := w.startFlows(t)
	defer f.Stop()
	labtest.Flush(t, n)
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
	f.WaitBack(t, time.Now())
	labtest.Ready(t, n)
	if c := inClear(); c.Clear > 0 {
		t.Errorf("%d of %d packets in clear: %v", c.Clear, c.Total, c.Examples)
	}
}

// A tailscaled that hangs does not keep the daemon from putting the tables back: its calls to it take 10 s to fail.
func TestFlushWhileTailscaledHangs(t *testing.T) {
	const hangs = 10 * time.Second
	w := faults.Enter(t)
	for _, p := range w.pods() {
		t.Run(p.Node.Mode, func(t *testing.T) {
			if err := p.Node.Tailscaled.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := p.Node.Tailscaled.Signal(syscall.SIGCONT); err != nil {
					t.Error(err)
				}
				labtest.Ready(t, p.Node)
			}()
			labtest.Sh(t, p.Node.Machine, "nft flush ruleset")
			labtest.EventuallyWithin(t, hangs/2, "wait for the tables", func() error {
				_, err := p.Node.Run(t.Context(), "sh", "-c", "nft list chain ip headcni guard && nft list chain ip6 headcni guard")
				return err
			})
		})
	}
}

// Nor is a node ready then, which kubelet asks /readyz: it is known within two looks at the paths, each of which takes a call's 10 s.
func TestReadinessWhileTailscaledHangs(t *testing.T) {
	const look, call = 10 * time.Second, 10 * time.Second
	w := faults.Enter(t)
	n := w.b.Node
	if err := n.Tailscaled.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	labtest.EventuallyWithin(t, 2*(look+call), "not ready", func() error {
		parts, err := readyz(t, n)
		if err == nil && parts["tailnet"] == "" {
			err = fmt.Errorf("ready after %v without tailscaled", time.Since(began))
		}
		return err
	})
	t.Logf("seen after %v", time.Since(began))
	if err := n.Tailscaled.Signal(syscall.SIGCONT); err != nil {
		t.Error(err)
	}
	labtest.Ready(t, n)
}

// What somebody takes from the host's end of a pod's link comes back by itself, and the pod with it, in both families.
func TestPodLink(t *testing.T) {
	w := faults.Enter(t)
	for _, p := range w.pods() {
		t.Run(p.Node.Mode, func(t *testing.T) { w.testPodLink(t, p) })
	}
}

func (w *broken) testPodLink(t *testing.T, p *lab.Pod) {
	f := w.startFlows(t)
	link := regexp.MustCompile(`dev (hc\S+)`).FindStringSubmatch(labtest.Sh(t, p.Node.Machine, "ip route get %s", p.Addr(false)))
	if link == nil {
		t.Fatal("no link leads to the pod")
	}
	for _, damage := range []string{
		"ip route flush dev LINK; ip -6 route flush dev LINK", "ip link set LINK down; ip link set LINK up", "ip link set LINK down",
		"sysctl -qw net.ipv6.conf.LINK.disable_ipv6=1; sysctl -qw net.ipv6.conf.LINK.disable_ipv6=0",
		// The kernel tells of no change of these: the daemon sees them whenever it looks.
		"sysctl -qw net.ipv4.conf.LINK.arp_ignore=0 net.ipv6.conf.LINK.accept_ra=2; ip link set LINK down; ip link set LINK up",
		"ip link add other type bridge; ip link set other up; ip link set LINK master other",
		"ip link delete other; ip link set LINK down; ip link set LINK name other; ip link set other up",
		"ip neigh replace ADDR4 lladdr 02:00:00:00:00:77 nud permanent dev LINK; ip neigh replace ADDR6 lladdr 02:00:00:00:00:77 nud permanent dev LINK\n" +
			"ip route replace ADDR4 dev lo; ip -6 route replace ADDR6 dev lo; ip address flush dev LINK",
	} {
		began := time.Now()
		labtest.Sh(t, p.Node.Machine, "%s", strings.NewReplacer("LINK", link[1], "ADDR4", p.Addr(false).String(), "ADDR6", p.Addr(true).String()).Replace(damage))
		labtest.Eventually(t, damage, func() error {
			_, err := p.Node.Run(labtest.Within(t), "sh", "-c", fmt.Sprintf("ip route get %s | grep -q %s && ip -6 route get %s | grep -q %[2]s && "+
				"! ip link show %[2]s | grep -q master && [ \"$(cat /proc/sys/net/ipv4/conf/%[2]s/arp_ignore /proc/sys/net/ipv6/conf/%[2]s/accept_ra | xargs)\" = '8 0' ]", p.Addr(false), link[1], p.Addr(true)))
			return err
		})
		f.WaitBack(t, began)
		t.Logf("%s: back after %v", damage, time.Since(began).Round(time.Millisecond))
		labtest.Ready(t, p.Node)
	}
	f.Stop()
}
