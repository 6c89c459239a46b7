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
	"time"
)

// Flows are what a pod sends while something is restarted: datagrams, each of which comes back.
type Flows struct {
	To []netip.AddrPort `json:"to"`
	// Back is how long the last flow may take, from the end of standard input, to be answered again.
	Back time.Duration `json:"back"`
}

// Flowing says that all flows are under way, but for the silent ones, which were not answered yet.
type Flowing struct {
	Silent []netip.AddrPort `json:"silent"`
}

// Flow is what became of one, since Flowing was said.
type Flow struct {
	Sent int `json:"sent"`
	Lost int `json:"lost"`
	// Gap is the longest time from a datagram that was lost to the next one that was not, by when they were sent: a sender that had to wait for its turn
	// has lost nothing.
	Gap time.Duration `json:"gap"`
	// Back: a datagram was answered that was sent after the end of standard input.
	Back bool `json:"back"`
}

const (
	// flowEvery is between two datagrams of a flow, flowSize their payload in bytes, which begins with their number.
	flowEvery, flowSize, numberSize = 20 * time.Millisecond, 64, 8
	// flowCalm is how long flows go on at least when standard input has ended, flowDrain how long the last answers may take.
	flowCalm, flowDrain = 2 * time.Second, time.Second
)

// SendFlows reads Flows as JSON, sends them, writes Flowing, and when its input ends and all are answered again a Flow for each.
func SendFlows(ctx context.Context, in io.Reader, out io.Writer) error {
	d := json.NewDecoder(in)
	var f Flows
	if err := d.Decode(&f); err != nil {
		return fmt.Errorf("read the flows: %w", err)
	}
	ended, end := context.WithCancel(ctx)
	defer end()
	go func() { // ends with the input, which nothing can interrupt
		_, _ = io.Copy(io.Discard, io.MultiReader(d.Buffered(), in)) // an error is an end
		end()
	}()
	flows := make([]*flow, len(f.To))
	sending, stop := context.WithCancel(ctx)
	var senders, readers sync.WaitGroup
	defer readers.Wait()
	defer senders.Wait()
	defer stop()
	for i, to := range f.To {
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		if err != nil {
			return plain(err)
		}
		defer c.Close()
		flows[i] = &flow{conn: c}
		senders.Go(func() { flows[i].send(sending) })
		readers.Go(flows[i].receive)
	}
	all := func(since time.Time) bool {
		return !slices.ContainsFunc(flows, func(f *flow) bool { return !f.answeredSince(since) })
	}
	waitFor(ended, answerWithin, func() bool { return all(time.Time{}) })
	begun, said := time.Now(), Flowing{Silent: []netip.AddrPort{}}
	for i, one := range flows {
		if !one.answeredSince(time.Time{}) {
			said.Silent = append(said.Silent, f.To[i])
		}
		one.since(begun)
	}
	if err := json.NewEncoder(out).Encode(said); err != nil {
		return err
	}
	<-ended.Done()
	last := time.Now()
	waitFor(ctx, max(f.Back, flowCalm), func() bool { return time.Since(last) >= flowCalm && all(last) })
	stop()
	senders.Wait()
	stopped := time.Now()
	waitFor(ctx, flowDrain, func() bool { return !slices.ContainsFunc(flows, func(f *flow) bool { return f.open() }) })
	results := make([]Flow, len(flows))
	for i, f := range flows {
		f.conn.Close()
		results[i] = f.result(last, stopped)
	}
	readers.Wait()
	return json.NewEncoder(out).Encode(results)
}

// waitFor looks until it is so, ctx ends or the time is over.
func waitFor(ctx context.Context, limit time.Duration, so func() bool) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	_ = every(ctx, func() (bool, error) { return so(), nil }) // the caller looks what is so
}

// flow is one that is under way.
type flow struct {
	conn *net.UDPConn
	mu   sync.Mutex
	// By number, from first on: when it was sent, and whether it came back.
	first    uint64
	sent     []time.Time
	answered []bool
}

func (f *flow) send(ctx context.Context) {
	tick := time.NewTicker(flowEvery)
	defer tick.Stop()
	datagram := make([]byte, flowSize)
	for {
		f.mu.Lock()
		binary.BigEndian.PutUint64(datagram, f.first+uint64(len(f.sent)))
		f.sent, f.answered = append(f.sent, time.Now()), append(f.answered, false)
		f.mu.Unlock()
		_, _ = f.conn.Write(datagram) // what cannot be sent is lost
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// receive ends with the socket.
func (f *flow) receive() {
	buf := make([]byte, flowSize)
	for {
		n, err := f.conn.Read(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n != flowSize {
			continue // an ICMP error, which says once that something was lost
		}
		f.mu.Lock()
		if i := binary.BigEndian.Uint64(buf) - f.first; i < uint64(len(f.answered)) {
			f.answered[i] = true
		}
		f.mu.Unlock()
	}
}

// answeredSince reports whether one came back that was sent since then.
func (f *flow) answeredSince(t time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := len(f.sent) - 1; i >= 0 && !f.sent[i].Before(t); i-- {
		if f.answered[i] {
			return true
		}
	}
	return false
}

// since forgets what was sent before.
func (f *flow) since(t time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for n < len(f.sent) && f.sent[n].Before(t) {
		n++
	}
	f.first, f.sent, f.answered = f.first+uint64(n), f.sent[n:], f.answered[n:]
}

// open reports whether the last one may still come back.
func (f *flow) open() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.sent) > 0 && !f.answered[len(f.sent)-1]
}

// result counts. last is when the input ended, stopped when the sending did.
func (f *flow) result(last, stopped time.Time) Flow {
	back := f.answeredSince(last)
	f.mu.Lock()
	defer f.mu.Unlock()
	r := Flow{Sent: len(f.sent), Back: back}
	var dark time.Time
	for i, at := range f.sent {
		switch {
		case !f.answered[i]:
			if r.Lost++; dark.IsZero() {
				dark = at
			}
		case !dark.IsZero():
			r.Gap, dark = max(r.Gap, at.Sub(dark)), time.Time{}
		}
	}
	if !dark.IsZero() {
		r.Gap = max(r.Gap, stopped.Sub(dark))
	}
	return r
}
