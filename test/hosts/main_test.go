package hosts

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config"
)

// Most of these tests wait most of the time.
func TestMain(m *testing.M) { labtest.Main(m, 8) }

// answer is how long a connection that works may take.
const answer = 3 * time.Second

const (
	host   = config.ModeHost
	daemon = config.ModeDaemon
)

// advertise has the user of a node advertise these routes and no others, and approves them.
func advertise(t *testing.T, l *lab.Lab, n *lab.Node, routes ...string) {
	t.Helper()
	if _, err := n.Run(labtest.Within(t), "tailscale", "set", "--advertise-routes="+strings.Join(routes, ",")); err != nil {
		t.Fatal(err)
	}
	labtest.Approve(t, l, n, routes...)
}

// accepted waits until a node has routes in tailscaled's table.
func accepted(t *testing.T, n *lab.Node, routes ...string) {
	t.Helper()
	labtest.Eventually(t, "wait for accepted routes", func() error {
		have := strings.Fields(labtest.Sh(t, n.Machine, "ip route show table 52; ip -6 route show table 52"))
		for _, r := range routes {
			if !slices.Contains(have, r) {
				return fmt.Errorf("%s has no route to %s", n.Name, r)
			}
		}
		return nil
	})
}

// families are nft's names of them.
var families = []string{"ip", "ip6"}

// ip is `ip` for a family.
func ip(v6 bool) string {
	if v6 {
		return "ip -6"
	}
	return "ip -4"
}
