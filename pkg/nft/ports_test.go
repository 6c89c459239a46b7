package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

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
			// The daemon knows that the link is gone, and somebody's own rule for the port is left.
			for i := range cfg.Ports {
				cfg.Ports[i].Gone = true
			}
			w.sync(cfg)
			hear("a port whose pod is gone", w.lan, port(a.node, 8080), false)
			w.node.Run(t, "nft", fmt.Sprintf(`table inet left { chain in { type nat hook prerouting priority dstnat; udp dport 8080 dnat %s to %s; }; }`,
				map[bool]string{false: "ip", true: "ip6"}[a.podA.Is6()], to(a.podA)))
			before = w.drops()[DropPortStale]
			hear("a port whose pod is gone, by another's rule", w.lan, port(a.node, 8080), false)
			if w.drops()[DropPortStale] == before {
				t.Error("nothing was counted")
			}
			w.node.Run(t, "nft", "delete", "table", "inet", "left")
			// The next pod has the port too, and the one before never got a DEL.
			cfg.Ports = append(cfg.Ports, Port{Protocol: "udp", Number: 8080, To: to(a.podA), Link: "hcnext"})
			w.sync(cfg)
			hear("a port that the next pod has too", w.lan, port(a.node, 8080), true)
			w.sync(typical())
			hear("a port that is gone", w.lan, port(a.node, 8080), false)
		})
	}
}

// A client that goes on sending by UDP from one socket reaches whom a port of the node leads to now: the pod, after it a program of the
// node itself, the next pod, and that one also where the flow began while somebody had flushed all rules.
func TestPortsMoveUDP(t *testing.T) {
	t.Parallel()
	for family, a := range worldAddrs {
		t.Run(family, func(t *testing.T) {
			w := newWorld(t)
			at := netip.AddrPortFrom(a.node, 8080)
			none, first, second, other := typical(), typical(), typical(), typical()
			first.Ports = []Port{{Protocol: "udp", Number: 8080, To: netip.AddrPortFrom(a.podA, testPort), Link: "hca"}}
			second.Ports = []Port{{Protocol: "udp", Number: 8080, To: netip.AddrPortFrom(a.podB, testPort), Link: "hcb"}}
			other.Ports = []Port{{Protocol: "udp", Number: 8081, At: a.docker, To: netip.AddrPortFrom(a.podA, testPort), Link: "hca"}}
			w.answer(w.podA, netip.AddrPortFrom(a.podA, testPort), "first pod")
			w.answer(w.podB, netip.AddrPortFrom(a.podB, testPort), "second pod")
			w.answer(w.node, at, "node")
			one := w.client(w.lan, at)
			one.hears("", "node")
			for _, step := range []struct {
				cfg   Config
				hears string
			}{{first, "first pod"}, {none, "node"}, {second, "second pod"}, {first, "first pod"}, {other, "node"}, {second, "second pod"}} {
				before := one.last
				w.sync(step.cfg)
				one.hears(before, step.hears)
			}
			w.node.Run(t, "nft", "flush", "ruleset")
			two := w.client(w.lan, at)
			two.hears("", "node")
			w.sync(second)
			two.hears("node", "second pod")
			one.hears("second pod", "second pod")
		})
	}
}

// answer has somebody answer each datagram with a word.
func (w *world) answer(ns *nstest.NS, at netip.AddrPort, word string) {
	w.t.Helper()
	var c *net.UDPConn
	ns.Do(w.t, func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	})
	w.t.Cleanup(func() { _ = c.Close() })
	go func() {
		for {
			if _, from, err := c.ReadFromUDPAddrPort(make([]byte, 16)); err != nil {
				return
			} else if _, err := c.WriteToUDPAddrPort([]byte(word), from); err != nil && !errors.Is(err, os.ErrPermission) {
				return
			}
		}
	}()
}

// client is a socket that is connected to somebody who answers.
type client struct {
	w    *world
	conn net.Conn
	last string
}

func (w *world) client(from *nstest.NS, at netip.AddrPort) *client {
	w.t.Helper()
	c := &client{w: w}
	from.Do(w.t, func() (err error) {
		c.conn, err = net.Dial("udp", at.String())
		return err
	})
	w.t.Cleanup(func() { _ = c.conn.Close() })
	return c
}

// hears asks until somebody answers, who must be want. Late answers of before are let pass.
func (c *client) hears(before, want string) {
	c.w.t.Helper()
	buf := make([]byte, 16)
	for range 50 {
		_, _ = c.conn.Write([]byte("x")) // refused, where the one before said that it is not there
		if err := c.conn.SetReadDeadline(time.Now().Add(60 * time.Millisecond)); err != nil {
			c.w.t.Fatal(err)
		}
		n, err := c.conn.Read(buf)
		if c.last = string(buf[:n]); err == nil && c.last == want {
			return
		}
		if err == nil && c.last != before {
			break
		}
	}
	c.w.t.Errorf("after %q: %q answers, want %q", before, c.last, want)
}
