package tailnet

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config"
)

// A node that says that pods may start reaches the others. A handshake that the other side cannot answer yet, or that crosses another, is tried
// again after 5 s: so long, or a multiple of it, pods of two nodes that have just joined may be dark.
func TestFirstPods(t *testing.T) {
	const retry = 5 * time.Second // WireGuard's RekeyTimeout
	for i := range 4 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			l := labtest.New(t, lab.Options{Nodes: 2, Modes: []string{config.ModeHost, config.ModeDaemon}, Batch: 500 * time.Millisecond, Bin: labtest.Programs(t)})
			a, b := labtest.AddPod(t, l.Nodes[0], "a", lab.PodOptions{}), labtest.AddPod(t, l.Nodes[1], "b", lab.PodOptions{})
			since := time.Now()
			flows := append(labtest.StartFlows(t, a, b), labtest.StartFlows(t, b, a)...)
			flows.WaitBack(t, since)
			for i, r := range flows.Stop() {
				if r.Longest > retry-time.Second {
					t.Errorf("%s: %+v", flows[i].Name, r)
				}
			}
			// tailscaled binds its sockets anew for the addresses of the node's name server.
			log := logSince(t, l.Nodes[0], 0)
			if names, pods := strings.Index(log, "169.254.116.52 to lo"), strings.Index(log, "part=conflist changes="); names < 0 || names > pods {
				t.Errorf("the addresses come when pods may start already:\n%s", log)
			}
		})
	}
}
