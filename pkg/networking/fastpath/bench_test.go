package fastpath

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config/names"
)

// The sides of BenchmarkFastPath, the one that others are held against first.
const (
	off   = "off"
	auto  = "auto"
	first = "from the first packet on"
	bare  = "no tables"
)

// BenchmarkFastPath has one thread with both ends send between two pods of a node, in bursts with and without the fast path in turn, each in
// namespaces of its own. It tells the processor time of each, of the fastest quarter of the bursts, beside that without. Policies are in force and
// allow it. "no tables" is a host without any rule and without connection tracking, and "from the first packet on" takes flows up as soon as
// they are answered.
func BenchmarkFastPath(b *testing.B) {
	if !has(b) {
		nstest.Skip(b, "the kernel has no flowtables: sudo make test-kernel ONLY='bench fastpath'")
	}
	for family, v := range []string{"IPv4", "IPv6"} {
		sides := []string{off, auto, first, bare}
		ends := map[string]*ends{}
		for _, side := range sides {
			ends[side] = newEnds(b, side, family)
		}
		for _, op := range operations {
			b.Run(v+"/"+strings.ReplaceAll(op.name, " ", "-"), func(b *testing.B) {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				took := map[string][]time.Duration{}
				for b.Loop() {
					for _, side := range sides {
						began := threadTime()
						for range op.times {
							if err := op.do(ends[side]); err != nil {
								b.Fatalf("%s: %v", side, err)
							}
						}
						took[side] = append(took[side], (threadTime()-began)/time.Duration(op.times))
					}
				}
				quick := func(side string) float64 {
					slices.Sort(took[side])
					return float64(took[side][len(took[side])/4].Nanoseconds()) / 1000
				}
				b.ReportMetric(0, "ns/op") // of all sides, which says nothing
				b.ReportMetric(quick(off), "us/off")
				for _, side := range sides[1:] {
					b.ReportMetric(quick(side)/quick(off), strings.ReplaceAll(side, " ", "-")+"/off")
				}
			})
		}
	}
}

// threadTime is the processor time of this thread, with what the kernel does for its packets.
func threadTime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) // it cannot fail
	return time.Duration(t.Nano())
}

type operation struct {
	name  string
	times int
	do    func(e *ends) error
}

var operations = []operation{
	{"UDP one way", 200, func(e *ends) error { return e.move(e.one, e.other, 64) }},
	{"UDP there and back", 100, func(e *ends) error { return e.thereAndBack(e.udp, e.udpPeer) }},
	{"TCP there and back", 100, func(e *ends) error { return e.thereAndBack(e.tcp, e.tcpPeer) }},
	{"TCP 64 kB", 20, func(e *ends) error { return e.move(e.tcp, e.tcpPeer, 64<<10) }},
	{"TCP connection", 30, (*ends).connection},
}

// ends are sockets of two pods. Those of one and other are never answered.
type ends struct {
	one, other, udp, udpPeer, tcp, tcpPeer, listener int
	server                                           unix.Sockaddr
	client                                           func() int
	buffer                                           []byte
}

func newEnds(b *testing.B, side string, family int) *ends {
	w := newWorld(b)
	if side == bare {
		w.node.Run(b, "nft", "flush", "ruleset")
	} else {
		want := w.toB(w.a)
		w.apply(want)
		w.recheck(want)
	}
	if side == auto || side == first {
		w.up()
	}
	if side == first {
		r, _, ok := strings.Cut(rule, "numgen")
		if !ok {
			b.Fatal("the rule has no number of packets")
		}
		w.node.Run(b, "nft", fmt.Sprintf("flush chain inet %[1]s %[2]s; add rule inet %[1]s %[2]s %[3]s flow add @%[4]s", names.FastTable, chain, r, flowtable))
	}
	e := &ends{buffer: make([]byte, 64<<10)}
	at := func(p *pod, port int) unix.Sockaddr {
		if family == 0 {
			return &unix.SockaddrInet4{Addr: p.addrs[0].As4(), Port: port}
		}
		return &unix.SockaddrInet6{Addr: p.addrs[1].As16(), Port: port}
	}
	e.server = at(w.b, port)
	open := func(p *pod, typ, port int) (fd int) {
		p.ns.Do(b, func() (err error) {
			if fd, err = unix.Socket([]int{unix.AF_INET, unix.AF_INET6}[family], typ|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
				return err
			}
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 60}); err != nil {
				return err
			}
			return unix.Bind(fd, at(p, port))
		})
		b.Cleanup(func() { _ = unix.Close(fd) })
		return fd
	}
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	pair := func(from int) (one, other int) {
		one, other = open(w.a, unix.SOCK_DGRAM, from), open(w.b, unix.SOCK_DGRAM, port)
		must(unix.Connect(one, e.server))
		must(unix.Connect(other, at(w.a, from)))
		return one, other
	}
	e.one, e.other = pair(own)
	e.udp, e.udpPeer = pair(own + 1)
	e.listener = open(w.b, unix.SOCK_STREAM, port)
	must(unix.Listen(e.listener, 128))
	e.tcp = open(w.a, unix.SOCK_STREAM, 0)
	must(unix.Connect(e.tcp, e.server))
	var err error
	e.tcpPeer, _, err = unix.Accept4(e.listener, unix.SOCK_CLOEXEC)
	must(err)
	b.Cleanup(func() { _ = unix.Close(e.tcpPeer) })
	for _, fd := range []int{e.tcp, e.tcpPeer} {
		must(unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
		must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20))
	}
	e.client = sockets(b, w.a.ns, family)
	return e
}

// sockets returns what makes TCP sockets of a namespace, by a thread that stays there.
func sockets(b *testing.B, ns *nstest.NS, family int) func() int {
	ask, made := make(chan struct{}), make(chan int)
	go ns.Do(b, func() error {
		for range ask {
			fd, err := unix.Socket([]int{unix.AF_INET, unix.AF_INET6}[family], unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				fd = -1 // connect says so
			}
			made <- fd
		}
		return nil
	})
	b.Cleanup(func() { close(ask) })
	return func() int { ask <- struct{}{}; return <-made }
}

// move sends bytes and takes them at the other end.
func (e *ends) move(from, to, size int) error {
	for sent := 0; sent < size; {
		n, err := unix.Write(from, e.buffer[:size-sent])
		if err != nil {
			return fmt.Errorf("send: %w", err)
		}
		sent += n
		for n > 0 {
			got, err := unix.Read(to, e.buffer)
			if err != nil {
				return fmt.Errorf("receive: %w", err)
			}
			n -= got
		}
	}
	return nil
}

func (e *ends) thereAndBack(one, other int) error {
	if err := e.move(one, other, 64); err != nil {
		return err
	}
	return e.move(other, one, 64)
}

// connection makes one, says a word and has it answered, and ends it.
func (e *ends) connection() error {
	c := e.client()
	if err := unix.Connect(c, e.server); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	s, _, err := unix.Accept4(e.listener, unix.SOCK_CLOEXEC)
	if err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	if err := e.thereAndBack(c, s); err != nil {
		return err
	}
	// A reset leaves no socket that waits, whose number nobody could use for a minute.
	_ = unix.SetsockoptLinger(c, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	_ = unix.Close(c)
	return unix.Close(s)
}
