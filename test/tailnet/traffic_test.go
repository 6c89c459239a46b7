package tailnet

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// fourPods makes two pods on each of two nodes.
func fourPods(t *testing.T, l *lab.Lab, name string) []*lab.Pod {
	t.Helper()
	var pods []*lab.Pod
	for i, n := range l.Nodes[:2] {
		for j := range 2 {
			pods = append(pods, labtest.AddPod(t, n, fmt.Sprintf("%s-%d%d", name, i+1, j+1), lab.PodOptions{}))
		}
	}
	return pods
}

func TestTraffic(t *testing.T) {
	l := steady.Enter(t)
	pods := fourPods(t, l, "traffic")
	t.Run("pod to pod", func(t *testing.T) { testPodToPod(t, pods) })
	t.Run("node and pod", func(t *testing.T) { testNodeAndPod(t, l, pods) })
	t.Run("outside", func(t *testing.T) { testOutside(t, l, pods) })
	t.Run("laptop", func(t *testing.T) { testLaptop(t, l, pods) })
}

// Every pod reaches every pod by its own address, and is seen by its own.
func testPodToPod(t *testing.T, pods []*lab.Pod) {
	for _, from := range pods {
		for _, to := range pods {
			for _, v6 := range []bool{false, true} {
				what := fmt.Sprintf("%s to %s, %s", from.Name, to.Name, labtest.Family(v6))
				labtest.WantUDP(t, what+", UDP", from, to.Addr(v6), 64, from.Addr(v6))
				labtest.WantTCP(t, what+", TCP", from, labtest.Echo(to, v6), from.Addr(v6))
				if out, err := from.Run(labtest.Within(t), "ping", "-n", "-c", "1", "-W", "10", to.Addr(v6).String()); err != nil {
					t.Errorf("%s, ping: %v\n%s", what, err, out)
				}
			}
		}
	}
}

func testNodeAndPod(t *testing.T, l *lab.Lab, pods []*lab.Pod) {
	for _, n := range l.Nodes[:2] {
		tailnet := labtest.TailnetAddrs(t, n)
		for i, v6 := range []bool{false, true} {
			for _, p := range pods {
				own := p.Node == n
				// Its own pods know the node by its address on the network, others by that in the tailnet.
				want := tailnet[i]
				if own {
					want = n.Underlay[i]
				}
				labtest.WantTCP(t, fmt.Sprintf("%s to %s, %s", n.Name, p.Name, labtest.Family(v6)), n, labtest.Echo(p, v6), want)
				for _, addr := range []netip.Addr{n.Underlay[i], tailnet[i]} {
					want := p.Addr(v6)
					switch {
					case own:
					case addr == tailnet[i]:
						want = labtest.TailnetAddrs(t, p.Node)[i]
					default:
						want = p.Node.Underlay[i]
					}
					labtest.WantTCP(t, fmt.Sprintf("%s to %s of %s", p.Name, addr, n.Name), p, labtest.Service(t, n, netip.AddrPortFrom(addr, 0)), want)
				}
			}
		}
	}
}

// Strangers see the node, not the pod.
func testOutside(t *testing.T, l *lab.Lab, pods []*lab.Pod) {
	for i := range 2 {
		control := labtest.ControlAddr(l, i == 1)
		to := labtest.Service(t, l.Control, netip.AddrPortFrom(control, 0))
		for _, p := range pods {
			labtest.WantTCP(t, fmt.Sprintf("%s to %s", p.Name, control), p, to, p.Node.Underlay[i])
		}
	}
}

// A user's device in the tailnet, without anything of ours.
func testLaptop(t *testing.T, l *lab.Lab, pods []*lab.Pod) {
	n := l.Nodes[laptop]
	labtest.StartTailscaled(t, n)
	labtest.Up(t, l, n, labtest.AuthKey(t, l), "--accept-routes")
	tailnet := labtest.TailnetAddrs(t, n)
	for i, v6 := range []bool{false, true} {
		to := labtest.Service(t, n, netip.AddrPortFrom(tailnet[i], 0))
		for _, p := range pods {
			if err := n.WaitRoute(labtest.Within(t), p.Addr(v6)); err != nil {
				t.Fatal(err)
			}
			labtest.WantTCP(t, fmt.Sprintf("laptop to %s, %s", p.Name, labtest.Family(v6)), n, labtest.Echo(p, v6), tailnet[i])
			labtest.WantTCP(t, fmt.Sprintf("%s to laptop, %s", p.Name, labtest.Family(v6)), p, to, labtest.TailnetAddrs(t, p.Node)[i])
		}
	}
	// A name, too: pods need no more than MagicDNS's address.
	for _, p := range pods {
		got, err := lab.Lookup(labtest.Within(t), p, n.Name+"."+lab.BaseDomain)
		if err != nil || len(got) == 0 || got[0] != tailnet[0] {
			t.Errorf("%s looks the laptop up: %v, %v; want %v", p.Name, got, err, tailnet)
		}
	}
}

// headers of IP and UDP, in bytes.
var headers = map[bool]int{false: 20 + 8, true: 40 + 8}

func TestMTU(t *testing.T) {
	l := steady.Enter(t)
	pods := fourPods(t, l, "mtu")
	for _, pair := range [][2]*lab.Pod{{pods[0], pods[1]}, {pods[0], pods[2]}, {pods[2], pods[0]}} {
		from, to := pair[0], pair[1]
		mtu := linkMTU(t, from.Node, from.Node.Tun)
		for _, v6 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s to %s, %s", from.Name, to.Name, labtest.Family(v6)), func(t *testing.T) {
				full := mtu - headers[v6]
				labtest.WantUDP(t, fmt.Sprintf("a packet of %d bytes", mtu), from, to.Addr(v6), full, from.Addr(v6))
				if _, _, err := lab.Echo(labtest.Within(t), from, to.Addr(v6), full+1); !errors.Is(err, unix.EMSGSIZE) {
					t.Errorf("a packet of %d bytes: %v, want %v", mtu+1, err, unix.EMSGSIZE)
				}
				transfer(t, from, to, to.Addr(v6))
			})
		}
	}
	t.Run("discovery", func(t *testing.T) { testDiscovery(t, pods[0], pods[2]) })
}

// A pod that believes in a larger MTU than the tunnel has is told by the node.
func testDiscovery(t *testing.T, from, to *lab.Pod) {
	tunnel := linkMTU(t, from.Node, from.Node.Tun)
	const belief = 1500
	if _, err := from.Run(labtest.Within(t), "ip", "link", "set", "eth0", "mtu", strconv.Itoa(belief)); err != nil {
		t.Fatal(err)
	}
	for _, link := range from.Result.Interfaces {
		if link.Sandbox == "" {
			if _, err := from.Node.Run(labtest.Within(t), "ip", "link", "set", link.Name, "mtu", strconv.Itoa(belief)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, v6 := range []bool{false, true} {
		// The first one may be lost: it is what the node answers.
		_, _, _ = lab.Echo(labtest.Within(t), from, to.Addr(v6), belief-headers[v6])
		if _, _, err := lab.Echo(labtest.Within(t), from, to.Addr(v6), tunnel+1-headers[v6]); !errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("%s: a packet of %d bytes into a tunnel of %d: %v, want %v", labtest.Family(v6), tunnel+1, tunnel, err, unix.EMSGSIZE)
		}
		labtest.WantUDP(t, labtest.Family(v6)+", a full packet", from, to.Addr(v6), tunnel-headers[v6], from.Addr(v6))
		transfer(t, from, to, to.Addr(v6))
		transfer(t, to, from, from.Addr(v6))
	}
}

// linkMTU in bytes.
func linkMTU(t *testing.T, n *lab.Node, name string) int {
	t.Helper()
	link, err := n.Net.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return link.Attrs().MTU
}

// connect returns both ends of a connection from one place to an address of another, which end with the test.
func connect(t *testing.T, from, to lab.Place, addr netip.Addr) (c, in net.Conn) {
	t.Helper()
	l := labtest.Listen(t, to, netip.AddrPortFrom(addr, 0))
	c, err := from.Dial(labtest.Within(t), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if in, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close() })
	return c, in
}

// transfer sends random data over TCP and compares what arrives.
func transfer(t *testing.T, from, to lab.Place, addr netip.Addr) {
	t.Helper()
	data := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{1}).Read(data)
	l := labtest.Listen(t, to, netip.AddrPortFrom(addr, 0))
	type outcome struct {
		sum [sha256.Size]byte
		n   int
		err error
	}
	got := make(chan outcome, 1)
	ctx := labtest.Within(t)
	deadline, _ := ctx.Deadline()
	go func() {
		c, err := l.Accept()
		if err != nil {
			got <- outcome{err: err}
			return
		}
		defer c.Close()
		_ = c.SetDeadline(deadline) // a socket that is open
		b, err := io.ReadAll(c)
		got <- outcome{sha256.Sum256(b), len(b), err}
	}()
	c, err := from.Dial(ctx, "tcp", l.Addr().String())
	if err != nil {
		t.Errorf("transfer to %s: %v", addr, err)
		return
	}
	_ = c.SetDeadline(deadline) // a socket that is open
	_, err = io.Copy(c, bytes.NewReader(data))
	if err := errors.Join(err, c.Close()); err != nil {
		t.Errorf("transfer to %s: %v", addr, err)
	}
	if o := <-got; o.err != nil || o.n != len(data) || o.sum != sha256.Sum256(data) {
		t.Errorf("transfer to %s: %d of %d bytes, right: %v, %v", addr, o.n, len(data), o.sum == sha256.Sum256(data), o.err)
	}
}
