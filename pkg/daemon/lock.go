package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/filelock"
	"github.com/headcni/headcni/internal/trusted"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/reconcile"
)

// lockPath is the file that the running daemon locks.
func lockPath() string { return filepath.Join(paths.RunDir, "daemon.lock") }

// lockWait is how long the lock of a daemon that was killed may stay: a child that it was about to start has it until that
// is another program.
const lockWait = time.Second

// lockLook is how often it is checked that the lock's file is there still.
const lockLook = 5 * time.Second

// pidLock is the lock of the one daemon that runs in this mount namespace. The kernel drops it with the process.
type pidLock struct {
	path string
	f    *os.File
}

// lock makes sure that one daemon runs.
func lock(ctx context.Context, path string) (*pidLock, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	if err := trusted.Plain(int(f.Fd()), path); err != nil { // it is truncated below
		f.Close()
		return nil, err
	}
	if err := filelock.Lock(ctx, f, lockWait); err != nil {
		holder, _ := os.ReadFile(path) // only for the message
		f.Close()
		return nil, fmt.Errorf("another headcni-daemon runs already (pid %s): stop it first", strings.TrimSpace(string(holder)))
	}
	l := &pidLock{path: path, f: f}
	if !l.there() {
		f.Close()
		return lock(ctx, path) // an uninstall had it, which has removed it
	}
	if f.Truncate(0) == nil {
		_, _ = fmt.Fprintf(f, "%d\n", os.Getpid()) // only for the message: a full /run must not keep a daemon from starting
	}
	return l, nil
}

// Close drops the lock.
func (l *pidLock) Close() error { return l.f.Close() }

// there reports whether the lock's file is the one that others find.
func (l *pidLock) there() bool {
	have, err := l.f.Stat()
	if err != nil {
		return false
	}
	found, err := os.Stat(l.path)
	return err == nil && os.SameFile(have, found)
}

// keep locks again where somebody has removed the file, until ctx ends. It fails where another daemon was faster.
func (l *pidLock) keep(ctx context.Context) error {
	for ctx.Err() == nil {
		if !l.there() {
			if err := os.MkdirAll(filepath.Dir(l.path), 0o755); err != nil {
				return err
			}
			again, err := lock(ctx, l.path)
			if err != nil && ctx.Err() == nil {
				return err
			}
			if err == nil {
				l.f.Close()
				l.f = again.f
			}
		}
		reconcile.Sleep(ctx, lockLook)
	}
	return nil
}
