package podlink

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/rtnl"
)

// openNetns opens a network namespace that is not the caller's own.
func openNetns(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w: %w", path, ErrNetns, err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil || fs.Type != unix.NSFS_MAGIC {
		unix.Close(fd)
		return -1, fmt.Errorf("open %s: %w: it is not a namespace; has the sandbox ended?", path, ErrNetns)
	}
	var its, own unix.Stat_t
	err = unix.Fstat(fd, &its)
	if err == nil {
		err = unix.Stat("/proc/thread-self/ns/net", &own)
	}
	if err == nil && its.Ino == own.Ino && its.Dev == own.Dev {
		err = errors.New("it is the node's own; a pod on the host network needs no plugin")
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("open %s: %w: %w", path, ErrNetns, err)
	}
	return fd, nil
}

// stillThere reports a namespace whose path has gone while it was worked on: then nothing holds it any longer.
func stillThere(path string, fd int) error {
	var was, is unix.Stat_t
	if err := unix.Fstat(fd, &was); err != nil {
		return fmt.Errorf("look at %s: %w", path, err)
	}
	if err := unix.Stat(path, &is); err != nil || was.Ino != is.Ino || was.Dev != is.Dev {
		return fmt.Errorf("%w: %s disappeared while the pod was attached; the sandbox has ended", ErrNetns, path)
	}
	return nil
}

// openedNetns is a pod's network namespace and a netlink socket in it.
type openedNetns struct {
	path string
	fd   int
	conn *rtnl.Conn
}

// enter opens a pod's namespace, or takes over what Vacant has opened.
func (p *Handle) enter(path string) (*openedNetns, error) {
	if was := p.vacant; was != nil {
		p.vacant = nil
		if was.path == path {
			return was, nil
		}
		was.close()
	}
	fd, err := openNetns(path)
	if err != nil {
		return nil, err
	}
	conn, err := openIn(fd, unix.NETLINK_ROUTE)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &openedNetns{path: path, fd: fd, conn: conn}, nil
}

func (n *openedNetns) close() {
	n.conn.Close()
	unix.Close(n.fd)
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

// openIn opens a socket in another network namespace.
func openIn(netns, protocol int) (c *rtnl.Conn, err error) {
	err = inNetns(netns, func() error {
		c, err = rtnl.Open(protocol)
		return err
	})
	return c, err
}
