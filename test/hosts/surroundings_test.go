package hosts

import (
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// The service CIDRs of the labs' cluster.
var serviceCIDR4, serviceCIDR6 = lab.ServiceCIDRs[0].String(), lab.ServiceCIDRs[1].String()

// world is a lab with two nodes in the cluster, two pods on each, and machines that are left alone.
type world struct {
	*lab.Lab
	a, b           *lab.Node // host mode and daemon mode
	a1, a2, b1, b2 *lab.Pod
	outside        []netip.AddrPort // a service on the control host, IPv4 first
}

func newWorld(t testing.TB, opt lab.Options) *world {
	t.Helper()
	opt.Bin, opt.Policy = labtest.Programs(t), allowAll
	opt.Configure = withServices
	l := labtest.New(t, opt)
	w := &world{Lab: l, a: l.Nodes[0], b: l.Nodes[1]}
	w.a1, w.a2 = labtest.AddPod(t, w.a, "a1", lab.PodOptions{}), labtest.AddPod(t, w.a, "a2", lab.PodOptions{})
	w.b1, w.b2 = labtest.AddPod(t, w.b, "b1", lab.PodOptions{}), labtest.AddPod(t, w.b, "b2", lab.PodOptions{})
	for _, v6 := range []bool{false, true} {
		w.outside = append(w.outside, labtest.Service(t, l.Control, netip.AddrPortFrom(labtest.ControlAddr(l, v6), 0)))
	}
	return w
}

func withServices(_ *lab.Node, c map[string]any) {
	labtest.Section(c, "network")["serviceCIDRs"] = []string{serviceCIDR4, serviceCIDR6}
}

// allowAll lets everybody use every route: since Headscale 0.29 `*` means tailnet addresses only. Pods have SCTP too, as
// docs/troubleshooting.md has it.
func allowAll(policy map[string]any) {
	rules := policy["acls"].([]map[string]any)
	sctp := maps.Clone(rules[0])
	sctp["proto"] = "sctp"
	rules[0]["dst"] = append(rules[0]["dst"].([]string), "0.0.0.0/0:*", "::/0:*")
	policy["acls"] = append(rules, sctp)
}

// works says that the nodes' and pods' whole traffic flows, with the sources that it should have.
func (w *world) works(t testing.TB) {
	t.Helper()
	for i, v6 := range []bool{false, true} {
		for _, c := range []struct {
			what     string
			from     lab.Place
			to       netip.AddrPort
			expected netip.Addr
		}{
			{"pod to pod of its node", w.a1, labtest.Echo(w.a2, v6), w.a1.Addr(v6)},
			{"pod to pod of its node", w.b1, labtest.Echo(w.b2, v6), w.b1.Addr(v6)},
			{"pod to pod of another node", w.a1, labtest.Echo(w.b1, v6), w.a1.Addr(v6)},
			{"pod to pod of another node", w.b1, labtest.Echo(w.a1, v6), w.b1.Addr(v6)},
			{"pod to outside", w.a1, w.outside[i], w.a.Underlay[i]},
			{"pod to outside", w.b1, w.outside[i], w.b.Underlay[i]},
			{"node to its pod", w.a, labtest.Echo(w.a1, v6), w.a.Underlay[i]},
			{"node to its pod", w.b, labtest.Echo(w.b1, v6), w.b.Underlay[i]},
			{"node to pod of another node", w.a, labtest.Echo(w.b1, v6), labtest.TailnetAddrs(t, w.a)[i]},
			{"node to pod of another node", w.b, labtest.Echo(w.a1, v6), labtest.TailnetAddrs(t, w.b)[i]},
			{"node to outside", w.a, w.outside[i], w.a.Underlay[i]},
		} {
			labtest.WantTCP(t, fmt.Sprintf("%s, %s", c.what, c.to), c.from, c.to, c.expected)
		}
	}
}

// nodes are those of the cluster.
func (w *world) nodes() []*lab.Node { return []*lab.Node{w.a, w.b} }

// Machines of the lab of surroundings. The first two are the cluster; each other is left alone until a test takes it.
const (
	foreignPeer = iota + 2
	withoutIPv6
	ownResolver
	behindRouter
	surroundingsNodes
)

// surroundings is a world whose tests put something into the nodes' surroundings, and take it away again.
var surroundings = labtest.OneByOne(func(t testing.TB) *world {
	w := newWorld(t, lab.Options{Nodes: surroundingsNodes, Spare: surroundingsNodes - 2, Modes: []string{host, daemon, host, daemon}})
	w.works(t)
	return w
})

// Docker sets the policy of FORWARD to DROP and has a chain of its own there, by whichever iptables the host has.
func TestForwardDrops(t *testing.T) {
	w := surroundings.Enter(t)
	for _, backend := range []string{"nft", "legacy"} {
		t.Run("iptables-"+backend, func(t *testing.T) { testForwardDrops(t, w, backend) })
	}
}

func testForwardDrops(t *testing.T, w *world, backend string) {
	labtest.Kill(t, w.a.Daemon, w.b.Daemon)
	for _, n := range w.nodes() {
		for _, v6 := range []bool{false, true} {
			labtest.Sh(t, n.Machine, "%[1]s -N DOCKER-USER; %[1]s -A FORWARD -j DOCKER-USER; %[1]s -P FORWARD DROP", iptables(backend, v6))
			// Where tailscaled has rules in FORWARD, ours stand there already.
			deleteAccepts(t, n, backend, v6)
		}
	}
	for _, v6 := range []bool{false, true} {
		labtest.WantRefused(t, "without the daemon, "+labtest.Family(v6), w.a1, labtest.Echo(w.a2, v6))
		labtest.WantRefused(t, "without the daemon, "+labtest.Family(v6), w.b1, labtest.Echo(w.b2, v6))
	}
	labtest.StartDaemon(t, w.nodes()...)
	w.works(t)
	for _, n := range w.nodes() {
		wantAccepts(t, n, backend)
		for _, v6 := range []bool{false, true} {
			deleteAccepts(t, n, backend, v6)
		}
	}
	for _, n := range w.nodes() {
		labtest.Eventually(t, "wait for accepts that were deleted", func() error { return accepts(t, n, backend) })
	}
	w.works(t)
	for _, n := range w.nodes() {
		for _, v6 := range []bool{false, true} {
			labtest.Sh(t, n.Machine, "%[1]s -D FORWARD -j DOCKER-USER; %[1]s -P FORWARD ACCEPT", iptables(backend, v6))
		}
	}
}

func iptables(backend string, v6 bool) string {
	return map[bool]string{false: "iptables-", true: "ip6tables-"}[v6] + backend
}

// deleteAccepts deletes our accepts as anybody could. A daemon may put them back meanwhile.
func deleteAccepts(t *testing.T, n *lab.Node, backend string, v6 bool) {
	t.Helper()
	if backend == "legacy" {
		labtest.Sh(t, n.Machine, "%[1]s -S FORWARD | sed -n '/--comment headcni/s/^-A/-D/p' | while read -r rule; do %[1]s $rule 2>/dev/null || :; done", iptables(backend, v6))
		return
	}
	chain := map[bool]string{false: "ip", true: "ip6"}[v6] + " filter FORWARD"
	labtest.Sh(t, n.Machine, `nft -a list chain %[1]s | sed -n '/comment "headcni"/s/.*# handle //p' | while read -r h; do nft delete rule %[1]s handle $h 2>/dev/null || :; done`, chain)
}

func wantAccepts(t *testing.T, n *lab.Node, backend string) {
	t.Helper()
	if err := accepts(t, n, backend); err != nil {
		t.Error(err)
	}
}

// accepts says whether ours stand where they should.
func accepts(t *testing.T, n *lab.Node, backend string) error {
	for _, v6 := range []bool{false, true} {
		if got := acceptsOf(t, n, backend, v6); got != 4 {
			return fmt.Errorf("%s, %s: %d accepts with our comment lead FORWARD, want 4", n.Name, labtest.Family(v6), got)
		}
	}
	return nil
}

// acceptsOf counts our accepts at the head of a FORWARD chain.
func acceptsOf(t *testing.T, n *lab.Node, backend string, v6 bool) (count int) {
	t.Helper()
	list, comment := iptables(backend, v6)+" -S FORWARD | grep ^-A || :", "--comment headcni -j ACCEPT"
	if backend == "nft" {
		list = "nft list chain " + map[bool]string{false: "ip", true: "ip6"}[v6] + " filter FORWARD | grep -E 'accept|drop|jump' || :"
		comment = `accept comment "headcni"`
	}
	for line := range strings.Lines(labtest.Sh(t, n.Machine, "%s", list)) {
		switch {
		case strings.Contains(line, "policy"): // the head of an nft chain
		case strings.Contains(line, comment):
			count++
		default:
			return count
		}
	}
	return count
}

// Whether the kernel asks that answers would take the way that a packet came is the host's affair.
func TestRPFilter(t *testing.T) {
	w := surroundings.Enter(t)
	serve(t, w)
	for _, n := range w.nodes() {
		found := labtest.Sh(t, n.Machine, "cd /proc/sys/net/ipv4/conf; for i in *; do echo echo $(<$i/rp_filter) '>' $i/rp_filter; done")
		defer labtest.Sh(t, n.Machine, "cd /proc/sys/net/ipv4/conf; %s", found)
	}
	for _, value := range []string{"0", "1", "2"} {
		for _, n := range w.nodes() {
			labtest.Sh(t, n.Machine, "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo %s > $f; done", value)
		}
		t.Run(value, func(t *testing.T) {
			w.works(t)
			w.servicesWork(t)
		})
	}
}

// A firewall such as firewalld's cannot be overruled by us: it is named, with what to do, and that it is done is seen.
func TestForeignFirewall(t *testing.T) {
	w := surroundings.Enter(t)
	n := w.a
	labtest.Sh(t, n.Machine, `nft 'table inet firewalld { chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept; jump zones; reject with icmpx admin-prohibited; }; chain zones { }; }'`)
	labtest.WantRefused(t, "through the firewall", w.a1, labtest.Echo(w.a2, false))
	labtest.Eventually(t, "wait for the firewall to be named", func() error {
		text, ready := labtest.Part(t, n, "foreign")
		for _, want := range []string{"chain inet firewalld filter_FORWARD", "firewall-cmd", "hc+", n.Tun} {
			if !strings.Contains(text, want) {
				return fmt.Errorf("%q does not say %q", text, want)
			}
		}
		if !ready {
			return fmt.Errorf("the node is not ready: whether the firewall means pods is not known")
		}
		return nil
	})
	for _, command := range []string{"status", "health"} {
		if out := labtest.Sh(t, n.Machine, "headcni-daemon %s", command); !strings.Contains(out, "filter_FORWARD") {
			t.Errorf("%s does not name the firewall:\n%s", command, out)
		}
	}
	// As `firewall-cmd --zone=trusted --add-interface=hc+ --add-interface=tailscale0` does it.
	labtest.Sh(t, n.Machine, `for i in 'hc*' %s; do nft "add rule inet firewalld zones iifname \"$i\" accept"; done`, n.Tun)
	w.works(t)
	labtest.Eventually(t, "wait for the firewall to be right", func() error {
		if text, _ := labtest.Part(t, n, "foreign"); text != "" {
			return fmt.Errorf("%s", text)
		}
		return nil
	})
	labtest.Sh(t, n.Machine, "nft delete table inet firewalld")
}

// A tailnet peer that advertises the node's LAN, the services and Headscale's network gets none of their traffic.
func TestForeignRoutes(t *testing.T) {
	w := surroundings.EnterLast(t)
	peer := w.Nodes[foreignPeer]
	labtest.Sh(t, w.Control.Machine, "ip address add 192.168.99.1/32 dev lo; ip address add fd99::1/128 dev lo nodad")
	behind := []netip.AddrPort{
		labtest.Service(t, w.Control, netip.MustParseAddrPort("192.168.99.1:0")), labtest.Service(t, w.Control, netip.MustParseAddrPort("[fd99::1]:0")),
	}
	routes := []string{"192.168.77.0/24", "fd77:77:77::/64", serviceCIDR4, serviceCIDR6, "192.168.99.0/24", "fd99::/64"}
	labtest.StartTailscaled(t, peer)
	labtest.Up(t, w.Lab, peer, labtest.AuthKey(t, w.Lab))
	advertise(t, w.Lab, peer, routes...)
	for _, n := range w.nodes() {
		accepted(t, n, routes...)
	}
	w.works(t)
	serve(t, w)
	w.servicesWork(t)
	for _, n := range w.nodes() {
		for i, addr := range n.Underlay {
			labtest.WantTCP(t, n.Name+" to what is behind its default route", n, behind[i], addr)
			at := labtest.Service(t, n, netip.AddrPortFrom(addr, 0))
			labtest.WantTCP(t, "LAN host to "+n.Name, w.Control, at, labtest.ControlAddr(w.Lab, i == 1))
		}
		if _, err := n.Run(labtest.Within(t), "headcni-daemon", "health"); err != nil {
			t.Error(err)
		}
	}
	// It is by our rules: without them the peer has it all.
	labtest.Kill(t, w.a.Daemon)
	for i, v6 := range []bool{false, true} {
		for pref := 5194; pref <= 5195; pref++ {
			labtest.Sh(t, w.a.Machine, "%s rule delete pref %d", ip(v6), pref)
		}
		labtest.WantRefused(t, "without our rules, to the LAN", w.a, w.outside[i])
		labtest.WantRefused(t, "without our rules, to what is behind the default route", w.a, behind[i])
	}
	labtest.StartDaemon(t, w.a)
	w.works(t)
}

// A host without IPv6, in a cluster that has it.
func TestNoIPv6(t *testing.T) {
	w := surroundings.Enter(t)
	n := w.Nodes[withoutIPv6]
	labtest.Sh(t, n.Machine, "for i in all default lo eth0; do echo 1 > /proc/sys/net/ipv6/conf/$i/disable_ipv6; done")
	labtest.Start(t, n, func(n *lab.Node, c map[string]any) { labtest.Section(c, "network")["podCIDRs"] = n.PodCIDRs[:1] })
	labtest.Ready(t, n)
	p, q := labtest.AddPod(t, n, "p", lab.PodOptions{}), labtest.AddPod(t, n, "q", lab.PodOptions{})
	if len(p.Addrs) != 1 || !p.Addrs[0].Is4() {
		t.Errorf("the pod has %v", p.Addrs)
	}
	for _, far := range []*lab.Pod{w.a1, w.b1} {
		labtest.WantTCP(t, "to "+far.Name, p, labtest.Echo(far, false), p.Addr(false))
		labtest.WantTCP(t, "from "+far.Name, far, labtest.Echo(p, false), far.Addr(false))
	}
	labtest.WantTCP(t, "to a pod of its node", p, labtest.Echo(q, false), p.Addr(false))
	labtest.WantTCP(t, "to outside", p, w.outside[0], n.Underlay[0])
	labtest.WantTCP(t, "node to its pod", n, labtest.Echo(p, false), n.Underlay[0])
}

// In daemon mode, tailscaled is a process of its own: it outlives the daemon, and the next daemon takes it as it is. It
// does not start beside a host's own, whose routes it would break.
func TestDedicatedTailscaled(t *testing.T) {
	w := surroundings.Enter(t)
	out, err := w.a.Run(labtest.Within(t), "headcni-daemon", "tailscaled")
	for _, want := range []string{"answers at", "tailscale.mode: host", "systemctl disable --now tailscaled"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("beside a host's tailscaled: %v, want %q; printed %q", err, want, out)
		}
	}
	before, err := labtest.Registered(t, w.Lab, w.b)
	if err != nil {
		t.Fatal(err)
	}
	pid := w.b.Tailscaled.PID()
	labtest.Kill(t, w.b.Daemon)
	w.works(t)
	labtest.StartDaemon(t, w.b)
	after, err := labtest.Registered(t, w.Lab, w.b)
	if err != nil {
		t.Fatal(err)
	}
	if !w.b.Tailscaled.Alive() || w.b.Tailscaled.PID() != pid || after.NodeKey != before.NodeKey {
		t.Errorf("the daemon did not take the tailscaled that it found: %v, now %v", before, after)
	}
	w.works(t)
}
