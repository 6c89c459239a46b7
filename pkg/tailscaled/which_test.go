package tailscaled

import (
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
)

// tailscale.socket is that of the mode that is asked for, and the host's under auto.
func TestSocketOf(t *testing.T) {
	const own = "/run/mine.sock"
	for _, tt := range []struct{ asked, socket, mode, want string }{
		{config.ModeAuto, "", config.ModeHost, paths.HostTailscaleSocket},
		{config.ModeAuto, "", config.ModeDaemon, paths.DaemonTailscaleSocket},
		{config.ModeAuto, own, config.ModeHost, own},
		{config.ModeAuto, own, config.ModeDaemon, paths.DaemonTailscaleSocket},
		{config.ModeAuto, own, "", ""},
		{config.ModeHost, own, config.ModeHost, own},
		{config.ModeHost, own, config.ModeDaemon, paths.DaemonTailscaleSocket},
		{config.ModeDaemon, own, config.ModeDaemon, own},
		{config.ModeDaemon, own, config.ModeHost, paths.HostTailscaleSocket},
	} {
		c := config.Default()
		c.Tailscale.Mode, c.Tailscale.Socket = tt.asked, tt.socket
		if got := Socket(c.Tailscale, tt.mode); got != tt.want {
			t.Errorf("%+v: got %s", tt, got)
		}
	}
}

// What a power failure left of the state is put aside; what is sound, or cannot be judged, stays.
func TestSetAside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tailscaled.state")
	for name, c := range map[string]struct {
		state string
		aside bool
	}{
		"sound": {`{"_machinekey":"cHJpdmtleQ=="}`, false}, "zeros": {strings.Repeat("\x00", 4096), true}, "empty": {"", true}, "cut off": {`{"_machinekey":"cHJ`, true},
	} {
		if err := os.WriteFile(path, []byte(c.state), 0o600); err != nil {
			t.Fatal(err)
		}
		for range 2 { // a second start has nothing to do
			if err := setAside(path, slog.New(slog.DiscardHandler)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		kept := path
		if c.aside {
			kept += ".damaged"
		}
		if b, err := os.ReadFile(kept); err != nil || string(b) != c.state {
			t.Errorf("%s: %q is kept, %v", name, b, err)
		}
		if _, err := os.Stat(path); (err != nil) != c.aside {
			t.Errorf("%s: put aside %v, want %v", name, err != nil, c.aside)
		}
	}
	if err := setAside(t.TempDir(), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a folder in its place: no error")
	}
}

// A host's tailscaled with a socket of its own is found under auto, and while it does not answer its socket is named.
func TestAutoFindsTheHostsSocket(t *testing.T) {
	c := config.Default()
	c.Tailscale.Socket = filepath.Join(t.TempDir(), "tailscaled.sock")
	if got := Mode(c.Tailscale, ""); got != "" {
		t.Errorf("nobody answers, and the mode is %q", got)
	}
	if err := ErrNone(c.Tailscale); !strings.Contains(err.Error(), c.Tailscale.Socket) {
		t.Error(err)
	}
	l, err := net.Listen("unix", c.Tailscale.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if got := Mode(c.Tailscale, ""); got != config.ModeHost {
		t.Errorf("the host's answers, and the mode is %q", got)
	}
}
