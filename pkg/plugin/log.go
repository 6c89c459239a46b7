package plugin

import (
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/trusted"
	"github.com/headcni/headcni/pkg/config/netconf"
)

// logLimit is the size in bytes at which the log file becomes FILE.1 and a new one is begun.
const logLimit = 8 << 20

// newLogger writes to the configured file, else to standard error, which runtimes keep. Standard output is for the result
// alone.
func newLogger(stderr io.Writer, c netconf.Config) *slog.Logger {
	w := stderr
	var fault error
	if c.LogFile != "" {
		var f *os.File
		if f, fault = openLog(c.LogFile); fault == nil {
			w = f // open until the process ends, a few milliseconds from now
		}
	}
	log := slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: c.LogLevel}))
	if fault != nil {
		log.Warn("could not open the log file", "err", fault)
	}
	return log
}

// openLog opens the file in a folder in which others may be able to write, as in some systems' /var/log.
func openLog(path string) (*os.File, error) {
	if err := trusted.Way(filepath.Dir(path)); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil && info.Size() >= logLimit {
		// If two processes rotate at once, the second moves a young file over the old one. Some log lines are lost then,
		// which is better than a lock on the way of every pod.
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, err
		}
	}
	const flags = unix.O_WRONLY | unix.O_APPEND | unix.O_CREAT | unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_NONBLOCK // a FIFO would block
	fd, err := unix.Open(path, flags, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	if err = trusted.Plain(fd, path); err == nil {
		err = unix.SetNonblock(fd, false)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}
