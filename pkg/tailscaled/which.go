package tailscaled

import (
	"context"
	"net"
	"time"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/findings"
)

// Mode decides auto: what it settled on before, else whichever tailscaled answers.
func Mode(c config.Tailscale, saved string) string {
	switch {
	case saved != "":
		return saved
	case Answers(Socket(c, config.ModeHost)):
		return config.ModeHost
	case Answers(Socket(c, config.ModeDaemon)):
		return config.ModeDaemon
	}
	return ""
}

// Socket is where the tailscaled of a mode listens; "" while auto has not settled. tailscale.socket is that of the mode that
// is asked for, and the host's under auto.
func Socket(c config.Tailscale, mode string) string {
	asked := c.Mode
	if asked == config.ModeAuto {
		asked = config.ModeHost
	}
	switch {
	case c.Socket != "" && mode == asked:
		return c.Socket
	case mode == config.ModeHost:
		return paths.HostTailscaleSocket
	case mode == config.ModeDaemon:
		return paths.DaemonTailscaleSocket
	}
	return ""
}

// ErrNone is what auto says while it has found neither.
func ErrNone(c config.Tailscale) error {
	return findings.Errorf(findings.TailscaledSilent, "no tailscaled answers at %s or %s: install Tailscale and run `tailscale up --login-server URL`, or start "+
		"`headcni-daemon tailscaled`", Socket(c, config.ModeHost), Socket(c, config.ModeDaemon))
}

// Answers reports whether something listens on a Unix socket.
func Answers(socket string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return false
	}
	c.Close()
	return true
}
