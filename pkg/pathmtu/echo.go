package pathmtu

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// echoTimeout is long enough for a path around the world over a slow link.
const echoTimeout = time.Second

// echo reports whether an ICMP echo of size bytes, which nobody may fragment, comes back through the tunnel. The peer's kernel
// answers. The random bytes in it keep an old or invented answer from counting.
func echo(ctx context.Context, tun string, to netip.Addr, size int) bool {
	network, request, answer, header := "ip4:icmp", byte(8), byte(0), 20
	if to.Is6() {
		network, request, answer, header = "ip6:ipv6-icmp", 128, 129, 40
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var set error
		err := c.Control(func(fd uintptr) { set = prepare(int(fd), tun, to.Is6()) })
		return errors.Join(err, set)
	}}
	conn, err := lc.ListenPacket(ctx, network, "")
	if err != nil {
		return false // no tun, or no right: nothing is learned
	}
	defer conn.Close()
	msg := make([]byte, size-header)
	_, _ = rand.Read(msg[4:]) // never fails
	msg[0] = request
	if to.Is4() {
		binary.BigEndian.PutUint16(msg[2:], checksum(msg))
	} // the kernel makes ICMPv6's
	if _, err := conn.WriteTo(msg, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return false
	}
	_ = conn.SetReadDeadline(time.Now().Add(echoTimeout)) // a socket that is open
	buf := make([]byte, size)
	for ctx.Err() == nil {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return false
		}
		ip, ok := from.(*net.IPAddr)
		if ok && ip.IP.Equal(to.AsSlice()) && n == len(msg) && buf[0] == answer && bytes.Equal(buf[4:n], msg[4:]) {
			return true
		}
	}
	return false
}

// prepare binds to the tun, and forbids fragments whatever is known of the path.
func prepare(fd int, tun string, ipv6 bool) error {
	level, opt, probe := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE
	if ipv6 {
		level, opt, probe = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE
	}
	return errors.Join(unix.BindToDevice(fd, tun), unix.SetsockoptInt(fd, level, opt, probe))
}

// checksum is that of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
