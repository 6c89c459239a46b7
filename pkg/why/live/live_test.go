package live

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// Two pods of a node, whose links lead over it, in both families.
var (
	web4, db4 = netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("10.244.1.3")
	web6, db6 = netip.MustParseAddr("fd00:1::2"), netip.MustParseAddr("fd00:1::3")
)

// world is a node with two pods.
type world struct{ node, web, db *nstest.NS }

func newWorld(t *testing.T) world {
	t.Helper()
	w := world{nstest.New(t), nstest.New(t), nstest.New(t)}
	for pod, of := range map[string]struct {
		ns   *nstest.NS
		four netip.Addr
		six  netip.Addr
	}{"hcweb": {w.web, web4, web6}, "hcdb": {w.db, db4, db6}} {
		w.node.Run(t, "ip", "link", "add", pod, "type", "veth", "peer", "name", "eth0", "netns", of.ns.Path)
		of.ns.Run(t, "sh", "-c", fmt.Sprintf(`ip link set lo up && ip link set eth0 up && ip addr add %s/32 dev eth0 && ip -6 addr add %s/128 dev eth0 nodad &&
			ip route add 169.254.1.1 dev eth0 && ip route add default via 169.254.1.1 && ip -6 route add default via fe80::1 dev eth0`, of.four, of.six))
		w.node.Run(t, "sh", "-c", fmt.Sprintf(`ip link set lo up && ip link set %s up && ip addr add 169.254.1.1/32 dev %[1]s && ip -6 addr add fe80::1/64 dev %[1]s nodad &&
			ip route add %[2]s dev %[1]s && ip -6 route add %[3]s dev %[1]s && echo 1 > /proc/sys/net/ipv4/conf/%[1]s/proxy_arp`, pod, of.four, of.six))
	}
	w.node.Run(t, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward && echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
	return w
}

// send sends as a node would: from inside the pod where its namespace is given, else by its link.
func (w world) send(t *testing.T, p Probe, inside bool) (s Side) {
	t.Helper()
	at := Place{Probe: p, Socket: "/nonexistent", Namespace: -1, Link: "hcweb"}
	if inside {
		f, err := os.Open(w.web.Path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		at.Namespace = int(f.Fd())
	}
	w.node.Do(t, func() (err error) {
		s, err = at.Send(t.Context())
		return errors.Join(err, left())
	})
	return s
}

// left is an error where the pair of links is still there.
func left() error {
	for _, name := range []string{injectLink, injectPeer} {
		if _, err := netlink.LinkByName(name); err == nil {
			return fmt.Errorf("link %s is left", name)
		}
	}
	return nil
}

// A packet is seen on both links, and what comes back: from inside the pod and by its link, in each protocol and family.
func TestSend(t *testing.T) {
	w := newWorld(t)
	listening := map[netip.Addr]bool{}
	for _, a := range []netip.Addr{db4, db6} {
		w.db.Do(t, func() error {
			l, err := net.Listen("tcp", netip.AddrPortFrom(a, 80).String())
			if err == nil {
				t.Cleanup(func() { l.Close() })
				listening[a] = true
			}
			return err
		})
	}
	for name, c := range map[string]struct {
		protocol string
		port     uint16
		want     Kind
	}{
		"a port that listens": {"tcp", 80, Answer},
		"one that does not":   {"tcp", 81, Refused},
		"UDP to nobody":       {"udp", 81, Refused},
		"an echo":             {"icmp", 0, Answer},
	} {
		for _, ends := range [][2]netip.Addr{{web4, db4}, {web6, db6}} {
			for _, inside := range []bool{true, false} {
				s := w.send(t, Probe{Src: ends[0], Dst: ends[1], Protocol: c.protocol, Port: c.port, Mark: 0xa0b0c0d0 + uint32(len(name))}, inside)
				from := map[bool]string{true: FromNamespace, false: FromLink}[inside]
				if s.Error != "" || s.From != from || s.Sent == 0 || s.Missed != 0 {
					t.Errorf("%s, %s: %+v", name, ends[1], s)
					continue
				}
				for what, n := range map[string]int{
					"request in": s.Passed("hcweb", false, Request), "request out": s.Passed("hcdb", true, Request),
					"answer in": s.Passed("hcdb", false, c.want), "answer out": s.Passed("hcweb", true, c.want),
				} {
					if n == 0 {
						t.Errorf("%s, %s, from %s: no %s among %+v", name, ends[1], from, what, s.Seen)
					}
				}
			}
		}
	}
}

// What a rule drops is seen up to there, and the counters of our own table say so.
func TestDropped(t *testing.T) {
	w := newWorld(t)
	w.node.Run(t, "nft", "add table ip headcni; add counter ip headcni lan_ingress; add chain ip headcni f { type filter hook forward priority 0; }; "+
		"add rule ip headcni f tcp dport 80 counter name lan_ingress drop")
	for _, inside := range []bool{true, false} {
		s := w.send(t, Probe{Src: web4, Dst: db4, Protocol: "tcp", Port: 80, Mark: 7}, inside)
		if s.Sent != tries || s.Passed("hcweb", false, Request) != tries || s.Passed("", true, Request) != 0 || s.Drops["lan_ingress"] != tries || len(s.Drops) != 1 {
			t.Errorf("%+v", s)
		}
	}
}

// A pair of links that a process left that was killed keeps nobody from sending, and a link of somebody else's is not removed.
func TestLeftLinks(t *testing.T) {
	w := newWorld(t)
	w.node.Run(t, "ip", "link", "add", injectLink, "type", "veth", "peer", "name", injectPeer)
	if s := w.send(t, Probe{Src: web4, Dst: db4, Protocol: "icmp", Mark: 9}, false); s.Error != "" || s.Passed("hcweb", true, Answer) == 0 {
		t.Errorf("%+v", s)
	}
	w.node.Run(t, "ip", "link", "add", injectLink, "type", "bridge")
	at := Place{Probe: Probe{Src: web4, Dst: db4, Protocol: "icmp", Mark: 9}, Socket: "/nonexistent", Namespace: -1, Link: "hcweb"}
	w.node.Do(t, func() error {
		s, err := at.Send(t.Context())
		if err != nil || s.Sent != 0 || !strings.Contains(s.Error, "make a link to send by") {
			t.Errorf("%+v, %v", s, err)
		}
		_, err = netlink.LinkByName(injectLink)
		return err
	})
}

// The far side says that it looks on, and what it saw once its input has ended.
func TestWatch(t *testing.T) {
	w := newWorld(t)
	p := Probe{Src: web4, Dst: db4, Protocol: "icmp", Mark: 11}
	in, end := io.Pipe()
	answer, out := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		var err error
		w.node.Do(t, func() error {
			err = Place{Probe: p, Socket: "/nonexistent", Namespace: -1}.Watch(t.Context(), in, out)
			return nil
		})
		out.Close()
		ended <- err
	}()
	lines := json.NewDecoder(answer)
	var ready Ready
	if err := lines.Decode(&ready); err != nil || !ready.Ready {
		t.Fatal(ready, err)
	}
	w.send(t, p, true)
	w.send(t, Probe{Src: web4, Dst: db4, Protocol: "icmp", Mark: 12}, true) // another's
	end.Close()
	var s Side
	if err := errors.Join(lines.Decode(&s), <-ended); err != nil {
		t.Fatal(err)
	}
	if s.Sent != 0 || s.Passed("hcdb", true, Request) != 1 || s.Passed("hcdb", false, Answer) != 1 {
		t.Errorf("%+v", s)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w.node.Do(t, func() error { // a cancelled one ends although its input does not
		never, _ := io.Pipe()
		return Place{Probe: p, Socket: "/nonexistent", Namespace: -1}.Watch(ctx, never, io.Discard)
	})
}

// Nothing that comes from outside makes the reader of packets look beyond what is there.
func FuzzKind(f *testing.F) {
	p := Probe{Src: web4, Dst: db4, Protocol: "udp", Port: 53, Mark: 5}
	f.Add(p.packet())
	f.Add(append([]byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, unix.IPPROTO_ICMP, 0, 0, 10, 244, 1, 3, 10, 244, 1, 2, 3, 3, 0, 0, 0, 0, 0, 0}, p.packet()...))
	f.Fuzz(func(_ *testing.T, b []byte) {
		p.kind(b)
		Probe{Src: web6, Dst: db6, Protocol: "tcp", Port: 53, Mark: 5}.kind(b)
	})
}
