package manual

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

const (
	// admin is the user who follows docs/install-by-hand.md.
	admin = "admin"
	// checkout is where they have it.
	checkout = "/home/admin/headcni"
	// rebooted is how systemd-nspawn --keep-unit ends where the machine wants another boot.
	rebooted = 133
)

// machine is a node of the lab, left alone by it, with an operating system.
type machine struct {
	*lab.Node
	t      *testing.T
	disk   string
	shared []string // "on the host:on the machine", for --bind
	groups []string
	nspawn *exec.Cmd
	log    string
	init   int // the machine's PID 1 as we see it
}

// newMachine makes the disk of a machine, whose files are those of base until it writes them.
func newMachine(t *testing.T, n *lab.Node, base string) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{Node: n, t: t, disk: overlay(t, base, dir, "disk"), log: filepath.Join(dir, "console.log")}
	t.Cleanup(func() {
		m.t = t
		m.end()
	})
	return m
}

// overlay makes what is in lower writable, at dir/name, until the test ends.
func overlay(t *testing.T, lower, dir, name string) string {
	t.Helper()
	at := filepath.Join(dir, name)
	upper, work := at+"-changes", at+"-work"
	for _, d := range []string{at, upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("overlay", at, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lower, upper, work)); err != nil {
		t.Fatalf("lay an overlay over %s: %v", lower, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return at
}

// boot starts the machine and waits until its systemd has started all it is to start.
func (m *machine) boot() {
	m.t.Helper()
	if m.groups == nil {
		m.groups = ownGroups(m.t, m.Cgroup())
	}
	args := []string{"-c", `while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs"; shift; done; shift; exec "$@"`, "sh"}
	args = append(append(args, m.groups...), "--", "systemd-nspawn", "--quiet", "--boot", "--directory="+m.disk, "--machine="+m.Name,
		// Nobody but this process is to know of it.
		"--register=no", "--keep-unit", "--link-journal=no", "--console=pipe", "--resolv-conf=off", "--timezone=off",
		"--network-namespace-path="+fmt.Sprintf("/proc/%d/ns/net", m.PID()),
		// Its root may do what a real one may, but change other settings of this kernel than the network's.
		"--capability=all", "--bind=/dev/net/tun")
	for _, s := range m.shared {
		args = append(args, "--bind="+s)
	}
	log, err := os.OpenFile(m.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		m.t.Fatal(err)
	}
	defer log.Close()
	m.nspawn = exec.Command("sh", args...)
	m.nspawn.Env = []string{"PATH=" + os.Getenv("PATH"), "SYSTEMD_NSPAWN_API_VFS_WRITABLE=network", "SYSTEMD_SECCOMP=0"}
	m.nspawn.Stdout, m.nspawn.Stderr = log, log
	m.nspawn.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := m.nspawn.Start(); err != nil {
		m.t.Fatal(err)
	}
	labtest.Eventually(m.t, "boot "+m.Name, m.booted)
}

// booted tells whether systemd has started everything.
func (m *machine) booted() error {
	children := fmt.Sprintf("/proc/%d/task/%[1]d/children", m.nspawn.Process.Pid)
	b, err := os.ReadFile(children)
	if err != nil {
		return fmt.Errorf("systemd-nspawn ended: %w\n%s", err, m.console())
	}
	if _, err := fmt.Sscan(string(b), &m.init); err != nil {
		return fmt.Errorf("%s: %w\n%s", children, err, m.console())
	}
	out, err := m.enter(m.t.Context(), "systemctl", "is-system-running", "--wait").CombinedOutput()
	if state := strings.TrimSpace(string(out)); state == "degraded" {
		failed, _ := m.enter(m.t.Context(), "systemctl", "--failed", "--no-pager").CombinedOutput() // an explanation
		m.t.Fatalf("%s has units that failed:\n%s", m.Name, failed)
	} else if state != "running" {
		return fmt.Errorf("%q: %v\n%s", state, err, m.console())
	}
	return nil
}

// console is the end of what the machine has printed.
func (m *machine) console() string {
	b, err := os.ReadFile(m.log)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

// enter prepares a command among the machine's processes, but outside its units.
func (m *machine) enter(ctx context.Context, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"-t", fmt.Sprint(m.init), "-a", "--"}, argv...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	return cmd
}

// try runs lines of shell as a user in their checkout, as after a login, and returns what they printed.
func (m *machine) try(ctx context.Context, user, lines string) (string, error) {
	cmd := m.enter(ctx, "systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--uid="+user, "--working-directory="+checkout,
		"--description=the page's reader", // else the lines, with keys, would be in the journal
		"bash", "-l", "-euo", "pipefail", "-c", lines)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("on %s, as %s: %s\n%w\n%s", m.Name, user, lines, err, out.String())
	}
	return out.String(), nil
}

// run is try, which must succeed.
func (m *machine) run(user, lines string) string {
	m.t.Helper()
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(m.t.Context()), 10*time.Minute, errors.New("not within 10 minutes"))
	defer cancel()
	out, err := m.try(ctx, user, lines)
	if err != nil {
		m.t.Fatal(err)
	}
	return out
}

// root runs lines of shell that are the test's own and not the page's.
func (m *machine) root(lines string) string { m.t.Helper(); return m.run("root", lines) }

// write makes a file on the machine.
func (m *machine) write(name, text string, mode os.FileMode) {
	m.t.Helper()
	m.root(fmt.Sprintf("mkdir -p %s\ninstall -m %#o /dev/stdin %s <<'END OF FILE'\n%s\nEND OF FILE", filepath.Dir(name), mode, name, strings.TrimSpace(text)))
}

// reboot has the machine's own systemd end its boot and begin another.
func (m *machine) reboot() {
	m.t.Helper()
	// systemd-run is not waited for: it ends with the boot.
	if out, err := m.enter(m.t.Context(), "systemctl", "reboot").CombinedOutput(); err != nil {
		m.t.Fatalf("reboot %s: %v\n%s", m.Name, err, out)
	}
	if code := m.off(); code != rebooted {
		m.t.Fatalf("%s went down with %d, want a reboot\n%s", m.Name, code, m.console())
	}
	m.again()
}

// cut takes the machine's power away and gives it back.
func (m *machine) cut() {
	m.t.Helper()
	if err := unix.Kill(m.init, unix.SIGKILL); err != nil {
		m.t.Fatal(err)
	}
	m.off()
	m.again()
}

// again boots the machine with a kernel's network that knows nothing of the boot before.
func (m *machine) again() {
	m.t.Helper()
	if err := m.Crash(); err != nil {
		m.t.Fatal(err)
	}
	if err := m.Boot(labtest.Within(m.t)); err != nil {
		m.t.Fatal(err)
	}
	m.boot()
}

// off waits until the machine is down and returns how it ended.
func (m *machine) off() int {
	m.t.Helper()
	stuck := time.AfterFunc(labtest.Soon, func() { _ = unix.Kill(m.init, unix.SIGKILL) }) // it may just have ended
	defer stuck.Stop()
	err := m.nspawn.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		m.t.Fatal(err)
	}
	code := m.nspawn.ProcessState.ExitCode()
	m.nspawn, m.init = nil, 0
	return code
}

// end ends the machine for good.
func (m *machine) end() {
	if m.nspawn != nil {
		if m.t.Failed() {
			journal, _ := m.enter(context.Background(), "journalctl", "--no-pager", "-n", "80", "-u", "*tailscaled", "-u", "headcni-daemon", "-u", "kubelet").CombinedOutput() // an explanation
			m.t.Logf("--- the journal of %s\n%s", m.Name, journal)
		}
		if m.init == 0 {
			m.init = m.nspawn.Process.Pid
		}
		_ = unix.Kill(m.init, unix.SIGKILL) // it may just have ended
		m.off()
	}
}

// ownGroups makes a control group at the root of each hierarchy that this kernel has, v1 or v2. They end with the lab.
func ownGroups(t *testing.T, name string) (groups []string) {
	t.Helper()
	roots := []string{"/sys/fs/cgroup"}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		if roots, err = filepath.Glob("/sys/fs/cgroup/*"); err != nil {
			t.Fatal(err)
		}
	}
	for _, root := range roots {
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			continue
		}
		g := filepath.Join(root, name)
		if err := os.Mkdir(g, 0o755); err != nil && !errors.Is(err, os.ErrExist) { // cpu is cpu,cpuacct
			t.Fatal(err)
		}
		fillCPUSet(t, root, g)
		groups = append(groups, g)
	}
	return groups
}

// fillCPUSet gives a cpuset of v1 what its parent has: an empty one holds no process.
func fillCPUSet(t *testing.T, parent, g string) {
	t.Helper()
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(parent, name))
		if err != nil {
			return // another controller's, or v2's
		}
		if err := os.WriteFile(filepath.Join(g, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(g, "cgroup.clone_children"), []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}
}
