package hosts

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/headscale"
)

func TestMain(m *testing.M) {
	// Most of these tests wait most of the time. A -parallel of the caller's still counts: flags are parsed later.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	nstest.Main(m)
}

const (
	// moment is how long something is looked at that must not happen.
	moment = 700 * time.Millisecond
	// answer is how long a connection that works may take.
	answer = 3 * time.Second
)

const (
	host   = config.ModeHost
	daemon = config.ModeDaemon
)

// TestHosts tests on three labs at once, each of which is broken and mended many times.
func TestHosts(t *testing.T) {
	nstest.Require(t)
	bin := labtest.Programs(t)
	for name, test := range map[string]func(*testing.T, string){
		"surroundings": testSurroundings, "never in clear": testNeverInClear, "membership": testMembership,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, bin)
		})
	}
}

// sh runs a line of shell on a machine, and must succeed.
func sh(t *testing.T, m *lab.Machine, format string, args ...any) string {
	t.Helper()
	out, err := m.Run(labtest.Within(t), "bash", "-euo", "pipefail", "-c", fmt.Sprintf(format, args...))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func startDaemon(t *testing.T, nodes ...*lab.Node) {
	t.Helper()
	for _, n := range nodes {
		if err := n.StartDaemon(); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range nodes {
		labtest.Ready(t, n)
	}
}

func kill(t *testing.T, processes ...*lab.Process) {
	t.Helper()
	for _, p := range processes {
		if err := p.Kill(); err != nil {
			t.Fatal(err)
		}
	}
}

// addPod makes a pod that ends with the lab.
func addPod(t *testing.T, n *lab.Node, name string) *lab.Pod {
	t.Helper()
	p, err := n.AddPod(labtest.Within(t), name, lab.PodOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// up joins a tailscaled that a user has started, without anything of ours.
func up(t *testing.T, l *lab.Lab, n *lab.Node, args ...string) {
	t.Helper()
	out, err := l.Control.Run(labtest.Within(t), "headscale", "preauthkeys", "create", "--expiration", "24h", "--user", "1")
	if err != nil {
		t.Fatal(err)
	}
	words := strings.Fields(out)
	if len(words) == 0 {
		t.Fatal("headscale preauthkeys create printed nothing")
	}
	args = append([]string{"up", "--login-server=" + l.Control.URL, "--auth-key=" + words[len(words)-1], "--accept-dns=false"}, args...)
	if _, err := n.Run(labtest.Within(t), "tailscale", args...); err != nil {
		t.Fatal(err)
	}
}

// headscaleAPI is an administrator's.
func headscaleAPI(t *testing.T, l *lab.Lab) *headscale.Client {
	t.Helper()
	api, err := headscale.New(headscale.Options{
		URL: l.Control.URL, Key: secret.New(l.Control.APIKey),
		Transport: &http.Transport{DialContext: l.Control.Dial, DisableKeepAlives: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	return api
}

// registered is what Headscale has of a node that is in the tailnet.
func registered(t *testing.T, l *lab.Lab, n *lab.Node) (headscale.Node, error) {
	t.Helper()
	nodes, err := headscaleAPI(t, l).Nodes(labtest.Within(t))
	if err != nil {
		return headscale.Node{}, err
	}
	addr := tailnetAddrs(t, n)[0]
	for _, node := range nodes {
		if slices.Contains(node.IPs, addr) {
			return node, nil
		}
	}
	return headscale.Node{}, fmt.Errorf("Headscale has no node with the address %s", addr)
}

// advertise has the user of a node advertise these routes and no others, and approves them.
func advertise(t *testing.T, l *lab.Lab, n *lab.Node, routes ...string) {
	t.Helper()
	if _, err := n.Run(labtest.Within(t), "tailscale", "set", "--advertise-routes="+strings.Join(routes, ",")); err != nil {
		t.Fatal(err)
	}
	approve(t, l, n, routes...)
}

// approve approves routes beside those that are approved already.
func approve(t *testing.T, l *lab.Lab, n *lab.Node, routes ...string) {
	t.Helper()
	node, err := registered(t, l, n)
	if err != nil {
		t.Fatal(err)
	}
	var want []netip.Prefix
	for _, r := range routes {
		want = append(want, netip.MustParsePrefix(r))
	}
	if _, err := headscaleAPI(t, l).ApproveRoutes(labtest.Within(t), node.ID, want, nil); err != nil {
		t.Fatal(err)
	}
}

// accepted waits until a node has routes in tailscaled's table.
func accepted(t *testing.T, n *lab.Node, routes ...string) {
	t.Helper()
	labtest.Eventually(t, "wait for accepted routes", func() error {
		have := strings.Fields(sh(t, n.Machine, "ip route show table 52; ip -6 route show table 52"))
		for _, r := range routes {
			if !slices.Contains(have, r) {
				return fmt.Errorf("%s has no route to %s", n.Name, r)
			}
		}
		return nil
	})
}

func tailnetAddrs(t *testing.T, n *lab.Node) []netip.Addr {
	t.Helper()
	var addrs []netip.Addr
	labtest.Eventually(t, "wait for the tailnet's addresses", func() (err error) {
		addrs, err = n.TailnetAddrs()
		if err == nil && len(addrs) == 0 {
			err = errors.New("none")
		}
		return err
	})
	return addrs
}

// controlAddr is the control host's address on the underlay, where the nodes' are 11 and up.
func controlAddr(l *lab.Lab, v6 bool) netip.Addr {
	b := l.Nodes[0].Underlay[index(v6)].AsSlice()
	b[len(b)-1] = 1
	a, _ := netip.AddrFromSlice(b)
	return a
}

func index(v6 bool) int {
	if v6 {
		return 1
	}
	return 0
}

func family(v6 bool) string {
	if v6 {
		return "IPv6"
	}
	return "IPv4"
}

// ip is `ip` for a family.
func ip(v6 bool) string {
	if v6 {
		return "ip -6"
	}
	return "ip -4"
}

// echo is a pod's server that tells where a connection comes from.
func echo(p *lab.Pod, v6 bool) netip.AddrPort { return netip.AddrPortFrom(p.Addr(v6), lab.EchoPort) }

// wants connects to a service until it answers, and must be seen there as want. The first handshake with a node that has
// just joined takes seconds where it goes wrong. A wrong answer is one.
func wants(t *testing.T, what string, from lab.Place, to netip.AddrPort, want netip.Addr) {
	t.Helper()
	deadline := time.Now().Add(labtest.Soon)
	for {
		seen, err := lab.Ask(t.Context(), from, to)
		switch {
		case err == nil && seen == want:
			return
		case err == nil:
			t.Errorf("%s: came from %v, want %v", what, seen, want)
			return
		case time.Now().After(deadline):
			t.Errorf("%s: %v", what, err)
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// refused must not get an answer, not even within a while in which anything that works has answered.
func refused(t *testing.T, what string, from lab.Place, to netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), moment)
	defer cancel()
	if seen, err := lab.Ask(ctx, from, to); err == nil {
		t.Errorf("%s: answered, to %v", what, seen)
	}
}
