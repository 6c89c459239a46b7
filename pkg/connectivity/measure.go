package connectivity

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// PerfPort is where pods of a measurement answer, some of them in the node's own network: not in the range of NodePorts.
const PerfPort = 18248

// Way is how a measurement goes from one node to another.
type Way string

const (
	ByPods     Way = "pods"
	ByTailnet  Way = "tailnet"
	ByUnderlay Way = "underlay"
)

// Measure is one measurement that a pod is asked for.
type Measure struct {
	To netip.AddrPort `json:"to"`
	// Time is what all of it may take.
	Time time.Duration `json:"time"`
}

// Measured is what came of a Measure.
type Measured struct {
	// One and Eight are what arrived of one TCP stream and of eight at once, in bit/s.
	One   float64 `json:"one"`
	Eight float64 `json:"eight"`
	// P50 and P99 are of requests and their answers over one TCP connection, one after another.
	P50 time.Duration `json:"p50"`
	P99 time.Duration `json:"p99"`
	// Sent is how much the kernel took of all streams, in bytes, and Congestion how TCP sent it, such as cubic.
	Sent       int64  `json:"sent"`
	Congestion string `json:"congestion,omitempty"`
	Error      string `json:"error,omitempty"`
}

// A connection begins with what it is for, and for how long, in milliseconds: `kind` (1 byte) and a big-endian uint32. Of a bulk the server
// says at the end how much came, and in which time: two big-endian uint64, bytes and nanoseconds. Each request it answers with itself.
const (
	bulk, request = 'b', 'r'

	headLen, replyLen, requestLen = 5, 16, 64
	// longestBulk is what a server takes part in; a bulk is measured when a quarter of its time is over, and TCP fast.
	longestBulk, warmUp = time.Minute, 4
	blockLen            = 1 << 17
	many                = 8
	// perfSlack is what a connection may take beside, dialFor how long the other pod may take to listen and to answer.
	perfSlack, dialFor = 5 * time.Second, 10 * time.Second
)

// ServePerf answers measurements at addresses, else at all, until ctx ends.
func ServePerf(ctx context.Context, port int, addrs ...netip.Addr) error {
	where := []string{fmt.Sprintf(":%d", port)}
	if len(addrs) > 0 {
		where = nil
	}
	for _, a := range addrs {
		where = append(where, at(a, port))
	}
	ctx, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	failed := make(chan error, len(where))
	for _, w := range where {
		l, err := net.Listen("tcp", w)
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { l.Close() })
		wg.Go(func() { failed <- acceptPerf(ctx, l) })
	}
	if err := <-failed; ctx.Err() == nil {
		return err
	}
	return nil
}

// acceptPerf serves a listener's connections, which end with ctx.
func acceptPerf(ctx context.Context, l net.Listener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		wg.Go(func() {
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			_ = answerPerf(c) // whoever asked sees that the connection has ended
		})
	}
}

// answerPerf serves one connection.
func answerPerf(c net.Conn) error {
	head := make([]byte, headLen)
	if err := errors.Join(c.SetDeadline(time.Now().Add(perfSlack)), readFull(c, head)); err != nil {
		return err
	}
	length := min(time.Duration(binary.BigEndian.Uint32(head[1:]))*time.Millisecond, longestBulk)
	if err := c.SetDeadline(time.Now().Add(length + perfSlack)); err != nil {
		return err
	}
	switch head[0] {
	case request:
		_, err := io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, make([]byte, requestLen))
		return err
	case bulk:
		began := time.Now()
		n, took, err := countBulk(c, began.Add(length/warmUp), began.Add(length))
		if err != nil {
			return err
		}
		reply := binary.BigEndian.AppendUint64(nil, uint64(n))
		if _, err := c.Write(binary.BigEndian.AppendUint64(reply, uint64(took))); err != nil {
			return err
		}
		// It ends when the other side has the reply: a close with unread data would overtake that.
		_, err = io.Copy(io.Discard, c)
		return err
	}
	return fmt.Errorf("unknown kind %q", head[0])
}

// countBulk counts what comes between two moments, or until the first read after that. What comes late counts over the time that it took: else a
// stream that waits long for its turn would seem to be fast.
func countBulk(c io.Reader, from, to time.Time) (n int, took time.Duration, err error) {
	buf := make([]byte, blockLen)
	for {
		k, err := c.Read(buf)
		if err != nil {
			return n, took, err
		}
		now := time.Now()
		if now.After(from) {
			n += k
		}
		if now.After(to) {
			return n, now.Sub(from), nil
		}
	}
}

func readFull(r io.Reader, into []byte) error {
	_, err := io.ReadFull(r, into)
	return err
}

// MeasureAll reads a Measure as JSON and writes what came of it.
func MeasureAll(ctx context.Context, in io.Reader, out io.Writer) error {
	var m Measure
	if err := json.NewDecoder(in).Decode(&m); err != nil {
		return fmt.Errorf("read what to measure: %w", err)
	}
	return json.NewEncoder(out).Encode(m.run(ctx))
}

func (m Measure) run(ctx context.Context) (r Measured) {
	one, err := m.bulk(ctx, 1, m.Time*4/10)
	if err == nil {
		var eight carried
		if eight, err = m.bulk(ctx, many, m.Time*4/10); err == nil {
			r = Measured{One: one.rate, Eight: eight.rate, Sent: one.sent + eight.sent, Congestion: one.congestion}
			r.P50, r.P99, err = m.requests(ctx, m.Time*2/10)
		}
	}
	if err != nil {
		r = Measured{Error: plain(err).Error()}
	}
	return r
}

// dial tries until the other pod listens.
func (m Measure) dial(ctx context.Context, kind byte, length time.Duration) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialFor)
	defer cancel()
	for {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", m.To.String())
		if err == nil {
			head := binary.BigEndian.AppendUint32([]byte{kind}, uint32(length/time.Millisecond))
			_, err = c.Write(head)
			if err = errors.Join(err, c.SetDeadline(time.Now().Add(length+perfSlack))); err != nil {
				c.Close()
				return nil, err
			}
			return c.(*net.TCPConn), nil
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(pause):
		}
	}
}

// carried is what came of streams: what arrived, in bit/s, how much was sent in all, in bytes, and how.
type carried struct {
	rate       float64
	sent       int64
	congestion string
}

// bulk sends by so many streams at once.
func (m Measure) bulk(ctx context.Context, streams int, length time.Duration) (sum carried, err error) {
	each, errs := make([]carried, streams), make([]error, streams)
	var wg sync.WaitGroup
	for i := range streams {
		wg.Go(func() { each[i], errs[i] = m.stream(ctx, length) })
	}
	wg.Wait()
	for _, s := range each {
		sum = carried{sum.rate + s.rate, sum.sent + s.sent, s.congestion}
	}
	return sum, errors.Join(errs...)
}

func (m Measure) stream(ctx context.Context, length time.Duration) (s carried, err error) {
	c, err := m.dial(ctx, bulk, length)
	if err != nil {
		return s, err
	}
	s.congestion = congestion(c)
	defer context.AfterFunc(ctx, func() { c.Close() })()
	var wg sync.WaitGroup
	var sent atomic.Int64
	defer func() { wg.Wait(); s.sent = sent.Load() }()
	// What is still under way does not matter: it is thrown away.
	defer func() { _ = c.SetLinger(0); c.Close() }()
	wg.Go(func() {
		for block := make([]byte, blockLen); ; {
			n, err := c.Write(block)
			sent.Add(int64(n))
			if err != nil {
				return // the reader sees it as well
			}
		}
	})
	reply := make([]byte, replyLen)
	if err := readFull(c, reply); err != nil {
		return s, fmt.Errorf("send: %w", err)
	}
	n, took := binary.BigEndian.Uint64(reply), time.Duration(binary.BigEndian.Uint64(reply[8:]))
	if took <= 0 {
		return s, errors.New("send: what answers is no test pod")
	}
	s.rate = float64(n) * 8 / took.Seconds()
	return s, nil
}

// congestion is how the kernel governs a connection, "" where it does not say.
func congestion(c *net.TCPConn) (name string) {
	raw, err := c.SyscallConn()
	if err != nil {
		return ""
	}
	err = raw.Control(func(fd uintptr) {
		name, _ = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION) // the name is for those who look
	})
	if err != nil {
		return ""
	}
	return name
}

// requests sends one after another, and returns how long half of them and all but a hundredth took at most.
func (m Measure) requests(ctx context.Context, length time.Duration) (p50, p99 time.Duration, err error) {
	c, err := m.dial(ctx, request, length)
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	var took []time.Duration
	msg := make([]byte, requestLen)
	for end := time.Now().Add(length); len(took) == 0 || time.Now().Before(end); {
		began := time.Now()
		if _, err = c.Write(msg); err == nil {
			err = readFull(c, msg)
		}
		if err != nil {
			return 0, 0, fmt.Errorf("ask: %w", err)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	return took[len(took)/2], took[len(took)*99/100], nil
}
