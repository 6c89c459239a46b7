package lab

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroup is a name for a cgroup of the machine's own, at the root of whatever hierarchies somebody makes it in. It goes
// with the lab, also where that was killed.
func (m *Machine) Cgroup() string { return cgroupPrefix(filepath.Dir(m.Dir)) + m.Name }

// RemoveCgroup removes the machine's cgroup and those in it. Its processes must have been killed.
func (m *Machine) RemoveCgroup() error { return removeCgroups(m.Cgroup()) }

// cgroupPrefix begins the names of a world's cgroups: its folder has a name that no other has.
func cgroupPrefix(world string) string { return "headcni-" + filepath.Base(world) + "-" }

// removeCgroups removes the cgroups at the root of all hierarchies, v1 and v2, whose names match pattern.
func removeCgroups(pattern string) error {
	var errs []error
	for _, hierarchy := range []string{"/sys/fs/cgroup/*/", "/sys/fs/cgroup/"} {
		roots, err := filepath.Glob(hierarchy + pattern)
		errs = append(errs, err)
		for _, root := range roots {
			errs = append(errs, removeEmptied(root))
		}
	}
	return errors.Join(errs...)
}

// removeEmptied removes a cgroup whose processes have just been killed: some may still be on their way out.
func removeEmptied(dir string) error {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := removeTree(dir)
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}

// removeTree removes a cgroup and those in it. Their files cannot be removed and need not be.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}
