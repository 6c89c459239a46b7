package tailnet

import (
	"encoding/json"
	"fmt"
	"io"
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
	return labtest.New(t, lab.Options{Nodes: 2, Modes: []string{host, daemon}, Bin: labtest.Programs(t), UnderlayMTU: 1300, Policy: func(p map[string]any) {
		acl := p["acls"].([]map[string]any)[0]
		for _, c := range otherCluster {
			acl["src"], acl["dst"] = append(acl["src"].([]string), c.String()), append(acl["dst"].([]string), c.String()+":*")
		}
	}})
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
	var took time.Duration
	for _, v6 := range []bool{false, true} {
		began := time.Now()
		transfer(t, pods[0], pods[1], pods[1].Addr(v6))
		transfer(t, pods[1], pods[0], pods[0].Addr(v6))
		took = max(took, time.Since(began))
	}
	unclamped(t, l, pods, took)
	for _, n := range l.Nodes {
		waitPath(t, n, inside...)
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
	silent(t, l)
	shrinks(t, l, inside)
}

// unclamped shows that without the clamp TCP stands still: else the test would prove nothing. Then the daemons start again.
func unclamped(t *testing.T, l *lab.Lab, pods []*lab.Pod, took time.Duration) {
	t.Helper()
	for _, n := range l.Nodes {
		labtest.Stop(t, n.Daemon)
		labtest.Sh(t, n.Machine, "nft flush chain ip headcni forward_segments; nft flush chain ip6 headcni forward_segments")
	}
	for _, v6 := range []bool{false, true} {
		c, in := connect(t, pods[0], pods[1], pods[1].Addr(v6))
		deadline := time.Now().Add(5 * took)
		_, _ = c.SetDeadline(deadline), in.SetDeadline(deadline) // sockets that are open
		go func() { _, _ = c.Write(make([]byte, 16<<20)) }()     // ends at the deadline
		n, _ := io.Copy(io.Discard, in)                          // and so does this
		t.Logf("%s: 16 MiB in %v with the clamp, %d bytes in %v without", labtest.Family(v6), took, n, 5*took)
		if n > 16<<20/10 {
			t.Errorf("%s: %d bytes went through without the clamp in 5 times the time that 16 MiB take with it", labtest.Family(v6), n)
		}
	}
	for _, n := range l.Nodes {
		if err := n.StartDaemon(); err != nil {
			t.Fatal(err)
		}
	}
}

// silent has the underlay swallow large packets and tell nobody.
func silent(t *testing.T, l *lab.Lab) {
	t.Helper()
	labtest.Sh(t, l.Control.Machine, `nft add table bridge silent
		nft 'add chain bridge silent forward { type filter hook forward priority 0; }'
		nft add rule bridge silent forward meta l4proto udp meta length gt 1300 drop`)
	n := l.Nodes[0]
	labtest.Stop(t, n.Daemon) // else it asks every ten minutes
	if err := n.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	waitPath(t, n, 1232, 1152)
	if out := labtest.Sh(t, n.Machine, "headcni-daemon status || :"); !strings.Contains(out, "no router says so") {
		t.Errorf("status does not say that packets vanish:\n%s", out)
	}
}

// shrinks has the way that a node knows to carry all carry less, which is known long before tailscaled's status is looked at.
func shrinks(t *testing.T, l *lab.Lab, inside []int) {
	t.Helper()
	n := l.Nodes[1]
	waitPath(t, n, 0)
	labtest.Sh(t, n.Machine, "ip link set eth0 mtu 1300")
	began := time.Now()
	waitPath(t, n, inside...)
	t.Logf("known and clamped %v after the path has shrunk", time.Since(began).Round(time.Millisecond))
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
			// Those of pods' links stand always: "set rt mtu".
			out := labtest.Sh(t, n.Machine, "nft list chain %s headcni forward_segments | { grep -v 'set rt mtu$' || :; }", family)
			rules := strings.Count(out, fmt.Sprintf("maxseg size set %d", bytes-headers))
			if bytes == 0 && strings.Contains(out, "maxseg") || bytes != 0 && rules != 2 {
				return fmt.Errorf("clamps so:\n%s", out)
			}
		}
		return nil
	})
}
