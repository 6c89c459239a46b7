package tailnet

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
)

func TestMain(m *testing.M) { nstest.Main(m) }

const (
	host   = config.ModeHost
	daemon = config.ModeDaemon
)

// Machines of the lab of TestTailnet/steady. The first two are the cluster; the others are left alone until a test
// takes them.
const (
	nodeA = iota
	nodeB
	laptop
	crowded
	hostLocal
	flat
	keyOnly
	faulty
	duplicate
	leavingHost
	leavingDaemon
	steadyNodes
)

// TestTailnet tests on two labs: one in which nothing is broken that others need, and one for faults.
func TestTailnet(t *testing.T) {
	nstest.Require(t)
	bin := labtest.Programs(t)
	t.Run("steady", func(t *testing.T) {
		t.Parallel()
		modes := make([]string, steadyNodes)
		for i := range modes {
			modes[i] = host
		}
		for _, i := range []int{nodeB, crowded, hostLocal, keyOnly, duplicate, leavingDaemon} {
			modes[i] = daemon
		}
		l := labtest.New(t, lab.Options{
			Nodes: steadyNodes, Spare: steadyNodes - 2, Modes: modes, Bin: bin, Policy: autoApprove,
			Batch: 500 * time.Millisecond, // Headscale's own default, which changes what nodes get to know and when
		})
		for name, test := range map[string]func(*testing.T, *lab.Lab){
			"traffic": testTraffic, "MTU": testMTU, "crowd": testCrowd, "host-local": testHostLocal, "flat": testFlat,
			"pre-auth key": testPreAuthKey, "bad input": testBadInput, "duplicate CIDR": testDuplicate,
			"uninstall host": testUninstallHost, "uninstall daemon": testUninstallDaemon,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				test(t, l)
			})
		}
	})
	t.Run("faults", func(t *testing.T) {
		t.Parallel()
		testFaults(t, labtest.New(t, lab.Options{Nodes: 3, Spare: 1, Modes: []string{host, daemon, host}, Bin: bin}))
	})
}

// tagAuto is the tag whose nodes' routes Headscale approves by itself.
const tagAuto = "tag:auto"

func autoApprove(policy map[string]any) {
	owners := policy["tagOwners"].(map[string]any)
	owners[tagAuto] = owners[lab.Tag]
	routes := map[string]any{}
	for _, c := range lab.ClusterCIDRs {
		routes[c.String()] = []string{tagAuto}
	}
	policy["autoApprovers"] = map[string]any{"routes": routes}
}

func startDaemon(t *testing.T, n *lab.Node) {
	t.Helper()
	if err := n.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	labtest.Ready(t, n)
}

// addPod makes a pod that is removed with the test, unless the test does it.
func addPod(t *testing.T, n *lab.Node, name string, opt lab.PodOptions) *lab.Pod {
	t.Helper()
	p, err := n.AddPod(labtest.Within(t), name, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), labtest.Soon)
		defer cancel()
		if _, err := os.Stat(n.Path("/run/netns/" + name)); err != nil {
			return // the test has removed it
		}
		if err := p.Remove(ctx); err != nil {
			t.Errorf("remove %s: %v", name, err)
		}
	})
	return p
}

// section of a daemon.yaml in the making.
func section(c map[string]any, name string) map[string]any {
	if c[name] == nil {
		c[name] = map[string]any{}
	}
	return c[name].(map[string]any)
}

// authKey makes a pre-auth key of the lab's user, as up to Headscale 0.27 each has to have one.
func authKey(t *testing.T, l *lab.Lab, args ...string) string {
	t.Helper()
	out, err := l.Control.Run(labtest.Within(t), "headscale", append([]string{"preauthkeys", "create", "--expiration", "24h", "--user", "1"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return lastWord(t, out)
}

func lastWord(t *testing.T, s string) string {
	t.Helper()
	words := strings.Fields(s)
	if len(words) == 0 {
		t.Fatal("printed nothing")
	}
	return words[len(words)-1]
}

func family(v6 bool) string { return fmt.Sprintf("IPv%d", map[bool]int{false: 4, true: 6}[v6]) }
