package nft

import (
	"net/netip"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
)

// The node's ports lead to their pods, for everybody: a host beside the node, the node itself, other pods, the pod itself; at one address
// where it is to be one. Behind rules of others that are there, and never to the next pod with the address.
func TestPorts(t *testing.T) {
	t.Parallel()
	for family, a := range worldAddrs {
		t.Run(family, func(t *testing.T) {
			w := newWorld(t)
			cfg := typical()
			to := func(pod netip.Addr) netip.AddrPort { return netip.AddrPortFrom(pod, testPort) }
			cfg.Ports = []Port{
				{Protocol: "udp", Number: 8080, To: to(a.podA), Link: "hca"},
				{Protocol: "udp", Number: 8081, At: a.docker, To: to(a.podA), Link: "hca"},
				{Protocol: "tcp", Number: 8082, To: to(a.podA), Link: "hca"},
			}
			hear := func(what string, from *nstest.NS, at netip.AddrPort, want bool) {
				t.Helper()
				p := packet{from: from, to: w.podA, dst: a.podA, asked: at.Addr(), port: at.Port()}
				heard := w.heard
				if want {
					heard = w.waitFor
				}
				if got := heard(p); got.IsValid() != want {
					t.Errorf("%s at %s arrives: %v, want %v", what, at, got.IsValid(), want)
				} else if want && got == a.podA {
					t.Errorf("%s at %s: the pod sees itself", what, at)
				}
			}
			port := func(at netip.Addr, n uint16) netip.AddrPort { return netip.AddrPortFrom(at, n) }
			w.sync(cfg)
			for what, from := range map[string]*nstest.NS{"a host beside the node": w.lan, "another pod": w.podB, "the pod itself": w.podA, "the node": w.node} {
				hear(what, from, port(a.node, 8080), true)
			}
			hear("another address of the node", w.lan, port(a.docker, 8081), true)
			hear("an address that has no such port", w.lan, port(a.node, 8081), false)
			hear("another protocol", w.lan, port(a.node, 8082), false)
			hear("a pod's address", w.podB, port(a.podB, 8080), false)
			// Without the daemon: the pod is gone, and the next one has its address.
			w.node.Run(t, "ip", "link", "set", "hca", "name", "hcnext")
			before := w.drops()[DropPortStale]
			hear("an address that was given on", w.lan, port(a.node, 8080), false)
			if w.drops()[DropPortStale] == before {
				t.Error("nothing was counted")
			}
			if !w.waitFor(packet{from: w.podB, src: a.podB, to: w.podA, dst: a.podA}).IsValid() {
				t.Error("the next pod hears nothing at all")
			}
			w.sync(typical())
			hear("a port that is gone", w.lan, port(a.node, 8080), false)
		})
	}
}
