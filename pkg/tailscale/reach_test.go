package tailscale

import (
	"net/netip"
	"testing"
)

func TestFilter(t *testing.T) {
	prefix, addr := netip.MustParsePrefix, netip.MustParseAddr
	web := FilterDst{Net: prefix("10.244.2.0/24")}
	web.Ports.First, web.Ports.Last = 80, 81
	f := Filter{{IPProto: []int{ProtoTCP}, Srcs: []netip.Prefix{prefix("10.244.1.0/24")}, Dsts: []FilterDst{web}}}
	pod, other, far := addr("10.244.1.7"), addr("10.244.3.7"), addr("10.244.2.9")
	for name, c := range map[string]struct {
		src, dst netip.Addr
		proto    int
		port     uint16
		want     bool
	}{
		"all right":         {pod, far, ProtoTCP, 80, true},
		"the last port":     {pod, far, ProtoTCP, 81, true},
		"another port":      {pod, far, ProtoTCP, 82, false},
		"another protocol":  {pod, far, ProtoUDP, 80, false},
		"ICMP has no ports": {pod, far, ProtoICMP, 0, true},
		"another source":    {other, far, ProtoTCP, 80, false},
		"another end":       {pod, other, ProtoICMP, 0, false},
	} {
		if got := f.Accepts(c.src, c.dst, c.proto, c.port); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if !f.Pairs(pod, far) || f.Pairs(far, pod) {
		t.Error("pairs")
	}
	for want, protocols := range map[string][]int{"80-81": {ProtoTCP, ProtoUDP, ProtoICMP}, "80-81/tcp": {ProtoTCP}, "80-81/udp": {ProtoUDP}, "80-81 of protocol 132": {132}} {
		f[0].IPProto = protocols
		if got := f.Ports(pod, far); got != want {
			t.Errorf("protocols %v: ports %q, want %q", protocols, got, want)
		}
	}
}

func TestHolder(t *testing.T) {
	prefix, addr := netip.MustParsePrefix, netip.MustParseAddr
	s := Status{Peers: []Peer{
		{Name: "wide", Allowed: []netip.Prefix{prefix("10.0.0.0/8")}},
		{Name: "b", IPs: []netip.Addr{addr("100.64.0.2")}, Allowed: []netip.Prefix{prefix("100.64.0.2/32"), prefix("10.244.2.0/24")}},
	}}
	for a, want := range map[string]string{"10.244.2.9": "b", "10.244.3.1": "wide", "100.64.0.2": "b", "192.0.2.1": ""} {
		if p, ok := s.Holder(addr(a)); p.Name != want || ok != (want != "") {
			t.Errorf("%s is %s's, %v", a, p.Name, ok)
		}
	}
}
