package cmdlog

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/trusted"
)

const (
	// maxSpool bounds the folder's own size in bytes, which one stat tells and which grows with its entries: on a tmpfs, where
	// it usually is, by 20 for each. That is 8192 records, half a day of a node that starts a pod each ten seconds.
	maxSpool = 20 * 8192
	// maxRecord bounds one record in bytes. Names of Kubernetes and IDs of runtimes are far shorter.
	maxRecord = 4096
	// leftoverAge is when a file that is still being written is one that was not finished.
	leftoverAge = time.Minute
)

var (
	// errFull means that nobody has taken records for long.
	errFull = errors.New("the spool is full")
	errLong = errors.New("the record is too long")
)

// Spool is the folder of records that have not been counted, beside the daemon's socket. Every record goes there first: what
// is in it has not been counted, what has been is not, whoever was killed meanwhile.
func Spool(socket string) string { return filepath.Join(filepath.Dir(socket), "hints") }

// spool puts a record into the folder, whole or not at all. Where there is no folder no daemon has ever run. It is a tmpfs:
// nothing is synced.
func spool(dir string, b []byte) (err error) {
	if len(b) > maxRecord {
		return errLong
	}
	if err := trusted.Folder(dir); err != nil {
		return err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if info.Size() > maxSpool {
		return errFull
	}
	name := fmt.Sprintf("%d-%d", time.Now().UnixNano(), os.Getpid())
	temp := filepath.Join(dir, "."+name)
	if err := write(temp, b); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return os.Rename(temp, filepath.Join(dir, name))
}

// write makes a file. Unlike os.WriteFile it does not start the runtime's poller, which costs a plugin more than the file.
func write(path string, b []byte) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	n, err := unix.Write(fd, b)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	return errors.Join(err, unix.Close(fd))
}

// Spooled is a record in the spool and the name of its file. Record is zero where the file cannot be understood.
type Spooled struct {
	Name   string
	Record Record
}

// ReadSpool reads up to limit records, and removes what killed plugins did not finish.
func ReadSpool(dir string, limit int) ([]Spooled, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []Spooled
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if strings.HasPrefix(e.Name(), ".") {
			if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > leftoverAge {
				_ = os.Remove(path) // the next look tries again
			}
			continue
		}
		if len(out) == limit {
			break
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return out, err
		}
		s := Spooled{Name: e.Name()}
		_ = json.Unmarshal(b, &s.Record) // of another version, then: not understood
		out = append(out, s)
	}
	return out, nil
}

// RemoveSpooled removes records that have been counted.
func RemoveSpooled(dir string, names []string) error {
	var errs []error
	for _, name := range names {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
