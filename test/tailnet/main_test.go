package tailnet

import (
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config"
)

func TestMain(m *testing.M) { labtest.Main(m, 0) }

const (
	host   = config.ModeHost
	daemon = config.ModeDaemon
)

// Machines of the lab of steady. The first two are the cluster; the others are left alone until a test takes them.
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

// steady is a lab in which nothing is broken that others need.
var steady = labtest.SideBySide(func(t testing.TB) *lab.Lab {
	modes := make([]string, steadyNodes)
	for i := range modes {
		modes[i] = host
	}
	for _, i := range []int{nodeB, crowded, hostLocal, keyOnly, duplicate, leavingDaemon} {
		modes[i] = daemon
	}
	return labtest.New(t, lab.Options{
		Nodes: steadyNodes, Spare: steadyNodes - 2, Modes: modes, Bin: labtest.Programs(t), Plugins: []string{"host-local"}, Policy: autoApprove,
		Batch: 500 * time.Millisecond, // Headscale's own default, which changes what nodes get to know and when
	})
})

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
