package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/hint"
	"github.com/headcni/headcni/pkg/networking"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/tailscale"
)

// Uninstall takes everything of ours off this node and puts back what was there. Pods must be gone first: theirs is the
// network that it takes. It goes on past errors, so that running it again finishes what it could not do.
func Uninstall(ctx context.Context, c config.Config) error {
	if err := os.MkdirAll(paths.RunDir, 0o755); err != nil {
		return err
	}
	unlock, err := lock(lockPath())
	if err != nil {
		return err
	}
	defer unlock()
	s, err := loadState()
	if err != nil {
		return err
	}
	if err := takeOff(ctx, c, s); err != nil {
		return err
	}
	return removeRunDir()
}

// takeOff is Uninstall without the folder that the process itself uses.
func takeOff(ctx context.Context, c config.Config, s state) error {
	// The conflist goes first, so that no pod starts on a node that is being taken down; the guard goes last.
	err := errors.Join(
		removeConflist(c.CNI.ConfDir, s.ConflistMode),
		putBack(c.CNI.ConfDir, s.Hidden),
		restorePrefs(ctx, c, s),
		removeNetwork(ctx, s),
	)
	if err != nil {
		return fmt.Errorf("uninstall: %w", err)
	}
	return errors.Join(RemovePlugins(ctx), removeFile(statePath()), os.RemoveAll(paths.IPAMDir))
}

// removeRunDir removes our sockets and the lock that we hold. A dedicated tailscaled that still runs keeps the folder.
func removeRunDir() error {
	err := errors.Join(removeFile(paths.DaemonSocket), removeFile(paths.APISocket), removeFile(lockPath()), removeFile(totalsPath()),
		os.RemoveAll(hint.Spool(paths.DaemonSocket)))
	// In a container the folder is a mount, in a root that is read-only.
	gone := os.Remove(paths.RunDir)
	if gone != nil && !errors.Is(gone, unix.ENOTEMPTY) && !errors.Is(gone, unix.EBUSY) && !errors.Is(gone, unix.EROFS) {
		err = errors.Join(err, gone)
	}
	return err
}

// restorePrefs gives the user's tailscaled its prefs back.
func restorePrefs(ctx context.Context, c config.Config, s state) error {
	if s.Prefs == nil {
		return nil
	}
	_, err := tailscale.New(socketOf(c, s.Mode)).RestorePrefs(ctx, *s.Prefs, s.Advertised)
	if errors.Is(err, tailscale.ErrUnreachable) && s.Mode == config.ModeDaemon {
		return nil // ours, and stopped already
	}
	return err
}

func removeNetwork(ctx context.Context, s state) error {
	return errors.Join(networking.NewNode(s.Host, nil).Remove(ctx), nft.New().Remove(ctx))
}
