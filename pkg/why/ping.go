package why

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/printable"
	"github.com/headcni/headcni/pkg/pathmtu"
	"github.com/headcni/headcni/pkg/why/live"
)

// Pings is what one node is asked to do.
type Pings struct {
	Src, Dst string // as in Question
	Count    int
	// Size of a packet in bytes, IP header and all.
	Size int
}

// The sizes that can be sent.
const (
	MinPing = 64
	MaxPing = 9000
)

// pingInterval is between two packets.
const pingInterval = 200 * time.Millisecond

// Pinged is what came of it.
type Pinged struct {
	Node string     `json:"node"`
	From string     `json:"from"` // the pod, or the node where its namespace cannot be entered
	Src  netip.Addr `json:"src,omitzero"`
	Dst  netip.Addr `json:"dst"`
	// Inside: packets were sent from the pod's own network namespace.
	Inside bool `json:"inside"`
	// OfPod: it was to be sent from a pod.
	OfPod bool `json:"ofPod"`
	Size  int  `json:"size"`
	Sent  int  `json:"sent"`
	// Millis are the round trips of those that were answered.
	Millis []float64 `json:"millis"`
	Error  string    `json:"error,omitempty"`
	// Peer is the node behind the tailnet that has the address, and how its tailscaled answers; nil where the tailnet is not used.
	Peer *Peer `json:"peer,omitempty"`
}

// OK: all were answered.
func (p Pinged) OK() bool { return p.Sent > 0 && len(p.Millis) == p.Sent }

// Ping sends from the pod, where this program may enter its network namespace, else from its node.
func (p Place) Ping(ctx context.Context, q Pings) (Pinged, error) {
	s, err := p.Look(ctx, Question{Src: q.Src, Dst: q.Dst, Protocol: icmp})
	if err != nil {
		return Pinged{}, err
	}
	out := Pinged{Node: cmp.Or(s.Tailnet.Name, s.Node), Dst: s.Dst, Size: q.Size, Peer: s.Tailnet.Holder, Millis: []float64{}}
	out.From, out.Src = "node "+out.Node, s.Src
	if s.There.Dev != s.Tailnet.Tun {
		out.Peer = nil
	}
	listen := func() (net.PacketConn, error) { return pathmtu.ListenEcho(ctx, "", s.Dst.Is6()) }
	if out.OfPod = s.Link != nil; out.OfPod {
		if ns := namespaceOf(s.Src); ns >= 0 {
			defer unix.Close(ns)
			out.Inside, out.From = true, s.Link.Pod
			outer := listen
			listen = func() (conn net.PacketConn, err error) {
				err = live.In(ns, func() (err error) {
					conn, err = outer()
					return err
				})
				return conn, err
			}
		}
	}
	conn, err := listen()
	if err != nil {
		return out, fmt.Errorf("open a socket for ICMP: %w; it needs root", err)
	}
	defer conn.Close()
	for i := range q.Count {
		if i > 0 {
			select {
			case <-ctx.Done():
				return out, ctx.Err()
			case <-time.After(pingInterval):
			}
		}
		out.Sent++
		took, err := pathmtu.Echo(ctx, conn, s.Dst, q.Size)
		switch {
		case err == nil:
			out.Millis = append(out.Millis, float64(took.Microseconds())/1000)
		case errors.Is(err, unix.EMSGSIZE):
			out.Error = fmt.Sprintf("%d bytes are more than the link or the path carries", q.Size)
		case errors.Is(err, os.ErrDeadlineExceeded):
			out.Error = "no answer"
		default:
			out.Error = innermost(err).Error()
		}
	}
	return out, ctx.Err()
}

func innermost(err error) error {
	for u := errors.Unwrap(err); u != nil; u = errors.Unwrap(u) {
		err = u
	}
	return err
}

// namespaceOf is the network namespace in which an address is, -1 where it is not among those that have a name here: in a container
// there are none.
func namespaceOf(a netip.Addr) int {
	paths, _ := filepath.Glob("/run/netns/*") // the pattern is right
	for _, path := range paths {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		if hasAddr(fd, a) {
			return fd
		}
		unix.Close(fd)
	}
	return -1
}

func hasAddr(fd int, a netip.Addr) bool {
	h, err := netlink.NewHandleAt(netns.NsHandle(fd), unix.NETLINK_ROUTE)
	if err != nil {
		return false
	}
	defer h.Close()
	all, err := h.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return false
	}
	for _, one := range all {
		if ip, _ := netip.AddrFromSlice(one.IP); ip.Unmap() == a {
			return true
		}
	}
	return false
}

// Print writes it for people.
func (p Pinged) Print(out io.Writer, to string) error {
	b := &strings.Builder{}
	fmt.Fprintf(b, "%s -> %s (%s)   %d of %d answered, %d bytes", printable.Line(p.From), printable.Line(to), p.Dst, len(p.Millis), p.Sent, p.Size)
	if len(p.Millis) > 0 {
		least, most, sum := p.Millis[0], p.Millis[0], 0.0
		for _, ms := range p.Millis {
			least, most, sum = min(least, ms), max(most, ms), sum+ms
		}
		fmt.Fprintf(b, "\n  round trip  %s (%s to %s)", millis(sum/float64(len(p.Millis))), millis(least), millis(most))
	}
	if p.Error != "" {
		fmt.Fprintf(b, "\n  lost        %s", printable.Line(p.Error))
	}
	if h := p.Peer; h != nil {
		fmt.Fprintf(b, "\n  tailnet     %s %s %s", h.Name, h.Path, h.Endpoint)
		if h.Millis > 0 {
			fmt.Fprintf(b, ", %s", millis(h.Millis))
		}
	}
	if p.OfPod && !p.Inside {
		b.WriteString("\n  sent from the pod's node: the pod's network namespace cannot be entered from here")
	}
	b.WriteString("\n")
	_, err := io.WriteString(out, b.String())
	return err
}
