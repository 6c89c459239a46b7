// Package kernel runs kernel tests, and the demo, under another kernel than the machine's: in a virtual machine, with the kernel and the
// modules of a distribution. Nothing is loaded beforehand but what the guest's disk needs: the rest is up to the kernel, as on a user's
// machine. The guest sees the host's files, cannot write them, and has no network.
package kernel

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/test/kernel/wire"
)

// kernelEnv holds the folder with the kernel and its modules, as test/tools/kernel prints it.
const kernelEnv = "HEADCNI_KERNEL"

// silence is how long a guest may say nothing before it is given up.
const silence = 10 * time.Minute

// all has each test of the packages run. Without the help of a processor that takes an hour.
var all = flag.Bool("all", false, "run all tests of the packages in the guest, not only the quick ones")

// only chooses what runs in the guest. Without the help of a processor the rest takes long, and Headscale may give up on its own database while it starts.
var only = flag.String("only", "^(preflight|pkg/nft|pkg/networking/fastpath)$", "run what matches this regular expression: packages, bench NAME, preflight, demo")

// packages are those whose tests run in the guest, with those of them that say most in little time, and benchmarks: ONLY="bench NAME".
var packages = []struct{ path, quick, bench string }{
	{"pkg/nft", "TestNeverInClear|TestNothingIsRefusedMeanwhile|TestPortsMoveUDP|TestSubnetsNotInClear", ""},
	{"pkg/networking/podlink", "TestAttach$|TestCheck|TestGroup|TestGate|TestPodHasNoNeighboursToAskFor|TestSecondInterface", ""},
	{"pkg/networking/noderoutes", "TestRemoveLeavesTheHostAsItWas|TestRulesShareTheTailnetsRange|TestTunnelRoutesComeBack|TestConfigurationChange", ""},
	{"pkg/networking/fastpath", "TestPolicyEndsFlows|TestForged|TestPodGoes|TestIPVSStays", "FastPath"},
	{"pkg/policy/enforce", "TestDenied|TestLookups|TestRecheckEmptied", ""},
	{"pkg/policy/nflog", ".", ""},
	{"test/policy", "TestKernelRandom|TestNodePort", ""},
	{"test/kernel/ipvs", ".", ""},
}

// forbidden has a module that may not be loaded, as hardened machines have them, which must be named; and then has it allowed.
const forbidden = `
mkdir -p /run/modprobe.d
echo 'install nft_masq /bin/false' >/run/modprobe.d/forbidden.conf
said=$(bin/headcnictl doctor --preflight || [ $? = 1 ])
echo "$said"
[[ $said == *HC134*"it takes no rules of nft_masq, so:"* ]]
rm /run/modprobe.d/forbidden.conf
bin/headcnictl doctor --preflight`

// TestKernel boots a kernel once, and has a subtest for each package and for the demo.
func TestKernel(t *testing.T) {
	folder := os.Getenv(kernelEnv)
	if folder == "" {
		nstest.Skip(t, kernelEnv+" is not set; run make test-kernel")
	}
	k := find(t, folder)
	t.Logf("Linux %s, %s", k.release, k.accelerator())
	commands := commands(t)
	if len(commands) == 0 {
		t.Fatalf("-only %s leaves nothing to run", *only)
	}
	g := k.boot(t, wire.Job{Kernel: folder, Release: k.release, Commands: commands})
	for _, c := range commands {
		t.Run(c.Name, func(t *testing.T) { g.follow(t, c) })
	}
	g.end(t)
}

// commands compiles the tests and says how to run them.
func commands(t *testing.T) (list []wire.Command) {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	chosen, err := regexp.Compile(*only)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	env := []string{
		"PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin", "HOME=/root", "LANG=C.UTF-8", nstest.RequireEnv + "=1",
		"HEADCNI_TEST_FLOWTABLE=1", // pkg/networking/fastpath: this kernel has flowtables, and going without proves nothing
		lab.ToolsEnv + "=" + os.Getenv(lab.ToolsEnv), lab.BinEnv + "=" + os.Getenv(lab.BinEnv),
	}
	args := []string{"test", "-c", "-o", dir + "/"}
	for _, p := range packages {
		bench := "bench " + filepath.Base(p.path)
		if !chosen.MatchString(p.path) && (p.bench == "" || !chosen.MatchString(bench)) {
			continue
		}
		args = append(args, "./"+p.path)
		flags := []string{filepath.Join(dir, filepath.Base(p.path)+".test"), "-test.v", "-test.timeout=60m"}
		if !*all {
			flags = append(flags, "-test.short", "-test.run="+p.quick)
		}
		list = append(list, wire.Command{Name: p.path, Dir: filepath.Join(root, p.path), Env: env, Args: flags})
		if p.bench != "" {
			list = append(list, wire.Command{Name: bench, Dir: filepath.Join(root, p.path), Env: env, Args: []string{
				flags[0], "-test.run=^$", "-test.bench=" + p.bench, "-test.benchtime=40x", "-test.timeout=60m"}})
		}
	}
	ahead := wire.Command{Name: "preflight", Dir: root, Env: env, Args: []string{"bash", "-euo", "pipefail", "-c", forbidden}}
	demo := wire.Command{Name: "demo", Dir: root, Env: env, Args: []string{"bin/headcnictl", "demo", "--no-color"}}
	list = append(slices.Insert(list, 0, ahead), demo)
	if len(list) > 2 {
		build := exec.CommandContext(t.Context(), "go", args...)
		build.Dir = root
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("compile the tests: %v\n%s", err, out)
		}
	}
	return slices.DeleteFunc(list, func(c wire.Command) bool { return !chosen.MatchString(c.Name) })
}

// kernel is one of a distribution.
type kernel struct {
	folder, image, release string
}

func find(t *testing.T, folder string) kernel {
	t.Helper()
	images, err := filepath.Glob(filepath.Join(folder, "boot/vmlinuz-*"))
	if err != nil {
		t.Fatal(err)
	}
	if len(images) != 1 {
		t.Fatalf("%s has %d files boot/vmlinuz-*, want 1", folder, len(images))
	}
	_, release, _ := strings.Cut(filepath.Base(images[0]), "-")
	return kernel{folder: folder, image: images[0], release: release}
}

// accelerator names QEMU's: the processor's, where it has one that we may use.
func (k kernel) accelerator() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || !regexp.MustCompile(`(?m)^flags\b.* (vmx|svm)\b`).Match(b) {
		return "tcg" // some clouds have a /dev/kvm all the same, which runs kernels that are made for it only
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "tcg"
	}
	_ = f.Close() // nothing was written
	return "kvm"
}

// disk are the modules without which the guest sees no files and has no way to speak.
var disk = []string{"virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay"}

// modules returns the files of modules and of what they need, in the order in which they can be loaded.
func (k kernel) modules(t *testing.T, names ...string) (files []string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(k.folder, "lib/modules", k.release, "modules.dep"))
	if err != nil {
		t.Fatal(err)
	}
	needs, path := map[string][]string{}, map[string]string{}
	for line := range strings.Lines(string(b)) {
		file, rest, _ := strings.Cut(line, ":")
		needs[file] = strings.Fields(rest)
		path[strings.TrimSuffix(filepath.Base(file), ".ko")] = file
	}
	for _, n := range names {
		file := path[n]
		if file == "" {
			continue // built into the kernel, or the guest will say so
		}
		all := slices.Clone(needs[file])
		slices.Reverse(all)
		for _, f := range append(all, file) {
			if !slices.Contains(files, f) {
				files = append(files, f)
			}
		}
	}
	return files
}

// guest is a virtual machine that runs.
type guest struct {
	qemu    *exec.Cmd
	lines   chan wire.Line // closed at the end
	console string
	exited  chan struct{}
}

// boot starts the machine, which ends with the test.
func (k kernel) boot(t *testing.T, job wire.Job) *guest {
	t.Helper()
	dir := t.TempDir()
	initrd := filepath.Join(dir, "initrd")
	k.pack(t, initrd, job)
	g := &guest{lines: make(chan wire.Line, 1000), console: filepath.Join(t.ArtifactDir(), "console"), exited: make(chan struct{})}
	g.qemu = exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none",
		"-accel", k.accelerator(), "-cpu", "max", "-smp", "1", "-m", "3072",
		"-kernel", k.image, "-initrd", initrd, "-append", "console=ttyS0 panic=-1 oops=panic mitigations=off",
		"-serial", "file:"+g.console, "-device", "virtio-serial-pci", "-chardev", "stdio,id=out,signal=off", "-device", "virtserialport,chardev=out,name="+wire.PortName,
		"-virtfs", "local,path=/,mount_tag="+wire.Disk+",security_model=none,readonly=on,multidevs=remap")
	g.qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	var said strings.Builder
	g.qemu.Stderr = &said
	out, err := g.qemu.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.qemu.StdinPipe(); err != nil { // at its end the guest would be told that nobody listens
		t.Fatal(err)
	}
	if err := g.qemu.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(g.exited)
		defer close(g.lines)
		for s := bufio.NewReader(out); ; {
			b, err := s.ReadBytes('\n')
			if err != nil {
				break
			}
			var l wire.Line
			if err := json.Unmarshal(b, &l); err != nil {
				l = wire.Line{Text: fmt.Sprintf("%v: %q", err, b)}
			}
			g.lines <- l
		}
		_ = g.qemu.Wait() // how it ended is seen by whether all was said
	}()
	t.Cleanup(func() {
		_ = g.qemu.Process.Kill() // it may have ended
		for range g.lines {
		}
		<-g.exited
		if t.Failed() {
			b, err := os.ReadFile(g.console)
			t.Logf("QEMU: %s\nthe guest's console (%v):\n%s", said.String(), err, b[max(0, len(b)-8<<10):])
		}
	})
	return g
}

// next is what the guest says next.
func (g *guest) next(t *testing.T) wire.Line {
	t.Helper()
	select {
	case l, ok := <-g.lines:
		if !ok {
			t.Fatal("the guest has ended")
		}
		return l
	case <-time.After(silence):
		t.Fatalf("the guest has said nothing for %v", silence)
	}
	panic("not reached")
}

// follow reads what a command says until it has ended.
func (g *guest) follow(t *testing.T, c wire.Command) {
	t.Helper()
	for {
		l := g.next(t)
		if !l.Done {
			fmt.Fprintln(t.Output(), l.Text)
			if text := strings.TrimSpace(l.Text); strings.HasPrefix(text, "--- SKIP") || strings.HasSuffix(text, "no tests to run") {
				t.Errorf("not all was run: %s", text)
			}
			continue
		}
		if l.Command != c.Name {
			t.Fatalf("the guest has ended %s, want %s", l.Command, c.Name)
		}
		t.Logf("%.1f s; the kernel has loaded %s", l.Seconds, strings.Join(l.Loaded, " "))
		if l.Error != "" {
			t.Error(l.Error)
		}
		return
	}
}

// end waits until the machine has switched itself off.
func (g *guest) end(t *testing.T) {
	t.Helper()
	if !g.next(t).Last {
		t.Error("the guest goes on")
	}
	select {
	case <-g.exited:
	case <-time.After(silence):
		t.Error("the guest does not switch itself off")
	}
}

// pack writes the guest's first disk, in memory: its first program, modules and the job.
func (k kernel) pack(t *testing.T, to string, job wire.Job) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "init")
	build := exec.CommandContext(t.Context(), "go", "build", "-ldflags=-s -w", "-o", program, "./guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("compile the guest: %v\n%s", err, out)
	}
	f, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	a := archive{to: f}
	a.file("dev", unix.S_IFDIR|0o755, nil)
	a.file("proc", unix.S_IFDIR|0o755, nil)
	a.copy("init", program)
	for _, m := range k.modules(t, disk...) {
		name := filepath.Base(m)
		a.copy(name, filepath.Join(k.folder, "lib/modules", k.release, m))
		job.Modules = append(job.Modules, "/"+name)
	}
	b, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	a.file("job.json", unix.S_IFREG|0o644, b)
	a.file("TRAILER!!!", 0, nil)
	if err := errors.Join(a.err, f.Sync()); err != nil {
		t.Fatal(err)
	}
}

// archive is one of cpio's "newc", see the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
type archive struct {
	to  io.Writer
	n   uint32
	err error
}

func (a *archive) copy(name, from string) {
	b, err := os.ReadFile(from)
	a.err = errors.Join(a.err, err)
	a.file(name, unix.S_IFREG|0o755, b)
}

func (a *archive) file(name string, mode uint32, content []byte) {
	a.n++
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.n, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	for _, part := range [][]byte{[]byte(head), content} {
		if pad := len(part) % 4; pad != 0 {
			part = append(slices.Clip(part), make([]byte, 4-pad)...)
		}
		if _, err := a.to.Write(part); err != nil {
			a.err = errors.Join(a.err, err)
		}
	}
}
