package tailnet

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/nodestatus"
)

// narrow is a lab whose underlay carries less than tailscaled's full packets of 1340 bytes.
var narrow = labtest.OneByOne(func(t testing.TB) *lab.Lab {
	return labtest.New(t, lab.Options{Nodes: 2, Modes: []string{host, daemon}, Bin: labtest.Programs(t), UnderlayMTU: 1300})
})

// TCP of pods is clamped by itself to what the path carries, and unclamped when that grows.
func TestSmallPath(t *testing.T) {
	l := narrow.Enter(t)
	var pods []*lab.Pod
	for i, n := range l.Nodes {
		pods = append(pods, labtest.AddPod(t, n, fmt.Sprintf("narrow-%d", i), lab.PodOptions{}))
	}
	for _, v6 := range []bool{false, true} {
		labtest.WantUDP(t, "makes the path direct, "+labtest.Family(v6), pods[0], pods[1].Addr(v6), 64, pods[0].Addr(v6))
	}
	// 1300 less the headers of IP and UDP, WireGuard's 32 bytes and its padding. tailscaled chooses between IPv4 and IPv6.
	inside := []int{(1300 - 20 - 8 - 32) / 16 * 16, (1300 - 40 - 8 - 32) / 16 * 16}
	for _, n := range l.Nodes {
		waitPath(t, n, inside...)
	}
	for _, v6 := range []bool{false, true} {
		began := time.Now()
		transfer(t, pods[0], pods[1], pods[1].Addr(v6))
		transfer(t, pods[1], pods[0], pods[0].Addr(v6))
		t.Logf("%s: 16 MiB in %v", labtest.Family(v6), time.Since(began))
	}
	for _, n := range l.Nodes {
		labtest.Sh(t, l.Control.Machine, "ip link set %s mtu 1500", n.Port)
		labtest.Sh(t, n.Machine, "ip link set eth0 mtu 1500")
	}
	labtest.Sh(t, l.Control.Machine, "ip link set underlay mtu 1500")
	for _, n := range l.Nodes {
		waitPath(t, n, 0)
	}
	transfer(t, pods[0], pods[1], pods[1].Addr(false))
}

// waitPath waits until a node says that its path carries one of these, 0 for the tun's MTU, and clamps accordingly.
func waitPath(t *testing.T, n *lab.Node, want ...int) {
	t.Helper()
	labtest.Eventually(t, fmt.Sprintf("wait for %s to know that its path carries %d bytes", n.Name, want), func() error {
		var s nodestatus.Status
		if err := json.Unmarshal([]byte(labtest.Sh(t, n.Machine, "headcni-daemon status -o json || :")), &s); err != nil {
			return err
		}
		bytes := s.SmallPathBytes
		if !slices.Contains(want, bytes) {
			return fmt.Errorf("%d bytes to %q", s.SmallPathBytes, s.SmallPath)
		}
		for family, headers := range map[string]int{"ip": 40, "ip6": 60} {
			out := labtest.Sh(t, n.Machine, "nft list chain %s headcni clamp", family)
			rules := strings.Count(out, fmt.Sprintf("maxseg size set %d", bytes-headers))
			if bytes == 0 && strings.Contains(out, "maxseg") || bytes != 0 && rules != 2 {
				return fmt.Errorf("clamps so:\n%s", out)
			}
		}
		return nil
	})
}
