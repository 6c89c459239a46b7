// Package atomicfile replaces files whole: a reader sees the old content or the new one, also after kill -9 or a full disk.
package atomicfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/headcni/headcni/internal/trusted"
)

// Write puts data at path in one step, with these permissions, and syncs file and folder: it outlives a power cut once Write
// has returned. A symbolic link at path is replaced, not followed. A folder that others than root could exchange is refused, and so is a path of
// what is no file, such as /dev/null.
func Write(path string, data []byte, perm fs.FileMode) error {
	return write(path, perm, true, content(data))
}

// Stream is Write of what the function writes, for what need not be in memory as a whole. Where the function fails, nothing is replaced.
func Stream(path string, perm fs.FileMode, content func(io.Writer) error) error {
	return write(path, perm, true, content)
}

// WriteUnsynced is Write without syncs, for a tmpfs and for what is made again after a power cut.
func WriteUnsynced(path string, data []byte, perm fs.FileMode) error {
	return write(path, perm, false, content(data))
}

func content(data []byte) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	}
}

func write(path string, perm fs.FileMode, durable bool, content func(io.Writer) error) (err error) {
	if err := trusted.Way(filepath.Dir(path)); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if special(path) {
		return fmt.Errorf("write %s: it is no file, and would be replaced by one", path)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write %s: %w", path, err), Remove(f.Name()))
		}
	}()
	if err = content(f); err == nil {
		err = f.Chmod(perm)
	}
	if err == nil && durable {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil || !durable {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// special reports whether path is a device, a pipe or a socket, or leads to one, as /dev/null and /dev/stdout do: programs would miss it.
func special(path string) bool {
	if to, err := os.Readlink(path); err == nil && strings.HasPrefix(to, "/proc/") {
		return true
	}
	info, err := os.Stat(path)
	return err == nil && info.Mode()&(fs.ModeDevice|fs.ModeNamedPipe|fs.ModeSocket) != 0
}

// Remove removes path if it is there.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Sweep removes what a Write to path left beside it when it was killed. Nobody may be writing there.
func Sweep(path string) error {
	left, err := filepath.Glob(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".*"))
	errs := []error{err}
	for _, l := range left {
		errs = append(errs, Remove(l))
	}
	return errors.Join(errs...)
}

// SyncDir makes changes of a folder's entries outlive a power cut.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
