package hosts

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/headscale"
)

// Machines of the lab of membership, all left alone at first.
const (
	users = iota // a host whose user has made tailscaled their own
	laptop
	cutOff // whose Headscale is behind its default route
	router // a user's router that advertises where Headscale is
	forgotten
	memberNodes
)

// minutes bounds what has to wait for the daemon's minute.
const minutes = 3 * time.Minute

// Addresses of the control host that nodes reach by their default route only, IPv4 first: in the LAN that users routes,
// of the world outside (an exit node of Tailscale's does not give private ones away), and Headscale's (which must be a
// private one, see internal/lab).
var (
	usersLAN    = [2]netip.Addr{netip.MustParseAddr("192.168.97.1"), netip.MustParseAddr("fd97::1")}
	outside     = [2]netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:113::1")}
	headscaleAt = [2]netip.Addr{netip.MustParseAddr("192.168.99.1"), netip.MustParseAddr("fd99::1")}
)

// membership is a lab each of whose tests takes machines of its own.
var membership = labtest.SideBySide(func(t testing.TB) *lab.Lab {
	l := labtest.New(t, lab.Options{
		Nodes: memberNodes, Spare: memberNodes, Modes: []string{host, host, host, host, daemon}, Bin: labtest.Programs(t), Policy: allowAll,
	})
	for _, a := range [][2]netip.Addr{usersLAN, outside, headscaleAt} {
		labtest.Sh(t, l.Control.Machine, "ip address add %s/32 dev lo; ip address add %s/128 dev lo nodad", a[0], a[1])
	}
	return l
})

// withOurs is what a user's prefs are while the daemon runs.
func withOurs(p map[string]any, n *lab.Node) map[string]any {
	p = maps.Clone(p)
	p["RouteAll"], p["NoSNAT"], p["NoStatefulFiltering"] = true, true, true
	routes := slices.Clone(p["AdvertiseRoutes"].([]any))
	for _, c := range n.PodCIDRs {
		routes = append(routes, c.String())
	}
	p["AdvertiseRoutes"] = routes
	return p
}

// wantPrefs waits until the prefs are these, whatever the order of routes.
func wantPrefs(t *testing.T, what string, n *lab.Node, want map[string]any) {
	t.Helper()
	labtest.Eventually(t, what+": prefs, - want, + got", func() error {
		d := cmp.Diff(sortedRoutes(want), sortedRoutes(labtest.Prefs(t, n)))
		if d != "" {
			return errors.New(d)
		}
		return nil
	})
}

func sortedRoutes(p map[string]any) map[string]any {
	p = maps.Clone(p)
	routes := []string{}
	if list, ok := p["AdvertiseRoutes"].([]any); ok {
		for _, r := range list {
			routes = append(routes, r.(string))
		}
	}
	slices.Sort(routes)
	p["AdvertiseRoutes"] = routes
	return p
}

// household is a user's tailnet: a host that is an exit node and a LAN router, and a laptop that uses it.
type household struct {
	*lab.Lab
	host, laptop *lab.Node
	lan, outside [2]netip.AddrPort
}

func newHousehold(t *testing.T, l *lab.Lab) *household {
	h := &household{Lab: l, host: l.Nodes[users], laptop: l.Nodes[laptop]}
	for i := range 2 {
		h.lan[i] = labtest.Service(t, l.Control, netip.AddrPortFrom(usersLAN[i], 0))
		h.outside[i] = labtest.Service(t, l.Control, netip.AddrPortFrom(outside[i], 0))
	}
	labtest.Sh(t, h.host.Machine, "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
	labtest.StartTailscaled(t, h.host)
	labtest.Up(t, l, h.host, labtest.AuthKey(t, l), "--hostname=users-own", "--advertise-routes="+lanRoutes, "--advertise-exit-node", "--ssh")
	labtest.Approve(t, l, h.host, append(strings.Split(lanRoutes, ","), "0.0.0.0/0", "::/0")...)
	labtest.StartTailscaled(t, h.laptop)
	labtest.Up(t, l, h.laptop, labtest.AuthKey(t, l), "--accept-routes")
	return h
}

const lanRoutes = "192.168.97.0/24,fd97::/64"

// functions says that the laptop reaches the LAN, and the world by the exit node, both as the user's host.
func (h *household) functions(t *testing.T) {
	t.Helper()
	accepted(t, h.laptop, strings.Split(lanRoutes, ",")...)
	for i := range 2 {
		labtest.WantTCP(t, "laptop to the LAN", h.laptop, h.lan[i], h.host.Underlay[i])
		labtest.WantTCP(t, "laptop to the world without exit node", h.laptop, h.outside[i], h.laptop.Underlay[i])
	}
	h.usesExitNode(t, h.laptop, h.host)
}

// usesExitNode says that a device reaches the world as another one while that is its exit node, and only then.
func (h *household) usesExitNode(t *testing.T, device, exit *lab.Node) {
	t.Helper()
	for _, c := range []struct {
		node string
		seen *lab.Node
	}{{labtest.TailnetAddrs(t, exit)[0].String(), exit}, {"", device}} {
		labtest.Eventually(t, "choose the exit node", func() error { // of which the device may still have to hear
			_, err := device.Run(labtest.Within(t), "tailscale", "set", "--exit-node="+c.node)
			return err
		})
		for i := range 2 {
			labtest.Eventually(t, fmt.Sprintf("%s to the world, with the exit node %q", device.Name, c.node), func() error {
				seen, err := lab.Ask(t.Context(), device, h.outside[i])
				if err == nil && seen != c.seen.Underlay[i] {
					err = fmt.Errorf("came from %s", seen)
				}
				return err
			})
		}
	}
}

// What a user has made of their host's tailscaled stays as it is, and works as before, from start to uninstall.
func TestHostMode(t *testing.T) {
	l := membership.Enter(t)
	h := newHousehold(t, l)
	n := h.host
	h.functions(t)
	before := labtest.Prefs(t, n)
	if before["NoSNAT"] != false || before["RunSSH"] != true || before["Hostname"] != "users-own" {
		t.Fatalf("the user's prefs are not what they set: %v", before)
	}
	if err := n.ConfigureDaemon(nil); err != nil {
		t.Fatal(err)
	}
	labtest.StartDaemon(t, n)
	wantPrefs(t, "daemon started", n, withOurs(before, n))
	h.functions(t)
	t.Run("by our masquerade", func(t *testing.T) { h.testOurMasquerade(t) })
	labtest.Stop(t, n.Daemon)
	wantPrefs(t, "daemon stopped", n, withOurs(before, n))
	labtest.StartDaemon(t, n)
	wantPrefs(t, "daemon started again", n, withOurs(before, n))

	before = h.testUserChanges(t, before)
	h.functions(t)
	t.Run("with the laptop as exit node", func(t *testing.T) { h.testTurned(t) })
	wantPrefs(t, "the exit node again", n, withOurs(before, n))

	labtest.Stop(t, n.Daemon)
	if out, err := n.Run(labtest.Within(t), "headcni-daemon", "uninstall"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	wantPrefs(t, "uninstalled", n, before)
	h.functions(t)
}

// NoSNAT, which pods need, takes the function of the user's router; our rules give it back.
func (h *household) testOurMasquerade(t *testing.T) {
	labtest.Kill(t, h.host.Daemon)
	for i, v6 := range []bool{false, true} {
		labtest.Sh(t, h.host.Machine, "nft flush chain %s headcni postrouting", []string{"ip", "ip6"}[i])
		labtest.WantRefused(t, "without it, "+labtest.Family(v6), h.laptop, h.lan[i])
	}
	labtest.StartDaemon(t, h.host)
	h.functions(t)
}

// testTurned has the host use the laptop as its exit node. tailscaled allows nobody to be one and use one.
func (h *household) testTurned(t *testing.T) {
	labtest.Sh(t, h.host.Machine, "tailscale set --advertise-exit-node=false")
	labtest.Sh(t, h.laptop.Machine, "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1; tailscale set --advertise-exit-node")
	labtest.Approve(t, h.Lab, h.laptop, "0.0.0.0/0", "::/0")
	h.usesExitNode(t, h.host, h.laptop)
	labtest.Sh(t, h.laptop.Machine, "tailscale set --advertise-exit-node=false")
	labtest.Sh(t, h.host.Machine, "tailscale set --advertise-exit-node")
}

// testUserChanges has the user change their mind while the daemon runs, and returns what is theirs in the end.
func (h *household) testUserChanges(t *testing.T, before map[string]any) map[string]any {
	n := h.host
	theirs := func(change map[string]any) map[string]any {
		p := maps.Clone(before)
		maps.Copy(p, change)
		return p
	}
	exit := []any{"0.0.0.0/0", "::/0"}
	lan := []any{"192.168.97.0/24", "fd97::/64"}
	for _, c := range []struct {
		command string
		now     map[string]any
	}{
		{"tailscale set --advertise-routes=" + lanRoutes + ",192.168.95.0/24",
			theirs(map[string]any{"AdvertiseRoutes": slices.Concat(lan, exit, []any{"192.168.95.0/24"})})},
		{"tailscale set --advertise-routes=" + lanRoutes, before},
		{"tailscale set --accept-routes=false --hostname=renamed", theirs(map[string]any{"Hostname": "renamed"})},
		{"tailscale up --reset --login-server=" + h.Control.URL + " --accept-dns=false --advertise-exit-node --advertise-routes=" + lanRoutes,
			theirs(map[string]any{"Hostname": "", "RunSSH": false})},
	} {
		labtest.Sh(t, n.Machine, "%s", c.command)
		wantPrefs(t, c.command, n, withOurs(c.now, n))
		before = c.now
	}
	return before
}

// A node that was deleted in Headscale goes on saying Running. The daemon notices within a minute and joins anew.
func TestForgotten(t *testing.T) {
	l := membership.Enter(t)
	n := l.Nodes[forgotten]
	labtest.Start(t, n, nil)
	labtest.Ready(t, n)
	old, err := labtest.Registered(t, l, n)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Control.Run(labtest.Within(t), "headscale", "nodes", "delete", "--force", "-i", old.ID.String()); err != nil {
		t.Fatal(err)
	}
	again := func(what string, ok func(headscale.Node) bool) {
		t.Helper()
		labtest.EventuallyWithin(t, minutes, what, func() error {
			node, err := labtest.Registered(t, l, n)
			if err == nil && (node.NodeKey == old.NodeKey || !ok(node)) {
				err = fmt.Errorf("Headscale has %+v", node)
			}
			return err
		})
	}
	has := func(routes []netip.Prefix) bool {
		return slices.Contains(routes, n.PodCIDRs[0]) && slices.Contains(routes, n.PodCIDRs[1])
	}
	again("approved", func(node headscale.Node) bool { return has(node.Approved) })
	restartForRoutes(t, l)
	again("routed", func(node headscale.Node) bool { return has(node.Primary) })
	labtest.Ready(t, n)
}

// restartForRoutes restarts Headscale 0.27 and 0.28: to them a deleted node serves its routes until they end.
func restartForRoutes(t *testing.T, l *lab.Lab) {
	t.Helper()
	h, err := labtest.Headscale(t, l).Health(labtest.Within(t))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(h.Version, "v0.27.") && !strings.HasPrefix(h.Version, "v0.28.") {
		return
	}
	labtest.Kill(t, l.Control.Headscale)
	if err := l.Control.StartHeadscale(labtest.Within(t)); err != nil {
		t.Fatal(err)
	}
}

// Where it is our doing that a node cannot reach Headscale, it is taken back.
func TestDeadman(t *testing.T) {
	l := membership.Enter(t)
	n, peer := l.Nodes[cutOff], l.Nodes[router]
	at := netip.AddrPortFrom(headscaleAt[0], netip.MustParseAddrPort(strings.TrimPrefix(l.Control.URL, "http://")).Port())
	configure := func(lanFirst string) func(*lab.Node, map[string]any) {
		return func(_ *lab.Node, c map[string]any) {
			labtest.Section(c, "headscale")["url"] = "http://" + at.String()
			labtest.Section(c, "network")["lanFirst"] = lanFirst
		}
	}
	labtest.Start(t, n, configure("false"))
	labtest.Ready(t, n)
	labtest.StartTailscaled(t, peer)
	labtest.Up(t, l, peer, labtest.AuthKey(t, l))
	advertise(t, l, peer, "192.168.99.0/24")
	accepted(t, n, "192.168.99.0/24")
	if err := dialTCP(n, at); err == nil {
		t.Fatal("Headscale is reached although a peer took its prefix")
	}
	takenBack := func() error {
		if text, _ := labtest.Part(t, n, "config"); !strings.Contains(text, "taken back") || !strings.Contains(text, "network.lanFirst") {
			return fmt.Errorf("config: %q", text)
		}
		return nil
	}
	labtest.EventuallyWithin(t, minutes, "take the routes back", takenBack)
	wantTakenBack(t, n, at)
	// Not tried again by a restart, but with another configuration.
	labtest.Kill(t, n.Daemon)
	if err := n.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "after a restart", func() error {
		if _, err := n.Run(labtest.Within(t), "sh", "-c", "headcni-daemon status | grep ^node"); err != nil {
			return err // not up yet
		}
		return takenBack()
	})
	wantTakenBack(t, n, at)
	labtest.Kill(t, n.Daemon)
	if err := n.ConfigureDaemon(configure("true")); err != nil {
		t.Fatal(err)
	}
	labtest.StartDaemon(t, n)
	accepted(t, n, "192.168.99.0/24")
	if err := dialTCP(n, at); err != nil {
		t.Error(err)
	}
}

// wantTakenBack says that the node has its Headscale again, by no rules of ours, and still sends nothing in clear.
func wantTakenBack(t *testing.T, n *lab.Node, at netip.AddrPort) {
	t.Helper()
	labtest.Eventually(t, "reach Headscale again", func() error { return dialTCP(n, at) })
	if rules := labtest.Sh(t, n.Machine, "ip rule; ip -6 rule"); strings.Contains(rules, "\n51") {
		t.Errorf("rules of ours are left:\n%s", rules)
	}
	if p := labtest.Prefs(t, n); p["RouteAll"] != false || p["AdvertiseRoutes"] != nil && len(p["AdvertiseRoutes"].([]any)) > 0 {
		t.Errorf("prefs of ours are left: %v", p)
	}
	if guard := labtest.Sh(t, n.Machine, "nft list chain ip headcni guard"); !strings.Contains(guard, "drop") {
		t.Errorf("the guard is gone:\n%s", guard)
	}
}

func dialTCP(n *lab.Node, to netip.AddrPort) error {
	return n.Do(func() error { return dialFor(answer, to) })
}
