// Package pathmtu learns how large a packet inside the tunnel may be on the paths to peers.
//
// What the kernel knows of the way to a peer's endpoint counts first: the link's MTU, and what routers have said to tailscaled's
// own packets. An echo of full size through the tunnel makes routers say it before pods need it, shows where they are silent, and
// where a path carries more again: what the kernel has learned expires after ten minutes, and that alone proves nothing.
package pathmtu

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/headcni/headcni/pkg/config/names"
)

const (
	// again is the least time between two probes of a peer, patient that between those that cannot tell more soon.
	again, patient = time.Minute, 10 * time.Minute
	// Floor bounds what a forged answer of a router can do. TCP must live with it (RFC 9293: 536 bytes and headers).
	Floor = 576
)

// ladder are the sizes that are tried where full ones vanish and no router says why.
var ladder = [...]int{1232, 1152, 1024, 800, Floor}

// Peer is a node with pods and a direct path.
type Peer struct {
	Name string
	// Addr is its tailnet address, Endpoint where tailscaled sends to; the zero AddrPort where that is not known now.
	Addr     netip.Addr
	Endpoint netip.AddrPort
}

// Path is a path that carries less than the tunnel's MTU.
type Path struct {
	Peer string `json:"peer"`
	// Bytes of the largest packet inside the tunnel.
	Bytes int `json:"bytes"`
	// Silent: packets vanish and no router says why.
	Silent bool `json:"silent,omitempty"`
}

type state struct {
	Peer
	bytes  int // 0: the tunnel's MTU passes, as far as is known
	silent bool
	idle   bool      // its endpoint is not known now
	next   time.Time // when it may be probed again
}

// Watch keeps what is known of all peers. Make it with New.
type Watch struct {
	kick chan struct{}
	echo func(ctx context.Context, tun string, to netip.Addr, size int) bool
	ask  func(endpoint netip.Addr) (int, error)

	mu     sync.Mutex
	tun    string
	tunMTU int
	peers  map[netip.Addr]*state
	before Path // from before our start, until the first Set
}

// New returns a Watch without peers. It believes what was known before until it knows better, so that connections that are
// made during a restart fit too.
func New(before Path) *Watch {
	if before.Bytes < Floor {
		before = Path{}
	}
	return &Watch{before: before, kick: make(chan struct{}, 1), echo: echo, ask: underlay, peers: map[netip.Addr]*state{}}
}

// Set says which peers there are. What is known of one stays while its endpoint is the same or not known; of a new endpoint the
// old one's size is believed until it is probed.
func (w *Watch) Set(tun string, tunMTU int, peers []Peer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tun, w.tunMTU = tun, tunMTU
	now := map[netip.Addr]*state{}
	for _, p := range peers {
		s, ok := w.peers[p.Addr]
		switch {
		case !ok:
			s = &state{Peer: p}
			if p.Name == w.before.Peer {
				s.bytes, s.silent = w.before.Bytes, w.before.Silent
			}
		case p.Endpoint.IsValid() && p.Endpoint != s.Endpoint:
			s = &state{Peer: p, bytes: s.bytes, silent: s.silent}
		}
		s.idle = !p.Endpoint.IsValid()
		now[p.Addr] = s
	}
	w.peers, w.before = now, Path{}
	select {
	case w.kick <- struct{}{}:
	default: // one is waiting already
	}
}

// Smallest is the path that carries least, false where all carry the tunnel's MTU.
func (w *Watch) Smallest() (Path, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	least := w.before
	for _, s := range w.peers {
		if s.bytes != 0 && (least.Bytes == 0 || s.bytes < least.Bytes || s.bytes == least.Bytes && s.Name < least.Peer) {
			least = Path{s.Name, s.bytes, s.silent}
		}
	}
	return least, least.Bytes != 0
}

// Run looks after each Set until ctx ends, and calls changed where Smallest has changed. Peers are probed one after the other.
func (w *Watch) Run(ctx context.Context, changed func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.kick:
		}
		for _, s := range w.list() {
			before, _ := w.Smallest()
			w.look(ctx, s)
			if after, _ := w.Smallest(); after != before {
				changed()
			}
		}
	}
}

func (w *Watch) list() []*state {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []*state
	for _, s := range w.peers {
		if !s.idle {
			out = append(out, s)
		}
	}
	return out
}

// look asks the kernel, and probes where that does not settle it. Only Run's goroutine changes a state, which Set merely moves.
func (w *Watch) look(ctx context.Context, s *state) {
	w.mu.Lock()
	tun, full := w.tun, w.tunMTU
	w.mu.Unlock()
	if full == 0 {
		return
	}
	carries := func() int {
		mtu, err := w.ask(s.Endpoint.Addr())
		if err != nil {
			return full // no route now: nothing passes, of any size
		}
		return min(full, Inside(mtu, s.Endpoint.Addr().Is6()))
	}
	if n := carries(); n < full {
		w.learn(s, n, false)
		return
	}
	if time.Now().Before(s.next) {
		return
	}
	s.next = time.Now().Add(again)
	passes := func(size int) bool { return w.echo(ctx, tun, s.Addr, size) }
	switch {
	case passes(full) || passes(full) || passes(full):
		if carries() == full { // else the packet went in pieces
			s.next = time.Now().Add(patient) // it may shrink, and no router says so
			w.learn(s, 0, false)
		}
	case carries() < full:
		w.learn(s, carries(), false)
	case !passes(Floor):
		s.next = time.Now().Add(patient) // it answers nothing: this tells nothing of sizes
	default:
		s.next = time.Now().Add(patient)
		for _, size := range ladder {
			if size < full && (passes(size) || passes(size)) {
				w.learn(s, size, true)
				return
			}
		}
	}
}

func (w *Watch) learn(s *state, bytes int, silent bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s.bytes, s.silent = bytes, silent
}

// Inside is the largest packet in the tunnel of which the encrypted one is no larger than mtu: IP and UDP headers, 32 bytes of
// WireGuard's (header 16, tag 16), and its padding to 16 bytes.
func Inside(mtu int, ipv6 bool) int {
	headers := 20 + 8 + 32
	if ipv6 {
		headers += 20
	}
	return max((mtu-headers)/16*16, Floor)
}

// underlay is what the kernel knows of the way that tailscaled's packets to an endpoint take.
func underlay(endpoint netip.Addr) (int, error) {
	routes, err := netlink.RouteGetWithOptions(endpoint.AsSlice(), &netlink.RouteGetOptions{Mark: names.BypassMark})
	if err != nil || len(routes) == 0 {
		return 0, err
	}
	if routes[0].MTU != 0 {
		return routes[0].MTU, nil
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return 0, err
	}
	return link.Attrs().MTU, nil
}
