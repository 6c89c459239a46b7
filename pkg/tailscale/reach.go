package tailscale

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/headcni/headcni/internal/netset"
)

// Pong is a peer's answer to Ping.
type Pong struct {
	Latency time.Duration
	// Endpoint is the UDP address that the answer came from, "" where it came by Relay, the region's code.
	Endpoint, Relay string
}

// The kinds of pings: one that asks which way there is, and one through WireGuard, which makes a session.
const (
	pingDisco = "disco"
	pingTSMP  = "TSMP"
)

// pong is the LocalAPI's answer to a ping.
type pong struct {
	Err            string // why none was sent, or none came
	LatencySeconds float64
	Endpoint       string
	PeerRelay      string
	DERPRegionID   int // 0: it came directly
	DERPRegionCode string
}

// ErrNoAnswer means that nobody has answered a ping in time.
var ErrNoAnswer = errors.New("no answer")

// sendPing sends one ping, with so many bytes where size is not 0. The error matches ErrNoAnswer where ctx's time is over.
func (c *Client) sendPing(ctx context.Context, kind string, to netip.Addr, size int) (pong, error) {
	q := url.Values{"ip": {to.String()}, "type": {kind}}
	if size > 0 {
		q.Set("size", strconv.Itoa(size))
	}
	var w pong
	err := c.call(ctx, "POST", "ping?"+q.Encode(), nil, &w)
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return pong{}, fmt.Errorf("ping %s: %w", to, ErrNoAnswer)
	case err != nil:
		return pong{}, fmt.Errorf("ping %s: %w", to, err)
	}
	return w, nil
}

// disco is a ping that wants its answer.
func (c *Client) disco(ctx context.Context, to netip.Addr, size int) (pong, error) {
	w, err := c.sendPing(ctx, pingDisco, to, size)
	if err == nil && w.Err != "" {
		err = fmt.Errorf("ping %s: %s", to, w.Err)
	}
	return w, err
}

// Ping asks a peer's tailscaled for an answer by the way that packets take now, with so many bytes where size is not 0. The error matches
// ErrNoAnswer where ctx's time is over.
func (c *Client) Ping(ctx context.Context, to netip.Addr, size int) (Pong, error) {
	w, err := c.disco(ctx, to, size)
	if err != nil {
		return Pong{}, err
	}
	p := Pong{Latency: time.Duration(w.LatencySeconds * float64(time.Second)), Endpoint: w.Endpoint, Relay: w.DERPRegionCode}
	if p.Endpoint == "" && p.Relay == "" {
		p.Relay = w.PeerRelay
	}
	return p, nil
}

// Filter is what this node lets in from the tailnet: the control server's policy, as tailscaled applies it.
type Filter []Match

// Match lets the sources in to the destinations.
type Match struct {
	IPProto []int
	Srcs    []netip.Prefix
	Dsts    []FilterDst
}

// FilterDst is a destination. Ports count for TCP, UDP and SCTP.
type FilterDst struct {
	Net   netip.Prefix
	Ports struct{ First, Last uint16 }
}

// notifyInitialNetMap has the first message of the bus hold the network map, with every change up to then. The debug call for the filter
// leaves out what has changed since tailscaled connected (1.102).
const notifyInitialNetMap = 1 << 3

// ErrNoFilter means that tailscaled has no network map yet, or does not tell it.
var ErrNoFilter = errors.New("tailscaled does not tell what it lets in")

// Filter asks for it.
func (c *Client) Filter(ctx context.Context) (Filter, error) {
	b, err := c.openBus(ctx, notifyInitialNetMap)
	if err != nil {
		return nil, err
	}
	defer b.close()
	timer := time.AfterFunc(callTimeout, b.close)
	defer timer.Stop()
	var n struct {
		NetMap *struct{ PacketFilter Filter }
	}
	if err := b.dec.Decode(&n); err != nil {
		return nil, fmt.Errorf("ask for the packet filter: %w", err)
	}
	if n.NetMap == nil {
		return nil, ErrNoFilter
	}
	return n.NetMap.PacketFilter, nil
}

// Numbers of protocols (IANA).
const (
	ProtoICMP   = 1
	ProtoTCP    = 6
	ProtoUDP    = 17
	ProtoICMPv6 = 58
)

// Accepts reports whether a packet that begins something is let in. Of ICMP tailscaled compares addresses alone.
func (f Filter) Accepts(src, dst netip.Addr, proto int, port uint16) bool {
	if proto == ProtoICMP || proto == ProtoICMPv6 {
		return f.Pairs(src, dst)
	}
	return slices.ContainsFunc(f, func(m Match) bool {
		return slices.Contains(m.IPProto, proto) && netset.Contains(m.Srcs, src) && slices.ContainsFunc(m.Dsts, func(d FilterDst) bool {
			return d.Net.Contains(dst) && d.Ports.First <= port && port <= d.Ports.Last
		})
	})
}

// Pairs reports whether src may send something to dst, whatever it is.
func (f Filter) Pairs(src, dst netip.Addr) bool {
	return slices.ContainsFunc(f, func(m Match) bool {
		return netset.Contains(m.Srcs, src) && slices.ContainsFunc(m.Dsts, func(d FilterDst) bool { return d.Net.Contains(dst) })
	})
}

// Ports are those that src may send to at dst, in words, for people: of TCP and UDP where nothing else is said.
func (f Filter) Ports(src, dst netip.Addr) string {
	var out []string
	for _, m := range f {
		if !netset.Contains(m.Srcs, src) {
			continue
		}
		for _, d := range m.Dsts {
			if !d.Net.Contains(dst) {
				continue
			}
			text := fmt.Sprintf("%d-%d", d.Ports.First, d.Ports.Last)
			switch {
			case d.Ports.First == 0 && d.Ports.Last == 65535:
				text = "all"
			case d.Ports.First == d.Ports.Last:
				text = strconv.Itoa(int(d.Ports.First))
			}
			text += m.only()
			if !slices.Contains(out, text) {
				out = append(out, text)
			}
		}
	}
	return strings.Join(out, ", ")
}

// only names the protocols that the match is about where it is not about both TCP and UDP.
func (m Match) only() (text string) {
	if slices.Contains(m.IPProto, ProtoTCP) && slices.Contains(m.IPProto, ProtoUDP) {
		return ""
	}
	for _, p := range m.IPProto {
		switch p {
		case ProtoTCP:
			text += "/tcp"
		case ProtoUDP:
			text += "/udp"
		default:
			text += fmt.Sprintf(" of protocol %d", p)
		}
	}
	return text
}

// Holder is the peer that this node sends packets for an address to: the one with the narrowest prefix.
func (s Status) Holder(a netip.Addr) (found Peer, ok bool) {
	best := -1
	for _, p := range s.Peers {
		for _, r := range p.Allowed {
			if r.Contains(a) && r.Bits() > best && (r.Bits() > 0 || p.ExitNode) {
				found, best = p, r.Bits()
			}
		}
		if slices.Contains(p.IPs, a) && best < a.BitLen() {
			found, best = p, a.BitLen()
		}
	}
	return found, best >= 0
}
