package install

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config/paths"
)

var quiet = slog.New(slog.DiscardHandler)

var allPlugins = slices.Concat(borrowedPlugins, ownPlugins)

// plugins makes a folder of plugins of some size, whose content says which release they are.
func plugins(t *testing.T, release string, size int) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range allPlugins {
		writePlugin(t, filepath.Join(dir, name), name+" of "+release+strings.Repeat(release, size))
	}
	return dir
}

func TestMain(m *testing.M) {
	if os.Getenv(installLoopEnv) != "" {
		fmt.Fprintln(os.Stderr, installLoop())
		os.Exit(1)
	}
	flag.Parse()
	nstest.Main(m)
}

func writePlugin(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

// wantSame fails unless the plugins at to are whole and those of from.
func wantSame(t *testing.T, from, to string, names ...string) {
	t.Helper()
	for _, name := range names {
		want, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(to, name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not the one that was to be installed (%d bytes; want %d)", name, len(got), len(want))
		}
		if info, err := os.Stat(filepath.Join(to, name)); err != nil || info.Mode() != 0o755 {
			t.Errorf("%s: mode %v, %v; want 0755", name, info.Mode(), err)
		}
	}
}

func install(t *testing.T, from, to string) string {
	t.Helper()
	lines, err := Plugins(t.Context(), from, to)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(lines, "\n")
}

func TestInstallUpgradeAndRemove(t *testing.T) {
	nstest.FreshState(t)
	one, two, to := plugins(t, "1", 0), plugins(t, "2", 0), t.TempDir()
	install(t, one, to)
	wantSame(t, one, to, allPlugins...)
	before, err := os.Stat(filepath.Join(to, "headcni"))
	if err != nil {
		t.Fatal(err)
	}
	if out := install(t, one, to); strings.Count(out, ": up to date") != len(allPlugins) {
		t.Errorf("the second time:\n%s", out)
	}
	if after, err := os.Stat(filepath.Join(to, "headcni")); err != nil || !os.SameFile(before, after) {
		t.Errorf("what was up to date was written: %v", err)
	}
	install(t, two, to)
	wantSame(t, two, to, allPlugins...)
	// A mode that keeps the runtime from starting it is put right.
	if err := os.Chmod(filepath.Join(to, "headcni"), 0o600); err != nil {
		t.Fatal(err)
	}
	install(t, two, to)
	wantSame(t, two, to, allPlugins...)
	nstest.WantFiles(t, to, allPlugins...)
	if err := Remove(t.Context(), quiet, ""); err != nil {
		t.Fatal(err)
	}
	nstest.WantFiles(t, to)
	nstest.WantFiles(t, paths.StateDir)
	if err := Remove(t.Context(), quiet, ""); err != nil {
		t.Errorf("the second time: %v", err)
	}
}

// What others put there is theirs: a newer portmap, K3s' link, the same bytes by a package manager.
func TestInstallLeavesForeignPlugins(t *testing.T) {
	nstest.FreshState(t)
	one, two, to := plugins(t, "1", 0), plugins(t, "2", 0), t.TempDir()
	writePlugin(t, filepath.Join(to, "portmap"), "somebody's")
	if err := os.Symlink("cni", filepath.Join(to, "host-local")); err != nil {
		t.Fatal(err)
	}
	writePlugin(t, filepath.Join(to, "headcni"), "an old one, put there by hand")
	for _, from := range []string{one, two} {
		install(t, from, to)
		wantSame(t, from, to, ownPlugins...)
		if b, err := os.ReadFile(filepath.Join(to, "portmap")); err != nil || string(b) != "somebody's" {
			t.Errorf("portmap is %q, %v", b, err)
		}
		if l, err := os.Readlink(filepath.Join(to, "host-local")); err != nil || l != "cni" {
			t.Errorf("host-local links to %q, %v", l, err)
		}
	}
	if err := Remove(t.Context(), quiet, ""); err != nil {
		t.Fatal(err)
	}
	nstest.WantFiles(t, to, "host-local", "portmap")

	same := t.TempDir()
	writePlugin(t, filepath.Join(same, "portmap"), "portmap of 1")
	if out := install(t, one, same); !strings.Contains(out, "portmap: left as it is") {
		t.Errorf("a portmap that was there and is the same:\n%s", out)
	}
	// One that was ours and that somebody has replaced since.
	writePlugin(t, filepath.Join(same, "host-local"), "newer")
	install(t, two, same)
	if err := Remove(t.Context(), quiet, ""); err != nil {
		t.Fatal(err)
	}
	nstest.WantFiles(t, same, "host-local", "portmap")
}

func TestInstallRefuses(t *testing.T) {
	nstest.FreshState(t)
	from, to := plugins(t, "1", 0), t.TempDir()
	readOnly := t.TempDir()
	nstest.Mount(t, readOnly, readOnly, "", unix.MS_BIND, "")
	nstest.Mount(t, "", readOnly, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	file := filepath.Join(t.TempDir(), "file")
	writePlugin(t, file, "")
	for name, tc := range map[string]struct{ from, to, want string }{
		"read-only folder":  {from, readOnly, "read-only file system: set cni.binDir"},
		"no folder":         {from, to + "/missing", "MicroK8s: /var/snap/microk8s/current/opt/cni/bin"},
		"a file":            {from, file, "set cni.binDir"},
		"no plugins":        {t.TempDir(), to, "has no plugin headcni-ipam: give --from"},
		"no source":         {to + "/missing", to, "give --from"},
		"onto the original": {from, from, "is where the plugins go"},
	} {
		_, err := Plugins(t.Context(), tc.from, tc.to)
		if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v; want one line with %q", name, err, tc.want)
		}
	}
	nstest.WantFiles(t, to)
	if err := os.Mkdir(filepath.Join(to, "headcni"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Plugins(t.Context(), from, to); err == nil || !strings.Contains(err.Error(), "is a folder: remove it") {
		t.Errorf("a folder in the place of the plugin: %v", err)
	}
}

// A disk that fills up in the middle leaves the old plugins, whole, and nothing else. Room made, it goes on.
func TestInstallOntoFullDisk(t *testing.T) {
	nstest.FreshState(t)
	const size = 256 << 10
	old, next, to := plugins(t, "1", size), plugins(t, "2", size), t.TempDir()
	// Room for the five old ones and for a part of a sixth.
	nstest.Mount(t, "tmpfs", to, "tmpfs", 0, "size=1460k")
	install(t, old, to)
	_, err := Plugins(t.Context(), next, to)
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "make room on the file system of "+to) {
		t.Fatalf("onto a full disk: %v", err)
	}
	wantSame(t, old, to, allPlugins...)
	nstest.WantFiles(t, to, allPlugins...)
	if err := unix.Mount("", to, "", unix.MS_REMOUNT, "size=8m"); err != nil {
		t.Fatal(err)
	}
	install(t, next, to)
	wantSame(t, next, to, allPlugins...)

	// The other disk full: what cannot be noted as ours is not put there.
	nstest.Mount(t, "tmpfs", paths.StateDir, "tmpfs", 0, "size=4k")
	writePlugin(t, filepath.Join(paths.StateDir, "x"), strings.Repeat("x", 4096))
	fresh := t.TempDir()
	if _, err := Plugins(t.Context(), next, fresh); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("with a full state folder: %v", err)
	}
	nstest.WantFiles(t, fresh)
}

func TestInstallWaitsForAnother(t *testing.T) {
	nstest.FreshState(t)
	from, to := plugins(t, "1", 0), t.TempDir()
	unlock, err := lockFolder(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := Plugins(ctx, from, to); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("beside another installation: %v", err)
	}
	unlock()
	install(t, from, to)
	wantSame(t, from, to, allPlugins...)
}

// installLoopEnv turns the test binary into a process that installs two releases in turn until it is killed.
const installLoopEnv = "HEADCNI_TEST_INSTALL_LOOP"

// installLoop is that process, in the namespaces of the test that started it.
func installLoop() error {
	dirs := strings.Split(os.Getenv(installLoopEnv), ":")
	fmt.Println("started")
	for i := 0; ; i++ {
		if _, err := Plugins(context.Background(), dirs[i%2], dirs[2]); err != nil {
			return err
		}
	}
}

// Killed at any moment, an installation leaves each plugin whole, old or new, and still knows that all are ours.
func TestInstallKilled(t *testing.T) {
	nstest.FreshState(t)
	const size = 1 << 20
	one, two, to := plugins(t, "1", size), plugins(t, "2", size), t.TempDir()
	install(t, one, to)
	began := time.Now()
	install(t, two, to)
	took := time.Since(began) // with the race detector many times as long
	kills, leftovers := 0, 0
	// Most come between two files; some must come in the middle of one, or the test shows nothing.
	for ; kills < 40 || leftovers == 0 && kills < 400; kills++ {
		cmd := nstest.StartSelf(t, installLoopEnv+"="+one+":"+two+":"+to)
		time.Sleep(rand.N(2 * took))
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); cmd.ProcessState.ExitCode() >= 0 {
			t.Fatalf("the loop ended by itself: %v", err)
		}
		for _, name := range allPlugins {
			wantOneOf(t, filepath.Join(to, name), filepath.Join(one, name), filepath.Join(two, name))
		}
		left, err := filepath.Glob(filepath.Join(to, ".*"))
		if err != nil {
			t.Fatal(err)
		}
		leftovers += len(left)
	}
	if leftovers == 0 {
		t.Error("not one kill came while a file was being written")
	}
	t.Logf("%d files half written in %d kills", leftovers, kills)
	install(t, two, to)
	wantSame(t, two, to, allPlugins...)
	nstest.WantFiles(t, to, allPlugins...)
	nstest.WantFiles(t, paths.StateDir, filepath.Base(installedPath()))
	if err := Remove(t.Context(), quiet, ""); err != nil {
		t.Fatal(err)
	}
	nstest.WantFiles(t, to)
}

func wantOneOf(t *testing.T, path string, either ...string) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range either {
		if want, err := os.ReadFile(e); err == nil && bytes.Equal(got, want) {
			return
		}
	}
	t.Fatalf("%s is neither release (%d bytes)", path, len(got))
}

func TestInstalledStateCorrupt(t *testing.T) {
	nstest.FreshState(t)
	if err := os.WriteFile(installedPath(), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{Remove(t.Context(), quiet, ""), func() error { _, err := Plugins(t.Context(), plugins(t, "1", 0), t.TempDir()); return err }()} {
		if err == nil || !strings.Contains(err.Error(), "remove the file to start afresh") {
			t.Errorf("a broken %s: %v", installedPath(), err)
		}
	}
	if _, err := os.Stat(installedPath()); errors.Is(err, fs.ErrNotExist) {
		t.Error("it was removed")
	}
}

// Advice is about the disk that is full, and the mount that is read-only.
func TestInstallNamesTheRightDisk(t *testing.T) {
	nstest.FreshState(t)
	from, to := plugins(t, "1", 0), t.TempDir()
	makeRoom := nstest.FillDisk(t, paths.StateDir)
	for _, why := range []error{unix.ENOSPC, unix.EROFS} {
		if _, err := Plugins(t.Context(), from, to); !errors.Is(err, why) || !strings.Contains(err.Error(), "make room in "+paths.StateDir) ||
			strings.Contains(err.Error(), "cni.binDir") {
			t.Errorf("want %v: %v", why, err)
		}
		if why == unix.ENOSPC {
			makeRoom()
			if err := unix.Mount("", paths.StateDir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "size=16k"); err != nil {
				t.Fatal(err)
			}
		}
	}
	nstest.WantFiles(t, to)
}
