package hosts

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/nstest"
)

const (
	// networkd is where distributions have it.
	networkd = "/lib/systemd/systemd-networkd"
	// blink is longer than the underlay is gone, and shorter than anything takes that has to be mended.
	blink = time.Second
)

// requireNetworkd skips where the host has none, or cannot be the users that it changes to.
func requireNetworkd(t *testing.T) {
	t.Helper()
	ids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	if fields := strings.Fields(string(ids)); len(fields) == 3 && fields[2] == "1" {
		nstest.Skip(t, "systemd-networkd needs users beside root: run the tests as root")
	}
	for _, program := range []string{networkd, "dbus-daemon", "networkctl"} {
		if _, err := exec.LookPath(program); err != nil {
			nstest.Skip(t, "no "+program+": install systemd and dbus-daemon")
		}
	}
}

// startNetworkd has systemd-networkd manage a node's uplink as it is, until the test ends.
func startNetworkd(t *testing.T, l *lab.Lab, n *lab.Node) {
	t.Helper()
	gateway := func(i int) string { return controlAddr(l, i == 1).String() }
	config := fmt.Sprintf("[Match]\nName=eth0\n[Network]\nIPv6AcceptRA=no\nAddress=%s/24\nGateway=%s\nAddress=%s/64\nGateway=%s\n",
		n.Underlay[0], gateway(0), n.Underlay[1], gateway(1))
	// With a read-only /sys it does not wait for udev, of which there is none.
	sh(t, n.Machine, `mkdir -p /run/dbus /run/systemd/network /run/systemd/netif && chown systemd-network: /run/systemd/netif
		echo '%s' > /run/systemd/network/eth0.network; mount -o remount,bind,ro /sys`, config)
	bus, err := n.Start("dbus-daemon", nil, "--system", "--nofork", "--nopidfile")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		kill(t, bus)
		sh(t, n.Machine, "mount -o remount,bind,rw /sys; rm -r /run/systemd/network")
	})
	labtest.Eventually(t, "wait for the bus", func() error {
		_, err := os.Stat(n.Path("/run/dbus/system_bus_socket"))
		return err
	})
	manager, err := n.Start(networkd, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(t, manager) })
	configured(t, n)
}

func configured(t *testing.T, n *lab.Node) {
	t.Helper()
	labtest.Eventually(t, "wait until networkd has configured eth0", func() error {
		out, err := n.Run(labtest.Within(t), "networkctl", "list", "--no-legend", "--no-pager", "eth0")
		if err == nil && !strings.Contains(out, " configured") {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
}

// systemd-networkd deletes all rules, and all routes of links that it manages, that neither it nor the kernel made.
// Ours stay; tailscaled's come back.
func testNetworkd(t *testing.T, w *world) {
	requireNetworkd(t)
	for _, n := range w.nodes() {
		near, far := w.a1, w.b1
		if n == w.b {
			near, far = w.b1, w.a1
		}
		second := map[*lab.Node]*lab.Pod{w.a: w.a2, w.b: w.b2}[n]
		startNetworkd(t, w.Lab, n)
		before := rulesAndRoutes(t, n)
		monitor, err := n.Start("ip", nil, "monitor", "rule", "route")
		if err != nil {
			t.Fatal(err)
		}
		defer kill(t, monitor)
		var within, across []*lab.Stream
		for _, v6 := range []bool{false, true} {
			for to, list := range map[*lab.Pod]*[]*lab.Stream{second: &within, far: &across} {
				s, err := lab.StartStream(labtest.Within(t), near.Name+" to "+to.Name+", "+family(v6), near, to, to.Addr(v6))
				if err != nil {
					t.Fatal(err)
				}
				*list = append(*list, s)
			}
		}
		// Strangers, as the proof that it deletes.
		sh(t, n.Machine, "ip rule add pref 4000 to 198.51.100.0/24 lookup main; ip route add unreachable 198.51.100.0/24; networkctl reconfigure eth0")
		labtest.Eventually(t, "wait until networkd has deleted what it does not know", func() error {
			if have := sh(t, n.Machine, "ip rule; ip route"); strings.Contains(have, "198.51.100") {
				return fmt.Errorf("still there:\n%s", have)
			}
			return nil
		})
		configured(t, n)
		labtest.Eventually(t, "wait for all rules and routes", func() error {
			if now := rulesAndRoutes(t, n); now != before {
				return fmt.Errorf("before:\n%s\nnow:\n%s", before, now)
			}
			return nil
		})
		w.works(t)
		for _, s := range within {
			if r := s.Stop(); r.Lost > 0 {
				t.Errorf("%s: %+v", s.Name, r)
			}
		}
		for _, s := range across { // networkd takes the uplink's addresses away for a moment
			if r := s.Stop(); r.Longest > blink {
				t.Errorf("%s: %+v", s.Name, r)
			}
		}
		deletedByNetworkd(t, monitor)
	}
}

// deletedByNetworkd says that tailscaled's rules went and none of ours.
func deletedByNetworkd(t *testing.T, monitor *lab.Process) {
	t.Helper()
	log, err := os.ReadFile(monitor.Log)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), "Deleted 5270:") {
		t.Errorf("tailscaled's rules were not deleted:\n%s", log)
	}
	for line := range strings.Lines(string(log)) {
		for _, mark := range []string{" 5188:", " 5189:", " 519", "metric 4278", " dev hc"} {
			if strings.HasPrefix(line, "Deleted") && strings.Contains(line, mark) {
				t.Errorf("of ours: %s", line)
			}
		}
	}
}

// rulesAndRoutes are what pods need of a node's, tailscaled's too.
func rulesAndRoutes(t *testing.T, n *lab.Node) string {
	t.Helper()
	return sh(t, n.Machine, "for f in -4 -6; do ip $f rule; ip $f route show table 52 | sort; ip $f route | grep -E ' dev hc|metric 4278'; done")
}
