// Package reliability breaks one part of a small world after another and counts what pods on two nodes lose of each
// other meanwhile, and what leaves the nodes in clear: nothing may.
//
// A few faults run with the other tests. `make bench-faults` goes through all of them and prints the table of
// docs/reliability.md.
package reliability

import (
	"flag"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
)

var (
	all     = flag.Bool("all", false, "all faults, and print the table")
	outage  = flag.Duration("outage", 5*time.Minute, "how long Headscale is dead")
	cutFor  = flag.Duration("cut", 30*time.Second, "how long the underlay is cut")
	repeats = flag.Int("repeats", 2, "how often each fault of tailscaled strikes each node and direction")
)

// settled is how long flows are left alone before and after a fault.
const settled = time.Second

func TestMain(m *testing.M) {
	flag.Parse()
	nstest.Main(m)
}

// world is a lab with one pod on each of two nodes, the first in host mode, the second in daemon mode.
type world struct {
	*lab.Lab
	bin  string
	pods []*lab.Pod
}

// kind is what worlds differ in: whether nodes may keep maps of the tailnet, and where the relay is.
type kind struct {
	cache, relay bool
}

func (k kind) String() string {
	maps, relay := "no cached maps", "relay in Headscale"
	if k.cache {
		maps = "cached maps"
	}
	if k.relay {
		relay = "relay apart"
	}
	return maps + ", " + relay
}

// inWorld runs test in a world of its own.
func inWorld(t *testing.T, k kind, test func(*testing.T, *world)) {
	t.Run(k.String(), func(t *testing.T) { test(t, newWorld(t, k)) })
}

func newWorld(t *testing.T, k kind) *world {
	t.Helper()
	w := &world{bin: labtest.Programs(t)}
	w.Lab = labtest.New(t, lab.Options{
		Modes: []string{config.ModeHost, config.ModeDaemon}, Bin: w.bin, Relay: k.relay, Batch: 500 * time.Millisecond,
		Policy: func(p map[string]any) {
			if k.cache {
				p["nodeAttrs"] = []map[string]any{{"target": []string{lab.Tag}, "attr": []string{"cache-network-maps"}}}
			}
		},
	})
	for _, n := range w.Nodes {
		p, err := n.AddPod(labtest.Within(t), "probe", lab.PodOptions{Idle: true})
		must(t, err)
		w.pods = append(w.pods, p)
	}
	return w
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
