package daemon

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/headcni/headcni/pkg/dns/answer"
	"github.com/headcni/headcni/pkg/tailscale"
)

func TestNamesOf(t *testing.T) {
	ip := func(s string) []netip.Addr { return []netip.Addr{netip.MustParseAddr(s)} }
	s := tailscale.Status{State: tailscale.Running, MagicDNSSuffix: "hc.internal", Self: tailscale.Peer{DNSName: "me.hc.internal", IPs: ip("100.64.0.1")},
		Peers: []tailscale.Peer{{DNSName: "peer.hc.internal", IPs: ip("100.64.0.2")}, {IPs: ip("100.64.0.3")}}}
	dns := &tailscale.DNS{Records: map[string][]netip.Addr{"web.hc.internal": ip("10.96.0.1"), "peer.hc.internal": ip("10.96.0.2")}}
	want := answer.Names{Domain: "hc.internal", Hosts: map[string][]netip.Addr{
		"me.hc.internal": ip("100.64.0.1"), "peer.hc.internal": ip("100.64.0.2"), "web.hc.internal": ip("10.96.0.1")}}
	got, err := namesOf(s, dns, nil)
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" || err != nil {
		t.Error(diff, err)
	}
	if got, err := namesOf(s, nil, nil); err != nil || !got.Incomplete {
		t.Errorf("an older tailscaled: %+v, %v", got, err)
	}
	s.State = tailscale.Starting
	if _, err := namesOf(s, dns, nil); err == nil {
		t.Error("what a tailscaled says that has just begun counts")
	}
	if _, err := namesOf(s, nil, errors.New("dead")); err == nil {
		t.Error("what a dead tailscaled says counts")
	}
}
