package tailnet

import (
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// Nodes whose underlay has no IPv4 carry pods of both families by a direct path, and clamp TCP to what IPv6 leaves of a small one.
func TestOnlyIPv6(t *testing.T) {
	l := labtest.OneByOne(func(t testing.TB) *lab.Lab {
		return labtest.New(t, lab.Options{Nodes: 2, Modes: []string{host, daemon}, Bin: labtest.Programs(t), UnderlayMTU: 1300, OnlyIPv6: true})
	}).Enter(t)
	var pods []*lab.Pod
	for _, n := range l.Nodes {
		pods = append(pods, labtest.AddPod(t, n, "only-ipv6-"+n.Name, lab.PodOptions{}))
		if out := labtest.Sh(t, n.Machine, "ip -4 -o address show dev eth0; ip -4 route show default"); out != "" {
			t.Fatalf("%s has IPv4:\n%s", n.Name, out)
		}
	}
	inClear := labtest.Capture(t, l)
	for _, v6 := range []bool{false, true} {
		labtest.WantUDP(t, "there, "+labtest.Family(v6), pods[0], pods[1].Addr(v6), 64, pods[0].Addr(v6))
		labtest.WantUDP(t, "and back, "+labtest.Family(v6), pods[1], pods[0].Addr(v6), 64, pods[1].Addr(v6))
	}
	for _, n := range l.Nodes {
		waitPath(t, n, (1300-40-8-32)/16*16)
	}
	for _, v6 := range []bool{false, true} {
		transfer(t, pods[0], pods[1], pods[1].Addr(v6))
		transfer(t, pods[1], pods[0], pods[0].Addr(v6))
	}
	labtest.NoneInClear(t, inClear())
}
