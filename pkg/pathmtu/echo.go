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

	"github.com/headcni/headcni/internal/inetsum"
)

// echoTimeout is long enough for a path around the world over a slow link.
const echoTimeout = time.Second

// echo sends an ICMP echo of size bytes, which nobody may fragment, and succeeds if it comes back through the tunnel. It fails with EMSGSIZE where
// the tun itself is too small.
func echo(ctx context.Context, tun string, to netip.Addr, size int) error {
	return echoBy(ctx, to, size, func(fd uintptr) error { return prepare(int(fd), tun, to.Is6()) })
}

// echoWide is an IPv4 echo of more bytes than the tun's MTU, which goes by its route's instead (Wider). It fails with EMSGSIZE where that
// is less, or there is no such route.
func echoWide(ctx context.Context, tun string, to netip.Addr, size int) error {
	return echoBy(ctx, to, size, func(fd uintptr) error {
		return errors.Join(unix.BindToDevice(int(fd), tun), unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TOS, probeTOS),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO))
	})
}

func echoBy(ctx context.Context, to netip.Addr, size int, prepare func(fd uintptr) error) error {
	conn, err := listenEcho(ctx, to.Is6(), prepare)
	if err != nil {
		return err // no tun, or no right: nothing is learned
	}
	defer conn.Close()
	_, err = Echo(ctx, conn, to, size)
	return err
}

// ListenEcho opens a socket for Echo, bound to a link where one is named, in the network namespace of the thread.
func ListenEcho(ctx context.Context, link string, ipv6 bool) (net.PacketConn, error) {
	return listenEcho(ctx, ipv6, func(fd uintptr) error { return prepare(int(fd), link, ipv6) })
}

func listenEcho(ctx context.Context, ipv6 bool, prepare func(fd uintptr) error) (net.PacketConn, error) {
	network := "ip4:icmp"
	if ipv6 {
		network = "ip6:ipv6-icmp"
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var set error
		err := c.Control(func(fd uintptr) { set = prepare(fd) })
		return errors.Join(err, set)
	}}
	return lc.ListenPacket(ctx, network, "")
}

// Echo sends an ICMP echo of size bytes, header and all, which nobody may fragment, and says how long the answer took. The peer's kernel
// answers. The random bytes in it keep an old or invented answer from counting.
func Echo(ctx context.Context, conn net.PacketConn, to netip.Addr, size int) (time.Duration, error) {
	request, answer, header := byte(8), byte(0), 20
	if to.Is6() {
		request, answer, header = 128, 129, 40
	}
	msg := make([]byte, size-header)
	_, _ = rand.Read(msg[4:]) // never fails
	msg[0] = request
	if to.Is4() {
		binary.BigEndian.PutUint16(msg[2:], inetsum.Of(msg))
	} // the kernel makes ICMPv6's
	began := time.Now()
	if _, err := conn.WriteTo(msg, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return 0, err
	}
	_ = conn.SetReadDeadline(began.Add(echoTimeout)) // a socket that is open
	buf := make([]byte, max(size, 1500))
	for ctx.Err() == nil {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return 0, err
		}
		ip, ok := from.(*net.IPAddr)
		if ok && ip.IP.Equal(to.AsSlice()) && n == len(msg) && buf[0] == answer && bytes.Equal(buf[4:n], msg[4:]) {
			return time.Since(began), nil
		}
	}
	return 0, ctx.Err()
}

// prepare binds to the link, and forbids fragments whatever is known of the path.
func prepare(fd int, link string, ipv6 bool) error {
	level, opt, probe := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE
	if ipv6 {
		level, opt, probe = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE
	}
	var bound error
	if link != "" {
		bound = unix.BindToDevice(fd, link)
	}
	return errors.Join(bound, unix.SetsockoptInt(fd, level, opt, probe))
}
