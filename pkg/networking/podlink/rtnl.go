package podlink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Request is one netlink message. Attaching a pod is the hot path of a process that lives for milliseconds, so it has
// an encoder of its own: several messages go out in one system call, and one small buffer takes all answers (the netlink
// library allocates 64 KiB for each, which cost more than the kernel's work).
type Request struct {
	What  string // for the error, for example "add address 10.244.0.2/32"
	Type  uint16
	Flags uint16
	Body  []byte
}

const (
	Create = unix.NLM_F_CREATE | unix.NLM_F_EXCL
	// replyWait is how long the kernel may take for one answer. Links are made and deleted under one lock, which hundreds
	// of pods at once can hold for seconds.
	replyWait = 60 * time.Second
	// skipStats (RTEXT_FILTER_SKIP_STATS, linux/rtnetlink.h) spares the kernel from adding up counters.
	skipStats = 1 << 3
	operUp    = 6 // IF_OPER_UP, linux/if.h
)

func (r *Request) Bytes(b ...byte) { r.Body = append(r.Body, b...) }

func (r *Request) Uint32(v uint32) { r.Body = binary.NativeEndian.AppendUint32(r.Body, v) }

// attr appends a netlink attribute, padded to 4 bytes.
func (r *Request) Attr(typ uint16, data []byte) {
	end := r.Nest(typ)
	r.Body = append(r.Body, data...)
	end()
}

func (r *Request) AttrUint32(typ uint16, v uint32) {
	r.Attr(typ, binary.NativeEndian.AppendUint32(nil, v))
}

func (r *Request) AttrString(typ uint16, s string) { r.Attr(typ, append([]byte(s), 0)) }

// nest begins an attribute whose length is known when end is called.
func (r *Request) Nest(typ uint16) (end func()) {
	start := len(r.Body)
	r.Body = binary.NativeEndian.AppendUint16(r.Body, 0)
	r.Body = binary.NativeEndian.AppendUint16(r.Body, typ)
	return func() {
		binary.NativeEndian.PutUint16(r.Body[start:], uint16(len(r.Body)-start))
		for len(r.Body)%unix.NLMSG_ALIGNTO != 0 {
			r.Body = append(r.Body, 0)
		}
	}
}

// Ifinfo appends struct ifinfomsg.
func (r *Request) Ifinfo(index int, flags, change uint32) {
	r.Bytes(unix.AF_UNSPEC, 0, 0, 0)
	r.Uint32(uint32(index))
	r.Uint32(flags)
	r.Uint32(change)
}

// Conn is a netlink socket that lives in the namespace it was opened in, whichever thread uses it. Its methods are not
// for concurrent use.
type Conn struct {
	fd  int
	seq uint32
	buf []byte
}

func Open(protocol int) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	c := &Conn{fd: fd, buf: make([]byte, 32<<10)}
	tv := unix.NsecToTimeval(replyWait.Nanoseconds())
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("set up netlink socket: %w", err)
	}
	// The kernel's own words make an error clearer. Kernels that lack this answer without them.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	return c, nil
}

func (c *Conn) Close() { unix.Close(c.fd) }

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
			return fmt.Errorf("enter network namespace: %w: %w", ErrPodNetns, err)
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

// openPodConnAt opens a socket in another network namespace.
func openPodConnAt(netns, protocol int) (c *Conn, err error) {
	err = inNetns(netns, func() error {
		c, err = Open(protocol)
		return err
	})
	return c, err
}

// replyError is the kernel's refusal of one request.
type replyError struct {
	what, msg string
	errno     unix.Errno
}

func (e *replyError) Error() string {
	if e.msg != "" {
		return fmt.Sprintf("%s: %v (%s)", e.what, e.errno, e.msg)
	}
	return fmt.Sprintf("%s: %v", e.what, e.errno)
}

func (e *replyError) Unwrap() error { return e.errno }

// do sends all requests in one go. The kernel carries them out in order and goes on past a refused one; do returns the
// first refusal, and in replies the payload of the answers by request (nil for a mere acknowledgement).
func (c *Conn) Do(requests ...Request) (replies [][]byte, err error) {
	first := c.seq + 1
	var out []byte
	for i, r := range requests {
		c.seq++
		flags := r.Flags | unix.NLM_F_REQUEST
		if i == len(requests)-1 {
			flags |= unix.NLM_F_ACK // refusals come unasked, and before this one
		}
		out = binary.NativeEndian.AppendUint32(out, uint32(unix.NLMSG_HDRLEN+len(r.Body)))
		out = binary.NativeEndian.AppendUint16(out, r.Type)
		out = binary.NativeEndian.AppendUint16(out, flags)
		out = binary.NativeEndian.AppendUint32(out, c.seq)
		out = binary.NativeEndian.AppendUint32(out, 0)
		out = append(out, r.Body...)
	}
	err = ignoringEINTR(func() error { return unix.Sendto(c.fd, out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}) })
	if err != nil {
		return nil, fmt.Errorf("send netlink request: %w", err)
	}
	return c.replies(first, requests)
}

func (c *Conn) replies(first uint32, requests []Request) ([][]byte, error) {
	replies := make([][]byte, len(requests))
	var refusal error
	for last := false; !last; {
		n, err := c.receive()
		if errors.Is(err, unix.EAGAIN) {
			return nil, fmt.Errorf("wait for the kernel's answer: none within %v; the node is overloaded, try again", replyWait)
		}
		if err != nil {
			return nil, fmt.Errorf("receive netlink answer: %w", err)
		}
		for b := c.buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
			h := (*unix.NlMsghdr)(unsafe.Pointer(&b[0]))
			if int(h.Len) < unix.NLMSG_HDRLEN || int(h.Len) > len(b) {
				return nil, errors.New("receive netlink answer: malformed message")
			}
			payload := b[unix.NLMSG_HDRLEN:h.Len]
			i := int(int32(h.Seq - first))
			ours := i >= 0 && i < len(requests)
			switch {
			case ours && h.Type == unix.NLMSG_ERROR:
				if err := parseError(requests[i].What, h.Flags, payload); refusal == nil {
					refusal = err
				}
				last = i == len(requests)-1
			case ours:
				replies[i] = slices.Clone(payload)
			}
			b = b[min(align(int(h.Len)), len(b)):]
		}
	}
	return replies, refusal
}

func (c *Conn) receive() (n int, err error) {
	err = ignoringEINTR(func() error {
		n, _, err = unix.Recvfrom(c.fd, c.buf, 0)
		return err
	})
	return n, err
}

// parseError reads struct nlmsgerr and, where present, the extended acknowledgement behind it.
func parseError(what string, flags uint16, payload []byte) error {
	if len(payload) < 4+unix.NLMSG_HDRLEN {
		return &replyError{what: what, errno: unix.EBADMSG}
	}
	errno := -int32(binary.NativeEndian.Uint32(payload))
	if errno == 0 {
		return nil
	}
	e := &replyError{what: what, errno: unix.Errno(errno)}
	if flags&unix.NLM_F_ACK_TLVS != 0 {
		echoed := unix.NLMSG_HDRLEN
		if flags&unix.NLM_F_CAPPED == 0 {
			echoed = align(int(binary.NativeEndian.Uint32(payload[4:])))
		}
		if at := 4 + echoed; at <= len(payload) {
			if msg := Attrs(payload[at:])[unix.NLMSGERR_ATTR_MSG]; len(msg) > 0 {
				e.msg = unix.ByteSliceToString(msg)
			}
		}
	}
	return e
}

func align(n int) int { return (n + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1) }

// Attrs splits netlink attributes. A malformed rest is left out.
func Attrs(b []byte) map[uint16][]byte {
	attrs := map[uint16][]byte{}
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			break
		}
		attrs[binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)] = b[4:n]
		b = b[min(align(n), len(b)):]
	}
	return attrs
}

// ignoringEINTR repeats a system call that a signal has interrupted (Go's own preemption signals among them).
func ignoringEINTR(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Link is what the kernel says about a link.
type Link struct {
	Index, Peer int // peer: the other end's index in its own namespace
	MTU         int
	Up          bool
	Operational bool // it can send
	MAC         net.HardwareAddr
	Name        string
	Kind, Alias string
}

// link looks a link up by name: never by a dump, which is slow with thousands of links. The error matches ENODEV if there
// is none.
func (c *Conn) LinkByName(name string) (Link, error) {
	replies, err := c.Do(GetLink(name))
	if err != nil {
		return Link{}, err
	}
	return ParseLink(replies[0])
}

func GetLink(name string) Request {
	r := Request{What: "look up link " + name, Type: unix.RTM_GETLINK}
	r.Ifinfo(0, 0, 0)
	r.AttrUint32(unix.IFLA_EXT_MASK, skipStats)
	r.AttrString(unix.IFLA_IFNAME, name)
	return r
}

func ParseLink(b []byte) (Link, error) {
	if len(b) < unix.SizeofIfInfomsg {
		return Link{}, errors.New("look up link: short answer from the kernel")
	}
	info := (*unix.IfInfomsg)(unsafe.Pointer(&b[0]))
	attrs := Attrs(b[unix.SizeofIfInfomsg:])
	l := Link{
		Index: int(info.Index),
		Up:    info.Flags&unix.IFF_UP != 0,
		MAC:   slices.Clone(attrs[unix.IFLA_ADDRESS]),
		Name:  unix.ByteSliceToString(attrs[unix.IFLA_IFNAME]),
		Alias: unix.ByteSliceToString(attrs[unix.IFLA_IFALIAS]),
		Kind:  unix.ByteSliceToString(Attrs(attrs[unix.IFLA_LINKINFO])[unix.IFLA_INFO_KIND]),
	}
	if v := attrs[unix.IFLA_LINK]; len(v) == 4 {
		l.Peer = int(binary.NativeEndian.Uint32(v))
	}
	if v := attrs[unix.IFLA_OPERSTATE]; len(v) == 1 {
		l.Operational = v[0] == operUp
	}
	if v := attrs[unix.IFLA_MTU]; len(v) == 4 {
		l.MTU = int(binary.NativeEndian.Uint32(v))
	}
	return l, nil
}

func Family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
