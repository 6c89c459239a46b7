package sites

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// A node whose router is why it is relayed says so, and what helps.
func TestSaysWhy(t *testing.T) {
	w := sites.Enter(t)
	for name, want := range map[string]string{"office": "HC408", "noudp": "HC409", "cloud": ""} {
		n := w.Nodes[w.node(name)]
		labtest.Eventually(t, name+" is to say why it is relayed", func() error {
			for _, p := range w.pods { // paths are of who has talked of late
				if p.Node != n {
					if _, _, err := lab.Echo(t.Context(), w.pods[w.node(name)], p.Addr(false), 64); err != nil {
						return err
					}
				}
			}
			out := labtest.Sh(t, n.Machine, "headcnictl doctor || :")
			if want == "" && (strings.Contains(out, "HC408") || strings.Contains(out, "HC409")) || !strings.Contains(out, want) {
				return fmt.Errorf("doctor says:\n%s", out)
			}
			return nil
		})
	}
	if out := labtest.Sh(t, w.Nodes[w.node("office")].Machine, "headcni-daemon status || :"); !strings.Contains(out, "hard NAT") {
		t.Errorf("status does not say that the NAT is hard:\n%s", out)
	}
}

// All LANs are 192.168.1.0/24: a pod reaches the one that it is on, and no other.
func TestSameLAN(t *testing.T) {
	w := sites.Enter(t)
	home, office := w.node("home"), w.node("office")
	for _, at := range [][2]int{{home, office}, {office, home}} {
		n := w.Nodes[at[0]]
		lan := n.Routers[0].Site.LANAddr(1).Addr()
		server := labtest.Service(t, n.Routers[0], netip.AddrPortFrom(lan, 0))
		labtest.WantTCP(t, "in the own LAN", w.pods[at[0]], server, n.Routers[0].Site.LANAddr(10).Addr())
		if seen, err := lab.Ask(t.Context(), w.pods[at[1]], server); err == nil {
			t.Errorf("a pod of %s reaches %s in the LAN of %s, as %s", w.Nodes[at[1]].Name, server, n.Name, seen)
		}
	}
}

// Before anything is installed, a LAN is found that would lead pods astray.
func TestPreflight(t *testing.T) {
	l := labtest.New(t, lab.Options{
		Nodes: 3, Spare: 3, Bin: labtest.Programs(t), Names: []string{"fine", "pods", "carrier"},
		Sites: []lab.Site{
			{NAT: lab.Easy},
			{NAT: lab.Easy, LAN: netip.MustParsePrefix("10.244.7.0/24")},
			{NAT: lab.Easy, LAN: netip.MustParsePrefix("100.66.0.0/24")},
		},
	})
	for i, want := range []string{"", "HC102", "HC118"} {
		out := labtest.Sh(t, l.Nodes[i].Machine, "headcnictl doctor --preflight --set headscale.url=%s --set network.clusterCIDRs=10.244.0.0/16 || :", l.Control.URL)
		if !strings.Contains(out, want) || want != "HC102" && strings.Contains(out, "HC102") || want != "HC118" && strings.Contains(out, "HC118") {
			t.Errorf("%s: want %q:\n%s", l.Nodes[i].Name, want, out)
		}
	}
}
