package plugin

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// How long to wait for another command on the attachment, and how often to look.
const lockWait, lockTry = 10 * time.Second, 5 * time.Millisecond

// errBusy: another command on the attachment has not ended.
var errBusy = errors.New("another command on this attachment is at work")

// lock lets one command at a time work on an attachment. A runtime must see to that (specification section 2), but where it
// does not, a second ADD would take the lease and the link of the first one for what a killed ADD left. And a runtime cannot
// know of a plugin that we ran and that is still at work although we were killed: what that takes after the DEL that follows, an
// address or a port, would stay taken for good. To kill it along with us would be no better: an IPAM plugin that has made the file
// of a lease, but not yet written it, leaves a file that is nobody's.
//
// The kernel keeps a name in the abstract namespace (unix(7)) for as long as a process has the socket, whatever becomes of us, and
// the plugins that we run inherit it. Others in the node's network namespace could take the name too, so the wait has an end. The
// error matches errBusy.
func (r *Request) lock(ctx context.Context) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	r.locked = os.NewFile(uintptr(fd), "lock")
	h := fnv.New128a()
	h.Write([]byte(r.ContainerID + "\x00" + r.IfName))
	name := &unix.SockaddrUnix{Name: fmt.Sprintf("@headcni/turn/%x", h.Sum(nil))}
	for end := time.Now().Add(lockWait); unix.Bind(fd, name) == unix.EADDRINUSE; time.Sleep(lockTry) {
		if ctx.Err() != nil || time.Now().After(end) {
			return fmt.Errorf("%w and did not end within %s; try again later", errBusy, lockWait)
		}
	}
	return nil // any other error of bind(2) has nothing to do with a command at work
}

// unlock lets the next command on the attachment begin.
func (r *Request) unlock() {
	if r.locked != nil {
		r.locked.Close() // or the kernel does, when the process ends
	}
}
