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
	// batchBuffer is room for the answers to a batch that fails: one for each message that is wrong.
	batchBuffer = 4 << 20
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

// Run sends the batch. An error that is not ErrUnsure means that nothing of it took effect.
func (b *Batch) Run() error {
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

	fd, err := b.socket(len(out))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send a batch of %d nf_tables messages: %w", b.n, err)
	}
	return b.answer(fd)
}

// ErrUnsure says that the kernel's answer was lost: the batch may have taken effect.
var ErrUnsure = errors.New("the kernel's answer to a batch of nf_tables messages was lost")

// answer waits for the first error or the acknowledgement of the last message. The kernel sends them when the batch is done: errors
// first, in the order of messages, and the sequence number 0 where the whole batch is refused.
func (b *Batch) answer(fd int) error {
	buf := make([]byte, os.Getpagesize())
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%w (%w)", ErrUnsure, err)
		}
		// Each answer comes alone: struct nlmsghdr and the error number.
		if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(buf[4:]) != unix.NLMSG_ERROR {
			continue
		}
		seq, errno := binary.NativeEndian.Uint32(buf[8:]), -int32(binary.NativeEndian.Uint32(buf[unix.SizeofNlMsghdr:]))
		if errno != 0 {
			return fmt.Errorf("message %d of a batch of %d: %w", seq, b.n, unix.Errno(errno))
		}
		if seq == b.n {
			return nil
		}
	}
}

// socket can send size bytes at once.
func (b *Batch) socket(size int) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return -1, fmt.Errorf("open a socket to nf_tables: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	// Beyond the system's limit goes who may administer the network of the whole host. Others have what there is.
	for opt, n := range map[int]int{unix.SO_SNDBUFFORCE: 2*size + batchBuffer, unix.SO_RCVBUFFORCE: batchBuffer} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, n)
	}
	timeout := unix.NsecToTimeval(batchAnswer.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return -1, fmt.Errorf("limit the wait for nf_tables: %w", err)
	}
	return fd, nil
}

// Uint32 is a number as nf_tables has it.
func Uint32(typ int, n uint32) Attr { return Attr{Type: typ, Value: nl.BEUint32Attr(n)} }
