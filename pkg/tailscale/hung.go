package tailscale

import (
	"errors"
	"log/slog"
	"math"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/sockdiag"
	"github.com/headcni/headcni/pkg/config/names"
)

// What hangs at the relay hangs at Headscale too: tailscaled waits two minutes for a word, then asks on the same connection, and the kernel
// repeats that question for a quarter of an hour. It does no harm until Headscale restarts: a node that does not come back is offline to it, and others lose
// the way to its pods. The kernel knows: what is sent on such a connection is repeated, and nothing is acknowledged.
const (
	// hungLook is between two looks at tailscaled's connections.
	hungLook = 5 * time.Second
	// hungSilence is how long nothing may be acknowledged. hungRepeats is how often the kernel has then said the same, and hungWait how long it waits
	// until it does so again: that doubles each time, so what was said has had no answer for as long, however long the connection was idle before.
	hungSilence = 12 * time.Second
	hungRepeats = 3
	hungWait    = 6 * time.Second
	// hungProbes is how often it has asked on an idle connection: tailscaled has it do so each 15 s.
	hungProbes = 2
)

// hung reports whether nobody is at the other end of a connection.
func hung(i unix.TCPInfo) bool {
	silent := time.Duration(i.Last_ack_recv) * time.Millisecond
	wait := time.Duration(i.Rto) * time.Microsecond
	return silent > hungSilence && (i.Unacked > 0 && i.Retransmits >= hungRepeats && wait >= hungWait || i.Probes >= hungProbes)
}

// sockets ends tailscaled's TCP connections that hang. It is for one goroutine.
type sockets struct {
	log  *slog.Logger
	next time.Time
	// unable: the kernel ends nobody's connections, or does not let us.
	unable bool
}

// mend looks, if it is time to. Where the kernel cannot be asked there is nothing to do: tailscaled's own timeouts hold.
func (s *sockets) mend(now time.Time) {
	if s.unable || now.Before(s.next) {
		return
	}
	s.next = now.Add(hungLook)
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		conns, err := sockdiag.Marked(family, names.BypassMark, math.MaxUint32) // others' marks may have that bit too
		if err != nil {
			s.unable = errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP)
			continue
		}
		for _, c := range slices.DeleteFunc(conns, func(c sockdiag.Conn) bool { return !hung(c.Info) }) {
			err := c.Destroy()
			if errors.Is(err, unix.ENOENT) {
				continue // it has just ended
			}
			silent := time.Duration(c.Info.Last_ack_recv) * time.Millisecond
			if err != nil {
				s.unable = errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM)
				s.log.Info("a TCP connection of tailscaled's hangs and cannot be ended", "remote", c.Remote, "silent", silent, "err", err)
				continue
			}
			s.log.Info("a TCP connection of tailscaled's hung and was ended, for another one", "remote", c.Remote, "silent", silent)
		}
	}
}
