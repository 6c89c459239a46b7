package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/trusted"
)

// DirEnv names the folder that holds labs. It is also how a re-exec in a user namespace, where everybody is root, finds
// the folder of the user.
const DirEnv = "HEADCNI_LAB_DIR"

// BaseDir is the folder that holds this user's labs.
func BaseDir() string {
	if dir := os.Getenv(DirEnv); dir != "" {
		return dir
	}
	return baseDir(strconv.Itoa(os.Getuid()))
}

func baseDir(user string) string { return filepath.Join(os.TempDir(), "headcni-lab-"+user) }

// newWorldDir removes the leftovers of labs that ended and makes a folder for a new one. The lock file in it stays
// locked for as long as the lab or one of its machines lives: it is inherited by them.
func newWorldDir() (dir string, lock *os.File, err error) {
	base := BaseDir()
	if err := os.Mkdir(base, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", nil, fmt.Errorf("make a folder for labs: %w", err)
	}
	if err := checkBase(base); err != nil {
		return "", nil, err
	}
	baseLock, err := lockFile(filepath.Join(base, "lock"), unix.LOCK_EX)
	if err != nil {
		return "", nil, err
	}
	defer baseLock.Close() // so that nobody takes a folder that is not locked yet for a leftover
	if err := sweep(base); err != nil {
		return "", nil, err
	}
	if dir, err = os.MkdirTemp(base, "w"); err != nil {
		return "", nil, err
	}
	lock, err = lockFile(filepath.Join(dir, "lock"), unix.LOCK_EX|unix.LOCK_NB)
	return dir, lock, err
}

// checkBase makes sure that the folder is ours alone. Its name can be guessed: another user may have made it first.
func checkBase(base string) error {
	st, err := os.Lstat(base)
	if err != nil {
		return err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !st.IsDir() || !ok || int(sys.Uid) != os.Getuid() {
		return fmt.Errorf("%s is not a folder of yours; remove it or set %s", base, DirEnv)
	}
	return trusted.Folder(base)
}

// Sweep removes what labs left behind that were killed. New does it too.
func Sweep() error {
	base := BaseDir()
	err := checkBase(base)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // there never was one
	}
	if err != nil {
		return err
	}
	lock, err := lockFile(filepath.Join(base, "lock"), unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer lock.Close()
	return sweep(base)
}

// sweep removes the labs whose processes are all gone.
func sweep(base string) error {
	var errs []error
	for _, dir := range worldDirs(base) {
		lock, err := lockFile(filepath.Join(dir, "lock"), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			continue // in use
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, removeWorld(dir))
		lock.Close()
	}
	return errors.Join(errs...)
}

// removeWorld removes what is left of a world whose processes have ended. The folder goes last: it is what a later sweep
// finds the rest by.
func removeWorld(dir string) error {
	if err := removeCgroups(cgroupPrefix(dir) + "*"); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

func worldDirs(base string) []string {
	entries, err := os.ReadDir(base)
	if err != nil {
		return nil
	}
	var dirs []string
	for _, e := range entries {
		if e.IsDir() && strings.HasPrefix(e.Name(), "w") {
			dirs = append(dirs, filepath.Join(base, e.Name()))
		}
	}
	return dirs
}

// lockFile opens path and takes a flock(2), which belongs to the open file: children that inherit it hold it too.
func lockFile(path string, how int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}
