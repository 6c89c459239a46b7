package why

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/tailscale"
)

const (
	// pingTimeout bounds one ping, and pingTries is how often a peer is asked until it answers directly: the first answer may come by
	// the relay while the two look for a direct path.
	pingTimeout = 3 * time.Second
	pingTries   = 3
	pingPause   = 300 * time.Millisecond
	// pingsAtOnce bounds how many peers one node pings at the same time.
	pingsAtOnce = 8
)

// Paths to a peer beside those of tailscale.Peer.
const (
	pathDirect  = "direct"
	pathRelayed = "relayed"
	pathOffline = "offline"
	pathSilent  = "silent" // online, and it does not answer
)

// Peers is what one node says of the others.
type Peers struct {
	Name string       `json:"name"`
	IPs  []netip.Addr `json:"ips"`
	// State is tailscaled's, Running where all is well.
	State string `json:"state"`
	Peers []Peer `json:"peers"`
}

// Peer is another node of the tailnet as one node reaches it.
type Peer struct {
	Name string       `json:"name"`
	IPs  []netip.Addr `json:"ips"`
	// Node: it leads somewhere, or has a tag of the asking node's own. Others are people's devices, which are not pinged.
	Node bool `json:"node"`
	// Path is direct, relayed, silent or offline, or idle of a device.
	Path     string         `json:"path"`
	Endpoint string         `json:"endpoint,omitempty"` // the address, or the relay
	Millis   float64        `json:"latencyMillis,omitempty"`
	Routes   []netip.Prefix `json:"routes,omitempty"`
	// Handshake is WireGuard's last one.
	Handshake time.Time `json:"handshake,omitzero"`
}

// tailnet is what is asked of tailscaled.
type tailnet interface {
	Status(context.Context) (tailscale.Status, error)
	Ping(ctx context.Context, to netip.Addr, size int) (tailscale.Pong, error)
}

// AskPeers asks this node's tailscaled. Peers that lead somewhere are pinged, people's devices are not.
func AskPeers(ctx context.Context, t tailnet) (Peers, error) {
	s, err := t.Status(ctx)
	if err != nil {
		return Peers{}, err
	}
	out := Peers{Name: s.Self.Name, IPs: s.Self.IPs, State: s.State, Peers: make([]Peer, len(s.Peers))}
	var wg sync.WaitGroup
	free := make(chan struct{}, pingsAtOnce)
	for i, p := range s.Peers {
		one := &out.Peers[i]
		*one = peerOf(p, s.Self)
		if !one.Node && !p.Online {
			one.Path, one.Endpoint = pathOffline, ""
		}
		if !one.Node || one.Path == pathOffline || len(p.IPs) == 0 {
			continue
		}
		wg.Go(func() {
			free <- struct{}{}
			defer func() { <-free }()
			tries := pingTries
			if !p.Online { // it may answer all the same: its connection to Headscale is what is gone
				tries = 1
			}
			one.ping(ctx, t, tries, p.Online)
		})
	}
	wg.Wait()
	return out, ctx.Err()
}

// peerOf is a peer as tailscaled has it now.
func peerOf(p tailscale.Peer, self tailscale.Peer) Peer {
	ours := slices.ContainsFunc(p.Tags, func(tag string) bool { return slices.Contains(self.Tags, tag) })
	out := Peer{Name: p.Name, IPs: p.IPs, Path: p.Path(), Routes: p.Routes, Handshake: p.Handshake, Node: ours || len(p.Routes) > 0}
	switch out.Path {
	case pathDirect:
		out.Endpoint = p.CurAddr
	case pathRelayed:
		out.Endpoint = p.Relay
	}
	return out
}

// ping asks the peer until it answers directly, so many times.
func (p *Peer) ping(ctx context.Context, t tailnet, tries int, online bool) {
	p.Path, p.Endpoint = pathSilent, ""
	if !online {
		p.Path = pathOffline // since a moment ago, where tailscaled still has a path
	}
	for range tries {
		ctx, cancel := context.WithTimeout(ctx, pingTimeout)
		pong, err := t.Ping(ctx, p.IPs[0], 0)
		cancel()
		if err != nil {
			continue
		}
		p.Millis = float64(pong.Latency.Microseconds()) / 1000
		p.Path, p.Endpoint = pathDirect, pong.Endpoint
		if pong.Endpoint != "" {
			return
		}
		p.Path, p.Endpoint = pathRelayed, pong.Relay
		time.Sleep(pingPause)
	}
}

// Row is one node and how it reaches the others.
type Row struct {
	Node string `json:"node"`
	// Error is why it could not be asked; then the rest is empty.
	Error string `json:"error,omitempty"`
	Peers
}

// Mesh is how all nodes reach each other.
type Mesh struct {
	Version  string           `json:"version"`
	OK       bool             `json:"ok"`
	Findings []doctor.Finding `json:"findings"`
	Nodes    []Row            `json:"nodes"`
}

// NewMesh judges what nodes said. It does no I/O.
func NewMesh(version string, rows []Row) Mesh {
	m := Mesh{Version: version, OK: true, Findings: []doctor.Finding{}, Nodes: rows}
	for _, r := range rows {
		c := doctor.Check{Where: r.Node}
		switch {
		case r.Error != "":
			c.Add(findings.DaemonSilent, "%s", r.Error)
		case r.State != tailscale.Running:
			c.Add(findings.NotInTailnet, "tailscaled is in state %s", r.State)
		}
		for _, p := range r.Peers.Peers {
			name := m.nameOf(p)
			switch {
			case !p.Node && name == p.Name:
			case p.Path == pathOffline:
				c.Add(findings.PeerOffline, "%s is offline", name)
			case p.Path == pathSilent:
				c.Add(findings.PeerSilent, "%s is online and does not answer", name)
			case p.Path == pathRelayed:
				c.Add(findings.PeerRelayed, "%s is reached by the relay %s, in %s", name, p.Endpoint, millis(p.Millis))
			}
		}
		m.Findings = append(m.Findings, c.Found...)
	}
	m.OK = !slices.ContainsFunc(m.Findings, doctor.Finding.Wrong)
	return m
}

// Warnings is how many findings are warnings.
func (m Mesh) Warnings() (n int) {
	for _, f := range m.Findings {
		if !f.Wrong() {
			n++
		}
	}
	return n
}

// nameOf is the Node's name where the peer is one, else the tailnet's.
func (m Mesh) nameOf(p Peer) string {
	for _, r := range m.Nodes {
		if sharesAddr(r.IPs, p.IPs) {
			return r.Node
		}
	}
	return p.Name
}

func sharesAddr(a, b []netip.Addr) bool {
	return slices.ContainsFunc(a, func(x netip.Addr) bool { return slices.Contains(b, x) })
}

// between is how one node reaches another.
func (m Mesh) between(from, to Row) (Peer, bool) {
	for _, p := range from.Peers.Peers {
		if sharesAddr(p.IPs, to.IPs) || len(to.IPs) == 0 && p.Name == to.Node {
			return p, true
		}
	}
	return Peer{}, false
}

// Path says in a few words how one Node reaches another.
func (m Mesh) Path(from, to string) string {
	row := func(name string) Row {
		i := slices.IndexFunc(m.Nodes, func(r Row) bool { return r.Node == name })
		if i < 0 {
			return Row{Node: name, Error: "not asked"}
		}
		return m.Nodes[i]
	}
	a, b := row(from), row(to)
	switch p, ok := m.between(a, b); {
	case a.Error != "":
		return "path unknown"
	case !ok:
		return "not in its tailnet"
	case p.Path == pathRelayed:
		return "relayed by " + p.Endpoint
	default:
		return strings.TrimSpace(p.Path + " " + p.Endpoint)
	}
}

// IPs are a Node's addresses in the tailnet.
func (m Mesh) IPs(node string) []netip.Addr {
	for _, r := range m.Nodes {
		if r.Node == node {
			return r.IPs
		}
	}
	return nil
}
