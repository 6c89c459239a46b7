package nft

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/headcni/headcni/internal/nstest"
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

// A rule is never in force before what it asks for: no packet of the cluster is refused while tables come, or come back, or change.
func TestNothingIsRefusedMeanwhile(t *testing.T) {
	w := newWorld(t)
	w.sync(typical())
	for _, a := range worldAddrs {
		w.flood(w.podA, w.tn, a.remote)
	}
	wider, other := typical(), typical()
	wider.Cluster = append(prefixes("10.245.0.0/16", "fd00:245::/32"), wider.Cluster...)
	wider.KeepSource = append(prefixes("10.97.0.0/16"), wider.KeepSource...)
	other.Cluster = append(prefixes("10.247.0.0/24", "10.247.1.0/24"), other.Cluster...)
	for range 5 {
		for what, change := range map[string]func(){
			"somebody has flushed all":     func() { w.node.Run(t, "nft", "flush", "ruleset"); w.sync(typical()) },
			"somebody has emptied a chain": func() { w.node.Run(t, "nft", "flush", "chain", "ip", "headcni", "guard"); w.sync(typical()) },
			"a daemon starts":              func() { w.tables = New(); w.sync(typical()) },
			"the cluster has become wider": func() { w.sync(wider) },
			"and has other ranges":         func() { w.sync(other) },
			"and is what it was":           func() { w.sync(typical()) },
		} {
			change()
			for reason, n := range w.drops() {
				if n > 0 && reason != DropPodLinkLocal { // the world's pods look for neighbours
					t.Fatalf("%s: %d packets were dropped as %s", what, n, reason)
				}
			}
		}
	}
}

// flood sends datagrams from one namespace to another without a pause, until the test ends.
func (w *world) flood(from, to *nstest.NS, dst netip.Addr) {
	w.t.Helper()
	at := net.UDPAddrFromAddrPort(netip.AddrPortFrom(dst, testPort))
	var in, out *net.UDPConn
	to.Do(w.t, func() (err error) { in, err = net.ListenUDP("udp", at); return err })
	from.Do(w.t, func() (err error) { out, err = net.DialUDP("udp", nil, at); return err })
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			if _, err := out.Write([]byte("x")); errors.Is(err, net.ErrClosed) {
				return
			}
		}
	}()
	w.t.Cleanup(func() { in.Close(); out.Close(); <-ended })
}
