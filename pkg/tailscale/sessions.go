package tailscale

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

// When sessions are pinged. WireGuard starts no handshake with a peer within 5 s of the last message of one.
const (
	// rearmDelay and rearmJitter: after 150 to 250 ms a session that was lost is back, if the other side has started one.
	rearmDelay  = 150 * time.Millisecond
	rearmJitter = 100 * time.Millisecond
	// announceDelay is the same for a tailscaled that has just started.
	announceDelay = 550 * time.Millisecond
	// offlineDelay has peers that control takes for offline wait for the others.
	offlineDelay = time.Second
	// armJitter spreads the pings of the node that goes first.
	armJitter = 200 * time.Millisecond
	// secondDelay and secondJitter hold the node that goes second back until the first one's handshake has surely reached
	// it: the two may have learned of each other at different times, and their first packets go by the relay.
	secondDelay  = 2 * time.Second
	secondJitter = 500 * time.Millisecond
	// joinDelay is how long a node that has just logged in leaves its peers to hear of it. Headscale gathers such news for
	// 500 ms; a handshake that comes before is lost, and blocks the next one for 5 s.
	joinDelay = time.Second
	// freshFor is how long after its start a tailscaled takes a peer that it had not seen for one that knew it before.
	freshFor = 10 * time.Second
	// oldSession is the age of a session from which on tailscaled itself cannot be fresh: only the daemon is.
	oldSession = 10 * time.Second
	// confirmDelay and confirmJitter: the first moment at which a new handshake can help a session that nobody confirmed.
	confirmDelay  = 5*time.Second + 100*time.Millisecond
	confirmJitter = 400 * time.Millisecond
	confirmSecond = time.Second
	// keepAge: a packet on a session older than 120 s has it renewed, and at 180 s it is refused. Before 165 s, so that a
	// lost handshake is repeated in time.
	keepAge    = 150 * time.Second
	keepJitter = 10 * time.Second
	// keepSlack is how much earlier sessions are looked at where another one is due: one status serves them all.
	keepSlack = 5 * time.Second
	// renewable is the age from which on WireGuard renews a session.
	renewable = 120 * time.Second
	// keepAll is up to how many peers with pods all sessions are kept. Where there are more, only those with traffic are.
	keepAll = 64
	// keepFor is how long after a pair's last traffic its session is kept where there are more peers than keepAll.
	keepFor = time.Hour
	// keepBytes is more than a session costs that nobody but the keeping uses: a handshake, a ping and its answer.
	keepBytes = 1024
	// lookDelay gathers what the bus tells of peers at once.
	lookDelay = 20 * time.Millisecond
)

// Session states on the bus (ipn.PeerWireGuardState).
const (
	sessionNone        = "none"
	sessionHandshake   = "handshake"
	sessionEstablished = "established"
	sessionExpired     = "expired"
)

// task is what is to be done for a peer when its time comes. It is also why in the log.
type task string

const (
	taskNone     task = ""
	taskAnnounce task = "tailscaled started"
	taskArm      task = "peer is new"
	taskHeal     task = "peer restarted"
	taskKeep     task = "session ends"
	taskConfirm  task = "session was not confirmed"
)

// session is what is known of the session with one peer.
type session struct {
	state string
	// entered is when tailscaled entered the state, by its clock.
	entered time.Time
	key     string // the node key of the last look, "" before
	// first tells that of the two nodes this one pings first.
	first bool
	// pods tells that the peer has had routes, known that it has been pinged, or need not be, since it came, online what
	// control said last.
	pods, known, online bool
	// renewed tells that a session that had expired was tried already.
	renewed bool
	todo    task
	due     time.Time
	bytes   int64     // of the last look for traffic
	traffic time.Time // when traffic was last seen
}

func (p *session) plan(t task, due time.Time) { p.todo, p.due = t, due }

// needs reports whether a peer has neither a session nor one in the making.
func (p *session) needs() bool { return p.state != sessionEstablished && p.state != sessionHandshake }

// sessions is the decision of what to ping and when, without doing it. Two nodes must not start a handshake within one
// way of the path: each would refuse the other's answer, and again 5 s later. So of two nodes the one with the lower
// address goes first, and the other only where there is still no session.
type sessions struct {
	peers map[string]*session // by stable ID
	// look is when to ask for the status because peers have changed, zero for not.
	look time.Time
	// started is when tailscaled started as far as the bus told, zero where only the daemon did.
	started time.Time
	// running tells that tailscaled has its network map, login that it had to log in for it, looked that there was a look.
	running, login, looked bool
	// told tells that the bus has spoken of sessions. A tailscaled before 1.102 does not.
	told bool
	// few tells that there are so few peers with pods that all sessions are kept.
	few bool
}

// observe takes one message of the bus. first marks the first one of a connection, which holds the state of all peers.
func (s *sessions) observe(first bool, n notify, now time.Time) {
	old := false
	s.told = s.told || len(n.PeerState) > 0
	for id, w := range n.PeerState {
		s.transition(id, w, first, now)
		old = old || first && w.PeerWireGuardState == sessionEstablished && now.Sub(w.PeerWireGuardStateAt) > oldSession
	}
	if n.State != nil {
		s.enter(*n.State, old, now)
	}
	cameOnline := func(p wirePeerPatch) bool { return p.Online != nil && *p.Online }
	if bool(n.PeersChanged || n.NetMap) || slices.ContainsFunc(n.PeerChangedPatch, cameOnline) {
		s.lookSoon(now)
	}
}

// enter takes a new state of tailscaled. old tells that it has been running for long, and only the daemon is new.
func (s *sessions) enter(state int, old bool, now time.Time) {
	switch {
	case state < stateStarting && s.running: // tailscale down: it forgets its sessions, its peers do not
		s.running, s.login = false, false
		for _, p := range s.peers {
			p.known = false
		}
	case state >= stateStarting && !s.running:
		s.running = true
		if !old {
			s.started = now
		}
		s.lookSoon(now)
	}
	s.login = s.login || state == stateNeedsLogin || state == stateNeedsMachineAuth
}

func (s *sessions) lookSoon(now time.Time) {
	if s.running && s.look.IsZero() {
		s.look = now.Add(lookDelay)
	}
}

// transition takes the new state of one peer.
func (s *sessions) transition(id string, w wirePeerState, first bool, now time.Time) {
	p := s.peer(id)
	was := p.state
	p.state, p.entered = w.PeerWireGuardState, w.PeerWireGuardStateAt
	switch {
	case first:
		p.renewed = p.state == sessionExpired // so that a restart of the daemon pings nobody
	case p.state == sessionEstablished && (p.known || !s.looked):
		p.renewed = false
		p.plan(taskConfirm, now.Add(confirmDelay+jitter(confirmJitter)+p.second(confirmSecond)))
	case p.state == sessionNone && was == sessionEstablished && s.running:
		p.plan(taskHeal, now.Add(rearmDelay+jitter(rearmJitter)))
	case p.state == sessionExpired && p.pods && !p.renewed:
		p.plan(taskKeep, now.Add(jitter(armJitter)+p.second(secondDelay+jitter(secondJitter))))
	}
}

func (s *sessions) peer(id string) *session {
	if s.peers == nil {
		s.peers = map[string]*session{}
	}
	p := s.peers[id]
	if p == nil {
		p = &session{state: sessionNone}
		s.peers[id] = p
	}
	return p
}

// second is d for the node that goes second, else 0.
func (p *session) second(d time.Duration) time.Duration {
	if p.first {
		return 0
	}
	return d
}

func jitter(d time.Duration) time.Duration { return rand.N(d) }

// settled reports whether peers were looked at, and none that is online is about to get its first session, or has one in the making.
func (s *sessions) settled() bool {
	if !s.running || !s.look.IsZero() {
		return false
	}
	for _, p := range s.peers {
		first := p.todo == taskArm || p.todo == taskAnnounce
		if p.online && (p.state == sessionHandshake || first && p.needs()) {
			return false
		}
	}
	return true
}

// next is when status has to be asked for, zero for never.
func (s *sessions) next() time.Time {
	at := s.look
	for _, p := range s.peers {
		if p.todo != taskNone && (at.IsZero() || p.due.Before(at)) {
			at = p.due
		}
	}
	return at
}

// postpone is for a status that could not be had.
func (s *sessions) postpone(until time.Time) {
	if !s.look.IsZero() {
		s.look = until
	}
	for _, p := range s.peers {
		if p.todo != taskNone && p.due.Before(until) {
			p.due = until
		}
	}
}

// ping is one ping that is due.
type ping struct {
	due  time.Time
	id   string
	name string
	to   netip.Addr
	why  task
}

// act takes a status and returns the pings that are due by now, in the order in which they became due.
func (s *sessions) act(st Status, now time.Time) []ping {
	if !s.look.IsZero() && !s.look.After(now) {
		s.look = time.Time{}
		s.lookAt(st, now)
	}
	var due []ping
	for _, peer := range st.Peers {
		p := s.peers[peer.ID]
		if p == nil || p.todo == taskNone || p.due.After(now.Add(p.slack())) {
			continue
		}
		if p.key != "" && p.key != peer.NodeKey { // the task was for the node before; the look arms this one
			p.todo = taskNone
			s.lookSoon(now)
			continue
		}
		order := ping{p.due, peer.ID, peer.Name, target(st.Self, peer), p.todo}
		if s.settle(p, peer, now) && order.to.IsValid() {
			due = append(due, order)
		}
	}
	for _, p := range s.peers {
		if p.todo != taskNone && !p.due.After(now) {
			p.todo = taskNone // the peer is gone
		}
	}
	slices.SortFunc(due, func(a, b ping) int { return a.due.Compare(b.due) })
	return due
}

// target is the address of a peer to ping: one of a family that this node has too.
func target(self, peer Peer) netip.Addr {
	for _, to := range peer.IPs {
		if slices.ContainsFunc(self.IPs, func(a netip.Addr) bool { return a.Is4() == to.Is4() }) {
			return to
		}
	}
	return netip.Addr{}
}

// wants reports whether a ping whose turn has come is still needed.
func (s *sessions) wants(p ping) bool {
	known := s.peers[p.id]
	return known != nil && (known.needs() || p.why == taskKeep || p.why == taskConfirm)
}

// putOff plans a ping again that may not be sent yet.
func (s *sessions) putOff(p ping, until time.Time) {
	if known := s.peers[p.id]; known.todo == taskNone {
		known.plan(p.why, until)
	}
}

// slack is how long before its time a task may be done.
func (p *session) slack() time.Duration {
	if p.todo == taskKeep && p.state == sessionEstablished {
		return keepSlack
	}
	return 0
}

// settle ends what is due for a peer, plans what comes next and reports whether the peer is to be pinged now.
func (s *sessions) settle(p *session, peer Peer, now time.Time) bool {
	why := p.todo
	p.todo = taskNone
	switch why {
	case taskConfirm:
		if p.state != sessionEstablished || !p.known {
			return false
		}
		s.planKeep(p, now.Add(keepAge-confirmDelay))
		// tailscaled notes a handshake when a packet of the peer has confirmed it.
		return peer.Handshake.Before(p.entered.Add(-time.Second))
	case taskKeep:
		return s.keep(p, peer, now)
	}
	return p.needs() && (s.told || now.Sub(peer.Handshake) > keepAge)
}

// planKeep has the node that goes first look at a session before it ends. The other one waits for its end.
func (s *sessions) planKeep(p *session, due time.Time) {
	if p.first && p.pods {
		p.plan(taskKeep, due.Add(jitter(keepJitter)))
	}
}

// keep decides whether a session that ends is renewed.
func (s *sessions) keep(p *session, peer Peer, now time.Time) bool {
	moved := peer.Bytes - p.bytes
	if moved < 0 { // tailscaled forgets idle peers, and counts anew
		moved = peer.Bytes
	}
	if p.bytes = peer.Bytes; moved > keepBytes {
		p.traffic = now
	}
	if !s.keeps(p, now) {
		return false
	}
	if p.state != sessionEstablished {
		if p.renewed || !peer.Online || !p.needs() {
			return false
		}
		p.renewed = true // so that a peer that is dead is not tried for ever
		return true
	}
	// A clock that was set makes the age wrong. Then the ping is one packet for nothing.
	if age := now.Sub(peer.Handshake); age >= 0 && age < renewable {
		s.planKeep(p, now.Add(keepAge-age))
		return false
	}
	s.planKeep(p, now.Add(keepAge))
	return true
}

// keeps reports whether there is to be a session with a peer at every moment.
func (s *sessions) keeps(p *session, now time.Time) bool {
	return p.pods && (s.few || now.Sub(p.traffic) < keepFor)
}

// lookAt compares the peers with what was known of them.
func (s *sessions) lookAt(st Status, now time.Time) {
	daemonOnly, starting := !s.looked && s.started.IsZero(), !s.started.IsZero() && now.Sub(s.started) < freshFor
	s.few = s.countPods(st) <= keepAll
	for _, peer := range st.Peers {
		if !s.meet(st.Self, peer) {
			continue
		}
		p := s.peers[peer.ID]
		back := peer.Online && !p.online
		p.online = peer.Online
		switch {
		case p.known && p.state == sessionEstablished:
			s.resume(p, peer, now)
		case p.known && (!back || !s.told || !s.keeps(p, now)):
		case daemonOnly:
			s.adopt(p, peer, now)
		case starting && !s.login && !p.known:
			s.announce(p, peer, now)
		case peer.Online:
			s.arm(p, peer, now)
		}
	}
	for id, p := range s.peers {
		if _, ok := st.PeerByID(id); !ok && p.state == sessionNone {
			delete(s.peers, id)
		}
	}
	s.looked = s.looked || len(st.Peers) > 0
}

// meet notes who a peer is and reports whether this node is to have a session with it: because there are pods behind it,
// or will be, since it joined with this node's tag.
func (s *sessions) meet(self, peer Peer) bool {
	p := s.peers[peer.ID]
	sibling := slices.ContainsFunc(peer.Tags, func(t string) bool { return slices.Contains(self.Tags, t) })
	if len(peer.IPs) == 0 || len(self.IPs) == 0 || p == nil && len(peer.Routes) == 0 && !sibling {
		return false
	}
	p = s.peer(peer.ID)
	p.pods = p.pods || len(peer.Routes) > 0
	p.first = lower(self, peer)
	if p.key != "" && p.key != peer.NodeKey {
		p.known = false // made anew
	}
	p.key = peer.NodeKey
	return p.pods || sibling
}

// lower reports whether a goes before b. Both nodes must find the same: they compare the lowest address of each, and
// IPv4 comes before IPv6.
func lower(a, b Peer) bool {
	return slices.MinFunc(a.IPs, netip.Addr.Compare).Less(slices.MinFunc(b.IPs, netip.Addr.Compare))
}

func (s *sessions) countPods(st Status) (n int) {
	for _, peer := range st.Peers {
		if p := s.peers[peer.ID]; len(peer.Routes) > 0 || p != nil && p.pods {
			n++
		}
	}
	return n
}

// adopt takes a peer over after a restart of the daemon: sessions that live are left alone, those that lack are made.
func (s *sessions) adopt(p *session, peer Peer, now time.Time) {
	p.known, p.traffic, p.bytes = true, now, peer.Bytes
	switch {
	case p.state == sessionEstablished:
		s.resume(p, peer, now)
	case peer.Online && p.pods && p.needs() && (s.few || p.state == sessionExpired):
		p.renewed = false
		p.plan(taskKeep, now.Add(jitter(keepJitter)+p.second(keepJitter)))
	}
}

// resume plans the end of a session that nothing is planned for: the daemon is new, or the peer had no pods so far.
func (s *sessions) resume(p *session, peer Peer, now time.Time) {
	if age := now.Sub(peer.Handshake); p.todo == taskNone && age < keepAge {
		s.planKeep(p, now.Add(keepAge-max(age, 0)))
	}
}

// announce has a tailscaled that has just started ping a peer that knew it before, those that are offline later.
func (s *sessions) announce(p *session, peer Peer, now time.Time) {
	p.known, p.traffic = true, now
	if !p.needs() {
		s.resume(p, peer, now)
		return
	}
	after := announceDelay + jitter(rearmJitter)
	if !peer.Online {
		after += offlineDelay
	}
	p.plan(taskAnnounce, now.Add(after))
}

// arm makes a session with a peer that has come, before pods use it.
func (s *sessions) arm(p *session, peer Peer, now time.Time) {
	if !p.known {
		p.known, p.traffic = true, now
	}
	if !p.needs() {
		s.resume(p, peer, now)
		return
	}
	after := jitter(armJitter) + p.second(secondDelay+jitter(secondJitter))
	if p.first && s.login && !s.looked {
		after += joinDelay
	}
	p.plan(taskArm, now.Add(after))
}
