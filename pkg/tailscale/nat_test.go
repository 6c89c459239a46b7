package tailscale

import (
	"net/netip"
	"testing"
)

func TestNAT(t *testing.T) {
	host := []netip.Prefix{netip.MustParsePrefix("192.168.1.0/24"), netip.MustParsePrefix("2001:db8:1::/64")}
	for _, tt := range []struct {
		name      string
		host      []netip.Prefix
		endpoints []string
		want      NAT
		outside   string
	}{
		{"home", host, []string{"203.0.113.7:41641", "192.168.1.10:41641", "[2001:db8:1::10]:41641"}, NATEasy, "203.0.113.7:41641"},
		{"office", host, []string{"203.0.113.7:6601", "192.168.1.10:41641"}, NATHard, "203.0.113.7:6601"},
		{"office, two STUN servers", host, []string{"203.0.113.7:41641", "203.0.113.7:6601", "192.168.1.10:41641"}, NATHard, "203.0.113.7:6601"},
		{"no UDP", host, []string{"192.168.1.10:41641"}, NATUnknown, ""},
		{"only IPv6", host, []string{"192.168.1.10:41641", "[2001:db8:1::10]:41641"}, NATUnknown, ""},
		{"its own address", []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}, []string{"203.0.113.7:41641"}, NATNone, ""},
		{"nothing known yet", host, nil, NATUnknown, ""},
	} {
		var s Status
		for _, e := range tt.endpoints {
			s.Endpoints = append(s.Endpoints, netip.MustParseAddrPort(e))
		}
		got, outside := s.NAT(tt.host)
		text := ""
		if outside.IsValid() {
			text = outside.String()
		}
		if got != tt.want || text != tt.outside {
			t.Errorf("%s: %s at %q, want %s at %q", tt.name, got, text, tt.want, tt.outside)
		}
	}
}
