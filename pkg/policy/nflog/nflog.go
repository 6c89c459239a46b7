// Package nflog reads the packets that the kernel's rules log to an NFLOG group.
package nflog

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfnl"
)

// Packet is a packet that was logged.
type Packet struct {
	Time time.Time
	// Prefix is the logging rule's, without spaces around it.
	Prefix   string
	Src, Dst netip.Addr
	Protocol uint8
	// SrcPort and DstPort are 0 where the protocol has none.
	SrcPort, DstPort uint16
}

// What golang.org/x/sys lacks (include/uapi/linux/netfilter/nfnetlink_log.h).
const (
	msgPacket, msgConfig = 0, 1

	cfgCommand, cfgMode, cfgTimeout, cfgThreshold = 1, 2, 4, 5
	commandBind                                   = 1
	modePacket                                    = 2

	attrPayload, attrPrefix = 9, 10
)

const (
	headerLen = 4 // struct nfgenmsg
	// snapLen is as much of a packet as its headers need.
	snapLen = 128
	// bufferLen is room for what the kernel sends at once.
	bufferLen = 64 << 10
	// answerTimeout bounds the wait for the kernel's answer to what we configure.
	answerTimeout = 5 * time.Second
)

// Read calls do with each packet of a group that is logged in the network namespace of its caller, until ctx ends, and ready once it
// listens. lost is called where the kernel logged more than could be read.
func Read(ctx context.Context, group uint16, ready func(), do func(Packet), lost func()) error {
	f, err := open()
	if err != nil {
		return fmt.Errorf("listen to NFLOG group %d: %w", group, err)
	}
	defer f.Close()
	if err := bind(f, group); err != nil {
		return fmt.Errorf("listen to NFLOG group %d: %w", group, explain(err))
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Now()) }) // the read ends
	defer stop()
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	ready()
	buffer := make([]byte, bufferLen)
	for ctx.Err() == nil {
		n, err := f.Read(buffer)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			lost()
			continue
		case err != nil:
			return fmt.Errorf("read NFLOG group %d: %w", group, err)
		}
		eachMessage(buffer[:n], func(typ uint16, body []byte) {
			if p, ok := decode(body); ok && typ == unix.NFNL_SUBSYS_ULOG<<8|msgPacket {
				p.Time = time.Now()
				do(p)
			}
		})
	}
	return nil
}

func open() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "netlink")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// bind asks for a group's packets, each at once.
func bind(f *os.File, group uint16) error {
	if err := configure(f, group, nfnl.Attr{Type: cfgCommand, Value: []byte{commandBind}}); err != nil {
		return err
	}
	return configure(f, group,
		nfnl.Attr{Type: cfgMode, Value: append(binary.BigEndian.AppendUint32(nil, snapLen), modePacket, 0)},
		nfnl.Attr{Type: cfgThreshold, Value: binary.BigEndian.AppendUint32(nil, 1)},
		nfnl.Attr{Type: cfgTimeout, Value: binary.BigEndian.AppendUint32(nil, 1)}, // of 10 ms
	)
}

// configure sends one message and waits for the kernel's answer.
func configure(f *os.File, group uint16, attrs ...nfnl.Attr) error {
	b := binary.NativeEndian.AppendUint32(nil, 0) // its length
	b = binary.NativeEndian.AppendUint16(b, unix.NFNL_SUBSYS_ULOG<<8|msgConfig)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	b = append(b, make([]byte, 8)...) // sequence and port
	b = append(b, unix.AF_UNSPEC, unix.NFNETLINK_V0, byte(group>>8), byte(group))
	for _, a := range attrs {
		b = nfnl.AppendAttr(b, a.Type, a.Value)
	}
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.SetReadDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	answer, answered := error(nil), false
	for buffer := make([]byte, bufferLen); !answered; {
		n, err := f.Read(buffer)
		if err != nil && !errors.Is(err, unix.ENOBUFS) { // packets may come before the answer
			return err
		}
		eachMessage(buffer[:max(n, 0)], func(typ uint16, body []byte) {
			if typ == unix.NLMSG_ERROR && len(body) >= 4 {
				answered = true
				if errno := -int32(binary.NativeEndian.Uint32(body)); errno != 0 {
					answer = syscall.Errno(errno)
				}
			}
		})
	}
	return answer
}

func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: another program reads this group: end it; or CAP_NET_ADMIN is missing", err)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPROTONOSUPPORT):
		return fmt.Errorf("%w: the kernel has no NFLOG (CONFIG_NETFILTER_NETLINK_LOG): load nfnetlink_log", err)
	}
	return err
}

// eachMessage splits what was read.
func eachMessage(b []byte, do func(typ uint16, body []byte)) {
	for len(b) >= unix.SizeofNlMsghdr {
		n := int(binary.NativeEndian.Uint32(b))
		if n < unix.SizeofNlMsghdr || n > len(b) {
			return
		}
		do(binary.NativeEndian.Uint16(b[4:]), b[unix.SizeofNlMsghdr:n])
		b = b[min((n+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(b)):]
	}
}

// decode reads a message about a packet.
func decode(body []byte) (p Packet, ok bool) {
	if len(body) < headerLen {
		return p, false
	}
	attrs, err := nfnl.Attributes(body[headerLen:])
	if err != nil {
		return p, false
	}
	p, ok = read(attrs[attrPayload])
	p.Prefix = strings.TrimSpace(nfnl.Text(attrs[attrPrefix]))
	return p, ok
}

// read reads the headers of an IP packet.
func read(b []byte) (p Packet, ok bool) {
	var rest []byte
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		p.Src, p.Dst, p.Protocol = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:])), b[9]
		if fragment := binary.BigEndian.Uint16(b[6:]) & 0x1fff; fragment == 0 {
			rest = b[min(int(b[0]&0xf)*4, len(b)):]
		}
	case len(b) >= 40 && b[0]>>4 == 6:
		p.Src, p.Dst, p.Protocol, rest = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:])), b[6], b[40:]
	default:
		return p, false
	}
	switch p.Protocol {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP:
		if len(rest) >= 4 {
			p.SrcPort, p.DstPort = binary.BigEndian.Uint16(rest), binary.BigEndian.Uint16(rest[2:])
		}
	}
	return p, true
}
