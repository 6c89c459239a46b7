package nfnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// batchAnswer bounds the wait for the kernel's answer, which is there when the kernel has done the work.
	batchAnswer = 10 * time.Second
	// batchBuffer is room for the answers to a batch that fails: one for each message that is wrong. minRoom is for what is sent.
	batchBuffer, minRoom = 4 << 20, 256 << 10
	// nested marks an attribute that holds attributes.
	nested = unix.NLA_F_NESTED
)

// Batch is a transaction: all of its messages take effect at once, or none does. The zero value is empty.
//
// The last message alone asks for an answer. So there is one, and a socket's buffer does not overflow by them.
type Batch struct {
	family   uint8
	messages []byte
	last     int // where the last message begins
	n        uint32
}

// NewBatch returns an empty one for tables of a family (unix.NFPROTO_*).
func NewBatch(family uint8) *Batch { return &Batch{family: family} }

// Len is how many messages there are.
func (b *Batch) Len() int { return int(b.n) }

// Add appends a message (unix.NFT_MSG_*).
func (b *Batch) Add(msg, flags int, attrs ...Attr) {
	b.last = len(b.messages)
	b.n++
	b.messages = appendMessage(b.messages, unix.NFNL_SUBSYS_NFTABLES<<8|msg, flags, b.n, header{b.family, unix.NFNETLINK_V0, 0, 0})
	for _, a := range attrs {
		b.messages = AppendAttr(b.messages, a.Type, a.Value)
	}
	binary.NativeEndian.PutUint32(b.messages[b.last:], uint32(len(b.messages)-b.last))
}

// Nest is an attribute that holds others.
func Nest(typ int, attrs ...Attr) Attr {
	var value []byte
	for _, a := range attrs {
		value = AppendAttr(value, a.Type, a.Value)
	}
	return Attr{Type: typ | nested, Value: value}
}

// AppendAttr appends an attribute, padded.
func AppendAttr(b []byte, typ int, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofNlAttr+len(value)))
	b = binary.NativeEndian.AppendUint16(b, uint16(typ))
	b = append(b, value...)
	return append(b, make([]byte, -len(value)&(unix.NLA_ALIGNTO-1))...)
}

// appendMessage appends the head of a message, with a length that is right if nothing follows.
func appendMessage(b []byte, typ, flags int, seq uint32, h header) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(unix.SizeofNlMsghdr+len(h)))
	b = binary.NativeEndian.AppendUint16(b, uint16(typ))
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.NLM_F_REQUEST|flags))
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	return append(b, h...)
}

// ErrUnsure says that the kernel's answer to a batch was lost: it may have taken effect.
var ErrUnsure = errors.New("the kernel's answer to a batch of nf_tables messages was lost")

// Conn sends to the nf_tables of the network namespace in which it is used first. The zero value works. It keeps its socket until it is
// garbage: the kernel has whoever closes one wait until all that was deleted is gone, some 10 ms.
type Conn struct {
	file *os.File
	room int // for sending
}

// Run sends a batch. An error that is not ErrUnsure means that nothing of it took effect.
func (c *Conn) Run(b *Batch) error {
	if b.n == 0 {
		return nil
	}
	mark := header{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	out := appendMessage(nil, unix.NFNL_MSG_BATCH_BEGIN, 0, 0, mark)
	last := len(out) + b.last
	out = append(out, b.messages...)
	flags := binary.NativeEndian.Uint16(out[last+6:])
	binary.NativeEndian.PutUint16(out[last+6:], flags|unix.NLM_F_ACK)
	out = appendMessage(out, unix.NFNL_MSG_BATCH_END, 0, b.n+1, mark)
	err := c.send(out)
	if err == nil {
		err = c.answer(b.n)
	}
	if err != nil {
		c.drop() // more answers may wait in it
		return fmt.Errorf("batch of %d nf_tables messages: %w", b.n, err)
	}
	return nil
}

// Generation is the function of that name.
func (c *Conn) Generation() (uint32, error) {
	gen, err := c.generation()
	if err != nil {
		c.drop()
		return 0, fmt.Errorf("ask for the nf_tables generation: %w", err)
	}
	return gen, nil
}

func (c *Conn) generation() (uint32, error) {
	const seq = 1
	if err := c.send(appendMessage(nil, unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN, 0, seq, header{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0})); err != nil {
		return 0, err
	}
	_, _, body, err := c.receive()
	if err != nil {
		return 0, err
	}
	if id := Get(body[min(headerLen, len(body)):], unix.NFTA_GEN_ID); len(id) == 4 {
		return binary.BigEndian.Uint32(id), nil
	}
	return 0, errors.New("the kernel's answer has none")
}

// answer waits for the first error or the acknowledgement of the last message. The kernel sends them when the batch is done: errors
// first, in the order of messages, and the sequence number 0 where the whole batch is refused.
func (c *Conn) answer(last uint32) error {
	for {
		typ, seq, _, err := c.receive()
		var errno unix.Errno
		switch {
		case errors.As(err, &errno):
			return fmt.Errorf("message %d: %w", seq, err)
		case err != nil:
			return err
		case typ == unix.NLMSG_ERROR && seq == last:
			return nil
		}
	}
}

// receive returns one message. An error that the kernel answers with is an unix.Errno; another means that there is no answer.
func (c *Conn) receive() (typ uint16, seq uint32, body []byte, err error) {
	buf := make([]byte, os.Getpagesize())
	for {
		n, _, err := unix.Recvfrom(int(c.file.Fd()), buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, 0, nil, fmt.Errorf("%w (%v)", ErrUnsure, err)
		}
		if n < unix.SizeofNlMsghdr {
			continue
		}
		typ, seq, body = binary.NativeEndian.Uint16(buf[4:]), binary.NativeEndian.Uint32(buf[8:]), buf[unix.SizeofNlMsghdr:n]
		if typ == unix.NLMSG_ERROR && len(body) >= 4 {
			if errno := -int32(binary.NativeEndian.Uint32(body)); errno != 0 {
				return typ, seq, nil, unix.Errno(errno)
			}
		}
		return typ, seq, body, nil
	}
}

func (c *Conn) send(b []byte) error {
	if err := c.open(len(b)); err != nil {
		return err
	}
	return unix.Sendto(int(c.file.Fd()), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

// open opens the socket where there is none, and makes room to send size bytes at once.
func (c *Conn) open(size int) error {
	if c.file == nil {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		if err != nil {
			return fmt.Errorf("open a socket to nf_tables: %w", err)
		}
		c.file, c.room = os.NewFile(uintptr(fd), "nf_tables"), 0
		timeout := unix.NsecToTimeval(batchAnswer.Nanoseconds())
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
			return fmt.Errorf("limit the wait for nf_tables: %w", err)
		}
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, batchBuffer) // see below
	}
	if 2*size > c.room {
		c.room = max(4*size, minRoom)
		// Beyond the system's limit goes who may administer the network of the whole host. Others have what there is.
		_ = unix.SetsockoptInt(int(c.file.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, c.room)
	}
	return nil
}

func (c *Conn) drop() {
	if c.file != nil {
		_ = c.file.Close() // nothing was promised
		c.file = nil
	}
}

// Uint32 is a number as nf_tables has it.
func Uint32(typ int, n uint32) Attr { return Attr{Type: typ, Value: nl.BEUint32Attr(n)} }

// AwaitPackets waits until the kernel has finished with all packets that it works on now (membarrier waits for a grace period of RCU:
// some 15 ms without work).
func AwaitPackets() {
	const global = 1 // MEMBARRIER_CMD_GLOBAL
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0); errno != 0 {
		time.Sleep(100 * time.Millisecond) // a kernel that has it not, or not with nohz_full
	}
}
