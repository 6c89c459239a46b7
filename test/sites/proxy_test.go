package sites

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config"
)

// Where only an HTTP proxy leads outside, and names of the outside are known to it alone, nodes join and their pods reach those of others, by the relay.
// The proxy, and Headscale with its relay, may be away and come back.
func TestOnlyProxy(t *testing.T) {
	proxied := lab.Site{NAT: lab.Easy, Proxy: true}
	l := labtest.New(t, lab.Options{
		Nodes: 3, Names: []string{"office", "plant", "cloud"}, Modes: []string{config.ModeDaemon, config.ModeHost, config.ModeDaemon},
		Bin: labtest.Programs(t), TLS: true, Sites: []lab.Site{proxied, proxied, {}},
	})
	w := world{Lab: l}
	for _, n := range l.Nodes {
		w.pods = append(w.pods, labtest.AddPod(t, n, "pod-"+n.Name, lab.PodOptions{}))
	}
	outside := labtest.Service(t, l.Nodes[2], netip.AddrPortFrom(l.Nodes[2].Underlay[0], 0))
	for _, n := range l.Nodes[:2] { // else what follows shows nothing
		ctx, cancel := context.WithTimeout(t.Context(), time.Second) // nobody answers
		defer cancel()
		if c, err := n.Dial(ctx, "tcp", outside.String()); err == nil {
			c.Close()
			t.Errorf("%s reaches what is outside without the proxy", n.Name)
		}
		if out := labtest.Sh(t, n.Machine, "getent hosts headscale.lab || :"); out != "" {
			t.Errorf("%s resolves Headscale's name: %s", n.Name, out)
		}
	}
	stop := labtest.Capture(t, l)
	pairs(t, w)
	each(w, func(a, b *lab.Pod) {
		if path := pathTo(t, a.Node, b.Node); path != "relayed" {
			t.Errorf("the path from %s to %s is %s", a.Node.Name, b.Node.Name, path)
		}
	})

	flows := labtest.StartFlows(t, w.pods[0], w.pods[1])
	for _, n := range l.Nodes[:2] {
		labtest.Kill(t, n.Routers[0].Proxy)
	}
	for _, n := range l.Nodes[:2] {
		if err := n.Routers[0].StartProxy(labtest.Within(t)); err != nil {
			t.Fatal(err)
		}
	}
	flows.WaitBack(t, time.Now())
	labtest.Kill(t, l.Control.Headscale)
	if err := l.Control.StartHeadscale(labtest.Within(t)); err != nil {
		t.Fatal(err)
	}
	flows.WaitBack(t, time.Now())
	if err := l.Control.WaitConnected(labtest.Within(t), len(l.Nodes)); err != nil {
		t.Error(err)
	}
	flows.Stop()
	labtest.NoneInClear(t, stop())
}
