// Package live sends a marked packet from one end of a connection, and sees on both nodes which links it passes, which rules count it, and
// what comes back.
package live

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/policy/report"
)

const (
	// tries are sent at most, each when patience has passed since the one before without an answer.
	tries    = 3
	patience = 700 * time.Millisecond
	// settle is how long the last packet may take on one machine, and to be logged.
	settle = 200 * time.Millisecond
	// longest is how long a far side looks on where nobody tells it to stop.
	longest = 30 * time.Second
	// logReady bounds the wait for the daemon to log what policies deny.
	logReady = 3 * time.Second
)

// Side is what one node saw of a probe.
type Side struct {
	// Sent is how many packets, From where; the far side sends none. Error is why none could be.
	Sent  int    `json:"sent,omitempty"`
	From  string `json:"from,omitempty"`
	Error string `json:"error,omitempty"`
	// Seen is where they, and what came back, passed. Missed packets could not be looked at.
	Seen   []Count `json:"seen"`
	Missed uint32  `json:"missed,omitempty"`
	// Drops are the counters of our nftables that counted meanwhile, by any packets. Denied are the packets of this connection that
	// policies did.
	Drops  map[string]uint64 `json:"drops,omitempty"`
	Denied []report.Drop     `json:"denied,omitempty"`
}

// Passed is how often a kind of packet passed a link, "" for any.
func (s Side) Passed(link string, out bool, kinds ...Kind) (n int) {
	for _, c := range s.Seen {
		if (link == "" || c.Link == link) && c.Out == out && slices.Contains(kinds, c.Kind) {
			n += c.N
		}
	}
	return n
}

// Place is a node on which to look, and to send from.
type Place struct {
	Probe
	// Socket is the daemon's.
	Socket string
	// Namespace is the open network namespace of the pod that sends, -1 where it cannot be opened. Link is that pod's, "" where the node sends.
	Namespace int
	Link      string
}

// look is one that is under way.
type look struct {
	tap    *tap
	tables *nft.Tables
	before map[string]uint64
	stop   func()

	mu     sync.Mutex
	denied []report.Drop
}

func (p Place) look(ctx context.Context) (*look, error) {
	l := &look{tables: nft.New()}
	l.before, _ = l.tables.Drops() // without tables nothing is dropped by them
	l.stop = p.follow(ctx, l)
	var err error
	if l.tap, err = open(p.Probe); err != nil {
		l.stop()
		return nil, err
	}
	return l, nil
}

// follow has the daemon log what policies deny. Without a daemon, or policies, nothing is learned.
func (p Place) follow(ctx context.Context, l *look) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ready, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		_ = report.Follow(ctx, p.Socket, "", "", func(e report.Event) error {
			switch {
			case e.Started != nil:
				close(ready)
			case e.Drop != nil && p.concerns(*e.Drop):
				l.mu.Lock()
				l.denied = append(l.denied, *e.Drop)
				l.mu.Unlock()
			}
			return nil
		})
	}()
	select {
	case <-ready:
	case <-done:
	case <-time.After(logReady):
	}
	return func() { cancel(); <-done }
}

func (p Probe) concerns(d report.Drop) bool {
	port := p.Protocol
	if p.Protocol != "icmp" {
		port = fmt.Sprintf("%d/%s", p.Port, p.Protocol)
	}
	return d.Port == port && slices.Contains(d.To.Addrs, p.Dst) && slices.Contains(d.From.Addrs, p.Src)
}

// end waits for what is on its way, and tells what was seen.
func (l *look) end(ctx context.Context) (s Side) {
	pause(ctx, settle)
	l.stop()
	s.Seen, s.Missed = l.tap.end()
	s.Denied = l.denied
	now, _ := l.tables.Drops()
	for reason, n := range now {
		if more := n - l.before[reason]; more > 0 {
			if s.Drops == nil {
				s.Drops = map[string]uint64{}
			}
			s.Drops[reason] = more
		}
	}
	return s
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// Send sends probes until one is answered.
func (p Place) Send(ctx context.Context) (Side, error) {
	l, err := p.look(ctx)
	if err != nil {
		return Side{}, err
	}
	s, err := senderOf(p.Probe, p.Namespace, p.Link)
	sent := 0
	if err == nil {
		defer s.close()
		for sent < tries && ctx.Err() == nil && !l.tap.answered() {
			if err = s.send(p.packet()); err != nil {
				break
			}
			sent++
			l.await(ctx)
		}
	}
	out := l.end(ctx)
	out.Sent = sent
	if err != nil {
		out.Error = err.Error()
		return out, nil
	}
	out.From = s.from
	return out, ctx.Err()
}

// await waits for an answer.
func (l *look) await(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for ctx.Err() == nil && !l.tap.answered() {
		pause(ctx, 20*time.Millisecond)
	}
}

// Ready is what Watch writes once it sees.
type Ready struct {
	Ready bool `json:"ready"`
}

// Watch looks on at the far side: it writes Ready, and a Side when in has ended.
func (p Place) Watch(ctx context.Context, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, longest)
	defer cancel()
	l, err := p.look(ctx)
	if err != nil {
		return err
	}
	lines := json.NewEncoder(out)
	if err := lines.Encode(Ready{true}); err != nil {
		l.end(ctx)
		return err
	}
	ended := make(chan struct{})
	go func() { // it ends with the process at the latest
		defer close(ended)
		_, _ = io.Copy(io.Discard, in)
	}()
	select {
	case <-ended:
	case <-ctx.Done():
	}
	return lines.Encode(l.end(ctx))
}
