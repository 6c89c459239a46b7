package build

import (
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// staged is a copy of what scripts/install needs, with stand-ins for the programs: below DESTDIR none of them is run.
func staged(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, path := range []string{"scripts/install", "scripts/uninstall", "docs/daemon.yaml", "10-headcni.conflist",
		"systemd/headcni-daemon.service", "systemd/headcni-tailscaled.service"} {
		put(t, filepath.Join(dir, path), read(t, filepath.Join(repo, path)))
	}
	if err := os.CopyFS(filepath.Join(dir, "docs/man"), os.DirFS(filepath.Join(repo, "docs/man"))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"headcni", "headcni-ipam", "headcni-daemon", "headcnictl", "host-local", "loopback", "portmap"} {
		put(t, filepath.Join(dir, "bin", name), "program "+name)
	}
	return dir
}

func put(t *testing.T, path, text string) {
	t.Helper()
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, []byte(text), 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func files(t *testing.T, dir string) (list []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			list = append(list, strings.TrimPrefix(path, dir))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestUninstallBelowDESTDIR: what install brought goes, the reference plugins too; those of somebody else stay.
func TestUninstallBelowDESTDIR(t *testing.T) {
	const plugins = "/opt/cni/bin/"
	for name, theirs := range map[string][]string{"empty": nil, "host-local and loopback of somebody else": {"host-local", "loopback"}} {
		t.Run(name, func(t *testing.T) {
			dir, dest := staged(t), t.TempDir()
			var want []string
			for i, name := range theirs {
				text := "theirs"
				if i == 1 {
					text = "program " + name // the same as ours, and not brought by us
				}
				put(t, dest+plugins+name, text)
				want = append(want, plugins+name)
			}
			script := func(name string) {
				t.Helper()
				cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "scripts", name))
				cmd.Env = append(os.Environ(), "DESTDIR="+dest)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("%s: %v: %s", name, err, out)
				}
			}
			script("install")
			script("install") // again: it still knows what it has brought
			for _, want := range []string{plugins + "portmap", "/usr/local/share/man/man1/headcnictl-status.1", "/usr/local/share/man/man8/headcni-daemon.8",
				"/usr/local/share/bash-completion/completions/headcnictl", "/usr/local/share/zsh/site-functions/_headcnictl"} {
				if !slices.Contains(files(t, dest), want) {
					t.Fatalf("%s is not among %s", want, files(t, dest))
				}
			}
			// headcni-daemon reads the note too, where the tree becomes a machine's.
			var note map[string][]string
			if err := json.Unmarshal([]byte(read(t, dest+"/var/lib/headcni/plugins.json")), &note); err != nil || len(note) != 3-len(theirs) || len(note[plugins+"portmap"]) != 1 {
				t.Errorf("noted: %v, %v", note, err)
			}
			script("uninstall")
			script("uninstall")
			if got := files(t, dest); !slices.Equal(got, want) {
				t.Errorf("left: %s, want %s", got, want)
			}
		})
	}
}
