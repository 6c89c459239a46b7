package tailnet

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/why"
)

// Who reaches whom, as tailscaled finds by pings: a peer that is there, and one that has gone.
func TestPeers(t *testing.T) {
	l := labtest.New(t, lab.Options{Nodes: 2, Bin: labtest.Programs(t)})
	a, b := l.Nodes[0], l.Nodes[1]
	path := func(want, code string) {
		t.Helper()
		labtest.Eventually(t, want, func() error {
			out, got := ctl(t, a, "peers -o json --strict")
			var m why.Mesh
			if err := json.Unmarshal([]byte(out), &m); err != nil || len(m.Nodes) != 1 || len(m.Nodes[0].Peers.Peers) != 1 {
				return fmt.Errorf("exit code %s, %v: %s", got, err, out)
			}
			p := m.Nodes[0].Peers.Peers[0]
			if p.Path != want || got != code || p.Name != "node-2" || (p.Millis > 0) != (want == "direct") {
				return fmt.Errorf("exit code %s of %s", got, out)
			}
			text, _ := ctl(t, a, "peers")
			if !strings.Contains(text, "node-2") || !strings.Contains(text, want) {
				return fmt.Errorf("the text does not say it:\n%s", text)
			}
			t.Log(text)
			return nil
		})
	}
	path("direct", "0")
	labtest.Stop(t, b.Tailscaled)
	path("offline", "3")
	labtest.Stop(t, a.Tailscaled)
	if out, code := ctl(t, a, "peers"); code != "2" || !strings.Contains(out, "no tailscaled answers") {
		t.Errorf("without tailscaled: exit code %s of %s", code, out)
	}
}
