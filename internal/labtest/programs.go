package labtest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/nstest"
)

// Programs is a folder with our programs, each a link or a file that the test may replace: those of HEADCNI_BIN, else
// built ones. Under the race detector the daemon has it too: it is the one with goroutines that share memory.
func Programs(t testing.TB) string {
	t.Helper()
	nstest.Require(t)
	dir := t.TempDir()
	for _, from := range []string{os.Getenv(lab.BinEnv), shared.get(t)} {
		if from == "" {
			continue
		}
		if err := link(from, dir); err != nil {
			t.Fatal(err)
		}
	}
	if err := (lab.Options{Bin: dir}).Check(); err != nil {
		nstest.Skip(t, err.Error())
	}
	return dir
}

// WithController builds the controller into the folder of Programs where that lacks it.
func WithController(t testing.TB, bin string) {
	t.Helper()
	path := filepath.Join(bin, "headcni-controller")
	if _, err := os.Stat(path); err == nil {
		return
	}
	cmd := exec.CommandContext(Within(t), "go", "build", "-o", path, "github.com/headcni/headcni/cmd/headcni-controller")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build headcni-controller: %v\n%s", err, out)
	}
}

// link makes links to the files of one folder in another, in place of those that are there.
func link(from, to string) error {
	files, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(to, f.Name())
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			return err
		}
		if err := os.Symlink(filepath.Join(from, f.Name()), path); err != nil {
			return err
		}
	}
	return nil
}

// builder builds what HEADCNI_BIN lacks, once for all who want it at the same time.
type builder struct {
	mu    sync.Mutex
	users int
	dir   string
}

var shared builder

// get returns a folder with programs that stays until the test has ended, "" where none are built.
func (b *builder) get(t testing.TB) string {
	t.Helper()
	if os.Getenv(lab.BinEnv) != "" && !raceDetector {
		return ""
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.users == 0 {
		dir, err := os.MkdirTemp(nstest.Dir(), "programs")
		if err == nil {
			if err = build(t.Context(), dir); err != nil {
				_ = os.RemoveAll(dir) // the other error counts
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		b.dir = dir
	}
	b.users++
	t.Cleanup(func() { b.put(t) })
	return b.dir
}

// put ends what get began.
func (b *builder) put(t testing.TB) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.users--; b.users > 0 {
		return
	}
	if err := os.RemoveAll(b.dir); err != nil {
		t.Error(err)
	}
}

func build(ctx context.Context, dir string) error {
	if os.Getenv(lab.BinEnv) == "" {
		if err := lab.Build(ctx, dir); err != nil {
			return err
		}
	}
	if !raceDetector {
		return nil
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-race", "-o", filepath.Join(dir, "headcni-daemon"), "github.com/headcni/headcni/cmd/headcni-daemon")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build headcni-daemon: %w\n%s", err, out)
	}
	return nil
}
