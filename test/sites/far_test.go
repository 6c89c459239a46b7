package sites

import (
	"fmt"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// A site at the end of a line that takes 40 ms each way, loses one frame in fifty and is slow joins like others: packets of full size, a direct path, and
// no direction that stays dark.
func TestFarSite(t *testing.T) {
	l := labtest.New(t, lab.Options{
		Nodes: 2, Names: []string{"home", "far"}, Bin: labtest.Programs(t),
		Sites: []lab.Site{{NAT: lab.Easy}, {NAT: lab.Easy, Wire: lab.Wire{Delay: 40 * time.Millisecond, Loss: 0.02, Rate: 50e6}}},
	})
	w := world{Lab: l}
	for _, n := range l.Nodes {
		w.pods = append(w.pods, labtest.AddPod(t, n, "pod-"+n.Name, lab.PodOptions{}))
	}
	stop := labtest.Capture(t, l)
	flows := labtest.StartFlows(t, w.pods[0], w.pods[1])
	flows.WaitBack(t, time.Now())
	pairs(t, w)
	labtest.Eventually(t, "wait for a direct path", func() error {
		if path := pathTo(t, l.Nodes[0], l.Nodes[1]); path != "direct" {
			return fmt.Errorf("it is %s", path)
		}
		return nil
	})
	for range 3 { // no direction goes dark again
		flows.WaitBack(t, time.Now().Add(labtest.Moment))
	}
	for _, r := range flows.Stop() {
		if r.Lost == 0 {
			t.Errorf("%+v: nothing was lost, so the line is not what it should be", r)
		}
	}
	labtest.NoneInClear(t, stop())
}
