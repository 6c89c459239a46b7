package podlink

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/rtnl"
)

// Netns is a pod's network namespace and a netlink socket in it.
type Netns struct {
	path string
	fd   int
	conn *rtnl.Conn
}

// OpenVacant opens a pod's network namespace for Attach. The error matches ErrLinkExists if the pod already has the interface,
// and ErrNetns if there is no such namespace. It changes nothing.
func (h *Handle) OpenVacant(path, ifName string) (*Netns, error) {
	n, err := openNetns(path)
	if err != nil {
		return nil, err
	}
	_, err = n.conn.LinkByName(ifName)
	if errors.Is(err, unix.ENODEV) {
		return n, nil
	}
	n.Close()
	if err == nil {
		return nil, fmt.Errorf("%s in %s: %w; delete the attachment first", ifName, path, ErrLinkExists)
	}
	return nil, err
}

func openNetns(path string) (*Netns, error) {
	fd, err := openOtherNetns(path)
	if err != nil {
		return nil, err
	}
	n := &Netns{path: path, fd: fd}
	err = inNetns(fd, func() error {
		n.conn, err = rtnl.Open(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return n, nil
}

// openOtherNetns opens a network namespace that is not the caller's own, nor that of the machine's first process: a program that
// runs for a node inside another one sees that, and what it would make there would be among the interfaces of a host.
func openOtherNetns(path string) (fd int, err error) {
	if !filepath.IsAbs(path) {
		return -1, fmt.Errorf("open %q: %w: want an absolute path, such as /run/netns/NAME", path, ErrNetns)
	}
	at, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0) // a FIFO would block, and some devices act when they are opened
	if err != nil {
		return -1, fmt.Errorf("open %s: %w: %w", path, ErrNetns, err)
	}
	defer unix.Close(at)
	var fs unix.Statfs_t
	if err := unix.Fstatfs(at, &fs); err != nil || fs.Type != unix.NSFS_MAGIC {
		return -1, fmt.Errorf("open %s: %w: it is not a namespace; has the sandbox ended?", path, ErrNetns)
	}
	var its unix.Stat_t
	if err = unix.Fstat(at, &its); err == nil {
		err = notTheHosts(its)
	}
	if err == nil {
		fd, err = unix.Open("/proc/self/fd/"+strconv.Itoa(at), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return -1, fmt.Errorf("open %s: %w: %w", path, ErrNetns, err)
	}
	return fd, nil
}

// notTheHosts refuses the namespaces in which a pod's interface must never be.
func notTheHosts(its unix.Stat_t) error {
	var own unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &own); err != nil {
		return err
	}
	if its.Ino == own.Ino && its.Dev == own.Dev {
		return errors.New("it is the node's own; a pod on the host network needs no plugin")
	}
	if isFirstProcess(its) {
		return errors.New("it is that of the machine's first process; a pod on the host network needs no plugin")
	}
	return nil
}

// isFirstProcess reports whether all threads of process 1 are in a network namespace. A runtime that is process 1 of a container may
// have made the pod's namespace on its first thread, which then stays there. An ordinary user may not look, nor enter it.
func isFirstProcess(its unix.Stat_t) bool {
	in := func(path string) bool {
		var at unix.Stat_t
		return unix.Stat(path, &at) == nil && its.Ino == at.Ino && its.Dev == at.Dev
	}
	if !in("/proc/1/ns/net") { // that of the first thread: nearly always this one look is enough
		return false
	}
	threads, _ := filepath.Glob("/proc/1/task/*/ns/net") // the pattern is right
	return !slices.ContainsFunc(threads, func(path string) bool { return !in(path) })
}

// stillThere reports a namespace whose path has gone while it was worked on: then nothing holds it any longer.
func (n *Netns) stillThere() error {
	var was, is unix.Stat_t
	if err := unix.Fstat(n.fd, &was); err != nil {
		return fmt.Errorf("look at %s: %w", n.path, err)
	}
	if err := unix.Stat(n.path, &is); err != nil || was.Ino != is.Ino || was.Dev != is.Dev {
		return fmt.Errorf("%w: %s disappeared while the pod was attached; the sandbox has ended", ErrNetns, n.path)
	}
	return nil
}

// Close gives the namespace back. Closing nil does nothing.
func (n *Netns) Close() {
	if n != nil {
		n.conn.Close()
		unix.Close(n.fd)
	}
}

// inNetns runs fn on a thread that is in the namespace netns for the time being.
func inNetns(netns int, fn func() error) error {
	runtime.LockOSThread()
	own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer unix.Close(own)
	if err := unix.Setns(netns, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		switch {
		case errors.Is(err, unix.EPERM):
			return fmt.Errorf("enter network namespace: %w; run as root (CAP_SYS_ADMIN and CAP_NET_ADMIN)", err)
		case errors.Is(err, unix.EINVAL): // a namespace of another kind
			return fmt.Errorf("enter network namespace: %w: %w", ErrNetns, err)
		}
		return fmt.Errorf("enter network namespace: %w", err)
	}
	err = fn()
	if back := unix.Setns(own, unix.CLONE_NEWNET); back != nil {
		// The thread stays locked, so that the runtime throws it away with this goroutine.
		return errors.Join(err, fmt.Errorf("return to own network namespace: %w", back))
	}
	runtime.UnlockOSThread()
	return err
}
