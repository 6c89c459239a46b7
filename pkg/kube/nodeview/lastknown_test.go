package nodeview

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"github.com/headcni/headcni/pkg/kube"
)

func TestLastKnown(t *testing.T) {
	v := func(n *corev1.Node, pods ...string) *View {
		return &View{Synced: true, Node: n, PodCIDRs: prefixes(pods...)}
	}
	known := LastKnown{Node: "a", PodCIDRs: prefixes("10.244.1.0/24"), ClusterCIDRs: prefixes("10.244.0.0/23")}
	tests := []struct {
		name string
		have LastKnown
		v    *View
		want LastKnown
	}{
		{"nothing said yet", known, &View{}, known},
		{"API server lost later", known, &View{Err: errors.New("refused"), ServiceCIDRs: prefixes("10.96.0.0/16")},
			LastKnown{Node: "a", PodCIDRs: known.PodCIDRs, ClusterCIDRs: known.ClusterCIDRs, ServiceCIDRs: prefixes("10.96.0.0/16")}},
		{"first", LastKnown{}, v(node("a", "10.244.1.0/24", "fd00::/64"), "10.244.1.0/24", "fd00::/64"),
			LastKnown{Node: "a", PodCIDRs: prefixes("10.244.1.0/24", "fd00::/64"), ClusterCIDRs: prefixes("10.244.1.0/24", "fd00::/64")}},
		{"none given yet", LastKnown{}, v(node("a")), LastKnown{Node: "a"}},
		{"Node is gone", known, v(nil, "10.244.0.0/24"), LastKnown{Node: "a", PodCIDRs: known.PodCIDRs, ClusterCIDRs: prefixes("10.244.0.0/24")}},
		{"Node without, made again", known, v(node("a")), LastKnown{Node: "a", PodCIDRs: known.PodCIDRs}},
		{"another", known, v(node("a", "10.244.7.0/24")),
			LastKnown{Node: "a", PodCIDRs: prefixes("10.244.7.0/24"), Leaving: prefixes("10.244.1.0/24")}},
		{"and back", LastKnown{Node: "a", PodCIDRs: prefixes("10.244.7.0/24"), Leaving: prefixes("10.244.1.0/24")}, v(node("a", "10.244.1.0/24")),
			LastKnown{Node: "a", PodCIDRs: prefixes("10.244.1.0/24"), Leaving: prefixes("10.244.7.0/24")}},
		{"renamed", known, v(nil), LastKnown{Node: "b", Leaving: prefixes("10.244.1.0/24")}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			name := "a"
			if tt.name == "renamed" {
				name = "b"
			}
			got, err := tt.have.Update(tt.v, name)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, comparePrefixes); diff != "" {
				t.Error(diff)
			}
		})
	}
	if _, err := known.Update(v(node("a", "10.244.1.7/24")), "a"); err == nil {
		t.Error("took a CIDR with host bits")
	}
	told := v(node("a", "10.244.1.0/24"), "10.244.1.0/24")
	told.Node.Annotations = map[string]string{kube.Headscale: kube.View{State: kube.StatePending, Services: prefixes("10.96.0.0/12")}.String()}
	for _, c := range []struct {
		v    *View
		want int
	}{{told, 1}, {&View{}, 1}, {v(nil), 1}, {v(node("a", "10.244.1.0/24"), "10.244.1.0/24"), 0}} { // away, gone, told no more
		var err error
		if known, err = known.Update(c.v, "a"); err != nil || len(known.Services) != c.want {
			t.Errorf("leads to %v, %v, want %d", known.Services, err, c.want)
		}
	}
	live := prefixes("10.244.1.9/32")[0].Addr()
	l := LastKnown{Leaving: prefixes("10.244.1.0/24", "10.244.2.0/24")}.WithoutVacated([]netip.Addr{live})
	if diff := cmp.Diff(prefixes("10.244.1.0/24"), l.Leaving, comparePrefixes); diff != "" {
		t.Error(diff)
	}
}

// A node goes by what was known last where the API server does not answer, and not while it may still be about to.
func TestUsable(t *testing.T) {
	known := LastKnown{Node: "a", PodCIDRs: prefixes("10.244.1.0/24")}
	for what, c := range map[string]struct {
		l      LastKnown
		v      *View
		waited time.Duration
		want   bool
	}{
		"nothing is known":                      {LastKnown{Node: "a"}, &View{}, time.Hour, false},
		"the API server is asked":               {known, &View{}, time.Second, false},
		"it hangs":                              {known, &View{}, askPatience, true},
		"it cannot be asked":                    {known, &View{Err: errors.New("refused")}, 0, true},
		"it has answered":                       {known, &View{Synced: true, Node: node("a", "10.244.1.0/24")}, 0, true},
		"the Node is new, and has no range yet": {known, &View{Synced: true, Node: node("a")}, time.Second, false},
		"and gets none":                         {known, &View{Synced: true, Node: node("a")}, cidrPatience, true},
		"the Node is gone":                      {known, &View{Synced: true}, 0, true},
	} {
		if err := c.l.Usable(c.v, c.waited); (err == nil) != c.want {
			t.Errorf("%s: %v", what, err)
		}
	}
}
