package hosts

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// dark is far longer than routes are gone, which is some half a second, also on a busy machine. Where each event put the next look
// off they were gone for 16 s and more.
const dark = 5 * time.Second

// A tun that somebody sets down and up, or whose addresses somebody deletes, carries both families again.
func TestTunComesBack(t *testing.T) {
	w := surroundings.Enter(t)
	for _, n := range w.nodes() {
		for _, what := range []string{"ip link set %[1]s down; ip link set %[1]s up", "ip link set %[1]s down", "ip address flush dev %[1]s scope global"} {
			t.Run(n.Name+": "+strings.ReplaceAll(what, "%[1]s", n.Tun), func(t *testing.T) {
				before := rulesAndRoutes(t, n)
				labtest.Sh(t, n.Machine, what, n.Tun)
				labtest.Eventually(t, "wait for the tun", func() error {
					if now := rulesAndRoutes(t, n); now != before {
						return fmt.Errorf("before:\n%s\nnow:\n%s", before, now)
					}
					return linksRight(t, n)
				})
				w.works(t)
			})
		}
	}
}

// linksRight says what the node's part links says, or that the node is not ready.
func linksRight(t *testing.T, n *lab.Node) error {
	text, ready := labtest.Part(t, n, "links")
	if text != "" || !ready {
		return fmt.Errorf("ready %t: %s", ready, text)
	}
	return nil
}

// While IPv6 is switched off on the tun the node says so, and is not ready; once it is on again all is there.
func TestTunWithoutIPv6(t *testing.T) {
	w := surroundings.Enter(t)
	n := w.a
	labtest.Sh(t, n.Machine, "echo 1 > /proc/sys/net/ipv6/conf/%s/disable_ipv6", n.Tun)
	wantLinks(t, n, "by IPv6", n.Tun, "disable_ipv6=0")
	labtest.Sh(t, n.Machine, "echo 0 > /proc/sys/net/ipv6/conf/%s/disable_ipv6", n.Tun)
	labtest.Eventually(t, "wait for IPv6", func() error { return linksRight(t, n) })
	accepted(t, n, "fd7a:115c:a1e0::/48")
	labtest.Eventually(t, "wait for the peer's pods", func() error {
		if _, err := n.Run(labtest.Within(t), "ip", "-6", "route", "get", w.b1.Addr(true).String()); err != nil {
			return err
		}
		return nil
	})
	w.works(t)
}

// wantLinks waits until the node is not ready, and its part links says why.
func wantLinks(t *testing.T, n *lab.Node, words ...string) {
	t.Helper()
	labtest.Eventually(t, "wait until it is said", func() error {
		text, ready := labtest.Part(t, n, "links")
		for _, word := range words {
			if ready || !strings.Contains(text, word) {
				return fmt.Errorf("ready %t, and %q does not say %q", ready, text, word)
			}
		}
		return nil
	})
}

// Links have switches of their own for forwarding, which new ones take from a third.
func TestLinksForward(t *testing.T) {
	w := surroundings.Enter(t)
	n := w.a
	set := func(link, value string) {
		t.Helper()
		labtest.Sh(t, n.Machine, "echo %s > /proc/sys/net/ipv4/conf/%s/forwarding", value, link)
	}
	set("default", "0")
	defer set("default", "1")
	p := labtest.AddPod(t, n, "forwards", lab.PodOptions{})
	for i, v6 := range []bool{false, true} {
		labtest.WantTCP(t, "to another node", p, labtest.Echo(w.b1, v6), p.Addr(v6))
		labtest.WantTCP(t, "to outside", p, w.outside[i], n.Underlay[i])
	}
	set(n.Tun, "0")
	labtest.Sh(t, n.Machine, "for f in /proc/sys/net/ipv4/conf/hc*/forwarding; do echo 0 > $f; done")
	labtest.Eventually(t, "wait until ours forward", func() error {
		if got := labtest.Sh(t, n.Machine, "cat /proc/sys/net/ipv4/conf/%s/forwarding /proc/sys/net/ipv4/conf/hc*/forwarding", n.Tun); strings.Contains(got, "0") {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
	w.works(t)
	// IPv6 asks the host's switch alone.
	labtest.Sh(t, n.Machine, "for f in /proc/sys/net/ipv6/conf/{default,hc*,%s,eth0}/forwarding; do echo 0 > $f; done", n.Tun)
	w.works(t)
	labtest.Sh(t, n.Machine, "for f in /proc/sys/net/ipv6/conf/{default,hc*,%s,eth0}/forwarding; do echo 1 > $f; done", n.Tun)
	set("eth0", "0")
	wantLinks(t, n, "eth0 does not forward", "sysctl -w net/ipv4/conf/eth0/forwarding=1")
	set("eth0", "1")
	labtest.Eventually(t, "wait for the uplink", func() error { return linksRight(t, n) })
	w.works(t)
}

// Programs that clean routes up take them one by one. Each is back soon, however long the others take.
func TestTunnelRoutesOneByOne(t *testing.T) {
	w := surroundings.Enter(t)
	for _, n := range w.nodes() {
		near, far := w.a1, w.b1
		if n == w.b {
			near, far = w.b1, w.a1
		}
		before := rulesAndRoutes(t, n)
		flows := labtest.StartFlows(t, near, far)
		labtest.Sh(t, n.Machine, `for f in -4 -6; do ip $f route show table 52 | grep dev | while read -r to _; do
			ip $f route delete $to table 52; sleep 0.1; done; done`)
		labtest.Eventually(t, "wait for the routes", func() error {
			if now := rulesAndRoutes(t, n); now != before {
				return fmt.Errorf("before:\n%s\nnow:\n%s", before, now)
			}
			return nil
		})
		for i, r := range flows.Stop() {
			t.Logf("%s: %+v", flows[i].Name, r)
			if r.Longest > dark {
				t.Errorf("%s: %+v", flows[i].Name, r)
			}
		}
	}
}
