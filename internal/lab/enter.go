package lab

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// namespaces are open handles on the namespaces that a process or socket is to be born in. Unset ones (nil) stay the
// caller's.
type namespaces struct {
	net, mnt, uts, ipc, pid *os.File
}

// openNamespaces opens those of a process.
func openNamespaces(pid int) (ns namespaces, err error) {
	for _, f := range []struct {
		name string
		to   **os.File
	}{{"net", &ns.net}, {"mnt", &ns.mnt}, {"uts", &ns.uts}, {"ipc", &ns.ipc}, {"pid", &ns.pid}} {
		if *f.to, err = os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, f.name)); err != nil {
			ns.close()
			return namespaces{}, err
		}
	}
	return ns, nil
}

func (ns namespaces) close() {
	for _, f := range []*os.File{ns.net, ns.mnt, ns.uts, ns.ipc, ns.pid} {
		if f != nil {
			f.Close()
		}
	}
}

// do runs fn on a thread inside the namespaces. What fn starts with os/exec and the sockets it opens stay there; a
// goroutine that it starts does not. The PID namespace is that of fn's children only (setns(2)).
func (ns namespaces) do(fn func() error) error {
	errs := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine instead of carrying its namespaces elsewhere.
		runtime.LockOSThread()
		errs <- ns.enter(fn)
	}()
	return <-errs
}

func (ns namespaces) enter(fn func() error) error {
	if ns.mnt != nil {
		// setns(2): a thread that shares its root and working directory with others may not change mounts.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare file system attributes: %w", err)
		}
	}
	for _, s := range []struct {
		f    *os.File
		flag int
	}{{ns.ipc, unix.CLONE_NEWIPC}, {ns.uts, unix.CLONE_NEWUTS}, {ns.net, unix.CLONE_NEWNET}, {ns.pid, unix.CLONE_NEWPID}, {ns.mnt, unix.CLONE_NEWNS}} {
		if s.f == nil {
			continue
		}
		if err := unix.Setns(int(s.f.Fd()), s.flag); err != nil {
			return fmt.Errorf("enter %s: %w", s.f.Name(), err)
		}
	}
	return fn()
}

// Net is a Place that the lab did not make: the network namespace of a container, say.
type Net struct{ ns namespaces }

// NetAt opens the network namespace at a path such as /proc/1/ns/net.
func NetAt(path string) (*Net, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open a network namespace: %w", err)
	}
	return &Net{ns: namespaces{net: f}}, nil
}

// Do runs fn on a thread in the namespace; sockets that it opens stay there.
func (n *Net) Do(fn func() error) error { return n.ns.do(fn) }

// Dial connects from the namespace. addr is an IP address and port.
func (n *Net) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return dial(ctx, n.ns, network, addr)
}

// Close lets go of the namespace.
func (n *Net) Close() { n.ns.close() }
