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

	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/realparts"
)

// workTree copies the repository as it stands, without what is made in it.
func workTree(t *testing.T, to string) {
	t.Helper()
	err := filepath.WalkDir(repo, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(repo, path)
		switch {
		case err != nil:
			return err
		case d.IsDir() && slices.Contains([]string{".git", "bin", "dist"}, name):
			return fs.SkipDir
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, name), 0o755)
		case !d.Type().IsRegular():
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, name), b, info.Mode().Perm())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestReleaseIsReproducible makes a release, but for the images, twice: in other folders, with another umask, time zone and language.
// The images' packing is tested in test/tools/oci and test/image.
func TestReleaseIsReproducible(t *testing.T) {
	realparts.Tool(t, "cyclonedx-gomod")
	helm := realparts.Tool(t, "helm")
	const version = "0.1.0-test"
	release := func(folder, umask string, env ...string) (dist string) {
		dir := filepath.Join(t.TempDir(), folder)
		workTree(t, dir)
		cmd := exec.CommandContext(t.Context(), "bash", "-c", "umask "+umask+" && exec scripts/release --no-images amd64")
		cmd.Dir = dir
		cmd.Env = append(append(os.Environ(), "VERSION="+version), env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("scripts/release: %v\n%s", err, out)
		}
		return filepath.Join(dir, "dist")
	}
	dist := release("a", "022", "TZ=UTC")
	again := release("another-folder", "077", "TZ=Asia/Shanghai", "LANG=zh_CN.UTF-8")
	if a, b := read(t, filepath.Join(dist, "SHA256SUMS")), read(t, filepath.Join(again, "SHA256SUMS")); a != b {
		t.Errorf("two runs made different files:\n%s\n%s", a, b)
	}
	run(t, dist, "sha256sum", "--check", "--strict", "SHA256SUMS")

	// The archive can be installed, and calls itself what it is.
	name := "headcni-" + version + "-linux-amd64"
	tree := t.TempDir()
	run(t, tree, "tar", "xzf", filepath.Join(dist, name+".tar.gz"))
	tree = filepath.Join(tree, name)
	if got := run(t, tree, "bin/headcnictl", "version"); got != version {
		t.Errorf("headcnictl of the release says %s, want %s", got, version)
	}
	dest := t.TempDir()
	install := exec.CommandContext(t.Context(), "scripts/install")
	install.Dir, install.Env = tree, append(os.Environ(), "DESTDIR="+dest)
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("scripts/install of the archive: %v\n%s", err, out)
	}
	for _, path := range []string{"/opt/cni/bin/headcni", "/opt/cni/bin/portmap", "/usr/local/bin/headcnictl", "/usr/local/lib/systemd/system/headcni-daemon.service"} {
		if !slices.Contains(files(t, dest), path) {
			t.Errorf("installed from the archive: %s is missing", path)
		}
	}

	// Each program's modules are listed, with versions.
	for program, module := range map[string]string{"headcni": "golang.org/x/sys", "headcni-daemon": "k8s.io/client-go", "headcnictl": "github.com/spf13/cobra",
		"portmap": "github.com/containernetworking/cni"} {
		var sbom struct {
			Components []struct{ Name, Version string }
		}
		if err := json.Unmarshal([]byte(read(t, filepath.Join(tree, "sbom", program+".cdx.json"))), &sbom); err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(sbom.Components, func(c struct{ Name, Version string }) bool {
			return c.Name == module && strings.HasPrefix(c.Version, "v")
		}) {
			t.Errorf("sbom/%s.cdx.json does not list %s", program, module)
		}
	}

	// Helm takes the chart.
	run(t, dist, helm, "template", "headcni", "headcni-"+strings.TrimSuffix(version, "-test")+".tgz", "--set", "config.headscale.url=https://headscale.example.com",
		"--set", "existingSecret=headcni-auth")

	// What krew is told is true of the archive.
	var plugin struct {
		Spec struct {
			Version   string
			Platforms []struct {
				URI, SHA256, Bin string
				Files            []struct{ From string }
			}
		}
	}
	if err := yaml.Unmarshal([]byte(read(t, filepath.Join(dist, "krew-headcni.yaml"))), &plugin); err != nil {
		t.Fatal(err)
	}
	if len(plugin.Spec.Platforms) != 1 || plugin.Spec.Version != "v"+version {
		t.Fatalf("krew-headcni.yaml: %+v", plugin)
	}
	p := plugin.Spec.Platforms[0]
	if !strings.Contains(read(t, filepath.Join(dist, "SHA256SUMS")), p.SHA256+"  "+filepath.Base(p.URI)+"\n") {
		t.Errorf("krew-headcni.yaml says %s of %s", p.SHA256, p.URI)
	}
	for _, f := range p.Files {
		if found, err := filepath.Glob(filepath.Join(filepath.Dir(tree), f.From)); err != nil || len(found) != 1 {
			t.Errorf("krew-headcni.yaml: %s is %v in the archive, %v", f.From, found, err)
		}
	}
}
