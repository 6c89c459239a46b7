package cluster

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/lab"
)

const cgroupPrefix = "headcni-cluster-"

// cgroup is the name of the node's own root in each cgroup hierarchy: the world's folder has a name that no other has.
func (n *Node) cgroup() string {
	return cgroupPrefix + filepath.Base(n.cluster.Dir) + "-" + n.Name
}

// removeCgroups removes a node's cgroups. Its processes have just been killed, and some may still be on their way out.
func removeCgroups(name string) error {
	roots, err := filepath.Glob("/sys/fs/cgroup/*/" + name)
	if err != nil {
		return err
	}
	if unified := filepath.Join("/sys/fs/cgroup", name); isDir(unified) {
		roots = append(roots, unified)
	}
	var errs []error
	for _, root := range roots {
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			err := removeTree(root)
			if err == nil || !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				errs = append(errs, err)
				break
			}
		}
	}
	return errors.Join(errs...)
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

// removeStaleCgroups removes those of clusters that are gone without Stop. Faults are left to the next: nothing depends on it.
func removeStaleCgroups() {
	for _, pattern := range []string{"/sys/fs/cgroup/*/" + cgroupPrefix + "*", "/sys/fs/cgroup/" + cgroupPrefix + "*"} {
		found, _ := filepath.Glob(pattern) // the pattern is well-formed
		for _, dir := range found {
			world, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), cgroupPrefix), "-")
			if !isDir(filepath.Join(lab.BaseDir(), world)) {
				_ = removeTree(dir)
			}
		}
	}
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}
