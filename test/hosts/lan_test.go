package hosts

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/nodestatus"
)

// A host beside a node that routes everything of the cluster's over it reaches no pod of any site, whatever else is dead, and ports of
// the node go on leading to pods.
func TestLANIngress(t *testing.T) {
	w := surroundings.Enter(t)
	serve(t, w)
	for _, n := range w.nodes() {
		t.Run(n.Mode, func(t *testing.T) {
			routeOver(t, w, n)
			w.lanShut(t, "as it is")
			labtest.Kill(t, n.Daemon)
			w.lanShut(t, "without the daemon")
			labtest.Sh(t, n.Machine, "conntrack -F 2>/dev/null")
			w.lanShut(t, "with nothing in conntrack")
			w.servicesWork(t)
			// The proof that it could be reached: by our rules alone it is not.
			own := w.a1
			if n == w.b {
				own = w.b1
			}
			for i, v6 := range []bool{false, true} {
				labtest.Sh(t, n.Machine, "for c in forward antispoof last; do nft flush chain %s headcni $c; done", families[i])
				for _, to := range []netip.AddrPort{labtest.Echo(own, v6), clusterIPs[i]} {
					if _, err := lab.Ask(labtest.Within(t), w.Control, to); err != nil {
						t.Errorf("without our rules, to %s: %v", to, err)
					}
				}
			}
			labtest.StartDaemon(t, n)
			w.lanShut(t, "with the daemon back")
		})
	}
	w.works(t)
}

// Whoever wants it so lets the LAN in.
func TestLANIngressAllowed(t *testing.T) {
	w := surroundings.Enter(t)
	serve(t, w)
	n := w.a
	configure := func(value string) {
		t.Helper()
		err := n.ConfigureDaemon(func(n *lab.Node, c map[string]any) {
			withServices(n, c)
			labtest.Section(c, "network")["lanIngress"] = value
		})
		if err != nil {
			t.Fatal(err)
		}
		labtest.Kill(t, n.Daemon)
		labtest.StartDaemon(t, n)
	}
	routeOver(t, w, n)
	configure("allow")
	for i, v6 := range []bool{false, true} {
		labtest.WantTCP(t, "LAN host to a pod", w.Control, labtest.Echo(w.a1, v6), labtest.ControlAddr(w.Lab, v6))
		labtest.WantTCP(t, "LAN host to a pod of another node", w.Control, labtest.Echo(w.b1, v6), labtest.TailnetAddrs(t, n)[i])
		labtest.WantTCP(t, "LAN host to a service", w.Control, clusterIPs[i], labtest.TailnetAddrs(t, n)[i])
	}
	configure("deny")
	w.lanShut(t, "denied again")
	w.works(t)
	w.servicesWork(t)
}

// routeOver has the control host, which is on the nodes' LAN, route all of the cluster's ranges over a node, until the test ends.
func routeOver(t *testing.T, w *world, n *lab.Node) {
	t.Helper()
	ranges := slices.Concat(lab.ClusterCIDRs, lab.ServiceCIDRs,
		[]netip.Prefix{netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("fd7a:115c:a1e0::/48")})
	for _, r := range ranges {
		v6 := r.Addr().Is6()
		labtest.Sh(t, w.Control.Machine, "%s route add %s via %s", ip(v6), r, n.Underlay[labtest.Index(v6)])
		t.Cleanup(func() { labtest.Sh(t, w.Control.Machine, "%s route delete %s", ip(v6), r) })
	}
}

// lanShut says that a host on the LAN reaches neither pods nor services.
func (w *world) lanShut(t *testing.T, what string) {
	t.Helper()
	type target struct {
		name string
		to   netip.AddrPort
	}
	var targets []target
	for i, v6 := range []bool{false, true} {
		for _, p := range []*lab.Pod{w.a1, w.a2, w.b1, w.b2} {
			targets = append(targets, target{p.Name + ", " + labtest.Family(v6), labtest.Echo(p, v6)})
		}
		targets = append(targets, target{"a service, " + labtest.Family(v6), clusterIPs[i]})
	}
	done := make(chan struct{})
	for _, c := range targets {
		go func() {
			defer func() { done <- struct{}{} }()
			labtest.WantRefused(t, what+": LAN host to "+c.name, w.Control, c.to)
		}()
	}
	for range targets {
		<-done
	}
}

// What a node's rules drop is counted, by why, and shown by status and as a metric; the guard has tried itself at the daemon's start,
// and does so for whoever asks, without a trace on the node.
func TestGuardCounts(t *testing.T) {
	w := surroundings.Enter(t)
	n := w.a
	rules := func() string {
		return labtest.Sh(t, n.Machine, "nft -s list ruleset | grep -v -e expires -e 'elements = { .* timeout '; ip rule; ip -6 rule; ip -o link show type veth | grep -v hc || :")
	}
	before := rules()
	if out := labtest.Sh(t, n.Machine, "headcni-daemon check"); strings.Count(out, "stopped, counted as") < 4 {
		t.Errorf("check says\n%s", out)
	}
	if now := rules(); now != before {
		t.Errorf("check has changed the node: it was\n%s\nand is\n%s", before, now)
	}
	forged := func() (count uint64) {
		t.Helper()
		labtest.Eventually(t, "wait for the self-test", func() error {
			var s nodestatus.Status
			if err := json.Unmarshal([]byte(labtest.Sh(t, n.Machine, "headcni-daemon status -o json")), &s); err != nil {
				return err
			}
			if count = s.Dropped[nft.DropPodForged]; !strings.Contains(s.GuardTest, "self-test passed") {
				return fmt.Errorf("the self-test: %q", s.GuardTest)
			}
			return nil
		})
		return count
	}
	first := forged()
	for range 3 {
		if err := forge(w.a1, w.a2.Addr(false), labtest.Echo(w.b1, false), "forged"); err != nil {
			t.Fatal(err)
		}
	}
	if got := forged() - first; got != 3 {
		t.Errorf("%d more are counted as %s, want 3", got, nft.DropPodForged)
	}
	labtest.Kill(t, n.Daemon)
	labtest.StartDaemon(t, n)
	if got := forged() - first; got != 3 {
		t.Errorf("a daemon that has just begun shows %d", got)
	}
}

// With the capabilities of the chart's container the guard cannot try itself: that is no fault, and is said in words and as a metric.
func TestGuardUntried(t *testing.T) {
	w := surroundings.Enter(t)
	n := w.a
	const as = "setpriv --bounding-set -all,+net_admin,+net_raw,+dac_override "
	labtest.Kill(t, n.Daemon)
	var err error
	if n.Daemon, err = n.Start("bash", nil, "-c", "exec "+as+"headcni-daemon run"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		labtest.Kill(t, n.Daemon)
		labtest.StartDaemon(t, n)
		w.works(t)
	}()
	const want = "could not run: this process may not make a network namespace"
	labtest.Eventually(t, "status says that the self-test could not run", func() error {
		if s := labtest.Sh(t, n.Machine, "headcni-daemon status || :"); !strings.Contains(s, want) {
			return errors.New(s)
		}
		return nil
	})
	labtest.Ready(t, n)
	metrics := labtest.Sh(t, n.Machine, "exec 3<>/dev/tcp/127.0.0.1/9669; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3")
	if !strings.Contains(metrics, "\nheadcni_guard_self_test_ran 0\n") || strings.Contains(metrics, "\nheadcni_guard_self_test_ok ") {
		t.Errorf("metrics:\n%s", metrics)
	}
	if out, err := n.Run(t.Context(), "bash", "-c", as+"headcni-daemon check"); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("check: %s, %v", out, err)
	}
}
