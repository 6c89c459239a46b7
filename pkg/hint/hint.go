// Package hint carries what the short-lived CNI plugin did to the daemon: by a file, which is what the daemon counts, and
// over a Unix socket, which makes it look at once. No pod depends on it: a lost hint never fails an ADD or a DEL.
package hint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/jsonw"
)

// readWait is how long the daemon waits for what a plugin that has connected sends: it sends at once.
const readWait = 200 * time.Millisecond

// maxSize bounds a hint on the wire, in bytes.
const maxSize = 16 << 10

// Hint is one finished plugin command. On the wire it is one JSON object in one SOCK_SEQPACKET packet, without an answer.
type Hint struct {
	Command      string        `json:"command"` // ADD or DEL
	ContainerID  string        `json:"containerID"`
	IfName       string        `json:"ifName"`
	PodNamespace string        `json:"podNamespace,omitempty"`
	PodName      string        `json:"podName,omitempty"`
	HostIfName   string        `json:"hostIfName,omitempty"`
	Addrs        []netip.Addr  `json:"addrs,omitempty"`
	Duration     time.Duration `json:"durationNs"`          // of the whole command, without the hint
	ErrorCode    uint          `json:"errorCode,omitempty"` // CNI error code, 0 = success
	Stage        string        `json:"stage,omitempty"`     // what failed: config, gate, ipam, attach, ...
}

// encode writes what encoding/json would.
func (h Hint) encode() []byte {
	var w jsonw.Writer
	w.Begin('{')
	w.Key("command")
	w.String(h.Command)
	w.Key("containerID")
	w.String(h.ContainerID)
	w.Key("ifName")
	w.String(h.IfName)
	w.OptionalString("podNamespace", h.PodNamespace)
	w.OptionalString("podName", h.PodName)
	w.OptionalString("hostIfName", h.HostIfName)
	addrs := make([]string, len(h.Addrs))
	for i, a := range h.Addrs {
		addrs[i] = a.String()
	}
	w.OptionalStrings("addrs", addrs)
	w.Key("durationNs")
	w.Int(int64(h.Duration))
	w.OptionalInt("errorCode", int64(h.ErrorCode))
	w.OptionalString("stage", h.Stage)
	w.End('}')
	return w.Bytes()
}

// Send writes h into the spool and tells the daemon at socket. It waits for nobody: what the daemon counts is in the spool.
func Send(socket string, h Hint) error {
	b := h.encode()
	return errors.Join(spool(Spool(socket), b), tell(socket, b))
}

// tell gives a hint to the daemon. The kernel says at once where none listens, and where one does not keep up.
func tell(socket string, b []byte) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
		return fmt.Errorf("connect to %s: %w", socket, err)
	}
	return unix.Send(fd, b, unix.MSG_NOSIGNAL)
}

// Serve listens on socket (mode 0600) and calls take for each hint, one at a time, until ctx ends. A stale socket file is
// replaced.
func Serve(ctx context.Context, socket string, take func(Hint)) error {
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		return err
	}
	// The next daemon may have put its own socket in place by the time this one ends.
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(socket, 0o600); err != nil {
		l.Close()
		return err
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		serve(c, take)
	}
}

func serve(c *net.UnixConn, take func(Hint)) {
	defer c.Close()
	if c.SetReadDeadline(time.Now().Add(readWait)) != nil {
		return
	}
	buf := make([]byte, maxSize)
	n, err := c.Read(buf)
	if err != nil {
		return // the plugin was killed
	}
	var h Hint
	if json.Unmarshal(buf[:n], &h) == nil {
		take(h)
	}
}
