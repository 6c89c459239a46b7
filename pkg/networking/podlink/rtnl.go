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

// podRequest is one netlink message. Attaching a pod is the hot path of a process that lives for milliseconds, so it has
// an encoder of its own: several messages go out in one system call, and one small buffer takes all answers (the netlink
// library allocates 64 KiB for each, which cost more than the kernel's work).
type podRequest struct {
	what  string // for the error, for example "add address 10.244.0.2/32"
	typ   uint16
	flags uint16
	body  []byte
}

const (
	podCreate = unix.NLM_F_CREATE | unix.NLM_F_EXCL
	// podReplyWait is how long the kernel may take for one answer. Links are made and deleted under one lock, which hundreds
	// of pods at once can hold for seconds.
	podReplyWait = 60 * time.Second
	// skipLinkStats (RTEXT_FILTER_SKIP_STATS, linux/rtnetlink.h) spares the kernel from adding up counters.
	skipLinkStats = 1 << 3
	operUp        = 6 // IF_OPER_UP, linux/if.h
)

func (r *podRequest) fixed(b ...byte) { r.body = append(r.body, b...) }

func (r *podRequest) u32(v uint32) { r.body = binary.NativeEndian.AppendUint32(r.body, v) }

// attr appends a netlink attribute, padded to 4 bytes.
func (r *podRequest) attr(typ uint16, data []byte) {
	end := r.nest(typ)
	r.body = append(r.body, data...)
	end()
}

func (r *podRequest) attr32(typ uint16, v uint32) {
	r.attr(typ, binary.NativeEndian.AppendUint32(nil, v))
}

func (r *podRequest) attrString(typ uint16, s string) { r.attr(typ, append([]byte(s), 0)) }

// nest begins an attribute whose length is known when end is called.
func (r *podRequest) nest(typ uint16) (end func()) {
	start := len(r.body)
	r.body = binary.NativeEndian.AppendUint16(r.body, 0)
	r.body = binary.NativeEndian.AppendUint16(r.body, typ)
	return func() {
		binary.NativeEndian.PutUint16(r.body[start:], uint16(len(r.body)-start))
		for len(r.body)%unix.NLMSG_ALIGNTO != 0 {
			r.body = append(r.body, 0)
		}
	}
}

// ifinfo appends struct ifinfomsg.
func (r *podRequest) ifinfo(index int, flags, change uint32) {
	r.fixed(unix.AF_UNSPEC, 0, 0, 0)
	r.u32(uint32(index))
	r.u32(flags)
	r.u32(change)
}

// podConn is a netlink socket that lives in the namespace it was opened in, whichever thread uses it. Its methods are not
// for concurrent use.
type podConn struct {
	fd  int
	seq uint32
	buf []byte
}

func openPodConn(protocol int) (*podConn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	c := &podConn{fd: fd, buf: make([]byte, 32<<10)}
	tv := unix.NsecToTimeval(podReplyWait.Nanoseconds())
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err != nil {
		c.close()
		return nil, fmt.Errorf("set up netlink socket: %w", err)
	}
	// The kernel's own words make an error clearer. Kernels that lack this answer without them.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	return c, nil
}

func (c *podConn) close() { unix.Close(c.fd) }

// inPodNetns runs fn on a thread that is in the namespace netns for the time being.
func inPodNetns(netns int, fn func() error) error {
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
func openPodConnAt(netns, protocol int) (c *podConn, err error) {
	err = inPodNetns(netns, func() error {
		c, err = openPodConn(protocol)
		return err
	})
	return c, err
}

// podReplyError is the kernel's refusal of one request.
type podReplyError struct {
	what, msg string
	errno     unix.Errno
}

func (e *podReplyError) Error() string {
	if e.msg != "" {
		return fmt.Sprintf("%s: %v (%s)", e.what, e.errno, e.msg)
	}
	return fmt.Sprintf("%s: %v", e.what, e.errno)
}

func (e *podReplyError) Unwrap() error { return e.errno }

// do sends all requests in one go. The kernel carries them out in order and goes on past a refused one; do returns the
// first refusal, and in replies the payload of the answers by request (nil for a mere acknowledgement).
func (c *podConn) do(requests ...podRequest) (replies [][]byte, err error) {
	first := c.seq + 1
	var out []byte
	for i, r := range requests {
		c.seq++
		flags := r.flags | unix.NLM_F_REQUEST
		if i == len(requests)-1 {
			flags |= unix.NLM_F_ACK // refusals come unasked, and before this one
		}
		out = binary.NativeEndian.AppendUint32(out, uint32(unix.NLMSG_HDRLEN+len(r.body)))
		out = binary.NativeEndian.AppendUint16(out, r.typ)
		out = binary.NativeEndian.AppendUint16(out, flags)
		out = binary.NativeEndian.AppendUint32(out, c.seq)
		out = binary.NativeEndian.AppendUint32(out, 0)
		out = append(out, r.body...)
	}
	err = ignoringEINTR(func() error { return unix.Sendto(c.fd, out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}) })
	if err != nil {
		return nil, fmt.Errorf("send netlink request: %w", err)
	}
	return c.replies(first, requests)
}

func (c *podConn) replies(first uint32, requests []podRequest) ([][]byte, error) {
	replies := make([][]byte, len(requests))
	var refusal error
	for last := false; !last; {
		n, err := c.receive()
		if errors.Is(err, unix.EAGAIN) {
			return nil, fmt.Errorf("wait for the kernel's answer: none within %v; the node is overloaded, try again", podReplyWait)
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
				if err := podReply(requests[i].what, h.Flags, payload); refusal == nil {
					refusal = err
				}
				last = i == len(requests)-1
			case ours:
				replies[i] = slices.Clone(payload)
			}
			b = b[min(podAlign(int(h.Len)), len(b)):]
		}
	}
	return replies, refusal
}

func (c *podConn) receive() (n int, err error) {
	err = ignoringEINTR(func() error {
		n, _, err = unix.Recvfrom(c.fd, c.buf, 0)
		return err
	})
	return n, err
}

// podReply reads struct nlmsgerr and, where present, the extended acknowledgement behind it.
func podReply(what string, flags uint16, payload []byte) error {
	if len(payload) < 4+unix.NLMSG_HDRLEN {
		return &podReplyError{what: what, errno: unix.EBADMSG}
	}
	errno := -int32(binary.NativeEndian.Uint32(payload))
	if errno == 0 {
		return nil
	}
	e := &podReplyError{what: what, errno: unix.Errno(errno)}
	if flags&unix.NLM_F_ACK_TLVS != 0 {
		echoed := unix.NLMSG_HDRLEN
		if flags&unix.NLM_F_CAPPED == 0 {
			echoed = podAlign(int(binary.NativeEndian.Uint32(payload[4:])))
		}
		if at := 4 + echoed; at <= len(payload) {
			if msg := podAttrs(payload[at:])[unix.NLMSGERR_ATTR_MSG]; len(msg) > 0 {
				e.msg = unix.ByteSliceToString(msg)
			}
		}
	}
	return e
}

func podAlign(n int) int { return (n + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1) }

// podAttrs splits netlink attributes. A malformed rest is left out.
func podAttrs(b []byte) map[uint16][]byte {
	attrs := map[uint16][]byte{}
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			break
		}
		attrs[binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)] = b[4:n]
		b = b[min(podAlign(n), len(b)):]
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

// podLink is what the kernel says about a link.
type podLink struct {
	index, peer int // peer: the other end's index in its own namespace
	mtu         int
	up          bool
	operational bool // it can send
	mac         net.HardwareAddr
	name        string
	kind, alias string
}

// link looks a link up by name: never by a dump, which is slow with thousands of links. The error matches ENODEV if there
// is none.
func (c *podConn) link(name string) (podLink, error) {
	replies, err := c.do(getPodLink(name))
	if err != nil {
		return podLink{}, err
	}
	return parsePodLink(replies[0])
}

func getPodLink(name string) podRequest {
	r := podRequest{what: "look up link " + name, typ: unix.RTM_GETLINK}
	r.ifinfo(0, 0, 0)
	r.attr32(unix.IFLA_EXT_MASK, skipLinkStats)
	r.attrString(unix.IFLA_IFNAME, name)
	return r
}

func parsePodLink(b []byte) (podLink, error) {
	if len(b) < unix.SizeofIfInfomsg {
		return podLink{}, errors.New("look up link: short answer from the kernel")
	}
	info := (*unix.IfInfomsg)(unsafe.Pointer(&b[0]))
	attrs := podAttrs(b[unix.SizeofIfInfomsg:])
	l := podLink{
		index: int(info.Index),
		up:    info.Flags&unix.IFF_UP != 0,
		mac:   slices.Clone(attrs[unix.IFLA_ADDRESS]),
		name:  unix.ByteSliceToString(attrs[unix.IFLA_IFNAME]),
		alias: unix.ByteSliceToString(attrs[unix.IFLA_IFALIAS]),
		kind:  unix.ByteSliceToString(podAttrs(attrs[unix.IFLA_LINKINFO])[unix.IFLA_INFO_KIND]),
	}
	if v := attrs[unix.IFLA_LINK]; len(v) == 4 {
		l.peer = int(binary.NativeEndian.Uint32(v))
	}
	if v := attrs[unix.IFLA_OPERSTATE]; len(v) == 1 {
		l.operational = v[0] == operUp
	}
	if v := attrs[unix.IFLA_MTU]; len(v) == 4 {
		l.mtu = int(binary.NativeEndian.Uint32(v))
	}
	return l, nil
}

func podFamily(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
