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
)

const (
	// networkd is where distributions have it.
	networkd = "/lib/systemd/systemd-networkd"
	// blink is longer than the underlay is gone, also on a busy machine, and shorter than WireGuard takes where a handshake was lost.
	// That networkd deletes nothing of ours is looked at for itself.
	blink = 3 * time.Second
)

// realNetworkd tells whether the host has one that can become the users that it needs.
func realNetworkd(t *testing.T) bool {
	t.Helper()
	ids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	if fields := strings.Fields(string(ids)); len(fields) == 3 && fields[2] == "1" {
		return false // a user namespace of an ordinary user has root alone
	}
	for _, program := range []string{networkd, "dbus-daemon", "networkctl"} {
		if _, err := exec.LookPath(program); err != nil {
			return false
		}
	}
	return true
}

// imitation deletes what systemd-networkd 252 was seen to delete.
const imitation = `for f in -4 -6; do
	ip -d $f rule | sed '/proto kernel/d; s/:.*//' | while read -r pref; do ip $f rule delete pref $pref; done
	ip -d $f route | sed '/^unreachable/!d; /proto kernel/d' | while read -r _ to _; do ip $f route delete unreachable $to; done
	ip -d $f route | sed 's/^unicast //; / dev hc/!d; /proto kernel/d' | while read -r route; do ip $f route delete $route; done
done`

// startNetworkd has systemd-networkd manage a node's uplink as it is, and pods' links by DHCP, as a `Name=*` of some distributions does,
// until the test ends.
func startNetworkd(t *testing.T, l *lab.Lab, n *lab.Node) {
	t.Helper()
	gateway := func(i int) string { return labtest.ControlAddr(l, i == 1).String() }
	config := fmt.Sprintf("[Match]\nName=eth0\n[Network]\nIPv6AcceptRA=no\nAddress=%s/24\nGateway=%s\nAddress=%s/64\nGateway=%s\n",
		n.Underlay[0], gateway(0), n.Underlay[1], gateway(1))
	// With a read-only /sys it does not wait for udev, of which there is none.
	labtest.Sh(t, n.Machine, `mkdir -p /run/dbus /run/systemd/network /run/systemd/netif && chown systemd-network: /run/systemd/netif
		echo '%s' > /run/systemd/network/eth0.network; printf '[Match]\nName=hc*\n[Network]\nDHCP=yes\n' > /run/systemd/network/zz-default.network
		mount -o remount,bind,ro /sys`, config)
	bus, err := n.Start("dbus-daemon", nil, "--system", "--nofork", "--nopidfile")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		labtest.Kill(t, bus)
		labtest.Sh(t, n.Machine, "mount -o remount,bind,rw /sys; rm -r /run/systemd/network")
	})
	labtest.Eventually(t, "wait for the bus", func() error {
		_, err := os.Stat(n.Path("/run/dbus/system_bus_socket"))
		return err
	})
	manager, err := n.Start(networkd, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { labtest.Kill(t, manager) })
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

// startNetworkds starts one on each node, and returns what has it delete.
func startNetworkds(t *testing.T, w *world) (reconfigure func(*lab.Node)) {
	t.Helper()
	if !realNetworkd(t) {
		return func(n *lab.Node) { labtest.Sh(t, n.Machine, "%s", imitation) }
	}
	for _, n := range w.nodes() {
		startNetworkd(t, w.Lab, n)
	}
	return func(n *lab.Node) {
		labtest.Sh(t, n.Machine, "networkctl reconfigure eth0 $(ip -o link | sed 's/^[0-9]*: //; /^hc/!d; s/@.*//')")
		labtest.Eventually(t, "wait until networkd has deleted what it does not know", func() error { return strangers(t, n) })
		configured(t, n)
	}
}

// stranger is the beginning of an address that nothing of ours has.
const stranger = "198.51.100."

// strangers are a rule and routes that only networkd minds.
func strangers(t *testing.T, n *lab.Node) error {
	if have := labtest.Sh(t, n.Machine, "ip rule; ip route"); strings.Contains(have, stranger) {
		return fmt.Errorf("still there:\n%s", have)
	}
	return nil
}

// systemd-networkd deletes all rules, and all routes of links that it manages, that neither it nor the kernel made.
// Ours stay; tailscaled's come back.
func TestNetworkd(t *testing.T) {
	w := surroundings.Enter(t)
	reconfigure := startNetworkds(t, w)
	for _, n := range w.nodes() {
		near, far := w.a1, w.b1
		if n == w.b {
			near, far = w.b1, w.a1
		}
		second := map[*lab.Node]*lab.Pod{w.a: w.a2, w.b: w.b2}[n]
		before := rulesAndRoutes(t, n)
		monitor, err := n.Start("ip", nil, "monitor", "rule", "route")
		if err != nil {
			t.Fatal(err)
		}
		defer labtest.Kill(t, monitor)
		within, across := labtest.StartFlows(t, near, second), labtest.StartFlows(t, near, far)
		// Strangers, as the proof that it deletes.
		labtest.Sh(t, n.Machine, "ip rule add pref 4000 to 198.51.100.0/24 lookup main; ip route add unreachable 198.51.100.0/24; ip route add 198.51.100.1 dev %s",
			near.Result.Interfaces[0].Name)
		labtest.Eventually(t, "wait until the monitor sees them", func() error {
			log, err := os.ReadFile(monitor.Log)
			if err == nil && !strings.Contains(string(log), "198.51.100") {
				err = fmt.Errorf("it shows:\n%s", log)
				labtest.Sh(t, n.Machine, "ip rule delete pref 4000; ip rule add pref 4000 to 198.51.100.0/24 lookup main")
			}
			return err
		})
		reconfigure(n)
		if err := strangers(t, n); err != nil {
			t.Error(err)
		}
		labtest.Eventually(t, "wait for all rules and routes", func() error {
			if now := rulesAndRoutes(t, n); now != before {
				return fmt.Errorf("before:\n%s\nnow:\n%s", before, now)
			}
			return nil
		})
		w.works(t)
		for i, r := range within.Stop() {
			if r.Lost > 0 {
				t.Errorf("%s: %+v", within[i].Name, r)
			}
		}
		for i, r := range across.Stop() { // networkd takes the uplink's addresses away for a moment
			if r.Longest > blink {
				t.Errorf("%s: %+v", across[i].Name, r)
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
			if strings.HasPrefix(line, "Deleted") && strings.Contains(line, mark) && !strings.Contains(line, stranger) {
				t.Errorf("of ours: %s", line)
			}
		}
	}
}

// rulesAndRoutes are what pods need of a node's, tailscaled's too.
func rulesAndRoutes(t *testing.T, n *lab.Node) string {
	t.Helper()
	return labtest.Sh(t, n.Machine, "for f in -4 -6; do ip $f rule; ip $f route show table 52 | sort; ip $f route | grep -E ' dev hc|metric 4278'; done")
}
