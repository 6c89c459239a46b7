package hosts

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

const (
	servicePort = 80
	// farNodePort leads to a pod of the other node, ownNodePort to one of the node itself.
	farNodePort = 30080
	ownNodePort = 30081
)

var clusterIPs = []netip.AddrPort{
	netip.AddrPortFrom(netip.MustParseAddr("10.96.0.10"), servicePort), netip.AddrPortFrom(netip.MustParseAddr("fd00:96::10"), servicePort),
}

// serve makes services by DNAT alone, without what kube-proxy adds to help itself, until the test ends.
func serve(t *testing.T, w *world) {
	t.Helper()
	for _, n := range w.nodes() {
		own, far := w.a1, w.b1
		if n == w.b {
			own, far = w.b1, w.a1
		}
		for i, v6 := range []bool{false, true} {
			fam := map[bool]string{false: "ip", true: "ip6"}[v6]
			cluster := fmt.Sprintf("%s daddr %s tcp dport %d dnat to %s", fam, clusterIPs[i].Addr(), servicePort, labtest.Echo(far, v6))
			labtest.Sh(t, n.Machine, `nft 'table %s services {
				chain output { type nat hook output priority -100; %[2]s; }
				chain prerouting { type nat hook prerouting priority -100; %[2]s;
					fib daddr type local tcp dport %d dnat to %s; fib daddr type local tcp dport %d dnat to %s; }
			}'`, fam, cluster, farNodePort, labtest.Echo(far, v6), ownNodePort, labtest.Echo(own, v6))
			t.Cleanup(func() { labtest.Sh(t, n.Machine, "nft delete table %s services", fam) })
		}
	}
}

// servicesWork tries what serve made: who connects, and whom the pod sees.
func (w *world) servicesWork(t *testing.T) {
	t.Helper()
	for i, v6 := range []bool{false, true} {
		for _, n := range w.nodes() {
			pod := w.a2
			if n == w.b {
				pod = w.b2
			}
			labtest.WantTCP(t, n.Name+" to a service", n, clusterIPs[i], labtest.TailnetAddrs(t, n)[i])
			labtest.WantTCP(t, pod.Name+" to a service", pod, clusterIPs[i], pod.Addr(v6))
			labtest.WantTCP(t, "LAN host to a far pod's NodePort of "+n.Name, w.Control, netip.AddrPortFrom(n.Underlay[i], farNodePort), labtest.TailnetAddrs(t, n)[i])
			labtest.WantTCP(t, "LAN host to an own pod's NodePort of "+n.Name, w.Control, netip.AddrPortFrom(n.Underlay[i], ownNodePort), labtest.ControlAddr(w.Lab, v6))
		}
	}
}

func TestServices(t *testing.T) {
	w := surroundings.Enter(t)
	serve(t, w)
	w.servicesWork(t)
}

// A pod that connects while tailscaled is away waits for it, instead of being told that there is no network.
func TestConnectWaits(t *testing.T) {
	w := surroundings.Enter(t)
	for _, c := range []struct{ from, to *lab.Pod }{{w.a1, w.b1}, {w.b1, w.a1}} {
		n := c.from.Node
		t.Run(n.Mode, func(t *testing.T) {
			labtest.Kill(t, n.Tailscaled)
			results := make(chan error)
			for _, v6 := range []bool{false, true} {
				go func() { results <- connect(c.from, labtest.Echo(c.to, v6)) }()
			}
			select {
			case err := <-results:
				t.Errorf("ended while tailscaled was away: %v", err)
			case <-time.After(labtest.Moment):
			}
			labtest.StartTailscaled(t, n)
			for range 2 {
				if err := <-results; err != nil {
					t.Error(err)
				}
			}
			labtest.Ready(t, n)
		})
	}
	t.Run("because of our rules", func(t *testing.T) {
		labtest.Kill(t, w.a.Daemon, w.a.Tailscaled)
		for i, v6 := range []bool{false, true} {
			labtest.Sh(t, w.a.Machine, "nft flush chain %s headcni patience", []string{"ip", "ip6"}[i])
			began := time.Now()
			if err := connect(w.a1, labtest.Echo(w.b1, v6)); err == nil || time.Since(began) > labtest.Soon/2 {
				t.Errorf("%s: without them: %v after %v", labtest.Family(v6), err, time.Since(began))
			}
		}
		labtest.StartTailscaled(t, w.a)
		labtest.StartDaemon(t, w.a)
	})
	w.works(t)
}

// connect connects once, however long it takes.
func connect(from *lab.Pod, to netip.AddrPort) error {
	return from.Do(func() error { return dialFor(labtest.Soon, to) })
}

func dialFor(d time.Duration, to netip.AddrPort) error {
	dialer := net.Dialer{FallbackDelay: -1, Timeout: d}
	c, err := dialer.Dial("tcp", to.String())
	if err != nil {
		return err
	}
	return c.Close()
}
