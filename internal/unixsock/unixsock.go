// Package unixsock keeps a Unix socket in the file system: programs that clean /run take the files of sockets that are in use.
package unixsock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/internal/trusted"
)

// look is how often it is checked that the socket's file is there. It costs one stat.
const look = 2 * time.Second

// Serve listens on a socket of this network (unix or unixpacket) that only root can open, and calls serve with it; again whenever
// the socket's file has gone or is another's, until ctx ends. serve must return when its listener is closed. A stale file is
// replaced, and the folder made where it is missing. The file stays at the end: the next process may have put its own there.
//
// Only the first failure to listen ends Serve. Later ones are passed to failed, and tried again.
func Serve(ctx context.Context, network, path string, serve func(*net.UnixListener) error, failed func(error)) error {
	for first := true; ctx.Err() == nil; first = false {
		l, err := listen(network, path)
		if err != nil {
			if first {
				return err
			}
			failed(err)
			sleep(ctx)
			continue
		}
		watch, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for watch.Err() == nil && same(l, path) {
				sleep(watch)
			}
			l.UnixListener.Close()
		}()
		err = serve(l.UnixListener)
		cancel()
		<-done
		if err != nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
	}
	return nil
}

// listener knows the file that it made.
type listener struct {
	*net.UnixListener
	file os.FileInfo
}

func listen(network, path string) (listener, error) {
	if err := trusted.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return listener{}, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := atomicfile.Remove(path); err != nil {
		return listener{}, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
	if err != nil {
		return listener{}, err
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(path, 0o600)
	file, statErr := os.Lstat(path)
	if err = errors.Join(err, statErr); err != nil {
		l.Close()
		return listener{}, err
	}
	return listener{l, file}, nil
}

// same reports whether path is the file of l still.
func same(l listener, path string) bool {
	file, err := os.Lstat(path)
	return err == nil && os.SameFile(file, l.file)
}

func sleep(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(look):
	}
}
