package sites

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/nodestatus"
)

// Every pair of places reaches each other, in both directions and families, with packets of full size and the pods' own
// addresses, and nothing of it is in clear on what is the internet here.
func TestPairs(t *testing.T) {
	w := sites.Enter(t)
	stop := labtest.Capture(t, w.Lab)
	pairs(t, w)
	labtest.NoneInClear(t, stop())
}

// pairs has each pair of a world's pods talk.
func pairs(t *testing.T, w world) {
	t.Helper()
	each(w, func(a, b *lab.Pod) {
		for _, v6 := range []bool{false, true} {
			what := fmt.Sprintf("%s and %s, %s", a.Node.Name, b.Node.Name, labtest.Family(v6))
			labtest.WantTCP(t, what, a, labtest.Echo(b, v6), a.Addr(v6))
			labtest.WantTCP(t, what, b, labtest.Echo(a, v6), b.Addr(v6))
			size := 1280 - 28 // the tunnel is as large as tailscaled makes it
			if v6 {
				size -= 20
			}
			labtest.WantUDP(t, what, a, b.Addr(v6), size, a.Addr(v6))
			labtest.WantUDP(t, what, b, a.Addr(v6), size, b.Addr(v6))
		}
	})
}

// What can be direct becomes so, and the rest is reached by the relay.
func TestPaths(t *testing.T) {
	w := sites.Enter(t)
	for i, a := range w.pods {
		for j, b := range w.pods[i+1:] {
			yes, maybe := direct(places[i].site, places[i+1+j].site)
			if !yes {
				continue // looked at below, when the others have had their time
			}
			if !maybe {
				wantDirect(t, a, b)
			}
		}
	}
	for i, a := range w.pods {
		for j, b := range w.pods[i+1:] {
			if yes, _ := direct(places[i].site, places[i+1+j].site); yes {
				continue
			}
			wantRelayed(t, a, b)
		}
	}
}

// wantDirect waits until two pods' nodes reach each other directly.
func wantDirect(t testing.TB, a, b *lab.Pod) {
	t.Helper()
	for _, p := range [][2]*lab.Pod{{a, b}, {b, a}} {
		labtest.Eventually(t, fmt.Sprintf("wait for a direct path from %s to %s", p[0].Node.Name, p[1].Node.Name), func() error {
			if _, _, err := lab.Echo(t.Context(), p[0], p[1].Addr(false), 64); err != nil {
				return err
			}
			if path := pathTo(t, p[0].Node, p[1].Node); path != "direct" {
				return fmt.Errorf("it is %s", path)
			}
			return nil
		})
	}
}

// wantRelayed holds that a pod reaches another one by the relay.
func wantRelayed(t testing.TB, a, b *lab.Pod) {
	t.Helper()
	labtest.WantUDP(t, "by the relay", a, b.Addr(false), 64, a.Addr(false))
	if path := pathTo(t, a.Node, b.Node); path != "relayed" {
		t.Errorf("%s reaches %s on a path that is %s: the routers are not what they should be", a.Node.Name, b.Node.Name, path)
	}
}

// each calls do for all pairs of pods.
func each(w world, do func(a, b *lab.Pod)) {
	for i, a := range w.pods {
		for _, b := range w.pods[i+1:] {
			do(a, b)
		}
	}
}

// pathTo is how a node reaches another, as the daemon says.
func pathTo(t testing.TB, from, to *lab.Node) string {
	t.Helper()
	for _, p := range status(t, from).Tailnet.Peers {
		if p.Name == to.Name {
			return p.Path
		}
	}
	t.Fatalf("%s does not know %s", from.Name, to.Name)
	return ""
}

// status is what a node says of itself. With the race detector a program sleeps for a second before it ends, unless it is told not to.
func status(t testing.TB, n *lab.Node) (s nodestatus.Status) {
	t.Helper()
	if err := json.Unmarshal([]byte(labtest.Sh(t, n.Machine, "GORACE=atexit_sleep_ms=0 headcni-daemon status -o json || :")), &s); err != nil {
		t.Fatal(err)
	}
	if s.Tailnet == nil {
		t.Fatalf("tailscaled of %s does not answer", n.Name)
	}
	return s
}
