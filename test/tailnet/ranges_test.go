package tailnet

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// Two nodes whose cluster CIDRs contradict each other both say so, stay ready for their own pods, and take nothing of what the
// other advertises for pods.
func TestContradictingRanges(t *testing.T) {
	l := narrow.EnterLast(t)
	ours, theirs := l.Nodes[0], l.Nodes[1]
	before := pathsOf(t, ours)
	pod := labtest.AddPod(t, ours, "ranges", lab.PodOptions{})
	inClear := labtest.Capture(t, l)
	labtest.Stop(t, theirs.Daemon)
	if err := theirs.ConfigureDaemon(func(_ *lab.Node, c map[string]any) {
		n := labtest.Section(c, "network")
		n["podCIDRs"], n["clusterCIDRs"] = []string{"10.99.1.0/24", "fd99:0:1::/64"}, []string{"10.99.0.0/16", "fd99::/32"}
	}); err != nil {
		t.Fatal(err)
	}
	if err := theirs.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		n, other *lab.Node
		ranges   []string
	}{{ours, theirs, []string{"10.99.1.0/24", "fd99:0:1::/64"}}, {theirs, ours, []string{"10.244.1.0/24", "fd00:244:1::/64"}}} {
		labtest.Eventually(t, c.n.Name+" tells of the other's ranges", func() error {
			text, ready := labtest.Part(t, c.n, "foreign")
			for _, want := range append(c.ranges, c.other.Name, "network.clusterCIDRs") {
				if !ready || !strings.Contains(text, want) {
					return fmt.Errorf("ready: %v, foreign says %q; want %s in it", ready, text, want)
				}
			}
			return nil
		})
	}
	for _, to := range []string{"10.99.1.2", "fd99:0:1::2", theirs.PodCIDRs[0].Addr().Next().String(), theirs.PodCIDRs[1].Addr().Next().String()} {
		_, _, _ = lab.Echo(labtest.Within(t), pod, netip.MustParseAddr(to), 64) // nobody need answer
	}
	labtest.NoneInClear(t, inClear())
	if after := pathsOf(t, ours); after != before {
		t.Errorf("what a peer advertises has changed what is routed, accepted or kept from NAT:\n%s\nwas\n%s", after, before)
	}
}

// pathsOf are a node's rules and the sets that its tables decide by.
func pathsOf(t *testing.T, n *lab.Node) string {
	t.Helper()
	return labtest.Sh(t, n.Machine, `ip rule; ip -6 rule
		for f in ip ip6; do for s in cluster keepsrc own; do nft list set $f headcni $s; done; done`)
}
