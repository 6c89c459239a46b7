package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
)

// ErrNeedsRoot says that an ordinary user cannot have a lab here.
var ErrNeedsRoot = errors.New("needs root here")

// userNamespace makes the caller root in a user namespace of its own. Only that: the machines make the other ones.
func userNamespace(extra uintptr) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | extra,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGTERM,
	}
}

// RunAsRoot runs this program again, with the same arguments, as root of a user namespace and returns its exit code.
// Where that cannot work it returns an ErrNeedsRoot.
func RunAsRoot() (code int, err error) {
	// The parent-death signal is tied to the thread that starts the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return 0, fmt.Errorf("%w: the tun device cannot be opened (%w)", ErrNeedsRoot, err)
	}
	f.Close()
	// Some hosts make the namespace and then refuse what it is for, so the probe mounts something.
	probe := exec.Command("mount", "-t", "tmpfs", "tmpfs", "/tmp")
	probe.SysProcAttr = userNamespace(syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID)
	if out, err := probe.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("%w: no unprivileged user namespaces (%w%s)", ErrNeedsRoot, err, oneLine(out))
	}
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), DirEnv+"="+BaseDir())
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = userNamespace(0)
	// The child cleans up, we wait. An interrupt from the keyboard reaches it twice, which does no harm.
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(sig)
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case s := <-sig:
				_ = cmd.Process.Signal(s) // it may have ended
			case <-done:
				return
			}
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	if code := cmd.ProcessState.ExitCode(); code >= 0 {
		return code, nil
	}
	return 1, nil // killed
}

func oneLine(b []byte) string {
	if len(b) == 0 {
		return ""
	}
	for i, c := range b {
		if c == '\n' {
			b = b[:i]
			break
		}
	}
	return ": " + string(b)
}
