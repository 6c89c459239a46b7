package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// asHolder has this binary take the lock named, say so, and stop for good.
const asHolder = "HEADCNI_IPAM_TEST_HOLDER"

func hold(path string) {
	fd, err := unix.Open(path, unix.O_RDWR, 0)
	if err == nil {
		err = unix.Flock(fd, unix.LOCK_EX)
	}
	fmt.Println(err)
	if err == nil {
		_ = unix.Kill(os.Getpid(), unix.SIGSTOP)
	}
	os.Exit(1)
}

// mount puts a small disk of its own at a path.
func mount(t *testing.T, at, options string) {
	t.Helper()
	nstest.Require(t)
	if err := unix.Mount("tmpfs", at, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

func remountReadOnly(at string) error {
	return unix.Mount("", at, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
}

// inPlace puts something else in the place of a file.
func inPlace(path string, put func(path string) error) error {
	return errors.Join(os.Remove(path), put(path))
}

func link(path string) error   { return os.Symlink("/nowhere", path) }
func fifo(path string) error   { return unix.Mkfifo(path, 0o600) }
func socket(path string) error { return unix.Mknod(path, unix.S_IFSOCK|0o600, 0) }

// fillDisk leaves no room in a file system.
func fillDisk(at string) error {
	f, err := os.Create(filepath.Join(at, "ballast"))
	if err != nil {
		return err
	}
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if cerr := f.Close(); !errors.Is(err, unix.ENOSPC) {
		return errors.Join(err, cerr)
	}
	return nil
}

// unprivileged runs the plugin as a root that must keep to permissions.
var unprivileged = []string{"setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"}

// TestDisk: whatever is wrong with the disk or the files, ADD either gives an address that nobody has or says what is wrong,
// with the code that a runtime can act on; STATUS agrees; and what DEL says is true.
func TestDisk(t *testing.T) {
	boot := func(dir, name string) string {
		found, err := filepath.Glob(filepath.Join(dir, "net", "*-*-*-*-*", name))
		if err != nil || len(found) != 1 {
			return filepath.Join(dir, "no such file", name)
		}
		return found[0]
	}
	for _, c := range []struct {
		name    string
		spoil   func(dir string) error // after a has its lease
		by      []string
		add     uint // the code of the next ADD; 0: it works
		text    string
		del     uint // the code of DEL of a
		noState bool // STATUS does not tell
	}{
		{name: "sound", spoil: func(string) error { return nil }},
		{name: "record truncated", spoil: func(d string) error { return os.Truncate(boot(d, "leases/a:eth0"), 10) }},
		{name: "record junk", spoil: func(d string) error { return os.WriteFile(boot(d, "leases/a:eth0"), []byte("junk"), 0o600) }},
		{name: "record gone", spoil: func(d string) error { return os.Remove(boot(d, "leases/a:eth0")) }},
		{name: "index truncated", spoil: func(d string) error { return os.Truncate(boot(d, "index/10.0.0.0-12"), 100) }},
		{name: "index junk", spoil: func(d string) error { return os.WriteFile(boot(d, "index/10.0.0.0-12"), make([]byte, 9000), 0o600) }},
		{name: "index is a folder", spoil: func(d string) error {
			i := boot(d, "index/10.0.0.0-12")
			return errors.Join(os.Remove(i), os.Mkdir(i, 0o700))
		}},
		{name: "index is a link", spoil: func(d string) error { return inPlace(boot(d, "index/10.0.0.0-12"), link) }},
		{name: "record is a link", spoil: func(d string) error { return inPlace(boot(d, "leases/a:eth0"), link) }},
		{name: "record is a socket", spoil: func(d string) error { return inPlace(boot(d, "leases/a:eth0"), socket) }},
		{name: "sequence is a FIFO", spoil: func(d string) error { return inPlace(boot(d, "last.0"), fifo) }},
		{name: "layout is a FIFO", spoil: func(d string) error { return inPlace(boot(d, "layout"), fifo) },
			add: codeCorrupt, text: "layout is", del: codeCorrupt},
		{name: "layout of many words", spoil: func(d string) error { return os.WriteFile(boot(d, "layout"), make([]byte, 9000), 0o600) },
			add: codeCorrupt, text: "layout is", del: codeCorrupt},
		{name: "sequence junk", spoil: func(d string) error { return os.WriteFile(boot(d, "last.0"), []byte("junk"), 0o600) }},
		{name: "layout truncated", spoil: func(d string) error { return os.Truncate(boot(d, "layout"), 0) },
			add: codeCorrupt, text: "layout is", del: codeCorrupt},
		{name: "layout of the future", spoil: func(d string) error { return os.WriteFile(boot(d, "layout"), []byte("headcni-ipam 2\n"), 0o600) },
			add: codeCorrupt, text: "this program knows", del: codeCorrupt},
		{name: "folder gone", spoil: func(d string) error { return os.RemoveAll(boot(d, "addresses")) },
			add: codeCorrupt, text: "addresses is missing", del: codeCorrupt},
		{name: "file for a folder", spoil: func(d string) error {
			return errors.Join(os.RemoveAll(filepath.Join(d, "net")), os.WriteFile(filepath.Join(d, "net"), nil, 0o600))
		}, add: types.ErrIOFailure, text: "not a directory", del: types.ErrIOFailure},
		{name: "data of others", spoil: func(d string) error { return os.Chmod(filepath.Join(d, "net"), 0) },
			by: unprivileged, add: types.ErrIOFailure, text: "permission denied", del: types.ErrIOFailure},
		{name: "may not write", spoil: func(d string) error { return os.Chmod(boot(d, "leases"), 0o500) },
			by: unprivileged, add: types.ErrIOFailure, text: "permission denied", del: types.ErrIOFailure, noState: true},
		{name: "read-only", spoil: remountReadOnly, add: types.ErrIOFailure, text: "read-only file system", del: types.ErrIOFailure},
		{name: "full", spoil: fillDisk, add: types.ErrIOFailure, text: "no space left on device"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			mount(t, dir, "size=256k")
			cfg := conf("1.1.0", dir, dual, "")
			mustRun(t, call{"ADD", "a", "", cfg})
			if err := c.spoil(dir); err != nil {
				t.Fatal(err)
			}
			want := func(command, id string, code uint, text string) string {
				t.Helper()
				out, err := call{command, id, "", cfg}.runBy(t, c.by...)
				if code == 0 && err != nil || code != 0 && (err == nil || err.Code != code || !strings.Contains(err.Error(), text)) {
					t.Errorf("%s %s: %s%v, want code %d and %q", command, id, out, err, code, text)
				}
				return out
			}
			if out := want("ADD", "b", c.add, c.text); strings.Contains(out, "10.0.0.2/") || strings.Contains(out, "fd00::2/") {
				t.Errorf("an address was given twice: %s", out)
			}
			status := uint(0)
			if c.add != 0 && !c.noState {
				status = types.ErrPluginNotAvailable
			}
			want("STATUS", "", status, c.text)
			if c.add == 0 { // one file that is wrong keeps no other lease from garbage collection
				mustRun(t, call{"GC", "", "", conf("1.1.0", dir, dual, `, "cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]`)})
				want("CHECK", "b", codeNoLease, "")
			}
			want("DEL", "a", c.del, "")
		})
	}
}

// TestLockIsHeld: a process that hangs with the lock does not hang the others, and they say who it is.
func TestLockIsHeld(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cfg := conf("1.1.0", dir, dual, "")
	mustRun(t, call{"ADD", "a", "", cfg})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	holder := exec.Command(self)
	holder.Env = append(os.Environ(), asHolder+"="+filepath.Join(dir, "net", "lock"))
	// In a group of its own it stays stopped when the shell ends that began the tests in the background (setpgid(2), orphaned groups).
	holder.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = holder.Wait() }()
	defer func() { _ = holder.Process.Kill() }()
	said := make([]byte, 100)
	if n, err := out.Read(said); err != nil || string(said[:n]) != "<nil>\n" {
		t.Fatalf("the holder has no lock: %s, %v", said[:n], err)
	}
	who := fmt.Sprintf("pid %d (", holder.Process.Pid)
	var wg sync.WaitGroup
	for command, want := range map[string]struct {
		code        uint
		least, most time.Duration
	}{
		"STATUS": {types.ErrPluginNotAvailable, 0, 9 * time.Second},
		"ADD":    {types.ErrTryAgainLater, 9 * time.Second, time.Minute},
		"DEL":    {types.ErrTryAgainLater, 9 * time.Second, time.Minute},
	} {
		wg.Go(func() {
			began := time.Now()
			wantCode(t, call{command, "b", "", cfg}, want.code, who)
			if d := time.Since(began); d < want.least || d > want.most {
				t.Errorf("%s gave up after %s", command, d)
			}
		})
	}
	wg.Wait()
	mustRun(t, call{"CHECK", "a", "", cfg}) // to look takes no lock
	if err := holder.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	mustRun(t, call{"ADD", "b", "", cfg})
}
