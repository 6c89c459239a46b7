package hosts

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/realparts"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/networking/hostport"
)

// A port of the node leads to its pod again soon after somebody has flushed every rule of the host, as a reload of nftables.service or of
// firewalld does: portmap's rules do not come back. It ends with the pod, whose successor it never leads to.
func TestHostPortsOutliveAFlush(t *testing.T) {
	w := surroundings.Enter(t)
	const port = 8087
	for _, n := range w.nodes() {
		t.Run(n.Mode, func(t *testing.T) {
			program, err := os.ReadFile(realparts.Tool(t, "portmap"))
			if err == nil {
				err = os.WriteFile(n.Path(filepath.Join(paths.CNIBinDir, "portmap")), program, 0o755)
			}
			if err != nil {
				t.Fatal(err)
			}
			p := labtest.AddPod(t, n, "ported", lab.PodOptions{Ports: []hostport.Mapping{
				{HostPort: port, ContainerPort: lab.EchoPort, Protocol: "TCP"}, {HostPort: port, ContainerPort: lab.EchoPort, Protocol: "UDP"}}})
			at := func(v6 bool) netip.AddrPort {
				if v6 {
					return netip.AddrPortFrom(n.Underlay[1], port)
				}
				return netip.AddrPortFrom(n.Underlay[0], port)
			}
			reached := func(what string) {
				t.Helper()
				for _, v6 := range []bool{false, true} {
					labtest.WantTCP(t, what+": from beside the node", w.Control, at(v6), labtest.ControlAddr(w.Lab, v6))
				}
			}
			reached("before")
			labtest.Sh(t, n.Machine, "nft flush ruleset")
			labtest.Ready(t, n)
			reached("after a flush")
			for _, v6 := range []bool{false, true} {
				// Whom the pod sees is for the rule that lets it answer.
				if _, err := lab.Ask(labtest.Within(t), p, at(v6)); err != nil {
					t.Errorf("the pod does not reach itself by %s: %v", at(v6), err)
				}
				if _, err := lab.Ask(labtest.Within(t), n, at(v6)); err != nil {
					t.Errorf("the node does not reach its own %s: %v", at(v6), err)
				}
			}
			// While a link has another name its pod is nobody's; what it was given outlives that.
			link := p.Result.Interfaces[0].Name
			labtest.Sh(t, n.Machine, "ip link set %s name renamed0", link)
			labtest.Eventually(t, "wait for the link's name", func() error {
				_, err := n.Net.LinkByName(link)
				return err
			})
			labtest.Ready(t, n)
			labtest.Sh(t, n.Machine, "nft flush ruleset")
			labtest.Ready(t, n)
			reached("after its link had another name, and another flush")
			labtest.Kill(t, n.Daemon)
			reached("without the daemon")
			flows := func() string {
				return labtest.Sh(t, n.Machine, "for f in ipv4 ipv6; do conntrack -L -p udp --orig-port-dst %d -f $f; done", port)
			}
			for _, v6 := range []bool{false, true} {
				c := dialUDP(t, w.Control, at(v6))
				labtest.Eventually(t, "reach the pod by UDP", func() error { return answered(c) })
				if got := flows(); !strings.Contains(got, fmt.Sprintf("src=%s", p.Addr(v6))) {
					t.Errorf("conntrack does not know of a flow to %s: %s", p.Addr(v6), got)
				}
			}
			next := p.Addrs
			if err := p.Remove(labtest.Within(t)); err != nil {
				t.Fatal(err)
			}
			for _, a := range next {
				if got := flows(); strings.Contains(got, fmt.Sprintf("src=%s", a)) {
					t.Errorf("without the daemon a flow goes on to %s, which nobody has: %s", a, got)
				}
			}
			labtest.StartDaemon(t, n)
			labtest.Ready(t, n)
			for _, a := range next {
				labtest.Sh(t, n.Machine, "! nft list ruleset | grep -F 'dnat to %s'", netip.AddrPortFrom(a, lab.EchoPort))
			}
			if left, err := os.ReadDir(n.Path(hostport.Folder(paths.DaemonSocket))); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
	w.works(t)
}

// dialUDP has one socket that asks all the time of a test.
func dialUDP(t *testing.T, from lab.Place, to netip.AddrPort) net.Conn {
	t.Helper()
	c, err := from.Dial(labtest.Within(t), "udp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// answered asks once.
func answered(c net.Conn) error {
	if _, err := c.Write([]byte("who?")); err != nil {
		return err
	}
	if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	_, err := c.Read(make([]byte, 128))
	return err
}
