package atomicfile

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/headcni/headcni/internal/trusted"
)

func TestWriteReplaces(t *testing.T) {
	dir := t.TempDir()
	path, elsewhere := filepath.Join(dir, "state"), filepath.Join(dir, "elsewhere")
	if err := os.WriteFile(elsewhere, []byte("theirs"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, path); err != nil {
		t.Fatal(err)
	}
	for _, write := range []func(string, []byte, fs.FileMode) error{Write, WriteUnsynced} {
		if err := write(path, []byte("new"), 0o640); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		info, statErr := os.Lstat(path)
		if err != nil || statErr != nil || string(b) != "new" || info.Mode() != 0o640 {
			t.Errorf("%q %v, %v %v", b, info, err, statErr)
		}
	}
	if b, err := os.ReadFile(elsewhere); err != nil || string(b) != "theirs" {
		t.Errorf("wrote through the link: %q, %v", b, err)
	}
	if found, err := os.ReadDir(dir); err != nil || len(found) != 2 {
		t.Errorf("left behind: %v, %v", found, err)
	}
}

func TestWriteThatFailsLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state")
	if err := os.Mkdir(path, 0o755); err != nil { // a file cannot replace it
		t.Fatal(err)
	}
	if err := Write(path, nil, 0o600); err == nil || !strings.HasPrefix(err.Error(), "write "+path) {
		t.Errorf("over a folder: %v", err)
	}
	if found, err := os.ReadDir(dir); err != nil || len(found) != 1 {
		t.Errorf("left behind: %v, %v", found, err)
	}
	broken := errors.New("broken")
	path = filepath.Join(dir, "streamed")
	if err := Stream(path, 0o600, func(w io.Writer) error { _, _ = io.WriteString(w, "half"); return broken }); !errors.Is(err, broken) {
		t.Errorf("a writer that fails: %v", err)
	}
	if found, err := os.ReadDir(dir); err != nil || len(found) != 1 {
		t.Errorf("left behind: %v, %v", found, err)
	}
	if err := Write(filepath.Join(dir, "none", "state"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a folder: %v", err)
	}
}

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"state", ".state.123", ".state.456", ".other.123"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := Sweep(filepath.Join(dir, "state")); err != nil {
		t.Fatal(err)
	}
	found, err := os.ReadDir(dir)
	if err != nil || len(found) != 2 || found[0].Name() != ".other.123" || found[1].Name() != "state" {
		t.Errorf("%v, %v", found, err)
	}
}

// TestWriteElsewhere: a folder that somebody else can exchange is not written into, wherever it leads now.
func TestWriteElsewhere(t *testing.T) {
	dir := t.TempDir()
	theirs, victim := filepath.Join(dir, "theirs"), filepath.Join(dir, "victim")
	for _, d := range []string{theirs, victim} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(victim, filepath.Join(theirs, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(theirs, 0o777); err != nil {
		t.Fatal(err)
	}
	for _, write := range []func(string, []byte, fs.FileMode) error{Write, WriteUnsynced} {
		if err := write(filepath.Join(theirs, "link", "state"), nil, 0o600); !errors.Is(err, trusted.ErrOthers) {
			t.Errorf("got %v", err)
		}
	}
	if found, err := os.ReadDir(victim); err != nil || len(found) > 0 {
		t.Errorf("written: %v, %v", found, err)
	}
	// Others may write in the folder itself, whose names alone are at stake: /opt/cni/bin belongs to another user on some systems.
	if err := Write(filepath.Join(theirs, "state"), nil, 0o600); err != nil {
		t.Error(err)
	}
}

// What is no file stays what it is: a device that is replaced is missed by every program of the machine.
func TestSpecial(t *testing.T) {
	dir := t.TempDir()
	pipe, device, output := filepath.Join(dir, "pipe"), filepath.Join(dir, "device"), filepath.Join(dir, "output")
	if err := errors.Join(syscall.Mkfifo(pipe, 0o600), os.Symlink("/dev/null", device), os.Symlink("/proc/self/fd/1", output)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{pipe, device, output} {
		before, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := Write(path, []byte("x"), 0o600); err == nil || !strings.Contains(err.Error(), "it is no file") {
			t.Errorf("%s: %v", path, err)
		}
		if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) {
			t.Errorf("%s was replaced, %v", path, err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 3 {
		t.Errorf("left: %v, %v", left, err)
	}
}
