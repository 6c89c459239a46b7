// Package nstest gives tests real kernel namespaces that vanish with the test process.
//
// A package with kernel tests calls Main from TestMain. The test binary then runs again inside fresh mount, PID and
// network namespaces (and a user namespace where it is not root), with a private /run and /var/lib/headcni, so that
// whatever a test leaves behind, even when it is killed, ends with it.
package nstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	// insideEnv tells the process inside that it is, by the path of a folder that ends with it.
	insideEnv = "HEADCNI_NSTEST_INSIDE"
	// RequireEnv, when set, turns the skip of a kernel or tailnet test into a failure.
	RequireEnv = "HEADCNI_TEST_REQUIRE"
)

// skipReason is set once by Main, before any test runs.
var skipReason = "TestMain does not call nstest.Main"

// Main runs m inside namespaces of its own. Where the host forbids them, it runs m in place and Require skips.
func Main(m *testing.M) {
	if os.Getenv(insideEnv) != "" {
		if err := setUp(); err != nil {
			fmt.Fprintln(os.Stderr, "nstest:", err)
			os.Exit(2)
		}
		skipReason = ""
		os.Exit(m.Run())
	}
	code, err := reexec()
	if err == nil {
		os.Exit(code)
	}
	skipReason = fmt.Sprintf("no namespaces here: %v; run as root or allow unprivileged user namespaces", err)
	os.Exit(m.Run())
}

// Dir is a folder for what outlives a test. It ends with the test's process, however that ends. It is empty where there are
// no namespaces: os.MkdirTemp takes that for the usual folder.
func Dir() string { return os.Getenv(insideEnv) }

// Require skips the test where namespaces are not to be had, or fails it where RequireEnv is set.
func Require(t testing.TB) {
	t.Helper()
	if skipReason == "" {
		return
	}
	Skip(t, skipReason)
}

// Skip skips the test with the reason, or fails it where RequireEnv is set.
func Skip(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv(RequireEnv) != "" {
		t.Fatalf("%s is set, but: %s", RequireEnv, reason)
	}
	t.Skip(reason)
}

// reexec runs this binary again inside new namespaces and returns its exit code. An error means that it did not start.
func reexec() (int, error) {
	// The parent-death signal is tied to the thread that starts the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	attr := &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	if os.Geteuid() != 0 {
		attr.Cloneflags |= syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	// A probe first: a failure of the real run must not be taken for a missing permission.
	probe := exec.Command("/bin/true")
	probe.SysProcAttr = attr
	if err := probe.Run(); err != nil {
		return 0, err
	}
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "Test")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir) // also after a panic inside, or a time-out
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = attr
	// go test's SIGQUIT on a time-out must reach the process that has the goroutines to show.
	sig := make(chan os.Signal, 4)
	signal.Notify(sig, syscall.SIGQUIT, syscall.SIGINT, syscall.SIGTERM)
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	go func() {
		for s := range sig {
			_ = cmd.Process.Signal(s) // the process may be gone
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 2, nil
	}
	if code := cmd.ProcessState.ExitCode(); code >= 0 {
		return code, nil
	}
	return 2, nil
}

func setUp() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	for _, dir := range []string{"/run", "/var/lib/headcni", "/etc/headcni", "/etc/cni"} {
		if _, err := os.Stat(dir); err != nil {
			// An ordinary user cannot make it; a tmpfs on its parent would hide what the test needs.
			if os.MkdirAll(dir, 0o755) != nil {
				continue
			}
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	if err := os.MkdirAll("/run/netns", 0o755); err != nil {
		return err
	}
	if err := resetIPv4(); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// resetIPv4 gives the namespace of the thread the kernel's defaults. The kernel copies IPv4's settings from the host
// (ip-sysctl.rst, devconf_inherit_init_net), and one with Docker forwards, or a distribution's filters reverse paths.
func resetIPv4() error {
	for _, key := range []string{"ip_forward", "conf/all/rp_filter", "conf/default/rp_filter", "conf/lo/rp_filter"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/"+key, []byte("0"), 0); err != nil {
			return err
		}
	}
	return nil
}

// NS is a network namespace with its loopback up.
type NS struct {
	// Name and Path are as `ip netns` has them.
	Name, Path string
	// Handle makes netlink requests inside the namespace from any thread.
	Handle *netlink.Handle
}

var serial atomic.Int64

// New makes a network namespace that ends with the test.
func New(t testing.TB) *NS {
	t.Helper()
	Require(t)
	ns := &NS{Name: fmt.Sprintf("t%d", serial.Add(1))}
	ns.Path = filepath.Join("/run/netns", ns.Name)
	if err := Create(ns.Path); err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	t.Cleanup(func() {
		_ = unix.Unmount(ns.Path, unix.MNT_DETACH) // a test may have removed it
		_ = os.Remove(ns.Path)
	})
	fd, err := netns.GetFromPath(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	if ns.Handle, err = netlink.NewHandleAt(fd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ns.Handle.Close)
	lo, err := ns.Handle.LinkByName("lo")
	if err == nil {
		err = ns.Handle.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatalf("set lo up: %v", err)
	}
	return ns
}

// Create makes a namespace on a thread that is thrown away and binds it to path.
func Create(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	errs := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			errs <- err
			return
		}
		if err := resetIPv4(); err != nil {
			errs <- err
			return
		}
		errs <- unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
	}()
	return <-errs
}

// Do runs fn on a thread inside the namespace.
func (ns *NS) Do(t testing.TB, fn func() error) {
	t.Helper()
	errs := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		fd, err := netns.GetFromPath(ns.Path)
		if err != nil {
			errs <- err
			return
		}
		defer fd.Close()
		if err := netns.Set(fd); err != nil {
			errs <- err
			return
		}
		errs <- fn()
	}()
	if err := <-errs; err != nil {
		t.Fatalf("in %s: %v", ns.Name, err)
	}
}

// Command prepares a command that runs inside the namespace.
func (ns *NS) Command(name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + ns.Path, "--", name}, args...)...)
}

// Run runs a command inside the namespace and returns what it printed. A non-zero exit fails the test.
func (ns *NS) Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := ns.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("in %s: %s %s: %v\n%s", ns.Name, name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// LinksComeAndGo makes pairs of links, stay0 and so on, and beside them others that come and go all the time until the test ends, as on a
// host that starts containers without pause: no list of links is read without a change.
func (ns *NS) LinksComeAndGo(t testing.TB, pairs int) {
	t.Helper()
	var stay, change strings.Builder
	for i := range pairs {
		fmt.Fprintf(&stay, "link add stay%d type veth peer name peer%[1]d\n", i)
		fmt.Fprintf(&change, "link add NAME%d type veth peer name peerNAME%[1]d\nlink del NAME%[1]d\n", i)
	}
	dir := t.TempDir()
	comes := strings.ReplaceAll(change.String(), "NAME", "come")
	for name, text := range map[string]string{"stay": stay.String(), "come": comes, "go": strings.ReplaceAll(comes, "come", "go")} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ns.Run(t, "ip", "-batch", filepath.Join(dir, "stay"))
	for _, name := range []string{"come", "go"} {
		cmd := ns.Command("sh", "-c", `while ip -batch "$1"; do :; done`, "sh", filepath.Join(dir, name))
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			_ = cmd.Wait() // "signal: killed"
		})
	}
}
