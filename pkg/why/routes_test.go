package why

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/nodestatus"
)

// TestRoutes: of each range it is said whose turn it is: its node's, Headscale's, or another node's kernel's.
func TestRoutes(t *testing.T) {
	node := func(n byte, name string, advertised bool, peers ...nodestatus.Peer) doctor.Node {
		return doctor.Node{Name: name, PodCIDRs: routes(n), Status: &nodestatus.Status{Tun: "headcni01",
			PodCIDRs: []nodestatus.PodCIDR{{CIDR: routes(n)[0], Advertised: advertised}}, Tailnet: &nodestatus.Tailnet{Peers: peers}}}
	}
	peer := func(n byte) nodestatus.Peer { return nodestatus.Peer{Name: "x", PodCIDRs: routes(n)} }
	tunnel, out := Route{Dev: "headcni01"}, Route{Dev: "eth0"}
	at := func(n byte) netip.Addr { return routes(n)[0].Addr() }
	right := func() (doctor.Seen, map[string]map[netip.Addr]Route) {
		return doctor.Seen{Nodes: []doctor.Node{node(1, "a", true, peer(2)), node(2, "b", true, peer(1))}},
			map[string]map[netip.Addr]Route{"a": {at(2): tunnel}, "b": {at(1): tunnel}}
	}
	for name, c := range map[string]struct {
		change func(*doctor.Seen, map[string]map[netip.Addr]Route, map[string]error)
		want   []string
		says   string
	}{
		"right": {func(*doctor.Seen, map[string]map[netip.Addr]Route, map[string]error) {}, nil, "10.244.1.0/24  a     yes         yes       1 of 1 others"},
		"not advertised": {func(s *doctor.Seen, _ map[string]map[netip.Addr]Route, _ map[string]error) {
			*s = doctor.Seen{Nodes: []doctor.Node{node(1, "a", true, peer(2)), node(2, "b", true)}}
			s.Nodes[0].Status.PodCIDRs[0].Advertised = false
		}, []string{"a " + string(findings.NotReady)}, "no          no"},
		"not approved": {func(s *doctor.Seen, k map[string]map[netip.Addr]Route, _ map[string]error) {
			s.Nodes[1].Status.Tailnet.Peers = nil
			k["b"] = map[netip.Addr]Route{at(1): {Error: "network is unreachable"}}
		}, []string{"a " + string(findings.NotApproved)}, "yes         no        0 of 1 others"},
		"in clear": {func(_ *doctor.Seen, k map[string]map[netip.Addr]Route, _ map[string]error) {
			k["b"] = map[netip.Addr]Route{at(1): out}
		}, []string{"b " + string(findings.TunnelRoutes)}, "10.244.1.0/24 of a: by eth0"},
		"a silent kernel": {func(_ *doctor.Seen, _ map[string]map[netip.Addr]Route, e map[string]error) {
			e["b"] = errors.New("no answer")
		}, nil, "b  could not be asked: no answer"},
		"a silent node": {func(s *doctor.Seen, _ map[string]map[netip.Addr]Route, _ map[string]error) {
			s.Nodes[1].Status, s.Nodes[1].Err = nil, errors.New("it is away")
		}, nil, "10.244.2.0/24  b     yes         yes        1 of 1 others"},
	} {
		t.Run(name, func(t *testing.T) {
			s, kernels := right()
			errs := map[string]error{}
			c.change(&s, kernels, errs)
			r := NewRoutes("1", s, kernels, errs)
			var got []string
			for _, f := range r.Findings {
				got = append(got, f.Where+" "+string(f.ID))
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
			if r.OK != (name == "right") {
				t.Errorf("right: %v", r.OK)
			}
			var b strings.Builder
			if err := r.Print(&b, 0); err != nil || !strings.Contains(b.String(), c.says) {
				t.Errorf("%v, want %q:\n%s", err, c.says, b.String())
			}
		})
	}
}
