package sites

import (
	"slices"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config"
)

func TestMain(m *testing.M) { labtest.Main(m, 2) }

// place is where a node of world stands, which has its name.
type place struct {
	name string
	site lab.Site
}

// places are in the order of the nodes.
var places = []place{
	{"cloud", lab.Site{}},
	{"home", lab.Site{NAT: lab.Easy}},
	{"office", lab.Site{NAT: lab.Hard, Strict: true}},
	{"branch", lab.Site{NAT: lab.Hard, Strict: true, MTU: 1400}},
	{"carrier", lab.Site{NAT: lab.Easy, Strict: true, Carrier: true, MTU: 1492}},
	{"linux", lab.Site{NAT: lab.Easy, OpenInput: true}},
	{"noudp", lab.Site{NAT: lab.Easy, Strict: true, NoUDP: true}},
	{"opened", lab.Site{NAT: lab.Hard, Opened: true}},
	{"dual", lab.Site{NAT: lab.Hard, IPv6: true}},
	{"dual2", lab.Site{NAT: lab.Hard, IPv6: true, MTU: 1400}},
	{"upnp", lab.Site{NAT: lab.Hard, Strict: true, PortMapping: lab.UPnP}},
}

// direct tells whether two places meet without the relay. maybe is where it is decided by whose packet comes first.
func direct(a, b lab.Site) (yes, maybe bool) {
	// reached is a node that others can send to first.
	reached := func(s lab.Site) bool { return s == lab.Site{} || s.Opened || s.PortMapping != "" }
	switch {
	case a.NoUDP || b.NoUDP:
		return false, false
	case reached(a), reached(b), a.IPv6 && b.IPv6:
		return true, false
	case a.NAT == lab.Hard || b.NAT == lab.Hard:
		return false, false
	}
	return true, a.OpenInput || b.OpenInput
}

// world is one node in each place, with a pod on it.
type world struct {
	*lab.Lab
	pods []*lab.Pod
}

var sites = labtest.OneByOne(func(t testing.TB) world {
	return newWorld(t, lab.Options{Modes: []string{config.ModeHost, config.ModeDaemon}})
})

func newWorld(t testing.TB, opt lab.Options) world {
	t.Helper()
	opt.Nodes, opt.Spare, opt.Bin = len(places), len(places), labtest.Programs(t)
	for _, p := range places {
		opt.Names, opt.Sites = append(opt.Names, p.name), append(opt.Sites, p.site)
	}
	w := world{Lab: labtest.New(t, opt)}
	// Not all at once: Headscale takes a tenth of a second of a processor for each look at an API key.
	for wave := range slices.Chunk(w.Nodes, 3) {
		for _, n := range wave {
			labtest.Start(t, n, nil)
		}
		for _, n := range wave {
			labtest.Ready(t, n)
		}
	}
	for _, n := range w.Nodes {
		w.pods = append(w.pods, labtest.AddPod(t, n, "pod-"+n.Name, lab.PodOptions{}))
	}
	return w
}
