package main

import (
	"context"
	"iter"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/control/tsp"
	"tailscale.com/types/key"
)

// look is how often it is looked whether all have all routes.
const look = 10 * time.Millisecond

// tailnet is all nodes, and what each has seen of the others.
type tailnet struct {
	server    string
	authKey   string
	serverKey key.MachinePublic
	// decoding bounds how many maps are unpacked at once, and so the memory for them.
	decoding       chan struct{}
	received, sent atomic.Int64
	nodes          sync.WaitGroup

	mu    sync.Mutex
	all   map[netip.Prefix]*node // by their routes
	seen  []float64
	polls int
}

func newTailnet(ctx context.Context, server, authKey string) (*tailnet, error) {
	t := &tailnet{server: server, authKey: authKey, decoding: make(chan struct{}, runtime.NumCPU()), all: map[netip.Prefix]*node{}}
	var err error
	if t.serverKey, err = tsp.DiscoverServerKey(ctx, server); err != nil {
		return nil, err
	}
	return t, nil
}

// join starts nodes, parallel at once, until they have registered.
func (t *tailnet) join(ctx context.Context, c command, tell func(event) error) error {
	slots := make(chan struct{}, max(1, c.Parallel))
	for _, n := range c.Join {
		x, err := newNodeOf(t, n)
		if err != nil {
			return err
		}
		slots <- struct{}{}
		t.mu.Lock()
		x.began = time.Now()
		t.all[n.Route] = x
		t.mu.Unlock()
		t.nodes.Go(func() {
			defer x.http.Close()
			x.register(ctx)
			<-slots
			if ctx.Err() == nil && tell(event{Joined: n.Name, NodeKey: x.key.Public().String()}) == nil {
				x.poll(ctx)
			}
		})
	}
	return nil
}

// has says what a node's peers may send from now.
func (t *tailnet) has(x *node, allowed iter.Seq[[]netip.Prefix]) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	routes := map[netip.Prefix]bool{}
	for list := range allowed {
		for _, r := range list {
			other := t.all[r]
			if other == nil || other == x {
				continue
			}
			routes[r] = true
			if x.had[r] {
				continue
			}
			if x.had[r] = true; x.first.Before(other.began) {
				t.seen = append(t.seen, now.Sub(other.began).Seconds())
			}
		}
	}
	x.routes = routes
}

// begins says that a node polls anew.
func (t *tailnet) begins(x *node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if x.first.IsZero() {
		x.first = time.Now()
	}
	x.polls, x.routes = true, nil
	t.polls++
}

// forget has every node count as one that does not poll.
func (t *tailnet) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, x := range t.all {
		x.polls, x.routes = false, nil
	}
}

// wait waits until all poll and have the routes of all others.
func (t *tailnet) wait(ctx context.Context) error {
	for tick := time.NewTicker(look); !t.complete(); {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (t *tailnet) complete() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, x := range t.all {
		if !x.polls || len(x.routes) < len(t.all)-1 {
			return false
		}
	}
	return true
}

// take is what there is to tell since it was asked last.
func (t *tailnet) take() result {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := result{Seen: t.seen, Polls: t.polls, Received: t.received.Swap(0), Sent: t.sent.Swap(0)}
	t.seen, t.polls = nil, 0
	return r
}

// counted counts the bytes of a connection.
type counted struct {
	net.Conn
	t *tailnet
}

func (c counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.t.received.Add(int64(n))
	return n, err
}

func (c counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.t.sent.Add(int64(n))
	return n, err
}

func (t *tailnet) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return counted{c, t}, nil
}
