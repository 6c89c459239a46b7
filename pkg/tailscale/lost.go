package tailscale

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// A router that forgets its connections (a restart, a new address, a carrier's timeout) and passes on no TCP whose beginning it has
// not seen leaves tailscaled's connection to the relay hanging: nobody is told, and tailscaled finds out after a minute or two. Until
// then a node that needs the relay is deaf. It can be told to connect anew. Its rebind action, which asks the relays first and replaces
// what is dead, does not help: its question waits behind what cannot be sent. Which moment is the right one only traffic tells: a peer
// that was heard and is not, or is sent to and does not answer, is asked by one disco ping; where none that needs the relay
// answers, it is this node. Peers with a direct path are left alone.
const (
	// lostLook is between two looks at what peers have sent, lostLookMany where there are more than keepAll of them.
	lostLook, lostLookMany = 3 * time.Second, 10 * time.Second
	// lostTimeout bounds a ping. By the relay and half the world an answer takes half a second.
	lostTimeout = 2 * time.Second
	// lostSilence is how long a peer that is sent to may send nothing: WireGuard answers within 10 s, if only that it lives.
	lostSilence = 12 * time.Second
	// lostIdle is how long a node that needs the relay may hear nothing by it until it asks whether the relay is there.
	lostIdle = 30 * time.Second
	// lostAsked bounds the pings of one look, lostWitnesses those that are asked besides before anything is done.
	lostAsked, lostWitnesses = 16, 2
	// lostAgain is the least time from one reconnection to the next. It doubles up to lostAgainMost while nothing is heard.
	lostAgain, lostAgainMost = 10 * time.Second, 10 * time.Minute
)

// MendOptions are the parts of Mend that a caller may set; the zero value works.
type MendOptions struct {
	// Log tells of what is done. nil logs nothing.
	Log *slog.Logger
}

// Mend has tailscaled make its connections to relays and to Headscale anew where it hangs on dead ones, until ctx ends. It returns ctx's
// error.
func (c *Client) Mend(ctx context.Context, o MendOptions) error {
	m := newMender(c, o)
	s := sockets{log: m.log}
	for {
		s.mend(time.Now())
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(m.look(ctx)):
		}
	}
}

// paths is what a mender needs of the LocalAPI.
type paths interface {
	Status(context.Context) (Status, error)
	// reach sends one disco ping and returns whether the answer came by a relay, ErrNoAnswer where none came, another error where none was
	// sent.
	reach(ctx context.Context, to netip.Addr) (relayed bool, err error)
	reconnect(ctx context.Context) error
}

func (c *Client) reach(ctx context.Context, to netip.Addr) (relayed bool, err error) {
	w, err := c.disco(ctx, to, 0)
	return w.DERPRegionID != 0, err
}

func (c *Client) reconnect(ctx context.Context) error {
	return c.call(ctx, "POST", "debug?action=break-derp-conns", nil, nil)
}

// heard is what is known of one peer.
type heard struct {
	received, sent int64
	// at is when it was last heard, asked when it was last pinged.
	at, asked time.Time
}

// mender looks, asks and acts. It is for one goroutine.
type mender struct {
	net   paths
	log   *slog.Logger
	peers map[string]*heard
	// relay is when a peer was last heard by a relay.
	relay time.Time
	// deaf tells that nobody who was asked answered by the relay, and nobody was heard by it since.
	deaf bool
	// next is the first moment for another reconnection, wait how long the one after it waits.
	next time.Time
	wait time.Duration
}

func newMender(net paths, o MendOptions) *mender {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &mender{net: net, log: o.Log, peers: map[string]*heard{}, relay: time.Now(), wait: lostAgain}
}

// look does what is due, and returns when to look again.
func (m *mender) look(ctx context.Context) time.Duration {
	st, err := m.status(ctx)
	if err != nil || st.State != Running {
		clear(m.peers) // what comes next is another tailscaled
		m.relay, m.deaf = time.Now(), false
		return lostLook
	}
	pods := slices.DeleteFunc(slices.Clone(st.Peers), func(p Peer) bool { return len(p.Routes) == 0 || !target(st.Self, p).IsValid() })
	if silent := m.observe(pods, time.Now()); len(silent) > 0 {
		m.judge(ctx, st.Self, pods, silent)
	}
	if len(pods) > keepAll {
		return lostLookMany
	}
	return lostLook
}

func (m *mender) status(ctx context.Context) (Status, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return m.net.Status(ctx)
}

// direct reports whether packets go to a peer without a relay.
func (p Peer) direct() bool { return p.CurAddr != "" }

// observe takes a look and returns the peers that are to be asked.
func (m *mender) observe(pods []Peer, now time.Time) (silent []Peer) {
	known := m.peers
	m.peers = make(map[string]*heard, len(pods))
	for _, p := range pods {
		h := known[p.ID]
		if h == nil {
			h = &heard{received: p.Received, sent: p.Bytes - p.Received, at: now, asked: now}
		}
		m.peers[p.ID] = h
		came, went := p.Received != h.received, p.Bytes-p.Received != h.sent
		h.received, h.sent = p.Received, p.Bytes-p.Received
		fell := now.Sub(h.at) <= lostSilence && h.asked.Before(h.at) // asked once in each silence
		switch {
		case came:
			m.hear(p, !p.direct(), now)
		case p.direct(): // tailscaled looks after that itself, and where it ends it ends within 7 s
		case fell, went && now.Sub(h.at) > lostSilence && now.Sub(h.asked) > lostSilence:
			silent = append(silent, p)
		}
	}
	switch {
	case len(silent) > 0:
	case m.deaf && !now.Before(m.next):
		silent = m.witnesses(pods, nil, 1)
	case !m.deaf && now.Sub(m.relay) > lostIdle:
		silent = m.witnesses(pods, nil, 1)
		m.relay = now // not before another while
	}
	return silent[:min(len(silent), lostAsked)]
}

// hear notes that a peer was heard.
func (m *mender) hear(p Peer, relayed bool, now time.Time) {
	m.peers[p.ID].at = now
	if relayed {
		m.relay, m.deaf, m.wait = now, false, lostAgain
	}
}

// witnesses are up to n peers that are reached by the relay, but for some, those first that were asked the longest ago.
func (m *mender) witnesses(pods, but []Peer, n int) []Peer {
	out := slices.DeleteFunc(slices.Clone(pods), func(p Peer) bool {
		return p.direct() || !p.Online || slices.ContainsFunc(but, func(b Peer) bool { return b.ID == p.ID })
	})
	slices.SortStableFunc(out, func(a, b Peer) int {
		return cmp.Compare(m.peers[a.ID].asked.UnixNano(), m.peers[b.ID].asked.UnixNano())
	})
	return out[:min(n, len(out))]
}

// judge asks peers that are silent and, where none that needs the relay answers, a few others, and has tailscaled connect anew where they do not
// answer either.
func (m *mender) judge(ctx context.Context, self Peer, pods, silent []Peer) {
	began := time.Now()
	lost := m.ask(ctx, self, silent)
	if len(lost) == 0 || m.relay.After(began) {
		return
	}
	m.ask(ctx, self, m.witnesses(pods, silent, lostWitnesses))
	if m.relay.After(began) || ctx.Err() != nil {
		return // it is them and not us
	}
	m.deaf = true
	if time.Now().Before(m.next) {
		return // it was tried a moment ago
	}
	m.next, m.wait = time.Now().Add(m.wait), min(2*m.wait, lostAgainMost)
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err := m.net.reconnect(ctx)
	m.log.Info("nobody answers by the relay: tailscaled was told to connect anew", "silent", lost[0].Name, "err", err)
}

// ask pings peers, all at once, and returns those that do not answer.
func (m *mender) ask(ctx context.Context, self Peer, peers []Peer) (lost []Peer) {
	ctx, cancel := context.WithTimeout(ctx, lostTimeout)
	defer cancel()
	errs, relayed := make([]error, len(peers)), make([]bool, len(peers))
	var wg sync.WaitGroup
	for i, p := range peers {
		m.peers[p.ID].asked = time.Now()
		wg.Go(func() { relayed[i], errs[i] = m.net.reach(ctx, target(self, p)) })
	}
	wg.Wait()
	for i, p := range peers {
		switch {
		case errs[i] == nil:
			m.hear(p, relayed[i], time.Now())
			m.peers[p.ID].asked = time.Now()
		case errors.Is(errs[i], ErrNoAnswer):
			lost = append(lost, p)
		}
	}
	return lost
}
