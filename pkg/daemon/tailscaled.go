package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
)

// Tailscaled prepares the dedicated tailscaled of daemon mode and becomes it: on success it does not return. Its state
// outlives the daemon; supervision is systemd's or Kubernetes'.
func Tailscaled(c config.Config, environ []string) error {
	if os.Geteuid() != 0 {
		return errors.New("start tailscaled: needs root for the tun device and the routes; run it with sudo or as a systemd unit")
	}
	if err := refuseBesideHost(); err != nil {
		return err
	}
	bin, err := findTailscaled(environ)
	if err != nil {
		return err
	}
	if err := checkTun("/dev/net/tun"); err != nil {
		return err
	}
	socket := c.Tailscale.Socket
	if socket == "" {
		socket = paths.DaemonTailscaleSocket
	}
	for dir, mode := range map[string]os.FileMode{paths.TailscaleStateDir: 0o700, filepath.Dir(socket): 0o755} {
		if err := os.MkdirAll(dir, mode); err != nil {
			return fmt.Errorf("start tailscaled: %w", err)
		}
	}
	argv := []string{
		bin, "--tun=" + c.Tailscale.InterfaceName, "--statedir=" + paths.TailscaleStateDir, "--socket=" + socket,
		"--port=" + strconv.Itoa(c.Tailscale.Port), "--no-logs-no-support",
	}
	return fmt.Errorf("start %s: %w", bin, unix.Exec(bin, argv, tailscaledEnv(environ)))
}

// tailscaledEnv is the environment of the dedicated tailscaled.
func tailscaledEnv(environ []string) []string {
	var env []string
	for _, e := range environ {
		name, _, _ := strings.Cut(e, "=")
		// Our keys are none of its business, and what we set must not stand there twice.
		if name == "PATH" || strings.HasPrefix(name, "HEADCNI_") || strings.HasPrefix(name, "HEADSCALE_") {
			continue
		}
		env = append(env, e)
	}
	return append(env,
		// Without iptables on PATH tailscaled uses nftables and starts seconds sooner: it needs no other program.
		"PATH="+filepath.Join(paths.TailscaleStateDir, "no-programs"),
		"TS_DEBUG_FIREWALL_MODE=nftables",
		"TS_NO_LOGS_NO_SUPPORT=true",
		"TS_LOGS_DIR="+paths.TailscaleStateDir,
	)
}

// refuseBesideHost fails where the host's own tailscaled runs: both would fight over table 52 and rules 5210-5270.
func refuseBesideHost() error {
	if !answers(paths.HostTailscaleSocket) {
		return nil
	}
	return fmt.Errorf("start tailscaled: the host's own tailscaled answers at %s and two in one network namespace break each other's routes; "+
		"use it with tailscale.mode: host, or stop it first (systemctl disable --now tailscaled)", paths.HostTailscaleSocket)
}

// answers reports whether something listens on a Unix socket.
func answers(socket string) bool {
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

// findTailscaled looks at HEADCNI_TAILSCALED, beside our own program, then in PATH.
func findTailscaled(environ []string) (string, error) {
	for _, e := range environ {
		if path, ok := strings.CutPrefix(e, "HEADCNI_TAILSCALED="); ok && path != "" {
			if _, err := os.Stat(path); err != nil {
				return "", fmt.Errorf("HEADCNI_TAILSCALED: %w", err)
			}
			return path, nil
		}
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "tailscaled")
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath("tailscaled")
	if err != nil {
		return "", errors.New("start tailscaled: no tailscaled beside headcni-daemon or in PATH; install Tailscale or name it in HEADCNI_TAILSCALED")
	}
	return filepath.Abs(path)
}

// checkTun opens the tun device, which containers often lack.
func checkTun(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("start tailscaled: %w; load the tun module (modprobe tun), and in a container mount /dev/net/tun and allow the device c 10:200", err)
	}
	return f.Close()
}
