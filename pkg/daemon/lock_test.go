package daemon

import (
	"os"
	"path/filepath"
	"testing"
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
		if l, err := lock(t.Context(), path); err == nil {
			t.Errorf("%s: locked", name)
			l.Close()
		}
		if b, err := os.ReadFile(victim); err != nil || string(b) != "theirs" {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	l, err := lock(t.Context(), filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}
