package nstest

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/config/paths"
)

// FreshState gives the test an empty paths.StateDir of its own.
func FreshState(t *testing.T) {
	t.Helper()
	Require(t)
	if err := os.MkdirAll(paths.StateDir, 0o755); err != nil {
		t.Fatal(err)
	}
	Mount(t, "tmpfs", paths.StateDir, "tmpfs", 0, "mode=0755")
}

// Mount mounts until the test ends; see mount(2).
func Mount(t *testing.T, source, target, kind string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) }) // the namespace goes with the process
}

// FillDisk mounts a small tmpfs on dir and writes until nothing fits any more. The result makes room.
func FillDisk(t *testing.T, dir string) (makeRoom func()) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	Mount(t, "tmpfs", dir, "tmpfs", 0, "size=16k")
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 64<<10), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("filled it: %v", err)
	}
	return func() {
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
	}
}

// WantFiles fails the test unless dir has entries of just these names.
func WantFiles(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%s has %v, want %v", dir, got, want)
	}
}

// StartSelf runs the test binary as another program, which TestMain takes for one by a variable NAME=VALUE, and returns once
// that has written something to its standard output.
func StartSelf(t *testing.T, env string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), env)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatalf("it did not start: %v, %v", err, cmd.Wait())
	}
	return cmd
}
