package live

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/inetsum"
)

// Probe is a packet that is recognised wherever it passes.
type Probe struct {
	Src, Dst netip.Addr
	// Protocol is tcp, udp or icmp, which has no Port.
	Protocol string
	Port     uint16
	// Mark is chosen at random: TCP's sequence number, and what ICMP and UDP carry.
	Mark uint32
}

// Kind is what a packet is to a probe.
type Kind string

// The kinds. Unreachable is an ICMP error of somebody on the way, Refused that nobody listens.
const (
	Request     Kind = "request"
	Answer      Kind = "answer"
	Refused     Kind = "refused"
	Unreachable Kind = "unreachable"
)

const (
	hopLimit = 64
	tcpSYN   = 0x02
	tcpRST   = 0x04
	tcpACK   = 0x10
	// ICMP and ICMPv6 (RFC 792, RFC 4443).
	echoRequest4, echoReply4 = 8, 0
	echoRequest6, echoReply6 = 128, 129
	unreachable4             = 3
	portUnreachable4         = 3
	unreachable6             = 1
	portUnreachable6         = 4
)

// from is the port that it is sent from, of those that the kernel gives away itself.
func (p Probe) from() uint16 { return 33000 + uint16(p.Mark%27000) }

func (p Probe) number() uint8 {
	switch {
	case p.Protocol == "tcp":
		return unix.IPPROTO_TCP
	case p.Protocol == "udp":
		return unix.IPPROTO_UDP
	case p.Dst.Is6():
		return unix.IPPROTO_ICMPV6
	}
	return unix.IPPROTO_ICMP
}

// packet is the IP packet: a SYN without options, an echo request or a datagram of 4 bytes.
func (p Probe) packet() []byte {
	var b []byte
	sum := 0 // where the checksum is
	switch proto := p.number(); proto {
	case unix.IPPROTO_TCP:
		b = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, p.from()), p.Port)
		b = append(binary.BigEndian.AppendUint32(b, p.Mark), 0, 0, 0, 0, 5<<4, tcpSYN, 0xff, 0xff, 0, 0, 0, 0)
		sum = 16
	case unix.IPPROTO_UDP:
		b = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, p.from()), p.Port)
		b = binary.BigEndian.AppendUint32(append(b, 0, 12, 0, 0), p.Mark)
		sum = 6
	default:
		b = []byte{echoRequest4, 0, 0, 0}
		if proto == unix.IPPROTO_ICMPV6 {
			b[0] = echoRequest6
		}
		b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(b, p.from()), 0)[:8]
		b = binary.BigEndian.AppendUint32(b, p.Mark)
		sum = 2
	}
	pseudo := slices.Concat(p.Src.AsSlice(), p.Dst.AsSlice(), []byte{0, p.number()}, binary.BigEndian.AppendUint16(nil, uint16(len(b))))
	if p.number() == unix.IPPROTO_ICMP {
		pseudo = nil
	}
	binary.BigEndian.PutUint16(b[sum:], inetsum.Of(append(pseudo, b...)))
	if p.Dst.Is6() {
		head := binary.BigEndian.AppendUint16([]byte{0x60, 0, 0, 0}, uint16(len(b)))
		return slices.Concat(head, []byte{p.number(), hopLimit}, p.Src.AsSlice(), p.Dst.AsSlice(), b)
	}
	head := binary.BigEndian.AppendUint16([]byte{0x45, 0}, uint16(20+len(b)))
	head = append(head, 0, 0, 0, 0, hopLimit, p.number(), 0, 0)
	head = slices.Concat(head, p.Src.AsSlice(), p.Dst.AsSlice())
	binary.BigEndian.PutUint16(head[10:], inetsum.Of(head))
	return append(head, b...)
}

// kind says what a packet is to the probe, "" for nothing. The source may have been masqueraded on the way, and nothing else.
func (p Probe) kind(b []byte) Kind {
	src, dst, proto, rest := split(b)
	switch {
	case dst == p.Dst && p.request(proto, rest):
		return Request
	case src == p.Dst && proto == p.number() && len(rest) >= 8:
		return p.answer(rest)
	}
	return p.refusal(src, proto, rest)
}

// split takes an IP packet apart. Extension headers are nobody's here.
func split(b []byte) (src, dst netip.Addr, proto uint8, rest []byte) {
	switch {
	case len(b) >= 20 && b[0]>>4 == 4 && len(b) >= int(b[0]&15)*4:
		return netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:])), b[9], b[int(b[0]&15)*4:]
	case len(b) >= 40 && b[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:])), b[6], b[40:]
	}
	return src, dst, 0, nil
}

func (p Probe) request(proto uint8, l4 []byte) bool {
	if proto != p.number() || len(l4) < 8 {
		return false
	}
	switch proto {
	case unix.IPPROTO_TCP:
		return binary.BigEndian.Uint16(l4[2:]) == p.Port && binary.BigEndian.Uint32(l4[4:]) == p.Mark
	case unix.IPPROTO_UDP:
		return binary.BigEndian.Uint16(l4[2:]) == p.Port && p.marked(l4)
	}
	return (l4[0] == echoRequest4 && proto == unix.IPPROTO_ICMP || l4[0] == echoRequest6 && proto == unix.IPPROTO_ICMPV6) && p.marked(l4)
}

// marked looks behind the eight bytes that the headers of ICMP and UDP have.
func (p Probe) marked(l4 []byte) bool {
	return len(l4) >= 12 && binary.BigEndian.Uint32(l4[8:]) == p.Mark
}

func (p Probe) answer(l4 []byte) Kind {
	switch p.number() {
	case unix.IPPROTO_TCP:
		switch {
		case len(l4) < 14 || l4[13]&tcpACK == 0 || binary.BigEndian.Uint32(l4[8:]) != p.Mark+1:
			return ""
		case l4[13]&tcpRST != 0:
			return Refused
		}
		return Answer
	case unix.IPPROTO_UDP:
		if binary.BigEndian.Uint16(l4) == p.Port && binary.BigEndian.Uint16(l4[2:]) == p.from() {
			return Answer
		}
		return ""
	}
	if (l4[0] == echoReply4 || l4[0] == echoReply6) && p.marked(l4) {
		return Answer
	}
	return ""
}

// refusal reads an ICMP error that quotes the probe.
func (p Probe) refusal(src netip.Addr, proto uint8, l4 []byte) Kind {
	if len(l4) < 8 || proto != unix.IPPROTO_ICMP && proto != unix.IPPROTO_ICMPV6 || proto == unix.IPPROTO_ICMPV6 && l4[0] >= 128 {
		return ""
	}
	_, to, inner, quoted := split(l4[8:])
	if to != p.Dst || !p.request(inner, quoted) {
		return ""
	}
	port := l4[0] == unreachable4 && l4[1] == portUnreachable4
	if proto == unix.IPPROTO_ICMPV6 {
		port = l4[0] == unreachable6 && l4[1] == portUnreachable6
	}
	if port && src == p.Dst {
		return Refused
	}
	return Unreachable
}
