// Package rtnl is a small netlink client for programs that live for milliseconds: several messages go out in one system call,
// and one small buffer takes all answers (the netlink library allocates 64 KiB for each, which cost more than the kernel's
// work). It knows rtnetlink's links and routes; other messages are for the caller to make.
package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Request is one netlink message. Its methods append to Body.
type Request struct {
	What  string // for the error, for example "add address 10.244.0.2/32"
	Type  uint16
	Flags uint16 // beside NLM_F_REQUEST and NLM_F_ACK
	Body  []byte
}

// Create are the flags of a request that makes what must not be there.
const Create = unix.NLM_F_CREATE | unix.NLM_F_EXCL

// replyWait is how long the kernel may take for one answer. Links are made and deleted under one lock, which hundreds
// of pods at once can hold for seconds.
const replyWait = 60 * time.Second

// Bytes appends fixed fields of a header.
func (r *Request) Bytes(b ...byte) { r.Body = append(r.Body, b...) }

// Uint32 appends a fixed field in the machine's order of bytes, as netlink has them.
func (r *Request) Uint32(v uint32) { r.Body = binary.NativeEndian.AppendUint32(r.Body, v) }

// Attr appends a netlink attribute, padded to 4 bytes.
func (r *Request) Attr(typ uint16, data []byte) {
	end := r.Nest(typ)
	r.Body = append(r.Body, data...)
	end()
}

// AttrUint32 appends a number.
func (r *Request) AttrUint32(typ uint16, v uint32) {
	r.Attr(typ, binary.NativeEndian.AppendUint32(nil, v))
}

// AttrString appends a text with the zero behind it.
func (r *Request) AttrString(typ uint16, s string) { r.Attr(typ, append([]byte(s), 0)) }

// Nest begins an attribute whose length is known when end is called.
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

// append appends the whole message with its header.
func (r *Request) append(out []byte, flags uint16, seq uint32) []byte {
	out = binary.NativeEndian.AppendUint32(out, uint32(unix.NLMSG_HDRLEN+len(r.Body)))
	out = binary.NativeEndian.AppendUint16(out, r.Type)
	out = binary.NativeEndian.AppendUint16(out, flags)
	out = binary.NativeEndian.AppendUint32(out, seq)
	out = binary.NativeEndian.AppendUint32(out, 0) // sender: the kernel fills it in
	return append(out, r.Body...)
}

// Conn is a netlink socket that lives in the namespace it was opened in, whichever thread uses it. Its methods are not
// for concurrent use.
type Conn struct {
	fd  int
	seq uint32
	buf []byte
}

// Open opens a socket of a netlink protocol, such as unix.NETLINK_ROUTE, in the namespace of the calling thread.
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

// Close gives the socket back.
func (c *Conn) Close() { unix.Close(c.fd) }

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

// Do sends all requests in one go. The kernel carries them out in order and goes on past a refused one; Do returns the
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
		out = r.append(out, flags, c.seq)
	}
	if err := c.send(out); err != nil {
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

func (c *Conn) send(b []byte) error {
	return ignoringEINTR(func() error { return unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}) })
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

// Attr finds one attribute, nil where it is missing. It is for those who look at many messages: it allocates nothing.
func Attr(b []byte, typ uint16) []byte {
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			break
		}
		if binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER) == typ {
			return b[4:n]
		}
		b = b[min(align(n), len(b)):]
	}
	return nil
}

// ignoringEINTR repeats a system call that a signal has interrupted (Go's own preemption signals among them).
func ignoringEINTR(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// dumpTries bounds how often a dump that changes under way is begun again.
const dumpTries = 20

// Dump gives every message of a list to take. A list that changed while it was read is read again from the start, so take
// may see an entry twice, or one that has gone meanwhile. Where links come and go all the time, as on a host with a thousand containers, no
// reading is undisturbed: then all of them together are the list. What a change makes one reading leave out, if it was there all along,
// another has.
func (c *Conn) Dump(r Request, take func([]byte)) error {
	r.Flags |= unix.NLM_F_DUMP
	for range dumpTries {
		whole, err := c.dumpOnce(r, take)
		if err != nil {
			return fmt.Errorf("%s: %w", r.What, err)
		}
		if whole {
			break
		}
	}
	return nil
}

func (c *Conn) dumpOnce(r Request, take func([]byte)) (whole bool, err error) {
	c.seq++
	if err := c.send(r.append(nil, r.Flags|unix.NLM_F_REQUEST, c.seq)); err != nil {
		return false, err
	}
	whole = true
	for {
		n, err := c.receive()
		if err != nil {
			return false, err
		}
		for b := c.buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
			h := (*unix.NlMsghdr)(unsafe.Pointer(&b[0]))
			if int(h.Len) < unix.NLMSG_HDRLEN || int(h.Len) > len(b) {
				return false, errors.New("malformed message")
			}
			payload := b[unix.NLMSG_HDRLEN:h.Len]
			whole = whole && h.Flags&unix.NLM_F_DUMP_INTR == 0
			switch {
			case h.Seq != c.seq: // of an earlier request
			case h.Type == unix.NLMSG_DONE:
				return whole, nil
			case h.Type == unix.NLMSG_ERROR:
				return false, parseError(r.What, h.Flags, payload)
			default:
				take(payload)
			}
			b = b[min(align(int(h.Len)), len(b)):]
		}
	}
}
