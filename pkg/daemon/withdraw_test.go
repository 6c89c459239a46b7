package daemon

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/tailscale"
)

// What could not be taken back is tried again; afterwards the host is left alone.
func TestTakeBackUntilDone(t *testing.T) {
	c := testConfig(t)
	nstest.FreshState(t)
	d := newDaemon(t, c)
	d.pass(t.Context())
	d.saved.Mode, d.saved.Prefs = config.ModeDaemon, &tailscale.SavedPrefs{}
	if err := d.withdraw(t.Context(), "192.0.2.1:443"); !errors.Is(err, tailscale.ErrUnreachable) {
		t.Errorf("without tailscaled: %v", err)
	}
	asked := fakeTailscaled(t, paths.DaemonTailscaleSocket, http.StatusOK)
	for range 2 {
		if err := d.withdraw(t.Context(), "192.0.2.1:443"); err != nil {
			t.Error(err)
		}
		run(t, "sysctl", "-w", "net.ipv4.ip_forward=1") // by somebody else
	}
	if got := asked(); len(got) != 1 {
		t.Errorf("asked tailscaled %q", got)
	}
	if got := run(t, "sysctl", "net.ipv4.ip_forward"); !strings.Contains(got, "= 1") {
		t.Errorf("after all is done: %s", got)
	}
	if rules := run(t, "ip", "rule"); strings.Contains(rules, "519") {
		t.Errorf("rules of ours are left:\n%s", rules)
	}
	if d.pass(t.Context()); !strings.Contains(partErrors(d)[partConfig], "taken back") {
		t.Errorf("config: %q", partErrors(d)[partConfig])
	}
	if err := Uninstall(t.Context(), c, quiet); err != nil {
		t.Error(err)
	}
}
