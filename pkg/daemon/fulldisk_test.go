package daemon

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/cmdlog"
	"github.com/headcni/headcni/pkg/config/paths"
)

// What a full disk keeps from being written is of use after the next start only: the node follows the cluster all the
// same, and the state says so until there is room again. What uninstall would need is not done without being written.
func TestFullStateDisk(t *testing.T) {
	c := testConfig(t)
	makeRoom := nstest.FillDisk(t, paths.StateDir)
	d := newDaemon(t, c)
	d.kubernetes, _ = startWatch(t, node("a", "10.244.1.0/24"), node("b", "10.244.2.0/24"))
	d.cfg.Network.PodCIDRs, d.cfg.Network.ClusterCIDRs = nil, nil
	waitUntil(t, func() bool { return d.kubernetes.View().Synced })
	t.Cleanup(func() { _ = removeNetwork(context.Background(), d.saved) })
	d.pass(t.Context())
	got := partErrors(d)
	if got[partConfig] != "" || got[partFirewall] != "" || !strings.Contains(got[partState], "no space left on device; what runs goes on; make room") {
		t.Errorf("with a full disk: %q", got)
	}
	if err := d.withdraw(t.Context(), "192.0.2.1:443"); err != nil {
		t.Errorf("take back: %v", err)
	}
	if d.saved.TakenBackFor == "" || run(t, "ip", "rule") != run(t, "sh", "-c", "ip rule | grep -v 519") {
		t.Errorf("not taken back: %q\n%s", d.saved.TakenBackFor, run(t, "ip", "rule"))
	}
	if err := d.remember(func(s *state) { s.Hidden = []string{"10-x.conf"} }); !errors.Is(err, unix.ENOSPC) || d.saved.Hidden != nil {
		t.Errorf("remembered %v: %v", d.saved.Hidden, err)
	}
	makeRoom()
	d.pass(t.Context())
	if got := partErrors(d)[partState]; got != "" {
		t.Errorf("with room: %q", got)
	}
	if s, err := loadState(); err != nil || s.Kubernetes.Node != "a" || s.TakenBackFor == "" {
		t.Errorf("kept %+v, %v", s, err)
	}
}

// A full /run costs the count of what the plugin did, not the daemon.
func TestFullRunDisk(t *testing.T) {
	c := testConfig(t)
	nstest.FreshState(t)
	makeRoom := nstest.FillDisk(t, paths.RunDir)
	if err := os.Symlink("nowhere/hints", cmdlog.Spool(paths.DaemonSocket)); err != nil { // nor can its folder be made
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	d := newDaemon(t, c)
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	waitUntil(t, func() bool { return partErrors(d)[partRoutes] == "" })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	makeRoom()
	if err := Uninstall(t.Context(), c, quiet); err != nil {
		t.Error(err)
	}
}
