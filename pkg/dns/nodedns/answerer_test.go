package nodedns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/internal/nstest"
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

// The address is there while the server listens. Else whoever listens on all addresses would be asked in its place.
func TestAnswererBesideAnother(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "ip", "link", "set", "lo", "up")
	var other net.PacketConn
	ns.Do(t, func() (err error) { other, err = net.ListenPacket("udp", ":53"); return err })
	defer other.Close()
	a := New(func(context.Context) (tailscale.Status, *tailscale.DNS, error) {
		return tailscale.Status{}, nil, errors.New("dead")
	})
	woken := make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		ns.Do(t, func() error {
			a.Run(ctx, 10*time.Millisecond, func() {
				select {
				case woken <- struct{}{}:
				default:
				}
			})
			return nil
		})
	}()
	defer func() { cancel(); <-ended }()
	// until has passes run, as the daemon would, until one ends as it should.
	until := func(what string, ok func(error) bool) {
		t.Helper()
		for {
			var err error
			ns.Do(t, func() error { _, err = a.Sync([]netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}); return nil })
			has := strings.Contains(ns.Run(t, "ip", "addr", "show", "lo"), netset.AnswererIPv4.String())
			if ok(err) && has == (err == nil) {
				return
			}
			select {
			case <-woken:
			case <-time.After(20 * time.Second):
				t.Fatalf("%s: %v, the address is there: %t", what, err, has)
			}
		}
	}
	until("another one listens", func(err error) bool {
		return err != nil && strings.Contains(err.Error(), "something else listens there")
	})
	other.Close()
	until("it has gone", func(err error) bool { return err == nil })
}

// TestAhead: the addresses are those of the node's ranges, else of the families that the host has, and none while another program would be asked there.
func TestAhead(t *testing.T) {
	ranges := func(texts ...string) (out []netip.Prefix) {
		for _, s := range texts {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	for name, c := range map[string]struct {
		own    []netip.Prefix
		host   []string
		listen string
		want   string
	}{
		"two families":               {ranges("10.244.1.0/24", "fd00:244:1::/64"), nil, "", "46"},
		"one":                        {ranges("fd00:244:1::/64"), []string{"192.0.2.1/24"}, "", "6"},
		"not known, a host with one": {nil, []string{"192.0.2.1/24"}, "", "4"},
		"not known, with two":        {nil, []string{"192.0.2.1/24", "2001:db8::1/64"}, "", "46"},
		"UDP is taken":               {ranges("10.244.1.0/24"), nil, "udp4", ""},
		"UDP of both is taken":       {ranges("10.244.1.0/24"), nil, "udp", ""},
		"TCP is taken":               {ranges("10.244.1.0/24"), nil, "tcp4", ""},
	} {
		t.Run(name, func(t *testing.T) {
			ns := nstest.New(t)
			ns.Run(t, "ip", "link", "set", "lo", "up")
			for _, a := range c.host {
				ns.Run(t, "ip", "addr", "add", a, "dev", "lo")
			}
			ns.Do(t, func() error {
				switch {
				case strings.HasPrefix(c.listen, "udp"):
					other, err := net.ListenPacket(c.listen, ":53")
					if err != nil {
						return err
					}
					defer other.Close()
				case c.listen != "":
					other, err := net.Listen(c.listen, ":53")
					if err != nil {
						return err
					}
					defer other.Close()
				}
				return errors.Join(Ahead(c.own), Ahead(c.own))
			})
			got, lo := "", ns.Run(t, "ip", "addr", "show", "lo")
			if strings.Contains(lo, netset.AnswererIPv4.String()) {
				got += "4"
			}
			if strings.Contains(lo, netset.AnswererIPv6.String()) {
				got += "6"
			}
			if got != c.want {
				t.Errorf("%q, want %q:\n%s", got, c.want, lo)
			}
		})
	}
}
