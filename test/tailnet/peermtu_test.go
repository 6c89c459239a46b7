package tailnet

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/nodestatus"
)

// jumbo is a lab whose underlay carries 9000 bytes, but for the last node, whose switch drops what is larger than 1500 and says nothing.
var jumbo = labtest.OneByOne(func(t testing.TB) *lab.Lab {
	return labtest.New(t, lab.Options{Nodes: 3, Modes: []string{host, daemon, daemon}, Bin: labtest.Programs(t), UnderlayMTU: 9000, Configure: func(_ *lab.Node, c map[string]any) {
		network, _ := c["network"].(map[string]any)
		network["peerMTU"] = "auto"
	}})
})

// Packets between pods are as large as the path between their two nodes carries, and no larger to a third one.
func TestPeerMTU(t *testing.T) {
	l := jumbo.Enter(t)
	small := l.Nodes[2]
	labtest.Sh(t, l.Control.Machine, "ip link set %s mtu 1500", small.Port)
	labtest.Sh(t, small.Machine, "ip link set eth0 mtu 1500")
	for _, n := range l.Nodes { // or batches of tailscaled's would pass the switch in one piece, as on no cable
		labtest.Sh(t, n.Machine, "ip link set eth0 gso_max_segs 1")
	}
	var pods []*lab.Pod
	for i, n := range l.Nodes {
		pods = append(pods, labtest.AddPod(t, n, fmt.Sprintf("jumbo-%d", i), lab.PodOptions{}))
	}
	// A pod from before, whose link has 1280 bytes.
	old := labtest.AddPod(t, l.Nodes[1], "old", lab.PodOptions{})
	labtest.Sh(t, l.Nodes[1].Machine, "ip link set %s mtu 1280", old.Result.Interfaces[0].Name)
	if out, err := old.Run(labtest.Within(t), "ip", "link", "set", "eth0", "mtu", "1280"); err != nil {
		t.Fatal(err, out)
	}
	tooLarge := func(from *lab.Pod, to netip.Addr) {
		t.Helper()
		labtest.Eventually(t, "wait until a node says that this is too large", func() error {
			_, _, err := lab.Echo(t.Context(), from, to, 8800)
			if err == nil || !strings.Contains(err.Error(), "message too long") {
				return fmt.Errorf("8800 bytes to %s: %v", to, err)
			}
			return nil
		})
	}
	stop := labtest.Capture(t, l)
	for _, v6 := range []bool{false, true} {
		for _, from := range pods {
			for _, to := range pods {
				labtest.WantUDP(t, "makes the path direct, "+labtest.Family(v6), from, to.Addr(v6), 64, from.Addr(v6))
			}
		}
	}
	waitPeerMTU(t, l.Nodes[0], 8912, 8928)
	waitPeerMTU(t, l.Nodes[1], 8912, 8928)
	waitPeerMTU(t, small, 0, 0)
	for _, v6 := range []bool{false, true} {
		labtest.WantUDP(t, "in one piece, "+labtest.Family(v6), pods[0], pods[1].Addr(v6), 8800, pods[0].Addr(v6))
		labtest.WantUDP(t, "in one piece back, "+labtest.Family(v6), pods[1], pods[0].Addr(v6), 8800, pods[1].Addr(v6))
		labtest.WantUDP(t, "to the old pod, "+labtest.Family(v6), pods[0], old.Addr(v6), 1200, pods[0].Addr(v6))
		tooLarge(pods[0], old.Addr(v6))
		labtest.WantUDP(t, "to the small one, "+labtest.Family(v6), pods[0], pods[2].Addr(v6), 1200, pods[0].Addr(v6))
		tooLarge(pods[0], pods[2].Addr(v6))
		for _, from := range pods {
			for _, to := range pods {
				transfer(t, from, to, to.Addr(v6))
			}
		}
	}

	// What was proven outlives the daemon.
	monitor, err := l.Nodes[0].Start("ip", nil, "monitor", "route")
	if err != nil {
		t.Fatal(err)
	}
	defer labtest.Kill(t, monitor)
	if err := l.Nodes[0].Daemon.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := l.Nodes[0].StartDaemon(); err != nil {
		t.Fatal(err)
	}
	waitPeerMTU(t, l.Nodes[0], 8912, 8928)
	log, err := os.ReadFile(monitor.Log)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		if strings.HasPrefix(line, "Deleted") && strings.Contains(line, "mtu 89") {
			t.Errorf("a route went for a while: %s", line)
		}
	}

	// A flow that stands goes on when the path gets smaller and nobody says so.
	c, in := connect(t, pods[0], pods[1], pods[1].Addr(false))
	pass := func() {
		t.Helper()
		go func() { _, _ = c.Write(make([]byte, 1<<20)) }() // what is read tells
		_ = in.SetDeadline(time.Now().Add(labtest.Soon))    // a socket that is open
		if _, err := io.CopyN(io.Discard, in, 1<<20); err != nil {
			t.Errorf("1 MiB by a flow that stood: %v", err)
		}
	}
	pass()
	labtest.Sh(t, l.Control.Machine, `nft add table bridge silent
		nft 'add chain bridge silent forward { type filter hook forward priority 0; }'
		nft add rule bridge silent forward meta l4proto udp meta length gt 1500 drop`)
	began := time.Now()
	pass()
	t.Logf("1 MiB took %v when the path had just got smaller in silence", time.Since(began).Round(10*time.Millisecond))
	for _, n := range l.Nodes[:2] {
		waitPeerMTU(t, n, 0, 0)
	}
	for _, v6 := range []bool{false, true} {
		transfer(t, pods[0], pods[1], pods[1].Addr(v6))
		transfer(t, pods[1], pods[0], pods[0].Addr(v6))
	}
	labtest.NoneInClear(t, stop())
	labtest.Sh(t, l.Control.Machine, "nft delete table bridge silent")
}

// waitPeerMTU waits until the widest of a node's paths carries from least to most bytes, and its routes say so.
func waitPeerMTU(t *testing.T, n *lab.Node, least, most int) {
	t.Helper()
	labtest.Eventually(t, fmt.Sprintf("wait for %s to know a path of %d bytes", n.Name, least), func() error {
		var s nodestatus.Status
		if err := json.Unmarshal([]byte(labtest.Sh(t, n.Machine, "headcni-daemon status -o json || :")), &s); err != nil {
			return err
		}
		if s.PeerMTU == nil || s.PeerMTU.Bytes < least || s.PeerMTU.Bytes > most {
			return fmt.Errorf("status says %+v", s.PeerMTU)
		}
		// What a pod is told to be too large before the routes are there, it believes for ten minutes.
		routes := labtest.Sh(t, n.Machine, "for f in -4 -6; do ip $f route show table 52; done | grep -c '/[26]5 .* mtu ' || :")
		if strings.TrimSpace(routes) != fmt.Sprint(s.PeerMTU.Peers*4) {
			return fmt.Errorf("%+v, and %s routes", *s.PeerMTU, routes)
		}
		return nil
	})
}
