package daemon

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/reconcile"
)

// flock locks f, waiting for whoever has it.
func flock(ctx context.Context, f *os.File, wait time.Duration) error {
	for end := time.Now().Add(wait); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(end) || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		reconcile.Sleep(ctx, 50*time.Millisecond)
	}
}
