package bench

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// A contender is a network configuration (a chain of plugins) that is run as a container runtime runs it: one process per
// plugin and command, each with the result of the one before.
type contender struct {
	name    string
	network string // the name under which leases are kept
	chain   []link
}

// link is one plugin of a chain: its program and the members of its configuration besides cniVersion, name and type.
type link struct{ program, members string }

// programs finds our programs and the pinned real parts.
type programs struct {
	path string // as CNI_PATH has it: for the plugins' own look-up of IPAM plugins, too
}

func newPrograms(b testing.TB) programs {
	b.Helper()
	nstest.Require(b)
	ours, tools := os.Getenv("HEADCNI_BIN"), os.Getenv("HEADCNI_TOOLS")
	if ours == "" || tools == "" {
		nstest.Skip(b, "no programs to measure: run `sudo make bench`")
	}
	p := programs{path: ours + ":" + tools}
	return p.install(b, "headcni", "headcni-ipam", "ptp", "bridge", "host-local", "portmap")
}

// install writes programs in one go, as headcni-daemon installs plugins: then the page cache has them in large folios, where
// the file system knows those. What the linker wrote lies there in single pages, and takes longer to start.
func (p programs) install(b testing.TB, names ...string) programs {
	b.Helper()
	dir := b.TempDir()
	for _, name := range names {
		path, err := p.find(name)
		if err != nil {
			b.Fatal(err)
		}
		program, err := os.ReadFile(path)
		if err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), program, 0o755); err != nil {
			b.Fatal(err)
		}
	}
	p.path = dir + ":" + p.path
	return p
}

// build compiles the small programs beside this test as the Makefile compiles ours, and puts them with the others.
func (p programs) build(b testing.TB, names ...string) programs {
	b.Helper()
	dir := b.TempDir()
	args := []string{"build", "-trimpath", "-ldflags", "-s -w", "-o", dir + "/"}
	for _, name := range names {
		args = append(args, "./"+name)
	}
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("build %v: %v\n%s", names, err, out)
	}
	p.path = dir + ":" + p.path
	return p.install(b, names...)
}

func (p programs) find(name string) (string, error) {
	for _, dir := range filepath.SplitList(p.path) {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return exec.LookPath(name)
}

// run runs a program and returns what it printed and how long the process took.
func (p programs) run(name string, stdin []byte, env []string, args ...string) (out []byte, took time.Duration, err error) {
	path, err := p.find(name)
	if err != nil {
		return nil, 0, err
	}
	cmd := exec.Command(path, args...)
	cmd.Stdin, cmd.Env = bytes.NewReader(stdin), env
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	began := time.Now()
	err = cmd.Run()
	took = time.Since(began)
	if err != nil {
		err = fmt.Errorf("%s %v: %w: %s%s", name, args, err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.Bytes(), took, err
}

// A sandbox is a network namespace as a runtime has it, with what the runtime remembers of the attachment.
type sandbox struct {
	id, netns string
	result    []byte
}

// newSandboxes makes namespaces that end with the benchmark. All contenders use the same ones in turn: the kernel's removal
// of a namespace goes on in the background for long, and would fall to whoever comes next.
func newSandboxes(b testing.TB, n int) []*sandbox {
	b.Helper()
	all := make([]*sandbox, n)
	for i := range all {
		s := &sandbox{id: fmt.Sprintf("%064x", i)}
		s.netns = filepath.Join("/run/netns", s.id)
		if err := nstest.Create(s.netns); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := unix.Unmount(s.netns, unix.MNT_DETACH); err != nil {
				b.Error(err)
			}
			if err := os.Remove(s.netns); err != nil {
				b.Error(err)
			}
		})
		all[i] = s
	}
	return all
}

func cniEnv(command, path string, s *sandbox) []string {
	return []string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + s.id, "CNI_NETNS=" + s.netns, "CNI_IFNAME=eth0", "CNI_PATH=" + path,
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0", "PATH=" + os.Getenv("PATH"),
	}
}

func (c contender) conf(l link, prevResult []byte) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"cniVersion":"1.1.0","name":%q,"type":%q,%s`, c.network, l.program, l.members)
	if prevResult != nil {
		fmt.Fprintf(&b, `,"prevResult":%s`, prevResult)
	}
	b.WriteByte('}')
	return b.Bytes()
}

// command runs one CNI command as the specification says (section 3): ADD hands each result on, CHECK and DEL get the last one,
// DEL goes backwards.
func (p programs) command(c contender, command string, s *sandbox) error {
	chain, prev := c.chain, s.result
	switch command {
	case "ADD":
		prev = nil
	case "DEL":
		chain = slices.Clone(chain)
		slices.Reverse(chain)
	}
	env := cniEnv(command, p.path, s)
	for _, l := range chain {
		out, _, err := p.run(l.program, c.conf(l, prev), env)
		if err != nil {
			return fmt.Errorf("%s %s: %w", c.name, command, err)
		}
		if command == "ADD" {
			prev = out
		}
	}
	s.result = prev
	return nil
}

// together runs one command for all sandboxes at once and returns how long it took until the last was done.
func (p programs) together(c contender, command string, all []*sandbox) (time.Duration, error) {
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	began := time.Now()
	for i, s := range all {
		wg.Go(func() { errs[i] = p.command(c, command, s) })
	}
	wg.Wait()
	took := time.Since(began)
	for _, err := range errs {
		if err != nil {
			return 0, err
		}
	}
	return took, nil
}

// lives is the way that goes through the commands in order, for all sandboxes at once.
func (p programs) lives(c contender, all []*sandbox, commands ...string) way {
	return func(got samples) error {
		for _, command := range commands {
			took, err := p.together(c, command, all)
			if err != nil {
				return err
			}
			got.add(command+" "+c.name, took)
		}
		return nil
	}
}
