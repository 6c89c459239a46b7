package pathmtu

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// worth is how many times the tun's MTU a path must carry: between links of 1500 bytes nothing is gained (adr/0037).
	worth = 2
	// Widest bounds packets to a peer's pods: what a link of 9216 bytes carries, the largest that switches have.
	Widest = 9136
	// probeTOS is that of echoes larger than the tun's MTU, by which alone they have a route that says so. Of the six bits kernels may compare three,
	// and none of the DSCPs that have a name ends as these do (IANA: dscp-registry).
	probeTOS = 0x0c
	// recheck is how often a wide path is looked at again while it is in use, recheckEach what is between two such looks of one node: they
	// cost as many bytes as they prove.
	recheck, recheckEach = 9 * time.Second, 100 * time.Millisecond
)

// Wider knows the routes that say more than the tun's MTU.
type Wider interface {
	// Now are the ranges of peers' pods that have one, and how many bytes it says.
	Now() (map[netip.Prefix]int, error)
	// AddProbe gives echoes of a TOS to a peer's tailnet address one over tun, RemoveProbe takes it away.
	AddProbe(tun string, to netip.Addr, tos, mtu int) error
	RemoveProbe(tun string, to netip.Addr, tos int) error
}

// Widen has w look for paths that carry more than the tun's MTU, before Run. Routes of an earlier process are believed until their peers are
// seen.
func (w *Watch) Widen(wider Wider) {
	w.wider = wider
	if were, err := wider.Now(); err == nil { // else they are proven anew
		w.were = were
	}
}

// Wide are the peers' ranges of pods to which more than the tun's MTU goes, and how many bytes. nil where nobody asks for that.
func (w *Watch) Wide() map[netip.Prefix]int {
	if w.wider == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	out := map[netip.Prefix]int{}
	maps.Copy(out, w.were)
	for _, s := range w.peers {
		for _, p := range s.Pods {
			if s.wide > 0 {
				out[p] = s.wide
			}
		}
	}
	return out
}

// State is how many of the peers have a wide path, and what the widest carries in bytes.
type State struct{ Peers, Of, Bytes int }

// State is nil where nobody asks for wide paths.
func (w *Watch) State() *State {
	if w.wider == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s := &State{Of: len(w.peers)}
	for _, p := range w.peers {
		if p.wide > 0 {
			s.Peers, s.Bytes = s.Peers+1, max(s.Bytes, p.wide)
		}
	}
	return s
}

// room is what the kernel says that a path carries, 0 where that is not worth more than the tun's MTU.
func (w *Watch) room(s *state) int {
	_, full := w.tunnel()
	mtu, err := w.ask(s.Endpoint.Addr())
	if err != nil || full == 0 {
		return 0
	}
	return Worthwhile(mtu, s.Endpoint.Addr().Is6(), full)
}

// Worthwhile is what an underlay of so many bytes carries inside the tunnel, 0 where that is not worth more than the tun's MTU.
func Worthwhile(underlay int, ipv6 bool, tunMTU int) int {
	if n := min(Widest, Inside(underlay, ipv6)); n >= worth*tunMTU {
		return n
	}
	return 0
}

// narrow ends what the path does not carry by the kernel's own word, without asking anybody.
func (w *Watch) narrow(changed func(), s *state) {
	if w.wider != nil && s.wide > 0 {
		w.widen(changed, s, min(s.wide, w.room(s)))
	}
}

// proveWide looks whether a path carries as much as the kernel thinks. Nothing larger than the tun's MTU goes to a peer's pods that has not
// come there and back just before.
func (w *Watch) proveWide(ctx context.Context, changed func(), s *state) {
	room := 0
	if w.wider != nil && s.Addr.Is4() { // IPv6 has no routes by TOS
		room = w.room(s)
	}
	if room == 0 || time.Now().Before(s.nextWide) {
		return
	}
	tun, full := w.tunnel()
	proven, gone := false, false // gone: somebody has taken the echoes' route
	if err := w.wider.AddProbe(tun, s.Addr, probeTOS, room); err == nil {
		for try := 0; try < 3 && !proven && !gone && ctx.Err() == nil; try++ {
			err := w.echoWide(ctx, tun, s.Addr, room)
			proven = err == nil && w.room(s) == room // else a router has said so, and what came back went in pieces
			gone = errors.Is(err, unix.EMSGSIZE)
		}
	}
	switch {
	case proven:
		s.nextWide = time.Now().Add(max(recheck, time.Duration(len(w.list()))*recheckEach))
		w.widen(changed, s, room)
	case w.echo(ctx, tun, s.Addr, full) != nil || ctx.Err() != nil:
		// Nothing passes for the moment, of any size, or this process ends: what was proven stays.
		s.nextWide = time.Now().Add(recheck)
	default:
		_ = w.wider.RemoveProbe(tun, s.Addr, probeTOS) // it leads nothing but echoes
		s.nextWide = time.Now().Add(patient)
		if gone || s.wide > 0 || w.room(s) != room {
			s.nextWide = time.Now().Add(again)
		}
		w.widen(changed, s, 0)
	}
}

func (w *Watch) widen(changed func(), s *state, bytes int) {
	if s.wide == bytes {
		return
	}
	w.mu.Lock()
	s.wide = bytes
	w.mu.Unlock()
	changed()
}
