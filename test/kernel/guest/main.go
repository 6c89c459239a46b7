// Command guest is the first program of a virtual machine that runs tests under another kernel. It loads what the machine's disk needs,
// lays a tmpfs over the host's files, which it can only read, runs the jobs of /job.json, and switches the machine off. What it has to
// say goes to a serial port, as lines of JSON (wire.Line).
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/test/kernel/wire"
)

func main() {
	if len(os.Args) > 1 {
		if err := work(); err != nil {
			fmt.Fprintln(os.Stderr, "guest:", err) // on the kernel's console
			os.Exit(1)
		}
		return
	}
	if err := start(); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
	}
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Fprintln(os.Stderr, "guest: power off:", err) // the end of PID 1 is a panic, which ends the machine too
	}
}

// start sets the machine up and then is what PID 1 has to be: the parent of whoever lost theirs.
func start() error {
	job, err := setUp()
	if err != nil {
		return err
	}
	self, err := os.Open("/proc/self/exe") // its file is out of sight now
	if err != nil {
		return err
	}
	in, err := json.Marshal(job)
	if err != nil {
		return err
	}
	file, err := unix.MemfdCreate("job", 0)
	if err != nil {
		return err
	}
	input := os.NewFile(uintptr(file), "job")
	if _, err := input.Write(in); err != nil {
		return err
	}
	if _, err := input.Seek(0, io.SeekStart); err != nil {
		return err
	}
	worker, err := os.StartProcess(fmt.Sprintf("/proc/self/fd/%d", self.Fd()), []string{"guest", "work"},
		&os.ProcAttr{Files: []*os.File{input, os.Stdout, os.Stderr, self}, Env: os.Environ()})
	if err != nil {
		return err
	}
	for {
		pid, err := unix.Wait4(-1, nil, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for children: %w", err)
		case pid == worker.Pid:
			return nil
		}
	}
}

// mount is one mount(2).
type mount struct {
	source, target, kind string
	flags                uintptr
	data                 string
}

func (m mount) do() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s at %s: %w", m.kind, m.target, err)
	}
	return nil
}

// root is where the new root is put together.
const root = "/root"

// setUp makes the machine one with the host's programs and with /proc, /dev and the like of its own, as a distribution would.
func setUp() (wire.Job, error) {
	var job wire.Job
	b, err := os.ReadFile("/job.json")
	if err == nil {
		err = json.Unmarshal(b, &job)
	}
	if err != nil {
		return job, err
	}
	for _, name := range job.Modules {
		if err := load(name); err != nil {
			return job, err
		}
	}
	for _, m := range []mount{
		{source: wire.Disk, target: "/host", kind: "9p", flags: unix.MS_RDONLY, data: "trans=virtio,version=9p2000.L,msize=512000,cache=loose"},
		{source: "tmpfs", target: "/changes", kind: "tmpfs"},
	} {
		if err := m.do(); err != nil {
			return job, err
		}
	}
	for _, dir := range []string{"/changes/upper", "/changes/work"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return job, err
		}
	}
	for _, m := range []mount{
		{source: "overlay", target: root, kind: "overlay", data: "lowerdir=/host,upperdir=/changes/upper,workdir=/changes/work"},
		{source: "proc", target: root + "/proc", kind: "proc"},
		{source: "sysfs", target: root + "/sys", kind: "sysfs"},
		{source: "devtmpfs", target: root + "/dev", kind: "devtmpfs"},
		{source: "devpts", target: root + "/dev/pts", kind: "devpts"},
		{source: "tmpfs", target: root + "/dev/shm", kind: "tmpfs"},
		{source: "tmpfs", target: root + "/run", kind: "tmpfs", data: "mode=0755"},
		{source: "cgroup2", target: root + "/sys/fs/cgroup", kind: "cgroup2"},
		{source: filepath.Join(root, job.Kernel, "lib/modules"), target: root + "/lib/modules", flags: unix.MS_BIND},
	} {
		if err := m.do(); err != nil {
			return job, err
		}
	}
	if err := devices(filepath.Join(root, job.Kernel, "lib/modules", job.Release, "modules.devname")); err != nil {
		return job, err
	}
	if err := os.Chdir(root); err != nil {
		return job, err
	}
	if err := unix.Mount(root, "/", "", unix.MS_MOVE, ""); err != nil {
		return job, fmt.Errorf("move the root: %w", err)
	}
	return job, errors.Join(unix.Chroot("."), os.Chdir("/"), unix.Sethostname([]byte("guest")))
}

func load(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", name, err)
	}
	return nil
}

// devices makes the device files that load a module when they are opened, as every distribution does at boot.
func devices(list string) error {
	b, err := os.ReadFile(list)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		var module, name string
		var kind byte
		var major, minor uint32
		if _, err := fmt.Sscanf(line, "%s %s %c%d:%d", &module, &name, &kind, &major, &minor); err != nil || kind != 'c' {
			continue // a comment, or a disk
		}
		path := filepath.Join(root, "dev", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor))); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("make %s: %w", path, err)
		}
	}
	return nil
}

// out writes lines to the host.
type out struct {
	mu sync.Mutex
	to io.Writer
}

func (o *out) send(l wire.Line) error {
	b, err := json.Marshal(l)
	if err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	_, err = o.to.Write(append(b, '\n'))
	return err
}

// work runs one command after the other.
func work() error {
	if err := os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"); err != nil {
		return err
	}
	var job wire.Job
	if err := json.NewDecoder(os.Stdin).Decode(&job); err != nil {
		return err
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	o := &out{to: port}
	if b, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("set lo up: %w: %s", err, b)
	}
	// As in the chart's containers: nobody may load a module, but for the kernel itself.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_MODULE, 0, 0, 0); err != nil {
		return fmt.Errorf("drop CAP_SYS_MODULE: %w", err)
	}
	for _, c := range job.Commands {
		if err := o.run(c); err != nil {
			return err
		}
	}
	return o.send(wire.Line{Last: true})
}

// openPort opens the serial port, which the kernel makes some time after the module is there.
func openPort() (f *os.File, err error) {
	for range 1000 {
		if f, err = os.OpenFile(wire.Port, os.O_WRONLY, 0); err == nil {
			return f, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, err
}

// run runs one command, passes on what it says, and tells how it ended and which modules the kernel has loaded for it.
func (o *out) run(c wire.Command) error {
	before := modules()
	began := time.Now()
	cmd := exec.Command(c.Args[0], c.Args[1:]...)
	cmd.Dir, cmd.Env = c.Dir, c.Env
	said, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	cmd.Stderr = cmd.Stdout
	end := wire.Line{Command: c.Name, Done: true}
	if err = cmd.Start(); err == nil {
		r := bufio.NewReader(said)
		for {
			text, rerr := r.ReadString('\n')
			if text != "" {
				if err := o.send(wire.Line{Command: c.Name, Text: strings.TrimRight(text, "\n")}); err != nil {
					return err
				}
			}
			if rerr != nil {
				break
			}
		}
		err = cmd.Wait()
	}
	if err != nil {
		end.Error = err.Error()
	}
	end.Seconds = time.Since(began).Seconds()
	for _, m := range modules() {
		if !slices.Contains(before, m) {
			end.Loaded = append(end.Loaded, m)
		}
	}
	return o.send(end)
}

// modules lists what is loaded.
func modules() (names []string) {
	b, err := os.ReadFile("/proc/modules")
	if err != nil {
		return nil
	}
	for line := range bytes.Lines(b) {
		names = append(names, string(bytes.Fields(line)[0]))
	}
	slices.Sort(names)
	return names
}
