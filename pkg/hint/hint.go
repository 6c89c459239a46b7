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
)

// Wait is the longest a plugin waits for the daemon, in all.
const Wait = 200 * time.Millisecond

// maxSize bounds a hint on the wire, in bytes.
const maxSize = 16 << 10

// Hint is one finished plugin command. On the wire it is one JSON object in one SOCK_SEQPACKET packet; the answer is a
// packet "ok".
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

// Send writes h into the spool, gives it to the daemon at socket and waits until it has been taken, at most Wait.
func Send(ctx context.Context, socket string, h Hint) error {
	ctx, cancel := context.WithTimeout(ctx, Wait)
	defer cancel()
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	return errors.Join(spool(Spool(socket), b), tell(ctx, socket, b))
}

// tell gives a hint to the daemon. Where none listens the kernel says so at once.
func tell(ctx context.Context, socket string, b []byte) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unixpacket", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(deadline); err != nil {
			return err
		}
	}
	if _, err := c.Write(b); err != nil {
		return err
	}
	var answer [8]byte
	n, err := c.Read(answer[:])
	if err != nil {
		return err
	}
	if string(answer[:n]) != "ok" {
		return fmt.Errorf("daemon answered %q", answer[:n])
	}
	return nil
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
	if c.SetDeadline(time.Now().Add(Wait)) != nil {
		return
	}
	buf := make([]byte, maxSize)
	n, err := c.Read(buf)
	if err != nil {
		return // the plugin gave up
	}
	var h Hint
	if err := json.Unmarshal(buf[:n], &h); err != nil {
		_, _ = c.Write([]byte("bad"))
		return
	}
	take(h)
	_, _ = c.Write([]byte("ok")) // a plugin that gave up does not need the answer
}
