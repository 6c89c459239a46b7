package answer

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxAge is how long names are taken for what there is; then a question has them asked for anew, once in minAge at most. Changes of peers
	// come by Renew at once; extra records, of which tailscaled tells nobody, by this.
	maxAge, minAge = 5 * time.Second, 2 * time.Second
	// askTimeout bounds asking tailscaled.
	askTimeout = 5 * time.Second
	// maxConns over TCP there are at once, maxOfOne of them by one client, each for idle without a question and for maxQueries of them.
	maxConns, maxOfOne, maxQueries = 128, 8, 1000
	idle                           = 5 * time.Second
)

// Server answers. Over UDP one question at a time: what it costs is bounded, and how many a client may ask is the kernel's business (nftables).
type Server struct {
	// Source says what there is; an error leaves what there was.
	Source func(context.Context) (Names, error)
	// May reports whether a client is a pod of this node. The node itself, which asks from the address it asks at, always may.
	May func(netip.Addr) bool
	// Listening, if any, is called when all addresses are listened at.
	Listening func()
	// Port to listen at; 0 is 53.
	Port uint16

	now     atomic.Pointer[index]
	askedAt atomic.Int64 // when Source was last asked, in Unix nanoseconds
	renew   chan struct{}
	once    sync.Once
	mu      sync.Mutex
	conns   map[netip.Addr]int
	open    int
}

func (s *Server) prepare() {
	s.once.Do(func() { s.renew, s.conns = make(chan struct{}, 1), map[netip.Addr]int{} })
}

// Renew has Source asked soon. It does not wait.
func (s *Server) Renew() {
	s.prepare()
	select {
	case s.renew <- struct{}{}:
	default: // it will be
	}
}

// Run answers at the addresses until ctx ends. It returns early, with an error, where it cannot listen.
func (s *Server) Run(ctx context.Context, addrs []netip.Addr) error {
	s.prepare()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	at := cmp.Or(s.Port, port)
	var closers []io.Closer
	defer func() {
		cancel(nil)
		for _, c := range closers {
			_ = c.Close() // nothing is written any more
		}
	}()
	// The address may come later than the socket, or go for a while.
	lc := net.ListenConfig{Control: freeBind}
	for _, a := range addrs {
		at := netip.AddrPortFrom(a, at).String()
		udp, err := lc.ListenPacket(ctx, "udp", at)
		if err != nil {
			return cannotListen(err)
		}
		closers = append(closers, udp)
		tcp, err := lc.Listen(ctx, "tcp", at)
		if err != nil {
			return cannotListen(err)
		}
		closers = append(closers, tcp)
		wg.Go(func() { cancel(s.serveUDP(ctx, udp.(*net.UDPConn), a)) })
		wg.Go(func() { cancel(s.serveTCP(ctx, &wg, tcp, a)) })
	}
	wg.Go(func() { s.keep(ctx) })
	if s.Listening != nil {
		s.Listening()
	}
	<-ctx.Done()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return fmt.Errorf("answer for the tailnet's names: %w", err)
	}
	return nil
}

func cannotListen(err error) error {
	advice := "the daemon needs root, and in a container the capability NET_BIND_SERVICE"
	if errors.Is(err, unix.EADDRINUSE) {
		advice = "something else listens there on all addresses: bind it to addresses of its own"
	}
	return fmt.Errorf("answer for the tailnet's names: %w; %s", err, advice)
}

func freeBind(network, _ string, c syscall.RawConn) (err error) {
	level, opt := unix.SOL_IP, unix.IP_FREEBIND
	if network[len(network)-1] == '6' {
		level, opt = unix.SOL_IPV6, unix.IPV6_FREEBIND
	}
	ctlErr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, opt, 1) })
	return errors.Join(ctlErr, err)
}

// keep asks Source when it is asked to.
func (s *Server) keep(ctx context.Context) {
	for {
		asking, cancel := context.WithTimeout(ctx, askTimeout)
		names, err := s.Source(asking)
		cancel()
		s.askedAt.Store(time.Now().UnixNano())
		if err == nil { // else what was known stays
			s.now.Store(newIndex(names))
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(minAge):
		}
		select {
		case <-ctx.Done():
			return
		case <-s.renew:
		}
	}
}

// answer is for one client's message.
func (s *Server) answer(query []byte, size int) []byte {
	if time.Since(time.Unix(0, s.askedAt.Load())) > maxAge {
		s.Renew()
	}
	if len(query) > maxQuestion {
		return nil
	}
	return s.now.Load().respond(query, size)
}

func (s *Server) serveUDP(ctx context.Context, c *net.UDPConn, own netip.Addr) error {
	buf := make([]byte, maxQuestion+1)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
			return nil
		}
		if err != nil {
			continue // of an earlier answer, such as "port unreachable"
		}
		if !s.allowed(from.Addr(), own) {
			continue
		}
		if out := s.answer(buf[:n], 0); out != nil {
			_, _ = c.WriteToUDPAddrPort(out, from) // who does not get it asks again
		}
	}
}

// allowed is the second line behind the kernel's rules.
func (s *Server) allowed(from, own netip.Addr) bool {
	from = from.Unmap()
	return from == own || s.May(from)
}

func (s *Server) serveTCP(ctx context.Context, wg *sync.WaitGroup, l net.Listener, own netip.Addr) error {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
			return nil
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // no more files, for instance
			continue
		}
		from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		if !s.allowed(from, own) || !s.enter(from) {
			_ = c.Close() // nothing was said
			continue
		}
		wg.Go(func() {
			defer s.leave(from)
			stop := context.AfterFunc(ctx, func() { _ = c.Close() }) // the same
			defer stop()
			defer c.Close()
			s.converse(c)
		})
	}
}

func (s *Server) enter(from netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open >= maxConns || s.conns[from] >= maxOfOne {
		return false
	}
	s.open++
	s.conns[from]++
	return true
}

func (s *Server) leave(from netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
	if s.conns[from]--; s.conns[from] == 0 {
		delete(s.conns, from)
	}
}

// converse answers the questions of one connection, each with its length before it (RFC 7766).
func (s *Server) converse(c net.Conn) {
	buf := make([]byte, 2+maxQuestion)
	for range maxQueries {
		if c.SetDeadline(time.Now().Add(idle)) != nil {
			return
		}
		if _, err := io.ReadFull(c, buf[:2]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint16(buf))
		if n > maxQuestion {
			return
		}
		if _, err := io.ReadFull(c, buf[2:2+n]); err != nil {
			return
		}
		out := s.answer(buf[2:2+n], 1<<16-1)
		if out == nil {
			return
		}
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...)); err != nil {
			return
		}
	}
}
