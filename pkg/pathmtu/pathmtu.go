// Package pathmtu learns how large a packet inside the tunnel may be on the paths to peers.
//
// What the kernel knows of the way to a peer's endpoint counts first: the link's MTU, and what routers have said to tailscaled's
// own packets. An echo of full size through the tunnel makes routers say it before pods need it, shows where they are silent, and
// where a path carries more again: what the kernel has learned expires after ten minutes, and that alone proves nothing.
//
// Where it is asked to, it proves paths that carry more than the tun's MTU in the same way.
package pathmtu

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// again is the least time between two probes of a peer, patient that between those that cannot tell more soon.
	again, patient = time.Minute, 10 * time.Minute
	// glance is how often the kernel is asked at least what it knows, and glanceEach what is left between two questions of one
	// round: it tells of no change by itself. A question takes some 20 µs.
	glance, glanceEach = time.Second, 10 * time.Millisecond
	// memory is how long a peer that is gone is remembered: Headscale's restart takes all their routes away for a while.
	memory = 10 * time.Minute
	// budget bounds the probes after one Set: with hundreds of peers that do not answer, the kernel shall be asked in between.
	budget = 5 * time.Second
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
	// Pods are its ranges of pods.
	Pods []netip.Prefix
}

// Path is a path that carries less than the tunnel's MTU.
type Path struct {
	Peer string `json:"peer"`
	// Bytes of the largest packet inside the tunnel.
	Bytes int `json:"bytes"`
	// Silent: packets vanish and no router says why.
	Silent bool `json:"silent,omitempty"`
}

// Err says that a path carries too little, where no router does: nothing but TCP is helped then.
func (p Path) Err() error {
	if !p.Silent {
		return nil
	}
	return reconcile.Warning{Err: findings.Errorf(findings.PathSmall, "path to %s carries %d bytes, and no router says so: TCP of pods is clamped, but larger UDP packets vanish; let "+
		"ICMP \"fragmentation needed\" pass on the way, or set network.mtu to %[2]d (IPv6 pods need 1280) on every node", p.Peer, p.Bytes)}
}

type state struct {
	Peer
	bytes  int // 0: the tunnel's MTU passes, as far as is known
	silent bool
	idle   bool      // its endpoint is not known now
	seen   time.Time // by Set
	next   time.Time // when it may be probed again

	wide     int       // bytes beyond the tun's MTU that were proven, 0: none
	nextWide time.Time // when that may be looked at again
}

// Watch keeps what is known of all peers. Make it with New.
type Watch struct {
	kick chan struct{}
	echo func(ctx context.Context, tun string, to netip.Addr, size int) error
	// echoWide is one of more bytes than the tun's MTU.
	echoWide func(ctx context.Context, tun string, to netip.Addr, size int) error
	wider    Wider // nil: nothing larger than the tun's MTU is wanted
	ask      func(endpoint netip.Addr) (int, error)

	mu     sync.Mutex
	tun    string
	tunMTU int
	peers  map[netip.Addr]*state
	before Path                 // from before our start, until its peer is seen
	were   map[netip.Prefix]int // wide paths from before our start, until their peers are seen
	began  time.Time
}

// New returns a Watch without peers. It believes what was known before until it knows better, so that connections that are
// made during a restart fit too.
func New(before Path) *Watch {
	if before.Bytes < Floor {
		before = Path{}
	}
	return &Watch{before: before, began: time.Now(), kick: make(chan struct{}, 1), echo: echo, echoWide: echoWide, ask: underlay, peers: map[netip.Addr]*state{}}
}

// Set says which peers there are. What is known of one stays while its endpoint is the same or not known; of a new endpoint the
// old one's size is believed until it is probed.
func (w *Watch) Set(tun string, tunMTU int, peers []Peer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tun, w.tunMTU = tun, tunMTU
	now, taken := map[netip.Addr]*state{}, map[netip.Prefix]bool{}
	for _, p := range peers {
		s, ok := w.peers[p.Addr]
		switch {
		case !ok:
			s = &state{Peer: p}
			for _, pods := range p.Pods {
				s.wide = max(s.wide, w.were[pods])
			}
			if p.Name == w.before.Peer {
				s.bytes, s.silent = w.before.Bytes, w.before.Silent
				w.before = Path{}
			}
		case p.Endpoint.IsValid() && p.Endpoint != s.Endpoint:
			s = &state{Peer: p, bytes: s.bytes, silent: s.silent, wide: s.wide}
		}
		s.Pods = p.Pods
		s.idle, s.seen = !p.Endpoint.IsValid(), time.Now()
		now[p.Addr] = s
		for _, pods := range p.Pods {
			taken[pods] = true
			delete(w.were, pods)
		}
	}
	for addr, s := range w.peers {
		if _, ok := now[addr]; !ok && time.Since(s.seen) < memory {
			s.idle = true
			// What was proven of its path says nothing of the path to who has its range now.
			s.Pods = slices.DeleteFunc(slices.Clone(s.Pods), func(pods netip.Prefix) bool { return taken[pods] })
			now[addr] = s
		}
	}
	if time.Since(w.began) > memory {
		w.before = Path{}
		clear(w.were)
	}
	w.peers = now
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
// Between two Sets it asks the kernel alone: a path that shrinks costs pods' connections until it is known.
func (w *Watch) Run(ctx context.Context, changed func()) {
	for {
		probe, wait := false, max(glance, time.Duration(len(w.list()))*glanceEach)
		select {
		case <-ctx.Done():
			return
		case <-w.kick:
			probe = true
		case <-time.After(wait):
		}
		began, peers := time.Now(), w.list()
		peers = slices.DeleteFunc(peers, func(s *state) bool {
			w.narrow(changed, s)
			return w.learn(changed, s, w.carries(s))
		})
		for _, s := range peers {
			if probe && time.Since(began) < budget && ctx.Err() == nil {
				w.probe(ctx, changed, s)
				w.proveWide(ctx, changed, s)
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

// carries is what the kernel knows of the path, at most the tun's MTU. Only Run's goroutine changes a state, which Set merely moves.
func (w *Watch) carries(s *state) int {
	_, full := w.tunnel()
	mtu, err := w.ask(s.Endpoint.Addr())
	if err != nil {
		return full // no route now: nothing passes, of any size
	}
	return min(full, Inside(mtu, s.Endpoint.Addr().Is6()))
}

// probe looks whether a path carries as much as the kernel thinks.
func (w *Watch) probe(ctx context.Context, changed func(), s *state) {
	tun, full := w.tunnel()
	if full == 0 || time.Now().Before(s.next) {
		return
	}
	s.next = time.Now().Add(patient)
	shrunk := false // the tun itself has another MTU for the moment, which the daemon will put right
	// One echo may be lost for another reason than its size.
	passes := func(size, tries int) bool {
		for range tries {
			err := w.echo(ctx, tun, s.Addr, size)
			if err == nil {
				return true
			}
			shrunk = shrunk || errors.Is(err, unix.EMSGSIZE)
		}
		return false
	}
	whole := passes(full, 3)
	switch {
	case shrunk:
		s.next = time.Now().Add(again)
	case w.learn(changed, s, w.carries(s)): // a router has said so; what came back went in pieces
		s.next = time.Now().Add(again)
	case whole:
		w.set(changed, s, 0, false)
	case passes(Floor, 1): // else it answers nothing, which tells nothing of sizes
		for _, size := range ladder {
			if size < full && passes(size, 2) {
				// A path that was dead for a moment looks the same, but for what comes after.
				if !passes(full, 2) && !shrunk {
					w.set(changed, s, size, true)
				}
				return
			}
		}
	}
}

func (w *Watch) tunnel() (name string, mtu int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.tun, w.tunMTU
}

// learn keeps a size that is less than the tun's MTU, and reports whether it is.
func (w *Watch) learn(changed func(), s *state, bytes int) bool {
	if _, full := w.tunnel(); bytes >= full {
		return false
	}
	w.set(changed, s, bytes, false)
	return true
}

func (w *Watch) set(changed func(), s *state, bytes int, silent bool) {
	if s.bytes == bytes && s.silent == silent {
		return
	}
	before, _ := w.Smallest()
	w.mu.Lock()
	s.bytes, s.silent = bytes, silent
	w.mu.Unlock()
	if after, _ := w.Smallest(); after != before {
		changed()
	}
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
	if err != nil {
		return 0, err
	}
	if len(routes) == 0 {
		return 0, errors.New("the kernel names no route")
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
