// Package filelock locks files against other processes. The kernel drops a lock with the process that holds it.
package filelock

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// look is how often a lock that somebody else holds is asked for.
const look = 50 * time.Millisecond

// Lock locks f (flock(2), exclusive), waiting for whoever holds it at most for wait. Closing f unlocks it.
func Lock(ctx context.Context, f *os.File, wait time.Duration) error {
	for end := time.Now().Add(wait); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(end) || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		select {
		case <-ctx.Done():
		case <-time.After(look):
		}
	}
}
