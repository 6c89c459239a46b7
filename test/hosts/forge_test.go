package hosts

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
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

// A pod sends from its own address and from no other.
func TestForgingPod(t *testing.T) {
	w := surroundings.Enter(t)
	var scenes []scene
	for i, v6 := range []bool{false, true} {
		s := scene{from: w.a1, own: w.a1.Addr(v6), forged: []netip.Addr{
			w.a2.Addr(v6), w.b1.Addr(v6), w.a.Underlay[i], w.b.Underlay[i], labtest.ControlAddr(w.Lab, v6),
			labtest.TailnetAddrs(t, w.a)[i], labtest.TailnetAddrs(t, w.b)[i], w.a.PodCIDRs[i].Addr().Next(),
			[]netip.Addr{netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("2001:db8::9")}[i],
			[]netip.Addr{netip.MustParseAddr("169.254.1.1"), netip.MustParseAddr("fe80::1")}[i],
		}}
		near := listen(t, "a pod of its node, "+labtest.Family(v6), w.a2, w.a2.Addr(v6))
		s.to = []*ear{
			near, listen(t, "a pod of another node, "+labtest.Family(v6), w.b1, w.b1.Addr(v6)),
			listen(t, "its node, "+labtest.Family(v6), w.a, w.a.Underlay[i]),
			listen(t, "the outside, "+labtest.Family(v6), w.Control, labtest.ControlAddr(w.Lab, v6)),
		}
		speak(t, s)
		silent(t, s.to)
		s.to = []*ear{near}
		scenes = append(scenes, s)
	}
	deceived(t, w.a, scenes)
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
