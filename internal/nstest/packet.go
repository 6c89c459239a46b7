package nstest

import (
	"encoding/binary"
	"hash/crc32"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/inetsum"
)

const hopLimit = 64

// Packet is an IP packet with any source, as who has CAP_NET_RAW makes it.
func Packet(src, dst netip.Addr, protocol uint8, payload []byte) []byte {
	var b []byte
	if src.Is4() {
		b = []byte{0x45, 0, 0, 0, 0, 0, 0, 0, hopLimit, protocol, 0, 0}
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
	} else {
		b = []byte{0x60, 0, 0, 0, 0, 0, protocol, hopLimit}
		binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	}
	b = slices.Concat(b, src.AsSlice(), dst.AsSlice(), payload)
	if src.Is4() {
		binary.BigEndian.PutUint16(b[10:], inetsum.Of(b[:20]))
	}
	return b
}

// SourceRouted is an IPv4 packet that names whom it is to go to from its destination on (RFC 791, section 3.1: loose source route).
func SourceRouted(packet []byte, then netip.Addr) []byte {
	option := slices.Concat([]byte{131, 7, 4}, then.AsSlice(), []byte{0})
	p := slices.Concat(packet[:20], option, packet[20:])
	p[0] += byte(len(option) / 4)
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	p[10], p[11] = 0, 0
	binary.BigEndian.PutUint16(p[10:], inetsum.Of(p[:20+len(option)]))
	return p
}

// Send sends an IP packet from the caller's network namespace as it is.
func Send(packet []byte) error {
	family, to := unix.AF_INET, unix.Sockaddr(nil)
	if packet[0]>>4 == 6 {
		family, to = unix.AF_INET6, &unix.SockaddrInet6{Addr: [16]byte(packet[24:40])}
	} else {
		to = &unix.SockaddrInet4{Addr: [4]byte(packet[16:20])}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, packet, 0, to)
}

// ARPRequest is an Ethernet frame that asks for an address.
func ARPRequest(mac [6]byte, from, who netip.Addr) []byte {
	return slices.Concat([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, mac[:], []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 1},
		mac[:], from.AsSlice(), make([]byte, 6), who.AsSlice())
}

// Solicitation is a packet that asks for a neighbour (RFC 4861, section 4.3), with the asker's hardware address.
func Solicitation(mac [6]byte, from, to, who netip.Addr) []byte {
	body := slices.Concat(make([]byte, 4), who.AsSlice(), []byte{1, 1}, mac[:])
	_, payload := icmp(from, to, 135, 0, body)
	p := Packet(from, to, unix.IPPROTO_ICMPV6, payload)
	p[7] = 255 // proves that it comes from the link
	return p
}

// SendFrames sends Ethernet frames by a link of the caller's network namespace.
func SendFrames(index int, frames ...[]byte) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, f := range frames {
		if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: index}); err != nil {
			return err
		}
	}
	return nil
}

// UDP is a datagram's header and what it says.
func UDP(src, dst netip.Addr, from, to uint16, text string) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(text)))
	b = append(append(b, 0, 0), text...)
	return sum(src, dst, unix.IPPROTO_UDP, b, 6)
}

// TCP flags.
const (
	fin, syn, rst, ack = 1, 2, 4, 16
)

func tcp(src, dst netip.Addr, from, to uint16, flags byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = append(b, 0, 0, 0x30, 0x39, 0, 0, 0, 0, 5<<4, flags, 0xff, 0xff, 0, 0, 0, 0)
	if flags&ack != 0 {
		b[11] = 1
	}
	return sum(src, dst, unix.IPPROTO_TCP, b, 16)
}

// SYN is the header that begins a TCP connection.
func SYN(src, dst netip.Addr, from, to uint16) []byte { return tcp(src, dst, from, to, syn) }

// Segment is a header of TCP, with an acknowledgement, and what it carries.
func Segment(src, dst netip.Addr, from, to uint16, seq, acknowledged uint32, text string) []byte {
	b := tcp(src, dst, from, to, ack)
	binary.BigEndian.PutUint32(b[4:], seq)
	binary.BigEndian.PutUint32(b[8:], acknowledged)
	b[16], b[17] = 0, 0
	return sum(src, dst, unix.IPPROTO_TCP, append(b, text...), 16)
}

// SCTPInit is a packet that begins an SCTP association (RFC 9260, sections 3.1 and 3.3.2).
func SCTPInit(from, to uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// Echo is a request of ICMP or ICMPv6 with an identifier.
func Echo(src, dst netip.Addr, id uint16) []byte {
	typ := byte(8)
	if src.Is6() {
		typ = 128
	}
	_, payload := icmp(src, dst, typ, 0, binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, id), 1))
	return payload
}

// TooBig is an ICMP error that tells a sender how large packets to a destination may be, and quotes the one that it is about (RFC 1191; RFC 4443,
// section 3.2).
func TooBig(src, dst netip.Addr, mtu uint16, about []byte) []byte {
	typ, code := byte(3), byte(4)
	if src.Is6() {
		typ, code = 2, 0
	}
	protocol, payload := icmp(src, dst, typ, code, slices.Concat([]byte{0, 0, byte(mtu >> 8), byte(mtu)}, about))
	return Packet(src, dst, protocol, payload)
}

// icmp is a message of ICMP or ICMPv6.
func icmp(src, dst netip.Addr, typ, code byte, body []byte) (protocol uint8, payload []byte) {
	b := append([]byte{typ, code, 0, 0}, body...)
	if src.Is4() {
		binary.BigEndian.PutUint16(b[2:], inetsum.Of(b))
		return unix.IPPROTO_ICMP, b
	}
	return unix.IPPROTO_ICMPV6, sum(src, dst, unix.IPPROTO_ICMPV6, b, 2)
}

// Shapes are packets of kinds that conntrack makes an entry for, and of those that it takes for invalid, by what they are. Ports are
// from a number on.
func Shapes(src, dst netip.Addr, port uint16) map[string][]byte {
	out := map[string][]byte{}
	next := func() uint16 { port++; return port }
	add := func(name string, protocol uint8, payload []byte) { out[name] = Packet(src, dst, protocol, payload) }
	broken := func(b []byte, at int) []byte { b[at] ^= 0x55; return b }
	add("UDP", unix.IPPROTO_UDP, UDP(src, dst, next(), 9, "secret"))
	add("UDP with a wrong checksum", unix.IPPROTO_UDP, broken(UDP(src, dst, next(), 9, "secret"), 6))
	add("SYN", unix.IPPROTO_TCP, tcp(src, dst, next(), 9, syn))
	add("SYN with a wrong checksum", unix.IPPROTO_TCP, broken(tcp(src, dst, next(), 9, syn), 16))
	add("SYN+FIN", unix.IPPROTO_TCP, tcp(src, dst, next(), 9, syn|fin))
	add("SYN+ACK", unix.IPPROTO_TCP, tcp(src, dst, next(), 9, syn|ack))
	add("RST+ACK", unix.IPPROTO_TCP, tcp(src, dst, next(), 9, rst|ack))
	add("ACK", unix.IPPROTO_TCP, tcp(src, dst, next(), 9, ack))
	add("no flags", unix.IPPROTO_TCP, tcp(src, dst, next(), 9, 0))
	add("an unknown protocol", 253, []byte("secret"))
	add("IP in IP", map[bool]uint8{true: unix.IPPROTO_IPIP, false: unix.IPPROTO_IPV6}[src.Is4()],
		Packet(src, dst, unix.IPPROTO_UDP, UDP(src, dst, next(), 9, "secret")))
	add("GRE", unix.IPPROTO_GRE, append([]byte{0, 0, 8, 0}, Packet(src, dst, unix.IPPROTO_UDP, UDP(src, dst, next(), 9, "secret"))...))
	add("ESP", unix.IPPROTO_ESP, []byte("\x00\x00\x00\x01\x00\x00\x00\x01 secret"))
	add("SCTP", unix.IPPROTO_SCTP, SCTPInit(next(), 9))
	if src.Is4() {
		out["UDP by a way of its own"] = SourceRouted(Packet(src, dst, unix.IPPROTO_UDP, UDP(src, dst, next(), 9, "secret")), dst)
		add("IGMP", unix.IPPROTO_IGMP, []byte{0x16, 0, 9, 4, 224, 0, 0, 251})
	} else {
		// Each header says what follows it, and has no more than 8 bytes.
		for name, header := range map[string][2]byte{"hop-by-hop options": {unix.IPPROTO_HOPOPTS, 1}, "destination options": {unix.IPPROTO_DSTOPTS, 1}, "a routing header": {unix.IPPROTO_ROUTING, 0}, "a fragment's header": {unix.IPPROTO_FRAGMENT, 0}} {
			begin := []byte{unix.IPPROTO_UDP, 0, header[1], header[1] * 4, 0, 0, 0, 0} // PadN
			add("UDP behind "+name, header[0], append(begin, UDP(src, dst, next(), 9, "secret")...))
		}
	}
	rest := []byte{0, 7, 0, 1}
	types := map[string][2]byte{"echo request": {8, 0}, "echo reply": {0, 0}, "redirect": {5, 1}, "unreachable": {3, 1}, "timestamp reply": {14, 0}}
	if src.Is6() {
		types = map[string][2]byte{"echo request": {128, 0}, "echo reply": {129, 0}, "packet too big": {2, 0}, "unreachable": {1, 3}, "an unknown ICMP": {200, 0}}
	}
	for name, t := range types {
		body := rest
		if name != "echo request" && name != "echo reply" { // they quote what they are about
			body = append([]byte{0, 0, 5, 0}, Packet(dst, src, unix.IPPROTO_UDP, UDP(dst, src, next(), 9, "x"))...)
		}
		protocol, payload := icmp(src, dst, t[0], t[1], body)
		add("ICMP "+name, protocol, payload)
	}
	return out
}

// sum puts the checksum that TCP, UDP and ICMPv6 have in common at an offset (RFC 9293, section 3.1; RFC 8200, section 8.1).
func sum(src, dst netip.Addr, protocol uint8, b []byte, at int) []byte {
	pseudo := slices.Concat(src.AsSlice(), dst.AsSlice(), binary.BigEndian.AppendUint32(nil, uint32(len(b))), []byte{0, 0, 0, protocol}, b)
	binary.BigEndian.PutUint16(b[at:], inetsum.Of(pseudo))
	return b
}
