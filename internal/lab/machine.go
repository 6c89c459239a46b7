package lab

import (
	"bufio"
	"context"
	_ "embed" // machine.sh
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

//go:embed machine.sh
var machineScript string

// Machine is a host of the lab: namespaces of its own, held by a shell.
type Machine struct {
	Name string
	Dir  string // on the lab's disk: logs and files given to it
	// Net makes netlink requests inside from any thread.
	Net *netlink.Handle

	ns     namespaces
	env    []string
	line   *line // to the underlay, nil where the wire is short
	holder *exec.Cmd
	stdin  io.WriteCloser
}

// newMachine starts a machine with no network but lo. lock, the lab's lock file, is handed to the holder so that it is
// held for as long as any machine lives.
func newMachine(ctx context.Context, dir, name, hosts, path string, lock *os.File) (_ *Machine, err error) {
	m := &Machine{Name: name, Dir: filepath.Join(dir, name)}
	if err := os.MkdirAll(m.Dir, 0o700); err != nil {
		return nil, err
	}
	files := map[string]string{"resolv.conf": "# set by whoever runs here\n", "hosts": "127.0.0.1 localhost\n::1 localhost\n" + hosts}
	for file, text := range files {
		if err := os.WriteFile(filepath.Join(m.Dir, file), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	m.env = append(cleanEnv(), "PATH="+path, "HOME="+m.Dir)
	m.holder = exec.Command("bash", "-c", machineScript, "machine", name, m.Dir)
	m.holder.Dir, m.holder.Env = "/", m.env
	m.holder.ExtraFiles = []*os.File{lock}
	m.holder.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWPID,
		Setsid:     true, // an interrupt from the keyboard is the lab's to handle
	}
	var errOut strings.Builder
	m.holder.Stderr = &errOut
	if m.stdin, err = m.holder.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := m.holder.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := m.holder.Start(); err != nil {
		return nil, fmt.Errorf("make namespaces for %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			m.stop()
		}
	}()
	if line, readErr := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		m.stop()
		return nil, fmt.Errorf("set %s up: %w: %s", name, readErr, errOut.String())
	}
	return m, m.open()
}

// open takes hold of the namespaces and sets lo up.
func (m *Machine) open() (err error) {
	if m.ns, err = openNamespaces(m.holder.Process.Pid); err != nil {
		return err
	}
	// /proc/sys/kernel/hostname belongs to the first user namespace's root.
	if err := (namespaces{uts: m.ns.uts}).do(func() error { return unix.Sethostname([]byte(m.Name)) }); err != nil {
		return fmt.Errorf("set the host name of %s: %w", m.Name, err)
	}
	if m.Net, err = netlink.NewHandleAt(netns.NsHandle(m.ns.net.Fd())); err != nil {
		return fmt.Errorf("open netlink in %s: %w", m.Name, err)
	}
	lo, err := m.Net.LinkByName("lo")
	if err != nil {
		return err
	}
	return m.Net.LinkSetUp(lo)
}

// stop ends everything on the machine, with its line, and waits for it.
func (m *Machine) stop() {
	if m.line != nil {
		_ = m.line.close() // sockets that nothing was written to a file through
	}
	m.stdin.Close()
	_ = m.holder.Process.Kill() // PID 1 of its namespace: the kernel kills the rest
	_ = m.holder.Wait()         // "signal: killed"
	if m.Net != nil {
		m.Net.Close()
	}
	m.ns.close()
}

// cleanEnv is the caller's environment without what would change how the real parts work.
func cleanEnv() []string {
	var env []string
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		switch {
		case name == "PATH", name == "HOME", strings.HasPrefix(name, "HEADCNI_"), strings.HasPrefix(name, "HEADSCALE_"),
			strings.HasPrefix(name, "TS_"), strings.HasPrefix(name, "CNI_"), strings.HasPrefix(strings.ToLower(name), "http"):
		default:
			env = append(env, e)
		}
	}
	return env
}

// Path is where a file of the machine can be opened from outside, but not through absolute links such as /var/run: those
// lead to the caller's files.
func (m *Machine) Path(file string) string {
	return fmt.Sprintf("/proc/%d/root%s", m.holder.Process.Pid, file)
}

// Run runs a program on the machine and returns its standard output.
func (m *Machine) Run(ctx context.Context, name string, args ...string) (string, error) {
	out, err := run(ctx, m.ns, m.env, nil, m.find(name), args...)
	if err != nil {
		return string(out), fmt.Errorf("on %s: %w", m.Name, err)
	}
	return string(out), nil
}

// Start runs a program in the background. Its log is appended to.
func (m *Machine) Start(name string, env []string, args ...string) (*Process, error) {
	log := filepath.Join(m.Dir, filepath.Base(name)+".log")
	return start(m.ns, log, append(m.env[:len(m.env):len(m.env)], env...), nil, m.find(name), args...)
}

// PID is the number, in the caller's PID namespace, of the process that holds the machine.
func (m *Machine) PID() int { return m.holder.Process.Pid }

// Find looks a program up in the machine's PATH.
func (m *Machine) Find(name string) string { return m.find(name) }

// find looks a program up in the machine's PATH.
func (m *Machine) find(name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	for _, e := range m.env {
		if path, ok := strings.CutPrefix(e, "PATH="); ok {
			for _, dir := range filepath.SplitList(path) {
				if st, err := os.Stat(filepath.Join(dir, name)); err == nil && !st.IsDir() && st.Mode()&0o111 != 0 {
					return filepath.Join(dir, name)
				}
			}
		}
	}
	return name
}

// Do runs fn on a thread in the machine's network namespace; sockets that it opens stay there.
func (m *Machine) Do(fn func() error) error { return namespaces{net: m.ns.net}.do(fn) }

// Dial connects from the machine. addr is an IP address and port.
func (m *Machine) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return dial(ctx, namespaces{net: m.ns.net}, network, addr)
}

func dial(ctx context.Context, ns namespaces, network, addr string) (c net.Conn, err error) {
	err = ns.do(func() (err error) {
		// With a literal address the dialer stays in this goroutine, and thus on this thread.
		d := net.Dialer{FallbackDelay: -1, Timeout: 10 * time.Second}
		c, err = d.DialContext(ctx, network, addr)
		return err
	})
	return c, err
}
