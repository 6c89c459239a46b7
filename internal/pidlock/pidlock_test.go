package pidlock

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestLockIsAFileOfItsOwn: what the lock's name leads to is not truncated where it is another file.
func TestLockIsAFileOfItsOwn(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	for name, plant := range map[string]func(from, to string) error{"link": os.Symlink, "hard link": os.Link} {
		path := filepath.Join(dir, name)
		err := os.WriteFile(victim, []byte("theirs"), 0o600)
		if err == nil {
			err = plant(victim, path)
		}
		if err != nil {
			t.Fatal(err)
		}
		if l, err := Take(t.Context(), path, "test"); err == nil {
			t.Errorf("%s: locked", name)
			l.Close()
		}
		if b, err := os.ReadFile(victim); err != nil || string(b) != "theirs" {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	l, err := Take(t.Context(), filepath.Join(dir, "lock"), "test")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// A child that a killed daemon was about to start has its lock for a moment; an uninstall that had it removes its file.
func TestLockOfTheDead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	first, err := Take(t.Context(), path, "test")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		time.Sleep(patience / 4)
		_ = os.Remove(path)
		first.Close()
	}()
	second, err := Take(t.Context(), path, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if _, err := Take(t.Context(), path, "test"); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("(pid %d): stop it first", os.Getpid())) {
		t.Errorf("a second one: %v", err)
	}
}
