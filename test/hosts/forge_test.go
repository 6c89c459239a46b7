package hosts

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/internal/nstest"
)

const genuine = "genuine"

// ear hears what UDP datagrams say that arrive at an address.
type ear struct {
	name string
	addr netip.AddrPort

	mu    sync.Mutex
	heard []string
}

func listen(t *testing.T, name string, at lab.Place, addr netip.Addr) *ear {
	t.Helper()
	var c net.PacketConn
	err := at.Do(func() (err error) {
		c, err = net.ListenPacket("udp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	e := &ear{name: name, addr: netip.MustParseAddrPort(c.LocalAddr().String())}
	go func() {
		buf := make([]byte, 128)
		for {
			n, _, err := c.ReadFrom(buf)
			if err != nil {
				return // closed
			}
			e.mu.Lock()
			e.heard = append(e.heard, string(buf[:n]))
			e.mu.Unlock()
		}
	}()
	return e
}

// lies are what was heard and not genuine; truth tells whether anything genuine was.
func (e *ear) lies() (lies []string, truth bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, s := range e.heard {
		if s != genuine {
			lies = append(lies, s)
		}
	}
	return lies, slices.Contains(e.heard, genuine)
}

func (e *ear) forget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.heard = nil
}

// forge sends a UDP datagram with any source through a raw socket.
func forge(from lab.Place, src netip.Addr, dst netip.AddrPort, text string) error {
	packet := nstest.Packet(src, dst.Addr(), unix.IPPROTO_UDP, nstest.UDP(src, dst.Addr(), 4242, dst.Port(), text))
	return from.Do(func() error { return nstest.Send(packet) })
}

// speak sends everything forged to all, and something genuine until it has arrived, behind which nothing can be late.
func speak(t *testing.T, s scene) {
	t.Helper()
	for _, e := range s.to {
		e.forget()
		labtest.Eventually(t, fmt.Sprintf("wait for something genuine from %s at %s", s.own, e.name), func() error {
			for _, src := range s.forged {
				if err := forge(s.from, src, e.addr, "forged "+src.String()); err != nil {
					return err
				}
			}
			if err := forge(s.from, s.own, e.addr, genuine); err != nil {
				return err
			}
			time.Sleep(50 * time.Millisecond)
			if _, ok := e.lies(); !ok {
				return fmt.Errorf("nothing yet")
			}
			return nil
		})
	}
	time.Sleep(labtest.Moment)
}

func silent(t *testing.T, to []*ear) {
	t.Helper()
	for _, e := range to {
		if lies, _ := e.lies(); len(lies) > 0 {
			t.Errorf("at %s: %v", e.name, lies)
		}
	}
}

// scene is one who forges, and those who would be deceived.
type scene struct {
	from   lab.Place
	own    netip.Addr // its true address
	forged []netip.Addr
	to     []*ear
}

// deceived is the proof that the forged packets would arrive without our rules.
func deceived(t *testing.T, n *lab.Node, scenes []scene) {
	t.Helper()
	labtest.Kill(t, n.Daemon)
	for _, f := range []string{"ip", "ip6"} {
		labtest.Sh(t, n.Machine, "nft flush chain %s headcni antispoof", f)
	}
	for _, s := range scenes {
		speak(t, s)
		for _, e := range s.to {
			if lies, _ := e.lies(); len(lies) == 0 {
				t.Errorf("at %s: nothing forged arrived without our rules either", e.name)
			}
		}
	}
	labtest.StartDaemon(t, n)
}

// poses are what a pod may send as, in each family, to a pod of its node, to one of another, to its node and to the outside.
func (w *world) poses(t *testing.T, p *lab.Pod) (scenes []scene) {
	t.Helper()
	near, far := w.a2, w.b1
	if p == w.b1 {
		near, far = w.b2, w.a1
	}
	n, other := p.Node, far.Node
	for i, v6 := range []bool{false, true} {
		s := scene{from: p, own: p.Addr(v6), forged: []netip.Addr{
			near.Addr(v6), far.Addr(v6), n.Underlay[i], other.Underlay[i], labtest.ControlAddr(w.Lab, v6),
			labtest.TailnetAddrs(t, n)[i], labtest.TailnetAddrs(t, other)[i], n.PodCIDRs[i].Addr().Next(), clusterIPs[i].Addr(),
			[]netip.Addr{netset.AnswererIPv4, netset.AnswererIPv6}[i],
			[]netip.Addr{netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("2001:db8::9")}[i],
			[]netip.Addr{netip.MustParseAddr("169.254.1.1"), netip.MustParseAddr("fe80::1")}[i],
		}}
		s.to = []*ear{
			listen(t, "a pod of its node, "+labtest.Family(v6), near, near.Addr(v6)),
			listen(t, "a pod of another node, "+labtest.Family(v6), far, far.Addr(v6)),
			listen(t, "its node, "+labtest.Family(v6), n, n.Underlay[i]),
			listen(t, "the outside, "+labtest.Family(v6), w.Control, labtest.ControlAddr(w.Lab, v6)),
		}
		scenes = append(scenes, s)
	}
	return scenes
}

// A pod sends from its own address and from no other.
func TestForgingPod(t *testing.T) {
	w := surroundings.Enter(t)
	scenes := w.poses(t, w.a1)
	for i, s := range scenes {
		speak(t, s)
		silent(t, s.to)
		scenes[i].to = s.to[:1]
	}
	deceived(t, w.a, scenes)
}

// Nor does it while the node changes: programs die and come back, rules are flushed, pods come and go.
func TestForgingPodWhileNodeChanges(t *testing.T) {
	w := surroundings.Enter(t)
	for _, p := range []*lab.Pod{w.a1, w.b1} {
		n, scenes := p.Node, w.poses(t, p)
		watch := labtest.Capture(t, w.Lab)
		stop := flood(p, scenes)
		t.Cleanup(stop)
		for range 10 {
			labtest.Kill(t, n.Daemon)
			if err := n.StartDaemon(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(rand.N(300 * time.Millisecond))
		}
		labtest.Ready(t, n)
		labtest.Kill(t, n.Tailscaled)
		time.Sleep(labtest.Moment)
		labtest.StartTailscaled(t, n)
		labtest.Ready(t, n)
		labtest.Sh(t, n.Machine, "%s", labtest.FlushRules)
		for i := range 5 {
			other, err := n.AddPod(labtest.Within(t), fmt.Sprintf("other-%d", i), lab.PodOptions{Idle: true})
			if err == nil {
				err = other.Remove(labtest.Within(t))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		labtest.Ready(t, n)
		for _, s := range scenes {
			for _, e := range s.to {
				labtest.Eventually(t, "something genuine at "+e.name, func() error {
					if _, truth := e.lies(); !truth {
						return errors.New("nothing")
					}
					return nil
				})
			}
			silent(t, s.to)
		}
		labtest.NoneInClear(t, watch())

		labtest.Kill(t, n.Daemon)
		labtest.Sh(t, n.Machine, "nft flush chain ip headcni antispoof; nft flush chain ip6 headcni antispoof")
		for _, s := range scenes {
			labtest.Eventually(t, "without our rules something forged arrives at "+s.to[0].name, func() error {
				if lies, _ := s.to[0].lies(); len(lies) == 0 {
					return errors.New("this test cannot fail")
				}
				return nil
			})
		}
		stop()
		labtest.StartDaemon(t, n)
	}
}

// flood says everything forged to all, again and again, and something genuine, and sends to those of the tunnel.
func flood(p *lab.Pod, scenes []scene) (stop func()) {
	var over atomic.Bool
	var ended sync.WaitGroup
	for i, s := range scenes {
		var to []netip.AddrPort
		for _, a := range slices.Concat(labtest.OfNobody(i == 1), labtest.OfTailnet(i == 1), []netip.Addr{clusterIPs[i].Addr()}) {
			to = append(to, netip.AddrPortFrom(a, lab.EchoPort))
		}
		for _, e := range s.to {
			to = append(to, e.addr)
		}
		ended.Go(func() {
			for !over.Load() {
				for _, at := range to {
					for _, src := range s.forged {
						_ = forge(p, src, at, "forged "+src.String()) // what is refused is of no interest
					}
					_ = forge(p, s.own, at, genuine)
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	return func() {
		over.Store(true)
		ended.Wait()
	}
}

// A host on the LAN does not pass for a pod, a service, a tailnet device or the node, also where a port of the node leads it to a pod.
func TestForgingLANHost(t *testing.T) {
	w := surroundings.Enter(t)
	var scenes []scene
	for i, v6 := range []bool{false, true} {
		pod := listen(t, "a pod, "+labtest.Family(v6), w.a1, w.a1.Addr(v6))
		labtest.Sh(t, w.a.Machine, `nft 'table %s ports { chain c { type nat hook prerouting priority -100; fib daddr type local udp dport %d dnat to %s; }; }'`,
			families[i], pod.addr.Port(), pod.addr)
		t.Cleanup(func() { labtest.Sh(t, w.a.Machine, "nft delete table %s ports", families[i]) })
		pod.addr = netip.AddrPortFrom(w.a.Underlay[i], pod.addr.Port())
		s := scene{
			from: w.Control, own: labtest.ControlAddr(w.Lab, v6),
			forged: []netip.Addr{w.a2.Addr(v6), w.b1.Addr(v6), w.b2.Addr(v6), w.b.PodCIDRs[i].Addr().Next()}, to: []*ear{pod},
		}
		s.to = append(s.to, listen(t, "a node, "+labtest.Family(v6), w.a, w.a.Underlay[i]))
		speak(t, s)
		silent(t, s.to)
		scenes = append(scenes, s)
		s.to = s.to[:1]
		s.forged = append(s.forged, labtest.TailnetAddrs(t, w.a)[i], labtest.TailnetAddrs(t, w.b)[i], clusterIPs[i].Addr(), w.a.Underlay[i],
			[]netip.Addr{netip.MustParseAddr("169.254.1.1"), netip.MustParseAddr("fe80::1")}[i])
		speak(t, s)
		silent(t, s.to)
	}
	deceived(t, w.a, scenes)
}

// On a host that lets packets name their way themselves, which goes round policies and tailscaled's filter, what comes from pods and out of the
// tunnel does not.
func TestSourceRoute(t *testing.T) {
	w := surroundings.Enter(t)
	labtest.Sh(t, w.a.Machine, "echo 1 >/proc/sys/net/ipv4/conf/all/accept_source_route")
	t.Cleanup(func() { labtest.Sh(t, w.a.Machine, "echo 0 >/proc/sys/net/ipv4/conf/all/accept_source_route") })
	if _, err := w.a2.Run(labtest.Within(t), "sh", "-ec", "for f in /proc/sys/net/ipv4/conf/*/accept_source_route; do echo 1 >$f; done"); err != nil { // as one that starts there has it
		t.Fatal(err)
	}
	to := listen(t, "a pod", w.a2, w.a2.Addr(false))
	tun := w.a.Tun
	labtest.Eventually(t, "the daemon has seen it", func() error {
		if v := strings.TrimSpace(labtest.Sh(t, w.a.Machine, "cat /proc/sys/net/ipv4/conf/%s/accept_source_route", tun)); v != "0" {
			return fmt.Errorf("%s has %s", tun, v)
		}
		return nil
	})
	for _, c := range []struct {
		what, link   string
		from         lab.Place
		own, through netip.Addr
	}{
		{"a pod of the node", w.a1.Link(), w.a1, w.a1.Addr(false), w.a.Underlay[0]},
		{"another node", tun, w.b, labtest.TailnetAddrs(t, w.b)[0], labtest.TailnetAddrs(t, w.a)[0]},
	} {
		send := func(text string) {
			packet := nstest.SourceRouted(nstest.Packet(c.own, c.through, unix.IPPROTO_UDP, nstest.UDP(c.own, to.addr.Addr(), 4242, to.addr.Port(), text)), to.addr.Addr())
			if err := c.from.Do(func() error { return nstest.Send(packet) }); err != nil {
				t.Fatal(err)
			}
		}
		to.forget()
		labtest.Eventually(t, "something genuine from "+c.what, func() error {
			send("by a way of its own, from " + c.what)
			if err := forge(c.from, c.own, to.addr, genuine); err != nil {
				return err
			}
			time.Sleep(50 * time.Millisecond)
			if _, ok := to.lies(); !ok {
				return errors.New("nothing yet")
			}
			return nil
		})
		silent(t, []*ear{to})
		labtest.Kill(t, w.a.Daemon)
		labtest.Sh(t, w.a.Machine, "echo 1 >/proc/sys/net/ipv4/conf/%s/accept_source_route", c.link)
		labtest.Eventually(t, "without the link's own switch it arrives", func() error {
			send("by a way of its own")
			time.Sleep(50 * time.Millisecond)
			if lies, _ := to.lies(); len(lies) == 0 {
				return errors.New("this test cannot fail")
			}
			return nil
		})
		labtest.StartDaemon(t, w.a)
	}
}

// What pods send from is in the cache of that check soon after they came, and is not any more soon after they went, also where nobody
// saw them go.
func TestSourcesAreKnown(t *testing.T) {
	w := surroundings.Enter(t)
	known := func(a netip.Addr) (bool, error) {
		f := map[bool]string{false: "ip", true: "ip6"}[a.Is6()]
		out, err := w.a.Run(labtest.Within(t), "nft", "list", "set", f, "headcni", "sources")
		return strings.Contains(out, `" . `+a.String()+" ") || strings.Contains(out, `" . `+a.String()+","), err
	}
	eventually := func(what string, p *lab.Pod, want bool) {
		t.Helper()
		for _, v6 := range []bool{false, true} {
			labtest.Eventually(t, what, func() error {
				if got, err := known(p.Addr(v6)); err != nil || got != want {
					return fmt.Errorf("%s known: %v, want %v, %v", p.Addr(v6), got, want, err)
				}
				return nil
			})
		}
	}
	eventually("a pod that was there", w.a1, true)
	for _, dead := range []bool{false, true} {
		p := labtest.AddPod(t, w.a, "new", lab.PodOptions{})
		eventually("a new pod", p, true)
		if dead {
			labtest.Kill(t, w.a.Daemon)
		}
		if err := p.Remove(labtest.Within(t)); err != nil {
			t.Fatal(err)
		}
		if dead {
			labtest.StartDaemon(t, w.a)
		}
		eventually("a pod that went", p, false)
	}
}
