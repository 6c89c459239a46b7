// Package cmdlog carries records of finished CNI commands from the short-lived plugin to the daemon, which counts them and knows by
// them what a pod was given. They are files in a spool; a connection to the daemon's socket, on which nothing is said, makes it look at
// once. No pod depends on it: a lost record never fails an ADD or a DEL.
package cmdlog

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/jsonw"
	"github.com/headcni/headcni/internal/unixsock"
)

// Record is one finished plugin command: a file of JSON in the spool.
type Record struct {
	Command      string        `json:"command"` // ADD or DEL
	ContainerID  string        `json:"containerID"`
	IfName       string        `json:"ifName"`
	PodNamespace string        `json:"podNamespace,omitempty"`
	PodName      string        `json:"podName,omitempty"`
	HostIfName   string        `json:"hostIfName,omitempty"`
	Addrs        []netip.Addr  `json:"addrs,omitempty"`
	Duration     time.Duration `json:"durationNs"`          // of the whole command, without the record
	ErrorCode    uint          `json:"errorCode,omitempty"` // CNI error code, 0 = success
	Stage        string        `json:"stage,omitempty"`     // what failed: config, gate, ipam, attach, ...
}

// encode writes what encoding/json would.
func (r Record) encode() []byte {
	var w jsonw.Writer
	w.Begin('{')
	w.Key("command")
	w.String(r.Command)
	w.Key("containerID")
	w.String(r.ContainerID)
	w.Key("ifName")
	w.String(r.IfName)
	w.OptionalString("podNamespace", r.PodNamespace)
	w.OptionalString("podName", r.PodName)
	w.OptionalString("hostIfName", r.HostIfName)
	addrs := make([]string, len(r.Addrs))
	for i, a := range r.Addrs {
		addrs[i] = a.String()
	}
	w.OptionalStrings("addrs", addrs)
	w.Key("durationNs")
	w.Int(int64(r.Duration))
	w.OptionalInt("errorCode", int64(r.ErrorCode))
	w.OptionalString("stage", r.Stage)
	w.End('}')
	return w.Bytes()
}

// Send writes r into the spool and wakes the daemon at socket. It waits for nobody.
func Send(socket string, r Record) error {
	return errors.Join(spool(Spool(socket), r.encode()), wake(socket))
}

// wake connects to the daemon. The kernel says at once where none listens, and where one does not keep up.
func wake(socket string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
		return fmt.Errorf("connect to %s: %w", socket, err)
	}
	return nil
}

// Serve listens on socket (mode 0600) and calls woken after each Send, one call at a time, until ctx ends. A stale socket file is
// replaced, and so is one that somebody has removed; failed gets what keeps it from being replaced.
func Serve(ctx context.Context, socket string, woken func(), failed func(error)) error {
	return unixsock.Serve(ctx, "unixpacket", socket, func(l *net.UnixListener) error {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return err
			}
			c.Close() // what an older plugin says on it stands in the spool too
			woken()
		}
	}, failed)
}
