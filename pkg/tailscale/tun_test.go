package tailscale

import (
	"net/netip"
	"slices"
	"testing"
)

func TestTunnelRoutes(t *testing.T) {
	prefixes := func(texts ...string) (out []netip.Prefix) {
		for _, s := range texts {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	s := Status{
		State: Running,
		Self:  Peer{IPs: []netip.Addr{netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("fd7a:115c:a1e0::1")}},
		Peers: []Peer{
			{Online: true, Allowed: prefixes("100.64.0.2/32", "fd7a:115c:a1e0::2/128", "10.244.2.0/24", "0.0.0.0/0", "::/0")},
			{Online: true, Allowed: prefixes("fd7a:115c:a1e0::3/128", "fd00:244:3::/64", "0.0.0.0/0"), ExitNode: true},
			{Allowed: prefixes("10.244.4.0/24")}, // offline
			{Online: true, Expired: true, Allowed: prefixes("10.244.5.0/24")},
		},
	}
	want := prefixes("100.100.100.100/32", "fd7a:115c:a1e0::53/128", "100.64.0.2/32", "fd7a:115c:a1e0::/48", "10.244.2.0/24", "fd00:244:3::/64", "0.0.0.0/0")
	if got := s.TunnelRoutes(); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	s.State = Starting
	if got := s.TunnelRoutes(); got != nil {
		t.Errorf("not running: %v", got)
	}
}
