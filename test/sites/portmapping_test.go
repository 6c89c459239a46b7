package sites

import (
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config"
)

// Behind a hard NAT whose router maps ports, tailscaled asks for one by itself: such a node and one behind another hard NAT meet directly, where two without meet at the relay
// only. A router that restarts forgets the port, and tailscaled is not told: pods go on by the relay until it asks again,
// as it does at once when it is started anew.
func TestPortMapping(t *testing.T) {
	hard := lab.Site{NAT: lab.Hard, Strict: true}
	natpmp := hard
	natpmp.PortMapping = lab.NATPMP
	l := labtest.New(t, lab.Options{
		Nodes: 3, Names: []string{"office", "natpmp", "branch"}, Modes: []string{config.ModeHost, config.ModeDaemon}, Bin: labtest.Programs(t),
		Sites: []lab.Site{hard, natpmp, hard},
	})
	w := world{Lab: l}
	for _, n := range l.Nodes {
		w.pods = append(w.pods, labtest.AddPod(t, n, "pod-"+n.Name, lab.PodOptions{}))
	}
	stop := labtest.Capture(t, l)
	pairs(t, w)
	office, mapped, branch := w.pods[0], w.pods[1], w.pods[2]
	wantDirect(t, office, mapped)
	wantDirect(t, branch, mapped)
	wantRelayed(t, office, branch)

	restart := fault{name: "the receiver's router restarts", do: func(t testing.TB, w world) time.Time {
		if err := mapped.Node.Routers[0].Restart(labtest.Within(t)); err != nil {
			t.Fatal(err)
		}
		return time.Now()
	}}
	w.recover(t, restart, [][2]string{{"office", "natpmp"}})
	pairs(t, w)
	t.Logf("after the restart the path from office to natpmp is %s", pathTo(t, office.Node, mapped.Node))

	labtest.Kill(t, mapped.Node.Tailscaled)
	labtest.StartTailscaled(t, mapped.Node)
	wantDirect(t, office, mapped)
	wantDirect(t, branch, mapped)
	labtest.NoneInClear(t, stop())
}
