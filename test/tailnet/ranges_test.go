package tailnet

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// otherCluster are the ranges of a cluster beside the lab's, which Headscale's policy of narrow lets pass.
var otherCluster = []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16"), netip.MustParsePrefix("fd99::/32")}

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
		n["podCIDRs"], n["clusterCIDRs"] = []string{"10.99.1.0/24", "fd99:0:1::/64"}, otherCluster
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
	t.Run("named", func(t *testing.T) { twoClusters(t, l, pod) })
}

// twoClusters has each node name the other's cluster. Then the pods of both reach each other by their own addresses, through the tunnel or
// not at all.
func twoClusters(t *testing.T, l *lab.Lab, pod *lab.Pod) {
	named, ranges := []string{"theirs", "ours"}, [][]netip.Prefix{otherCluster, lab.ClusterCIDRs}
	for i, n := range l.Nodes {
		labtest.Stop(t, n.Daemon)
		if err := n.ConfigureDaemon(func(_ *lab.Node, c map[string]any) {
			s := labtest.Section(c, "network")
			s["remoteClusters"] = []map[string]any{{"name": named[i], "podCIDRs": ranges[i]}}
			if i == 1 {
				s["podCIDRs"], s["clusterCIDRs"] = []string{"10.99.1.0/24", "fd99:0:1::/64"}, otherCluster
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	labtest.StartDaemon(t, l.Nodes...)
	for _, n := range l.Nodes {
		labtest.Eventually(t, n.Name+" has no stranger beside it", func() error {
			if text, _ := labtest.Part(t, n, "foreign"); strings.Contains(text, "network.clusterCIDRs") {
				return errors.New(text) // it may tell of a small path, of which this lab has had some
			}
			return nil
		})
	}
	remote := labtest.AddPod(t, l.Nodes[1], "remote", lab.PodOptions{})
	inClear := labtest.Capture(t, l)
	for _, v6 := range []bool{false, true} {
		if a := remote.Addr(v6); !otherCluster[labtest.Index(v6)].Contains(a) {
			t.Fatalf("the other cluster's pod has %s", a)
		}
		labtest.WantTCP(t, "to the other cluster, "+labtest.Family(v6), pod, labtest.Echo(remote, v6), pod.Addr(v6))
		labtest.WantTCP(t, "from the other cluster, "+labtest.Family(v6), remote, labtest.Echo(pod, v6), remote.Addr(v6))
	}
	labtest.Kill(t, l.Nodes[1].Tailscaled)
	for _, v6 := range []bool{false, true} {
		_, _, _ = lab.Echo(labtest.Within(t), remote, pod.Addr(v6), 64) // nobody can answer
	}
	labtest.NoneInClear(t, inClear())
}

// pathsOf are a node's rules and the sets that its tables decide by.
func pathsOf(t *testing.T, n *lab.Node) string {
	t.Helper()
	return labtest.Sh(t, n.Machine, `ip rule; ip -6 rule
		for f in ip ip6; do for s in cluster keepsrc own; do nft list set $f headcni $s; done; done`)
}
