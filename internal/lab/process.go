package lab

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
	"time"
)

// tailBytes of a log are shown when its process ends unexpectedly.
const tailBytes = 2000

// Process is a long-running program on a machine or in a pod, writing to a log file.
type Process struct {
	Name string
	Log  string // path
	cmd  *exec.Cmd
	done chan struct{}
	err  error // set before done is closed
}

// start runs a program inside ns and appends what it prints to log.
func start(ns namespaces, log string, env []string, attr *syscall.SysProcAttr, name string, args ...string) (*Process, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := &Process{Name: filepath.Base(name), Log: log, done: make(chan struct{})}
	p.cmd = exec.Command(name, args...)
	p.cmd.Dir, p.cmd.Env = "/", env
	p.cmd.Stdout, p.cmd.Stderr = f, f
	if attr == nil {
		attr = &syscall.SysProcAttr{}
	}
	attr.Setsid = true // an interrupt from the keyboard is the lab's to handle, and what is kept outlives its terminal
	p.cmd.SysProcAttr = attr
	if err := ns.do(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.Name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// PID is the process's number in the caller's PID namespace.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Alive tells whether the process runs.
func (p *Process) Alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Signal sends sig and, for signals that end a process, waits until it has ended: at most 10 s, then it is killed.
func (p *Process) Signal(sig syscall.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("send %v to %s: %w", sig, p.Name, err)
	}
	if sig != syscall.SIGKILL && sig != syscall.SIGTERM && sig != syscall.SIGINT {
		return nil
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(10 * time.Second):
		_ = p.cmd.Process.Kill() // it may just have ended
		<-p.done
		return fmt.Errorf("%s did not end within 10 s of %v", p.Name, sig)
	}
}

// Kill ends the process with SIGKILL and waits for its end.
func (p *Process) Kill() error { return p.Signal(syscall.SIGKILL) }

// ended describes an end that nobody asked for.
func (p *Process) ended() error {
	return fmt.Errorf("%s ended: %v\n%s", p.Name, p.err, tail(p.Log))
}

// tail is the end of a log file for an error message.
func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	if len(b) > tailBytes {
		b = b[len(b)-tailBytes:]
	}
	return fmt.Sprintf("--- end of %s\n%s", path, bytes.TrimSpace(b))
}

// run runs a program inside ns to its end. The error holds what it wrote to stderr.
func run(ctx context.Context, ns namespaces, env []string, stdin []byte, name string, args ...string) (stdout []byte, err error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = "/", env
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &out, &errOut
	// Grandchildren may hold the pipes open after a kill.
	cmd.WaitDelay = 10 * time.Second
	if err := ns.do(cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(name), err)
	}
	if err := cmd.Wait(); err != nil {
		return out.Bytes(), fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return out.Bytes(), nil
}

// until calls try every interval until it succeeds; its last error is returned when ctx ends or p (may be nil) does.
func until(ctx context.Context, interval time.Duration, p *Process, try func() error) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		var done <-chan struct{}
		if p != nil {
			done = p.done
		}
		select {
		case <-tick.C:
		case <-done:
			return p.ended()
		case <-ctx.Done():
			if p != nil {
				return fmt.Errorf("%w: %v\n%s", context.Cause(ctx), err, tail(p.Log))
			}
			return fmt.Errorf("%w: %v", context.Cause(ctx), err)
		}
	}
}
