package conflist

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestStandFirst(t *testing.T) {
	dir := t.TempDir()
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("00-multus.conf", `{"type":"multus"}`)
	put("05-cilium.conflist.bak", `{}`)
	put("10-headcni.conflist", `{}`)
	put("20-later.conf", `{}`)
	var hidden []string
	remember := func(names []string) error { hidden = append(hidden, names...); return nil }
	if done, err := StandFirst(dir, false, remember); err != nil || done != nil {
		t.Fatalf("alone: %v, %v", done, err)
	}
	put("10-flannel.conflist", `{"plugins":[{"type":"flannel"}]}`)
	put("05-x.json", `broken`)
	if _, err := StandFirst(dir, false, remember); err == nil || !strings.Contains(err.Error(), "05-x.json, 10-flannel.conflist") ||
		!strings.Contains(err.Error(), "cni.exclusive") || hidden != nil {
		t.Errorf("before ours: %v", err)
	}
	if done, err := StandFirst(dir, true, remember); err != nil || len(done) != 2 {
		t.Errorf("exclusive: %v, %v", done, err)
	}
	if others, err := before(dir); err != nil || others != nil {
		t.Errorf("left: %v, %v", others, err)
	}
	put("05-x.json", "again")
	if err := ShowHidden(dir, append(hidden, "never-was.conf")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"05-x.json": "again", "10-flannel.conflist": `{"plugins":[{"type":"flannel"}]}`} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*"+disabledSuffix)); left != nil {
		t.Errorf("left: %v", left)
	}
}
