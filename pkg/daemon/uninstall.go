package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/internal/pidlock"
	"github.com/headcni/headcni/internal/trusted"
	"github.com/headcni/headcni/pkg/cmdlog"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/dns/answer"
	"github.com/headcni/headcni/pkg/hostfirewall"
	"github.com/headcni/headcni/pkg/install"
	"github.com/headcni/headcni/pkg/networking/antispoof"
	"github.com/headcni/headcni/pkg/networking/fastpath"
	"github.com/headcni/headcni/pkg/networking/noderoutes"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/policy/nodepolicy"
	"github.com/headcni/headcni/pkg/tailscale"
	"github.com/headcni/headcni/pkg/tailscaled"
)

// Uninstall takes everything of ours off this node and puts back what was there. It goes on past errors, so that running
// it again finishes what it could not do, and it may be killed anywhere.
//
// Nothing waits for pods. Those that still run lose their network, since it is what goes; their addresses, which are links
// and routes of their own, go with them. The plugins stay where a runtime deletes by the configuration in its cache (CRI-O,
// podman, multus) and still has such pods: they delete without a lease and without a node. containerd needs a
// configuration to do a DEL by, and ours is gone: it waits for the next CNI's, or for a reboot, and plugins would not help it. The
// leases are of no use to a HeadCNI that comes back: it passes over addresses that are live without a lease.
//
// The dedicated tailscaled leaves the tailnet, where it still runs and the control server answers; its keys are removed in
// any case, because nobody could tell later whose they were. A host's own tailscaled stays logged in, with its prefs as
// they were found. What people wrote, the configuration and the key in /etc/headcni, is theirs.
func Uninstall(ctx context.Context, c config.Config, log *slog.Logger) error {
	if err := trusted.MkdirAll(paths.RunDir, 0o755); err != nil {
		return err
	}
	held, err := pidlock.Take(ctx, lockPath(), "headcni-daemon")
	if err != nil {
		return err
	}
	defer held.Close()
	s, err := loadState()
	if err != nil {
		return err
	}
	return uninstall(ctx, c, s, log, "")
}

// uninstall is Uninstall in a process that has the lock. runtime is the node's, see install.Remove.
func uninstall(ctx context.Context, c config.Config, s state, log *slog.Logger, runtime string) error {
	// The conflist goes first, so that no pod starts on a node that is being taken down; the guard goes last.
	err := errors.Join(
		conflist.Restore(c.CNI.ConfDir, s.ConflistMode),
		conflist.ShowHidden(c.CNI.ConfDir, s.Hidden),
		unlessStopped(restorePrefs(ctx, c, s), s.Mode),
		removeNetwork(ctx, s),
	)
	if err == nil {
		// The plugins' own list goes with them; the state, which says what there was to put back, when all is done.
		err = errors.Join(leaveTailnet(ctx, c, log), install.Remove(ctx, log, runtime), removeLeases(c.CNI.ConfDir), removeLeftovers(c.CNI.ConfDir))
	}
	if err == nil {
		err = errors.Join(atomicfile.Remove(statePath()), tailscaled.ForgetMachine(), nodepolicy.RemoveFiles(), removeRunFiles())
	}
	if err != nil {
		return fmt.Errorf("uninstall: %w", err)
	}
	return errors.Join(removeFolder(paths.StateDir), removeFolder(paths.RunDir))
}

// leaveTailnet logs the dedicated tailscaled out and removes its state. Without its folder it runs on until it is stopped,
// but keeps nothing; one that is started again makes a new one.
func leaveTailnet(ctx context.Context, c config.Config, log *slog.Logger) error {
	if _, err := os.Stat(paths.TailscaleStateDir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := tailscale.New(tailscaled.Socket(c.Tailscale, config.ModeDaemon)).Logout(ctx); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		log.Warn("the dedicated tailscaled could not leave the tailnet; its keys are removed all the same: see that its node goes too, "+
			"as headcni-controller does (headscale nodes delete)", "err", err)
	}
	return os.RemoveAll(paths.TailscaleStateDir)
}

// removeLeases removes our leases, also where the owner's conflist, which is back in its place, has them in a folder of its
// choice.
func removeLeases(confDir string) error {
	err := os.RemoveAll(paths.IPAMDir)
	if owners, bad := conflist.IPAM(confDir); bad == nil && owners.DataDir != "" { // a bad one gave no leases
		dir := filepath.Join(owners.DataDir, conflist.NetworkName)
		if bad := trusted.Folder(dir); bad != nil {
			return errors.Join(err, fmt.Errorf("remove leases: %w", bad))
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

// removeLeftovers removes files of ours that were being written when we were killed.
func removeLeftovers(confDir string) error {
	return errors.Join(atomicfile.Sweep(statePath()), conflist.Sweep(confDir), install.Sweep())
}

// removeRunFiles removes our sockets, what the plugin did, and the lock that we hold. The socket of a dedicated tailscaled
// that still runs goes with it.
func removeRunFiles() error {
	err := errors.Join(atomicfile.Remove(paths.DaemonSocket), atomicfile.Remove(paths.APISocket), atomicfile.Remove(totalsPath()), atomicfile.Sweep(totalsPath()),
		os.RemoveAll(cmdlog.Spool(paths.DaemonSocket)), atomicfile.Remove(lockPath()))
	if !tailscaled.Answers(paths.DaemonTailscaleSocket) {
		err = errors.Join(err, atomicfile.Remove(paths.DaemonTailscaleSocket))
	}
	return err
}

// removeFolder removes a folder in which there is nothing of anybody else. In a container it is a mount, in a root that is
// read-only.
func removeFolder(path string) error {
	err := os.Remove(path)
	for _, fine := range []error{fs.ErrNotExist, unix.ENOTEMPTY, unix.EBUSY, unix.EROFS} {
		if errors.Is(err, fine) {
			return nil
		}
	}
	return err
}

// restorePrefs gives the user's tailscaled its prefs back.
func restorePrefs(ctx context.Context, c config.Config, s state) error {
	if s.Prefs == nil {
		return nil
	}
	return tailscale.New(tailscaled.Socket(c.Tailscale, s.Mode)).RestorePrefs(ctx, *s.Prefs, s.Advertised)
}

// unlessStopped forgives that the dedicated tailscaled does not answer: it is ours, and stopped already.
func unlessStopped(err error, mode string) error {
	if errors.Is(err, tailscale.ErrUnreachable) && mode == config.ModeDaemon {
		return nil
	}
	return err
}

// removeNetwork closes the way into the network first, see noderoutes: what keeps pods apart goes when nothing is forwarded any more, but for a host
// that did so before us.
func removeNetwork(ctx context.Context, s state) error {
	return errors.Join(fastpath.Remove(), antispoof.Remove(), noderoutes.New(s.Host, nil).Remove(ctx), nodepolicy.Remove(ctx), answer.RemoveAddrs(), nft.New().Remove(ctx), hostfirewall.New().Remove(ctx))
}
