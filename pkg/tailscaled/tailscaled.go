// Package tailscaled starts the dedicated tailscaled of daemon mode: it decides whether a node is to have one, prepares its
// folders, flags and environment, and becomes it.
package tailscaled

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/trusted"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/reconcile"
)

// Node is what Become needs to know of its node.
type Node struct {
	// Mode is the one that the daemon has settled on, "" for none.
	Mode func() (string, error)
	// Ahead does what is better done before tailscaled starts. If it fails, tailscaled starts all the same.
	Ahead func() error
}

// Become prepares the dedicated tailscaled of daemon mode and becomes it: on success it does not return. Its state outlives the
// daemon; supervision is systemd's or Kubernetes'.
//
// In Kubernetes every node runs it, those whose host has a tailscaled too: there it waits for its end, quietly.
func Become(ctx context.Context, c config.Config, environ []string, node Node, log *slog.Logger) error {
	if os.Geteuid() != 0 {
		return errors.New("start tailscaled: needs root for the tun device and the routes; run it with sudo or as a systemd unit")
	}
	if c.InKubernetes(getenvOf(environ)) && c.Tailscale.Mode != config.ModeDaemon {
		wanted, err := wantDedicated(ctx, c, node.Mode, log)
		if err != nil || !wanted {
			return err
		}
	}
	if err := BesideHost(c.Tailscale); err != nil {
		return fmt.Errorf("start tailscaled: %w", err)
	}
	bin, err := findTailscaled(environ)
	if err != nil {
		return err
	}
	if err := checkTun("/dev/net/tun"); err != nil {
		return err
	}
	socket := Socket(c.Tailscale, config.ModeDaemon)
	for dir, mode := range map[string]os.FileMode{paths.TailscaleStateDir: 0o700, filepath.Dir(socket): 0o755} {
		if err := trusted.MkdirAll(dir, mode); err != nil {
			return fmt.Errorf("start tailscaled: %w", err)
		}
	}
	if !c.InKubernetes(getenvOf(environ)) { // where the controller sees one key on two Nodes
		if err := SameMachine(); err != nil {
			return fmt.Errorf("start tailscaled: %w", err)
		}
	}
	if err := setAside(filepath.Join(paths.TailscaleStateDir, "tailscaled.state"), log); err != nil {
		return fmt.Errorf("start tailscaled: %w", err)
	}
	if err := node.Ahead(); err != nil {
		log.Warn("prepare the node for tailscaled: the daemon does it later, for which tailscaled binds its sockets anew", "err", err)
	}
	argv := []string{
		bin, "--tun=" + c.Tailscale.InterfaceName, "--statedir=" + paths.TailscaleStateDir, "--socket=" + socket,
		"--port=" + strconv.Itoa(c.Tailscale.Port), "--no-logs-no-support",
	}
	return fmt.Errorf("start %s: %w", bin, unix.Exec(bin, argv, tailscaledEnv(environ, c.Headscale.Proxy)))
}

// setAside moves a state file away that is no JSON, as a power failure can leave it on some file systems: tailscaled would run
// without any state and join nothing until somebody moves the file. Without it the node joins anew. One that cannot be read may well be
// sound, and stays.
func setAside(path string, log *slog.Logger) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && json.Valid(b) {
		return nil
	}
	if err != nil {
		return err
	}
	aside := path + ".damaged"
	if err := os.Rename(path, aside); err != nil {
		return err
	}
	log.Warn("tailscaled's state is damaged: this node joins the tailnet anew", "file", path, "kept", aside)
	return nil
}

const (
	// bootGrace is how long after a boot a host's tailscaled may still be about to start. It comes before kubelet's pods as
	// a rule, but no unit waits for another here.
	bootGrace = time.Minute
	// hostLook is how often a host's tailscaled is looked for meanwhile.
	hostLook = time.Second
)

// wantDedicated returns true as soon as it is clear that the node is to have a dedicated tailscaled, and false when ctx
// ends before.
//
// What the daemon has settled on stays: a host's tailscaled that is away is being upgraded or restarted, and to take its
// routes over for that minute would cut every flow twice. Where nothing is settled, a host tailscaled that answers decides;
// so does a socket that nobody answers at, which is of this boot (/run is a tmpfs), so the host has a tailscaled; and a
// node that has just booted is given time. The host's unit files and state would tell more, but we do not see them.
func wantDedicated(ctx context.Context, c config.Config, savedMode func() (string, error), log *slog.Logger) (bool, error) {
	said := false
	for ctx.Err() == nil {
		mode, err := savedMode()
		if err != nil {
			return false, err
		}
		up, err := uptime()
		if err != nil {
			return false, err
		}
		if err := mountGone(filepath.Dir(paths.HostTailscaleSocket)); err != nil {
			return false, err
		}
		_, noSocket := os.Lstat(paths.HostTailscaleSocket)
		switch {
		case c.Tailscale.Mode == config.ModeHost || mode == config.ModeHost:
		case mode == config.ModeDaemon:
			return true, nil
		case noSocket != nil && up > bootGrace:
			return true, nil
		}
		if !said {
			log.Info("this node uses its host's own tailscaled, or may be about to; idle")
			said = true
		}
		reconcile.Sleep(ctx, hostLook)
	}
	return false, nil
}

// mountGone is an error where the folder that was mounted into our container exists no more. systemd makes a new
// /run/tailscale with each start of a host's tailscaled, and a container sees that one only after a start of its own.
func mountGone(dir string) error {
	var s unix.Stat_t
	if err := unix.Stat(dir, &s); err == nil && s.Nlink == 0 {
		return fmt.Errorf("the host has made %s anew, which a new container will see: ends to be started again", dir)
	}
	return nil // a folder that is not there is no mount
}

// WatchMount returns an error once the folder of the host's tailscaled, which is mounted into our container, is gone; nil when
// ctx ends.
func WatchMount(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := mountGone(filepath.Dir(paths.HostTailscaleSocket)); err != nil {
			return err
		}
		reconcile.Sleep(ctx, hostLook)
	}
	return nil
}

// uptime is how long ago the machine booted.
func uptime() (time.Duration, error) {
	var i unix.Sysinfo_t
	if err := unix.Sysinfo(&i); err != nil {
		return 0, fmt.Errorf("ask when the machine booted: %w", err)
	}
	return time.Duration(i.Uptime) * time.Second, nil
}

func getenvOf(environ []string) func(string) string {
	return func(name string) string {
		for _, e := range environ {
			if v, ok := strings.CutPrefix(e, name+"="); ok {
				return v
			}
		}
		return ""
	}
}

// tailscaledEnv is the environment of the dedicated tailscaled. A proxy, where there is one, is the only one, and used for all that TLS
// is spoken with.
func tailscaledEnv(environ []string, proxy string) []string {
	var env []string
	for _, e := range environ {
		name, _, _ := strings.Cut(e, "=")
		// Our keys are none of its business, and what we set must not stand there twice.
		if name == "PATH" || strings.HasPrefix(name, "HEADCNI_") || strings.HasPrefix(name, "HEADSCALE_") {
			continue
		}
		if proxy != "" && strings.HasSuffix(strings.ToUpper(name), "_PROXY") { // HTTPS_PROXY, NO_PROXY, https_proxy
			continue
		}
		env = append(env, e)
	}
	if proxy != "" {
		env = append(env, "HTTPS_PROXY="+proxy)
	}
	return append(env,
		// Without iptables on PATH tailscaled uses nftables and starts seconds sooner: it needs no other program.
		"PATH="+filepath.Join(paths.TailscaleStateDir, "no-programs"),
		"TS_DEBUG_FIREWALL_MODE=nftables",
		"TS_NO_LOGS_NO_SUPPORT=true",
		"TS_LOGS_DIR="+paths.TailscaleStateDir,
	)
}

// BesideHost tells why the dedicated tailscaled cannot be started where the host's own runs: both would fight over table 52 and
// rules 5210-5270.
func BesideHost(c config.Tailscale) error {
	socket := Socket(c, config.ModeHost)
	if !Answers(socket) {
		return nil
	}
	return findings.Errorf(findings.TwoTailscaleds, "the host's own tailscaled answers at %s and two in one network namespace break each other's routes; "+
		"use it with tailscale.mode: host, or stop it first (systemctl disable --now tailscaled)", socket)
}

// findTailscaled looks at HEADCNI_TAILSCALED, beside our own program, then in PATH.
func findTailscaled(environ []string) (string, error) {
	if path := getenvOf(environ)("HEADCNI_TAILSCALED"); path != "" {
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("HEADCNI_TAILSCALED: %w", err)
		}
		return path, nil
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
