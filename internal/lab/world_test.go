package lab

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// TestFolderOfAnotherUser: the folder of labs has a name that others know. What they put there is neither ended, removed nor locked.
func TestFolderOfAnotherUser(t *testing.T) {
	dir := t.TempDir()
	base, victim := filepath.Join(dir, "headcni-lab-0"), filepath.Join(dir, "victim")
	world := filepath.Join(base, "w1")
	for _, d := range []string{world, victim} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b, err := json.Marshal(World{Dir: victim, Kind: "k", Name: "theirs"})
	if err == nil {
		err = os.WriteFile(filepath.Join(world, stateFile), b, 0o644)
	}
	for _, link := range []string{filepath.Join(base, "lock"), filepath.Join(world, "lock")} {
		if err == nil {
			err = os.Symlink(filepath.Join(victim, "made"), link)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	const other = 54321
	if err := os.Chown(base, other, other); err != nil {
		nstest.Skip(t, "files of another user can be made by root only: "+err.Error())
	}
	t.Setenv(DirEnv, base)
	if w, err := Kept("k"); err == nil {
		t.Errorf("taken for ours: %+v", w)
	}
	if err := Sweep(); err == nil {
		t.Error("swept")
	}
	if _, _, err := newWorldDir(); err == nil {
		t.Error("used for a lab")
	}
	if w, err := kept(base, "k"); err != nil || len(w) != 1 { // as for the hint that another user has labs
		t.Errorf("looked at: %+v, %v", w, err)
	}
	if found, err := os.ReadDir(victim); err != nil || len(found) > 0 {
		t.Errorf("made through a link: %v, %v", found, err)
	}
	if err := os.Remove(filepath.Join(world, stateFile)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(world, stateFile), 0o644); err != nil {
		t.Fatal(err)
	}
	if w, err := kept(base, "k"); err == nil {
		t.Errorf("a FIFO: %+v", w)
	}
	if _, err := os.Stat(world); err != nil {
		t.Error(err)
	}
}

// Whoever begins a lab sweeps the folders of those that are dead: also of one that `demo down` has just killed, and waits for.
func TestSweptMeanwhile(t *testing.T) {
	if err := (World{Dir: filepath.Join(t.TempDir(), "swept")}).Down(t.Context()); err != nil {
		t.Error(err)
	}
}
