package trusted

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// other is another user.
const other = 54321

// plant is a folder below which others have been at work.
type plant struct {
	t   *testing.T
	dir string
}

func newPlant(t *testing.T) plant {
	t.Helper()
	if os.Geteuid() != 0 {
		nstest.Skip(t, "files of another user can be made by root only")
	}
	p := plant{t, t.TempDir()}
	if err := os.Chown(p.dir, other, other); err != nil { // also in a user namespace
		nstest.Skip(t, "files of another user can be made by root only: "+err.Error())
	}
	p.must(os.Chown(p.dir, 0, 0))
	return p
}

func (p plant) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p plant) path(name string) string { return filepath.Join(p.dir, name) }

// folder makes a folder of a user with exactly these permissions.
func (p plant) folder(name string, uid, gid int, mode os.FileMode) {
	p.t.Helper()
	p.must(os.MkdirAll(p.path(name), 0o755))
	p.must(os.Chown(p.path(name), uid, gid))
	p.must(os.Chmod(p.path(name), mode))
}

func (p plant) link(to, name string, uid int) {
	p.t.Helper()
	p.must(os.Symlink(to, p.path(name)))
	p.must(os.Lchown(p.path(name), uid, uid))
}

func TestFolderAndWay(t *testing.T) {
	p := newPlant(t)
	sticky := os.ModeSticky | 0o777
	p.folder("root", 0, 0, 0o755)
	p.folder("root/in", 0, 0, 0o700)
	p.folder("group", 0, other, 0o775)
	p.folder("group/in", 0, 0, 0o755)
	p.folder("rootgroup", 0, 0, 0o775)
	p.folder("all", 0, 0, 0o777)
	p.folder("all/in", 0, 0, 0o755)
	p.folder("tmp", 0, 0, sticky)
	p.folder("tmp/in", 0, 0, 0o755)
	p.folder("tmp/theirs", other, other, 0o700)
	p.folder("theirs", other, other, 0o755)
	p.folder("theirs/in", 0, 0, 0o755)
	p.link("root/in", "link", 0)
	p.link(p.path("tmp/in/../../theirs/in"), "link-to-theirs", 0)
	p.link("../root/in", "tmp/link", other)
	p.link("../root/in", "tmp/our-link", 0)
	p.link("loop", "loop", 0)
	p.must(os.WriteFile(p.path("file"), nil, 0o644))
	for path, want := range map[string]struct{ folder, way bool }{ // is it fine?
		"root":           {true, true},
		"root/in":        {true, true},
		"root/none/none": {true, true},
		"rootgroup":      {true, true},
		"group":          {false, true},
		"group/in":       {false, false},
		"group/none":     {false, false},
		"all":            {false, true},
		"all/in":         {false, false},
		"tmp":            {false, true},
		"tmp/in":         {true, true},
		"tmp/in/none":    {true, true},
		"tmp/none":       {true, true}, // who makes it looks again
		"tmp/theirs":     {false, false},
		"theirs":         {false, true},
		"theirs/in":      {false, false},
		"theirs/../root": {false, false},
		"link":           {true, true},
		"link/../in":     {true, true}, // root/in, not in
		"link-to-theirs": {false, false},
		"tmp/link":       {false, false},
		"tmp/our-link":   {true, true},
		"loop":           {false, false},
		"file":           {true, true},
		"file/in":        {true, true},
	} {
		at := p.dir + "/" + path
		if err := Folder(at); (err == nil) != want.folder {
			t.Errorf("Folder(%s): %v", path, err)
		}
		if err := Way(at); (err == nil) != want.way {
			t.Errorf("Way(%s): %v", path, err)
		}
	}
	for path, words := range map[string]string{
		"all": "chmod go-w " + p.path("all"), "theirs": "chown root " + p.path("theirs"), "tmp/link": "symbolic link of user 54321",
	} {
		if err := Folder(p.path(path)); !errors.Is(err, ErrOthers) || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v, want %q", path, err, words)
		}
	}
	if err := Folder("var"); err == nil || !strings.Contains(err.Error(), "absolute") {
		t.Errorf("a relative path: %v", err)
	}
}

func TestMkdirAll(t *testing.T) {
	p := newPlant(t)
	p.folder("tmp", 0, 0, os.ModeSticky|0o777)
	p.folder("all", 0, 0, 0o777)
	p.folder("victim", 0, 0, 0o755)
	p.link("../victim", "tmp/link", other)
	for path, fine := range map[string]bool{"a/b/c": true, "tmp/x/y": true, "tmp/x": true, "all/x": false, "tmp/link": false, "tmp/link/x": false} {
		if err := MkdirAll(p.path(path), 0o700); (err == nil) != fine {
			t.Errorf("%s: %v", path, err)
		}
		if info, err := os.Stat(p.path(path)); fine && (err != nil || !info.IsDir()) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if in, err := os.ReadDir(p.path("victim")); err != nil || len(in) > 0 {
		t.Errorf("made through a link of another user: %v, %v", in, err)
	}
	p.must(os.WriteFile(p.path("file"), nil, 0o644))
	if err := MkdirAll(p.path("file"), 0o700); err == nil {
		t.Error("a file for a folder")
	}
	info, err := os.Stat(p.path("a/b/c"))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestPlain(t *testing.T) {
	p := newPlant(t)
	for _, name := range []string{"file", "two", "theirs"} {
		p.must(os.WriteFile(p.path(name), nil, 0o600))
	}
	p.must(os.Link(p.path("two"), p.path("again")))
	p.must(os.Chown(p.path("theirs"), other, other))
	p.must(unix.Mkfifo(p.path("fifo"), 0o600))
	for name, fine := range map[string]bool{"file": true, "two": false, "again": false, "theirs": false, "fifo": false, "": false} {
		fd, err := unix.Open(p.path(name), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		p.must(err)
		if err := Plain(fd, p.path(name)); (err == nil) != fine || err != nil && !errors.Is(err, ErrOthers) {
			t.Errorf("%q: %v", name, err)
		}
		unix.Close(fd)
	}
}
