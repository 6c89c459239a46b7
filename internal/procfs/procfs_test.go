package procfs

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestReadAndWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "value")
	if err := Write(path, "1"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("wrote a file that is not there: %v", err)
	}
	if _, err := Read(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("read a file that is not there: %v", err)
	}
	if err := os.WriteFile(path, []byte("0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Write(path, "1"); err != nil {
		t.Fatal(err)
	}
	if got, err := Read(path); err != nil || got != "1" {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := Read("/proc/sys/kernel/random/boot_id"); err != nil || len(got) != 36 {
		t.Errorf("boot ID: %q, %v", got, err)
	}
	if _, err := Read(t.TempDir()); err == nil {
		t.Error("read a folder")
	}
}
