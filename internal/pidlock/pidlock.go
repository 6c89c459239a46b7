// Package pidlock has one process of a kind run: by a locked file that holds its pid. The kernel drops the lock with the process.
package pidlock

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
)

// patience is how long the lock of a process that was killed may stay: a child that it was about to start has it until that
// is another program.
const patience = time.Second

// look is how often it is checked that the lock's file is there still.
const look = 5 * time.Second

// Lock is held. Make it with Take.
type Lock struct {
	path, program string
	f             *os.File
}

// Take locks the file at path for this process. program is what it is called, for the error where another one holds it: that
// one is waited for a second, in case it is about to end.
func Take(ctx context.Context, path, program string) (*Lock, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	if err := trusted.Plain(int(f.Fd()), path); err != nil { // it is truncated below
		f.Close()
		return nil, err
	}
	if err := filelock.Lock(ctx, f, patience); err != nil {
		holder, _ := os.ReadFile(path) // only for the message
		f.Close()
		return nil, fmt.Errorf("another %s runs already (pid %s): stop it first", program, strings.TrimSpace(string(holder)))
	}
	l := &Lock{path: path, program: program, f: f}
	if !l.there() {
		f.Close()
		return Take(ctx, path, program) // an uninstall had it, which has removed it
	}
	if f.Truncate(0) == nil {
		_, _ = fmt.Fprintf(f, "%d\n", os.Getpid()) // only for the message: a full /run must not keep a process from starting
	}
	return l, nil
}

// Close drops the lock.
func (l *Lock) Close() error { return l.f.Close() }

// there reports whether the lock's file is the one that others find.
func (l *Lock) there() bool {
	have, err := l.f.Stat()
	if err != nil {
		return false
	}
	found, err := os.Stat(l.path)
	return err == nil && os.SameFile(have, found)
}

// Keep locks again where somebody has removed the file, until ctx ends. It fails where another process was faster.
func (l *Lock) Keep(ctx context.Context) error {
	for ctx.Err() == nil {
		if !l.there() {
			if err := os.MkdirAll(filepath.Dir(l.path), 0o755); err != nil {
				return err
			}
			again, err := Take(ctx, l.path, l.program)
			if err != nil && ctx.Err() == nil {
				return err
			}
			if err == nil {
				l.f.Close()
				l.f = again.f
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(look):
		}
	}
	return nil
}
