package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

func write(t *testing.T, file, content string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, mode); err != nil { // whatever the umask is
		t.Fatal(err)
	}
}

func folder(t *testing.T, when time.Time, writable os.FileMode) string {
	t.Helper()
	dir := t.TempDir()
	write(t, dir+"/b", "second", 0o755|writable)
	write(t, dir+"/a/file", "first", 0o644|writable)
	if err := os.Mkdir(dir+"/tmp", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir+"/tmp", 0o777|fs.ModeSticky), os.Symlink("/a/file", dir+"/link")); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"/b", "/a/file", "/a"} {
		if err := os.Chtimes(dir+f, when, when); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestPackSameInputSameBytes(t *testing.T) {
	var tars [][]byte
	for _, dir := range []string{folder(t, time.Now(), 0), folder(t, time.Unix(1e9, 0), 0o022)} {
		file := filepath.Join(t.TempDir(), "image.tar")
		args := []string{"pack", "--name", "example.org/x/y:1", "--rootfs", dir, "--entrypoint", "/b", "--label", "k=v=w", "-o", file}
		if err := run(args, io.Discard); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		tars = append(tars, b)
	}
	if !bytes.Equal(tars[0], tars[1]) {
		t.Error("times and umask show in the image")
	}
}

func TestPackKeepsWhatIsThere(t *testing.T) {
	file := filepath.Join(t.TempDir(), "image.tar")
	lower, upper := folder(t, time.Now(), 0), t.TempDir()
	write(t, upper+"/b", "upper", 0o600)
	args := []string{
		"pack", "--name", "example.org/x/y:1", "--name", "other:2", "--rootfs", lower, "--rootfs", upper, "--platform", "linux/arm64",
		"--entrypoint", "/b", "--entrypoint", "-x", "--cmd", "c", "--env", "A=B", "--label", "k=v=w", "--user", "1:2", "--workdir", "/a", "-o", file,
	}
	if err := run(args, io.Discard); err != nil {
		t.Fatal(err)
	}
	manifest, err := tarball.LoadManifest(func() (io.ReadCloser, error) { return os.Open(file) })
	if err != nil {
		t.Fatal(err)
	}
	if len(manifest) != 1 || strings.Join(manifest[0].RepoTags, " ") != "example.org/x/y:1 other:2" {
		t.Errorf("names: %+v", manifest)
	}
	if err := run(append(args, "--name", "no-tag"), io.Discard); err == nil {
		t.Error("a name without tag was taken")
	}
	args = append([]string{"pack", "--name", "one:1"}, args[5:]...)
	if err := run(args, io.Discard); err != nil {
		t.Fatal(err)
	}
	img, err := tarball.ImageFromPath(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	got, _ := json.Marshal(c.Config) // plain strings
	const want = `{"Cmd":["c"],"Entrypoint":["/b","-x"],"Env":["A=B"],"Labels":{"k":"v=w"},"User":"1:2","WorkingDir":"/a"}`
	if string(got) != want || c.Architecture != "arm64" || c.OS != "linux" {
		t.Errorf("config of %s/%s:\n%s\nwant\n%s", c.OS, c.Architecture, got, want)
	}
	layers, err := img.Layers()
	if err != nil || len(layers) != 2 {
		t.Fatalf("%d layers, %v", len(layers), err)
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || !h.ModTime.Equal(epoch) {
			t.Errorf("%s: owner %d:%d, time %s", h.Name, h.Uid, h.Gid, h.ModTime)
		}
		list = append(list, h.FileInfo().Mode().String()+" "+h.Name)
	}
	const files = "drwxr-xr-x a/,-rw-r--r-- a/file,-rwxr-xr-x b,Lrwxrwxrwx link,dtrwxrwxrwx tmp/"
	if got := strings.Join(list, ","); got != files {
		t.Errorf("files:\n%s\nwant\n%s", got, files)
	}
}

func TestPackRefuses(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mkfifo(dir+"/pipe", 0o644); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"a pipe":        {"pack", "--name", "x:1", "--rootfs", dir, "-o", t.TempDir() + "/x"},
		"no folder":     {"pack", "--name", "x:1", "--rootfs", "/does/not/exist", "-o", t.TempDir() + "/x"},
		"no name":       {"pack", "--rootfs", t.TempDir(), "-o", t.TempDir() + "/x"},
		"bad platform":  {"pack", "--name", "x:1", "--platform", "linux", "--rootfs", t.TempDir(), "-o", t.TempDir() + "/x"},
		"bad label":     {"pack", "--name", "x:1", "--label", "k", "--rootfs", t.TempDir(), "-o", t.TempDir() + "/x"},
		"no command":    nil,
		"other command": {"push"},
	} {
		if err := run(args, io.Discard); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// tree of a real dynamic program, from this machine, with the libraries that ldd names.
func TestCollectAndVerify(t *testing.T) {
	const program = "/bin/sh"
	to := t.TempDir()
	if err := collect("/", to, []string{program}); err != nil {
		t.Fatal(err)
	}
	ldd, err := exec.Command("ldd", program).Output()
	if err != nil {
		t.Fatalf("ldd: %v", err)
	}
	libc := ""
	for _, word := range strings.Fields(string(ldd)) {
		if strings.HasPrefix(word, "/") {
			if _, _, err := (tree{to}).resolve(word); err != nil {
				t.Errorf("ldd names %s: %v", word, err)
			}
			if strings.Contains(word, "libc.so") {
				libc = word
			}
		}
	}
	arch, other := "amd64", "arm64"
	o, err := readObject(program)
	if err != nil || o == nil {
		t.Fatalf("%s: %v, %v", program, o, err)
	}
	if o.machine == elf.EM_AARCH64 {
		arch, other = other, arch
	}
	if n, err := verify(tree{to}, arch); err != nil || n < 3 {
		t.Errorf("%d files, %v", n, err)
	}
	if _, err := verify(tree{to}, other); err == nil || !strings.Contains(err.Error(), "is for EM_") {
		t.Errorf("another architecture was taken: %v", err)
	}
	_, end, err := (tree{to}).resolve(libc)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(within(to, end)); err != nil {
		t.Fatal(err)
	}
	if _, err := verify(tree{to}, arch); err == nil || !strings.Contains(err.Error(), "libc.so") {
		t.Errorf("a missing library was not noticed: %v", err)
	}
	// As a layer of its own it counts again.
	lower := t.TempDir()
	if err := copyInto(end, within(lower, end)); err != nil {
		t.Fatal(err)
	}
	if _, err := verify(tree{lower, to}, arch); err != nil {
		t.Errorf("a library in another layer: %v", err)
	}
	if _, err := verify(tree{t.TempDir()}, arch); err == nil {
		t.Error("an empty folder passed")
	}
}

func TestResolveStaysInside(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/real/x", "", 0o644)
	for link, target := range map[string]string{"/abs": "/real", "/up": "../../../../real", "/loop": "loop"} {
		if err := os.Symlink(target, dir+link); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{"/abs/x", "/up/x"} {
		if _, end, err := (tree{dir}).resolve(p); err != nil || end != "/real/x" {
			t.Errorf("%s is %q, %v; want /real/x", p, end, err)
		}
	}
	for _, p := range []string{"/loop", "/nothing", "/etc/passwd"} {
		if _, end, err := (tree{dir}).resolve(p); err == nil {
			t.Errorf("%s is %q; want an error", p, end)
		}
	}
}

func TestSBOM(t *testing.T) {
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := copyInto(self, dir+"/usr/bin/self"); err != nil {
		t.Fatal(err)
	}
	write(t, dir+statusDir+"libx", "Package: libx\nVersion: 2:1.0+b~c-1\nArchitecture: arm64\nDescription: x\n y: z\n", 0o644)
	b := bill{name: "n", version: "v1-dirty", arch: "arm64"}
	one, err := b.document(tree{dir})
	if err != nil {
		t.Fatal(err)
	}
	if two, err := b.document(tree{dir}); err != nil || !bytes.Equal(one, two) {
		t.Errorf("not the same twice: %v", err)
	}
	var d spdxDocument
	if err := json.Unmarshal(one, &d); err != nil {
		t.Fatal(err)
	}
	ids, purls := map[string]bool{"SPDXRef-DOCUMENT": true}, map[string]bool{}
	for _, p := range d.Packages {
		if ids[p.ID] || p.ID == "" {
			t.Errorf("id %s twice", p.ID)
		}
		ids[p.ID] = true
		for _, r := range p.Refs {
			name, _, _ := strings.Cut(r.Locator, "@")
			purls[name] = true
		}
	}
	for _, want := range []string{"pkg:deb/debian/libx", "pkg:golang/stdlib", "pkg:golang/github.com/google/go-containerregistry"} {
		if !purls[want] {
			t.Errorf("%s is missing", want)
		}
	}
	for _, r := range d.Relationships {
		if !ids[r.From] || !ids[r.To] {
			t.Errorf("%+v: of what is not there", r)
		}
	}
	b.arch = "amd64"
	if _, err := b.document(tree{dir}); err == nil {
		t.Error("a package of another architecture was taken")
	}
	if _, err := b.document(tree{t.TempDir()}); err == nil {
		t.Error("an empty folder was taken")
	}
}

// TestLicences: the texts of every module of a program are there, and Go's; none of our own modules' is looked for.
func TestLicences(t *testing.T) {
	dir, to := t.TempDir(), t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := copyInto(self, dir+"/usr/bin/self"); err != nil {
		t.Fatal(err)
	}
	own := t.TempDir() + "/LICENSE"
	write(t, own, "ours", 0o644)
	if err := licences(tree{dir}, "github.com/headcni/headcni", own, to); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"LICENSE", "go/LICENSE", "github.com/google/go-containerregistry@*/LICENSE", "github.com/klauspost/compress@*/LICENSE"} {
		if found, err := filepath.Glob(to + "/" + want); err != nil || len(found) != 1 {
			t.Errorf("%s: %v, %v", want, found, err)
		}
	}
	if err := licences(tree{t.TempDir()}, "x", own, to); err == nil {
		t.Error("an empty folder was taken")
	}
	if err := copyLicences("bare", t.TempDir(), to); err == nil || !strings.Contains(err.Error(), "bare has no licence") {
		t.Errorf("a module without a text: %v", err)
	}
}

// A file that is cut off, or no program at all, must not pass for one without needs.
func TestReadObjectBroken(t *testing.T) {
	dir := t.TempDir()
	var half bytes.Buffer
	half.WriteString(elf.ELFMAG)
	_ = binary.Write(&half, binary.LittleEndian, uint32(0x00010102)) // a buffer takes all
	write(t, dir+"/half", half.String(), 0o755)
	if _, err := readObject(dir + "/half"); err == nil {
		t.Error("half an ELF file was taken")
	}
	write(t, dir+"/text", "#!/bin/sh\n", 0o755)
	if o, err := readObject(dir + "/text"); o != nil || err != nil {
		t.Errorf("a script is %v, %v; want neither", o, err)
	}
}
