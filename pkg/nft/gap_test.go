package nft

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/headcni/headcni/pkg/config"
)

// A pod's flow that began while somebody had taken our tables away, and that never pauses, is seen as its node's once they are back.
func TestFlowsOfAGap(t *testing.T) {
	t.Parallel()
	for family, a := range worldAddrs {
		t.Run(family, func(t *testing.T) {
			w := newWorld(t)
			// As kube-proxy, firewalls and others do.
			w.node.Run(t, "nft", "table inet other { chain c { type nat hook postrouting priority srcnat + 50; }; chain d { type filter hook forward priority 0; ct state invalid drop; }; }")
			w.sync(typical())
			w.answer(w.lan, netip.AddrPortFrom(a.lan, testPort), "lan")
			before := w.client(w.podA, netip.AddrPortFrom(a.lan, testPort))
			before.hears("", "lan")
			w.node.Run(t, "sh", "-ec", "nft delete table ip headcni; nft delete table ip6 headcni")
			gap := w.client(w.podA, netip.AddrPortFrom(a.lan, testPort))
			gap.hears("", "lan") // this host knows the way back to pods, others do not
			w.sync(typical())
			gap.hears("", "lan")
			before.hears("", "lan")
		})
	}
}

func TestUnmasked(t *testing.T) {
	const node, pod = "192.0.2.11", "10.244.1.10"
	masked, preserve := typical(), typical()
	masked.TailnetEgress, preserve.TailnetEgress = config.EgressMasquerade, config.EgressPreserve
	for what, c := range map[string]struct {
		from, to, answers, answersTo string
		cfg                          Config
		want                         bool
	}{
		"a pod to outside":             {pod, "198.51.100.7", "198.51.100.7", pod, masked, true},
		"seen as its node":             {pod, "198.51.100.7", "198.51.100.7", node, masked, false},
		"to another node's pod":        {pod, "10.244.2.20", "10.244.2.20", pod, masked, false},
		"to a service":                 {pod, "10.96.0.10", "10.244.2.20", pod, masked, false},
		"to a service outside":         {pod, "10.96.0.10", "198.51.100.7", pod, masked, true},
		"to its node":                  {pod, node, node, pod, masked, false},
		"to a device":                  {pod, "100.64.0.9", "100.64.0.9", pod, masked, true},
		"to a device that sees pods":   {pod, "100.64.0.9", "100.64.0.9", pod, preserve, false},
		"to a group":                   {pod, "224.0.0.251", "224.0.0.251", pod, masked, false},
		"a host beside it":             {"192.0.2.1", "198.51.100.7", "198.51.100.7", "192.0.2.1", masked, false},
		"a pod of IPv6 to outside":     {"fd00:244:1::10", "2001:db8:7::7", "2001:db8:7::7", "fd00:244:1::10", masked, true},
		"a pod of IPv6 to another pod": {"fd00:244:1::10", "fd00:244:2::20", "fd00:244:2::20", "fd00:244:1::10", masked, false},
	} {
		ip := func(a string) []byte { return netip.MustParseAddr(a).AsSlice() }
		s := staleFlows{own: c.cfg.Own, keep: keepsSource(c.cfg), local: map[netip.Addr]bool{netip.MustParseAddr(node): true}}
		flow := &netlink.ConntrackFlow{Forward: netlink.IPTuple{SrcIP: ip(c.from), DstIP: ip(c.to)}, Reverse: netlink.IPTuple{SrcIP: ip(c.answers), DstIP: ip(c.answersTo)}}
		if got := s.unmasked(flow); got != c.want {
			t.Errorf("%s: %v, want %v", what, got, c.want)
		}
	}
}
