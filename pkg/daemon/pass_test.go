package daemon

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/membership"
	"github.com/headcni/headcni/pkg/tailscale"
)

func TestSharedCGNAT(t *testing.T) {
	prefixes := func(texts ...string) (out []netip.Prefix) {
		for _, s := range texts {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	for name, c := range map[string]struct {
		o    observation
		want string
	}{
		"other networks": {observation{Seen: membership.Seen{Tailnet: &tailscale.Status{}}, hostPrefixes: prefixes("192.168.1.0/24", "100.128.0.0/16", "fd7a::/16")}, ""},
		"inside":         {observation{Seen: membership.Seen{Tailnet: &tailscale.Status{}}, hostPrefixes: prefixes("192.168.1.0/24", "100.64.200.0/24")}, "has 100.64.200.0/24"},
		"around":         {observation{Seen: membership.Seen{Tailnet: &tailscale.Status{}}, hostPrefixes: prefixes("100.0.0.0/8")}, "has 100.0.0.0/8"},
		"allowed":        {observation{Seen: membership.Seen{Tailnet: &tailscale.Status{SharesCGNAT: true}}, hostPrefixes: prefixes("100.64.200.0/24")}, ""},
		"no tailscaled":  {observation{hostPrefixes: prefixes("100.64.200.0/24")}, ""},
	} {
		err := c.o.Tailnet.SharedCGNAT(c.o.hostPrefixes)
		if (err != nil) != (c.want != "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestTailnetLacksFamily(t *testing.T) {
	addrs := func(texts ...string) (out []netip.Addr) {
		for _, s := range texts {
			out = append(out, netip.MustParseAddr(s))
		}
		return out
	}
	both := []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:244:1::/64")}
	for name, c := range map[string]struct {
		status *tailscale.Status
		pods   []netip.Prefix
		want   string
	}{
		"both":           {&tailscale.Status{State: tailscale.Running, Self: tailscale.Peer{IPs: addrs("100.64.0.1", "fd7a:115c:a1e0::1")}}, both, ""},
		"no IPv6":        {&tailscale.Status{State: tailscale.Running, Self: tailscale.Peer{IPs: addrs("100.64.0.1")}}, both, "set prefixes.v6"},
		"no IPv4":        {&tailscale.Status{State: tailscale.Running, Self: tailscale.Peer{IPs: addrs("fd7a:115c:a1e0::1")}}, both, "set prefixes.v4"},
		"none is wanted": {&tailscale.Status{State: tailscale.Running, Self: tailscale.Peer{IPs: addrs("100.64.0.1")}}, both[:1], ""},
		"not in yet":     {&tailscale.Status{State: tailscale.Starting}, both, ""},
		"no tailscaled":  {nil, both, ""},
	} {
		err := c.status.LacksFamily(c.pods)
		if (err != nil) != (c.want != "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// Whatever is wrong with a part has an id, also where the error says none.
func TestEveryPartHasAFinding(t *testing.T) {
	for _, p := range (&Daemon{kubernetes: &nodeview.Watch{}}).parts() {
		if _, ok := findings.Of(p.Finding); !ok {
			t.Errorf("part %s: %q is no finding", p.Name, p.Finding)
		}
	}
}
