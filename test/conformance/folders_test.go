package conformance

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// intruder is a user without rights who has been at work in folders.
const intruder = 54321

// planted is a folder with what an intruder would have others write, and where it has planted the way to it.
type planted struct {
	t   *testing.T
	dir string
}

func newPlanted(t *testing.T) planted {
	t.Helper()
	p := planted{t, t.TempDir()}
	if err := os.Chown(p.dir, intruder, intruder); err != nil {
		nstest.Skip(t, "files of another user can be made by root only: "+err.Error())
	}
	p.do(os.Chown(p.dir, 0, 0), os.Mkdir(p.path("victim"), 0o755), os.WriteFile(p.path("victim/file"), []byte("theirs"), 0o644),
		os.WriteFile(p.path("victim/large"), nil, 0o644), os.Truncate(p.path("victim/large"), 9<<20))
	return p
}

func (p planted) path(name string) string { return filepath.Join(p.dir, name) }

func (p planted) do(errs ...error) {
	p.t.Helper()
	for _, err := range errs {
		if err != nil {
			p.t.Fatal(err)
		}
	}
}

// folder makes one that belongs to uid.
func (p planted) folder(name string, uid int, mode fs.FileMode) string {
	p.t.Helper()
	p.do(os.MkdirAll(p.path(name), 0o755), os.Chown(p.path(name), uid, uid), os.Chmod(p.path(name), mode))
	return p.path(name)
}

// link makes a symbolic link of the intruder's to the victim or what is in it.
func (p planted) link(to, name string) string {
	p.t.Helper()
	p.do(os.Symlink(p.path(to), p.path(name)), os.Lchown(p.path(name), intruder, intruder))
	return p.path(name)
}

// victim is the state of what must not change.
func (p planted) victim() (state []string) {
	p.t.Helper()
	p.do(filepath.WalkDir(p.path("victim"), func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		text := ""
		if info.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text = strings.TrimRight(string(b), "\x00")
		}
		state = append(state, fmt.Sprintf("%s %v %d %s %q", path, info.Mode(), info.Size(), info.ModTime(), text))
		return nil
	}))
	return state
}

const sticky = fs.ModeSticky | 0o777

// TestHostileDataDir: leases are kept where only root can write, or the plugin says what to do.
func TestHostileDataDir(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	for name, tt := range map[string]struct {
		plant func(p planted) string // returns dataDir
		code  uint                   // 0: it works
		words string
	}{
		"another user's folder, with a link in it": {func(p planted) string {
			dir := p.folder("theirs", intruder, 0o755)
			p.link("victim", "theirs/net")
			return dir
		}, 100, "chown root"},
		"a folder for all, with a link in it": {func(p planted) string {
			dir := p.folder("all", 0, 0o777)
			p.link("victim", "all/net")
			return dir
		}, 100, "chmod go-w"},
		"a folder like /tmp, with a link in it": {func(p planted) string {
			dir := p.folder("tmp", 0, sticky)
			p.link("victim", "tmp/net")
			return dir
		}, 100, "symbolic link of user"},
		"a link in a folder like /tmp": {func(p planted) string {
			p.folder("tmp", 0, sticky)
			return p.link("victim", "tmp/link")
		}, 100, "symbolic link of user"},
		"a way by another user's folder": {func(p planted) string {
			p.folder("theirs", intruder, 0o755)
			return p.path("theirs/not/there")
		}, 100, "chown root"},
		"a hard link in the leases": {func(p planted) string {
			dir := p.folder("all", 0, 0o755)
			conf := n.conf(`{"ipam":` + strings.ReplaceAll(n.pool("10.244.1.0/24"), n.dataDir, dir) + `}`)
			n.must(attach("ADD", "first", pod, conf))
			n.must(attach("DEL", "first", pod, conf))
			left, err := filepath.Glob(p.path("all/net/*/last.0"))
			if err != nil || len(left) != 1 {
				t.Fatalf("%v, %v", left, err)
			}
			p.do(os.Remove(left[0]), os.Link(p.path("victim/file"), left[0]), os.Chown(p.path("all/net"), intruder, intruder))
			return dir
		}, 100, "chown root"},
		"a file":          {func(p planted) string { return p.path("victim/file") }, 100, "not a directory"},
		"a device":        {func(planted) string { return "/dev/null" }, 100, "not a directory"},
		"a FIFO":          {func(p planted) string { p.do(unix.Mkfifo(p.path("fifo"), 0o600)); return p.path("fifo") }, 100, "not a directory"},
		"a relative path": {func(planted) string { return "../x" }, 7, "absolute"},
		"a link of root's": {func(p planted) string {
			p.do(os.Mkdir(p.path("d"), 0o755), os.Symlink("d", p.path("l")))
			return p.path("l")
		}, 0, ""},
		"new, in /tmp":      {func(p planted) string { return filepath.Join(p.folder("tmp", 0, sticky), "new") }, 0, ""},
		"new, many folders": {func(p planted) string { return p.path("a/b/c/d") }, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlanted(t)
			dir := tt.plant(p)
			before := p.victim()
			for _, strategy := range []string{"sequential", "random", "dense-pack"} {
				conf := n.conf(`{"ipam":` + strings.Replace(strings.ReplaceAll(n.pool("10.244.1.0/24"), n.dataDir, dir), "{", `{"strategy":"`+strategy+`",`, 1) + `}`)
				conf = n.with(conf, `{"cni.dev/valid-attachments":[]}`)
				if tt.code == 0 {
					n.must(attach("ADD", "c1", pod, conf))
				} else {
					n.fails(attach("ADD", "c1", pod, conf), tt.code, tt.words)
					n.fails(attach("STATUS", "", nil, conf), 50, tt.words)
				}
				for _, verb := range []string{"GC", "DEL"} {
					if _, f := n.run(attach(verb, "c1", pod, conf)); f != nil && tt.code == 0 {
						t.Errorf("%s: %v", verb, f)
					}
				}
			}
			if diff := cmp.Diff(before, p.victim()); diff != "" {
				t.Errorf("a file of others has changed: %s", diff)
			}
			if l := n.links(); len(l) > 0 {
				t.Errorf("links left: %s", l)
			}
		})
	}
}

// TestHostileLogFile: the plugin logs into a file of root's or says on standard error why not. The pod starts in any case.
func TestHostileLogFile(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	for name, tt := range map[string]struct {
		plant func(p planted) string // returns log_file
		words string                 // ""; it is written
	}{
		"a link":          {func(p planted) string { p.folder("all", 0, 0o777); return p.link("victim/file", "all/log") }, "too many levels"},
		"a link to none":  {func(p planted) string { p.folder("all", 0, 0o777); return p.link("victim/none", "all/log") }, "too many levels"},
		"a link to large": {func(p planted) string { p.folder("all", 0, 0o777); return p.link("victim/large", "all/log") }, "too many levels"},
		"a hard link": {func(p planted) string {
			dir := p.folder("all", 0, 0o777)
			p.do(os.Link(p.path("victim/file"), filepath.Join(dir, "log")))
			return filepath.Join(dir, "log")
		}, "2 names"},
		"a hard link to large": {func(p planted) string {
			dir := p.folder("all", 0, 0o777)
			p.do(os.Link(p.path("victim/large"), filepath.Join(dir, "log")), os.Link(p.path("victim/file"), filepath.Join(dir, "log.1")))
			return filepath.Join(dir, "log")
		}, ""}, // it is renamed where it is, and a new one begun
		"another user's file": {func(p planted) string {
			p.do(os.WriteFile(p.path("log"), nil, 0o666), os.Chown(p.path("log"), intruder, intruder))
			return p.path("log")
		}, "belongs to user"},
		"a way by another user's folder": {func(p planted) string {
			p.folder("theirs", intruder, 0o755)
			p.link("victim", "theirs/dir")
			return p.path("theirs/dir/log")
		}, "chown root"},
		"a FIFO":                             {func(p planted) string { p.do(unix.Mkfifo(p.path("fifo"), 0o600)); return p.path("fifo") }, "no such device"},
		"a device":                           {func(planted) string { return "/dev/zero" }, "no regular file"},
		"a folder":                           {func(p planted) string { return p.path("victim") }, "is a directory"},
		"in a folder like /tmp":              {func(p planted) string { return filepath.Join(p.folder("tmp", 0, sticky), "log") }, ""},
		"in a folder like Ubuntu's /var/log": {func(p planted) string { return filepath.Join(p.folder("log", 0, 0o775), "log") }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlanted(t)
			file := tt.plant(p)
			before := p.victim()
			conf := n.conf(fmt.Sprintf(`{"log_level":"debug","log_file":%q}`, file))
			for _, verb := range []string{"ADD", "DEL"} {
				c := n.start(t.Context(), attach(verb, "c1", pod, conf))
				if _, f := c.answer(t); f != nil {
					t.Errorf("%s: %v", verb, f)
				}
				if tt.words != "" && !strings.Contains(c.stderr, tt.words) || tt.words == "" && c.stderr != "" {
					t.Errorf("%s says %q on standard error, want %q", verb, c.stderr, tt.words)
				}
			}
			if tt.words == "" { // anything else may be a FIFO
				if b, err := os.ReadFile(file); err != nil || !strings.Contains(string(b), "command=DEL") {
					t.Errorf("not logged: %.200q, %v", b, err)
				}
			}
			if diff := cmp.Diff(before, p.victim()); diff != "" {
				t.Errorf("a file of others has changed: %s", diff)
			}
		})
	}
	n.empty()
}

// TestHostileSpool: records for the daemon are not put where somebody else leads them.
func TestHostileSpool(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	p := newPlanted(t)
	before := p.victim()
	p.folder("tmp", 0, sticky)
	p.link("victim", "tmp/hints")
	p.folder("theirs", intruder, 0o755)
	p.link("victim", "theirs/hints")
	p.folder("own/hints", 0, 0o700)
	for _, dir := range []string{"tmp", "theirs", "own"} {
		conf := n.conf(fmt.Sprintf(`{"daemon_socket":%q}`, p.path(dir+"/daemon.sock")))
		n.must(attach("ADD", "c1", pod, conf))
		n.must(attach("DEL", "c1", pod, conf))
	}
	if diff := cmp.Diff(before, p.victim()); diff != "" {
		t.Errorf("the plugin wrote elsewhere: %s", diff)
	}
	if records, err := os.ReadDir(p.path("own/hints")); err != nil || len(records) != 2 {
		t.Errorf("where only root can write: %v, %v", records, err)
	}
	n.empty()
}
