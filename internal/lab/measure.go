package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Place is where sockets can be opened: a machine or a pod.
type Place interface {
	Do(fn func() error) error
	Dial(ctx context.Context, network, addr string) (net.Conn, error)
}

// answerIn bounds the wait for one answer.
const answerIn = 2 * time.Second

// Ask opens a TCP connection to a server that tells whom it sees, such as a pod's echo server, and returns that address.
func Ask(ctx context.Context, from Place, to netip.AddrPort) (netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, answerIn)
	defer cancel()
	c, err := from.Dial(ctx, "tcp", to.String())
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return netip.Addr{}, err
	}
	b, err := io.ReadAll(c)
	if err != nil {
		return netip.Addr{}, err
	}
	return netip.ParseAddr(string(bytes.TrimSpace(b)))
}

// Echo sends one UDP datagram of size bytes (at least 64) to a pod's echo server, never fragmented, and returns the
// source address that the server saw and the time until the answer was here.
func Echo(ctx context.Context, from Place, to netip.Addr, size int) (seen netip.Addr, rtt time.Duration, err error) {
	c, err := from.Dial(ctx, "udp", netip.AddrPortFrom(to, EchoPort).String())
	if err != nil {
		return netip.Addr{}, 0, err
	}
	defer c.Close()
	if err := dontFragment(c.(*net.UDPConn), to.Is6()); err != nil {
		return netip.Addr{}, 0, err
	}
	if err := c.SetDeadline(time.Now().Add(answerIn)); err != nil {
		return netip.Addr{}, 0, err
	}
	buf := make([]byte, max(size, 64))
	began := time.Now()
	if _, err := c.Write(buf); err != nil {
		return netip.Addr{}, 0, err
	}
	n, err := c.Read(buf)
	rtt = time.Since(began)
	if err != nil {
		return netip.Addr{}, rtt, err
	}
	if n != len(buf) {
		return netip.Addr{}, rtt, fmt.Errorf("sent %d bytes, got %d back", len(buf), n)
	}
	line, _, _ := bytes.Cut(buf, []byte("\n"))
	seen, err = netip.ParseAddr(string(line))
	return seen, rtt, err
}

// dontFragment sets DF (IPv4) and forbids fragments (IPv6): a datagram larger than the path MTU is an error, ip(7).
func dontFragment(c *net.UDPConn, v6 bool) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	level, opt := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
	if v6 {
		level, opt = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	var setErr error
	err = raw.Control(func(fd uintptr) { setErr = unix.SetsockoptInt(int(fd), level, opt, unix.IP_PMTUDISC_DO) })
	return errors.Join(err, setErr)
}

// Throughput sends TCP data from one place to an address of another for d and returns what arrived, in bit/s.
func Throughput(ctx context.Context, from, to Place, addr netip.Addr, d time.Duration) (float64, error) {
	var l net.Listener
	err := to.Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	if err != nil {
		return 0, err
	}
	defer l.Close()
	type received struct {
		bytes int64
		err   error
	}
	sink := make(chan received, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			sink <- received{err: err}
			return
		}
		defer c.Close()
		n, err := swallow(c)
		sink <- received{n, err}
	}()
	c, err := from.Dial(ctx, "tcp", l.Addr().String())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	began := time.Now()
	if err := c.SetDeadline(began.Add(d)); err != nil {
		return 0, err
	}
	block := make([]byte, 1<<18)
	for err == nil {
		_, err = c.Write(block)
	}
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		return 0, fmt.Errorf("send to %s: %w", addr, err)
	}
	c.Close()
	r := <-sink
	if r.err != nil {
		return 0, r.err
	}
	return float64(r.bytes*8) / time.Since(began).Seconds(), nil
}

// swallow reads to the end. io.Copy would splice, which measures another path than most programs take.
func swallow(c net.Conn) (n int64, err error) {
	buf := make([]byte, 1<<18)
	for {
		k, err := c.Read(buf)
		n += int64(k)
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// Beat is how often a stream sends.
const Beat = 10 * time.Millisecond

// Stream is a one-directional flow of small UDP datagrams, one each Beat. One direction, because two-way traffic hides
// dark sessions: any packet from the other side heals them.
type Stream struct {
	Name string

	send   net.Conn
	packet net.PacketConn
	stop   chan struct{}
	sent   chan struct{} // closed after the last datagram
	wg     sync.WaitGroup

	mu      sync.Mutex
	sentAt  []time.Time // by sequence number
	arrived []arrival
	seen    map[uint64]bool
}

type arrival struct {
	seq uint64
	at  time.Time
}

// StartStream starts a stream to an address of the place to.
func StartStream(ctx context.Context, name string, from, to Place, addr netip.Addr) (*Stream, error) {
	s := &Stream{Name: name, stop: make(chan struct{}), sent: make(chan struct{}), seen: map[uint64]bool{}}
	err := to.Do(func() (err error) {
		s.packet, err = net.ListenPacket("udp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	if err != nil {
		return nil, err
	}
	if s.send, err = from.Dial(ctx, "udp", s.packet.LocalAddr().String()); err != nil {
		s.packet.Close()
		return nil, err
	}
	s.wg.Go(func() {
		defer close(s.sent)
		s.sendAll()
	})
	s.wg.Go(s.receiveAll)
	return s, nil
}

func (s *Stream) sendAll() {
	tick := time.NewTicker(Beat)
	defer tick.Stop()
	for seq := uint64(0); ; seq++ {
		s.mu.Lock()
		s.sentAt = append(s.sentAt, time.Now())
		s.mu.Unlock()
		// An error (no route, say) is a datagram that does not arrive.
		_, _ = s.send.Write(binary.BigEndian.AppendUint64(nil, seq))
		select {
		case <-tick.C:
		case <-s.stop:
			return
		}
	}
}

func (s *Stream) receiveAll() {
	buf := make([]byte, 64)
	for {
		n, _, err := s.packet.ReadFrom(buf)
		if err != nil {
			return // closed by Stop
		}
		if n != 8 {
			continue
		}
		seq := binary.BigEndian.Uint64(buf)
		s.mu.Lock()
		if !s.seen[seq] {
			s.seen[seq] = true
			s.arrived = append(s.arrived, arrival{seq, time.Now()})
		}
		s.mu.Unlock()
	}
}

// Report is how a stream fared.
type Report struct {
	Sent, Lost int
	// Longest is the longest time without an arrival, from the first datagram's sending to the stop.
	Longest time.Duration
	// Dark is when that time began.
	Dark time.Time
}

// underWay is how long Stop waits for a datagram more. On a busy machine one can be that late.
const underWay = time.Second

// Stop ends the stream, after a wait for what is still under way.
func (s *Stream) Stop() Report {
	close(s.stop)
	<-s.sent
	for last, since := -1, time.Now(); time.Since(since) < underWay; time.Sleep(Beat) {
		s.mu.Lock()
		sent, arrived := len(s.sentAt), len(s.arrived)
		s.mu.Unlock()
		if arrived == sent {
			break
		}
		if arrived != last {
			last, since = arrived, time.Now()
		}
	}
	s.packet.Close()
	s.wg.Wait()
	s.send.Close()
	r := Report{Sent: len(s.sentAt), Lost: len(s.sentAt) - len(s.arrived)}
	at := []time.Time{s.sentAt[0]}
	for _, a := range s.arrived {
		at = append(at, a.at)
	}
	at = append(at, s.sentAt[len(s.sentAt)-1])
	slices.SortFunc(at, time.Time.Compare)
	for i := range at[1:] {
		if gap := at[i+1].Sub(at[i]); gap > r.Longest {
			r.Longest, r.Dark = gap, at[i]
		}
	}
	return r
}

// Back returns how long after since the first datagram that was sent after since arrived.
func (s *Stream) Back(since time.Time) (time.Duration, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.arrived {
		if s.sentAt[a.seq].After(since) {
			return a.at.Sub(since), true
		}
	}
	return 0, false
}

// WaitBack waits until a datagram that was sent after since has arrived.
func (s *Stream) WaitBack(ctx context.Context, since time.Time) (back time.Duration, err error) {
	err = until(ctx, Beat, nil, func() error {
		var ok bool
		if back, ok = s.Back(since); !ok {
			return fmt.Errorf("stream %s is dark", s.Name)
		}
		return nil
	})
	return back, err
}

// Lookup asks MagicDNS from a place for the addresses of a name.
func Lookup(ctx context.Context, from Place, name string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, answerIn)
	defer cancel()
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return from.Dial(ctx, network, "100.100.100.100:53")
	}}
	return r.LookupNetIP(ctx, "ip", name)
}
