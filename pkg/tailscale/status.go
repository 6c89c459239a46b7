package tailscale

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/reconcile"
)

// Backend states of tailscaled (ipn.State).
const (
	NoState          = "NoState"
	NeedsLogin       = "NeedsLogin"
	NeedsMachineAuth = "NeedsMachineAuth"
	Stopped          = "Stopped"
	Starting         = "Starting"
	Running          = "Running"
)

// AttrSharesCGNAT is the node attribute by which tailscaled, if it is new enough, lets other interfaces have addresses in
// 100.64.0.0/10 too. Without it, it drops what they get from there.
const AttrSharesCGNAT = "disable-linux-cgnat-drop-rule"

// Status is what tailscaled knows of itself and its peers.
type Status struct {
	// Version of tailscaled, such as 1.102.5-t0123456.
	Version string
	// State is one of the backend states above. It says Running also for a node that Headscale has deleted.
	State string
	// HaveNodeKey tells that it has been logged in and not logged out.
	HaveNodeKey bool
	// TUN is false for tailscaled --tun=userspace-networking, which can carry no pods.
	TUN bool
	// MagicDNSSuffix is the tailnet's domain, such as ts.example.com.
	MagicDNSSuffix string
	// Health holds what tailscaled complains of, for people: see Stateless.
	Health []string
	// SharesCGNAT tells that the tailnet's policy has given this node the attribute of that name (AttrSharesCGNAT).
	SharesCGNAT bool
	Self        Peer
	// Endpoints are where tailscaled tells its peers that it can be reached by UDP.
	Endpoints []netip.AddrPort
	// Peers are sorted by name.
	Peers []Peer
}

// Peer is a node of the tailnet as this one sees it.
type Peer struct {
	// ID is the control server's stable ID, which the bus uses too.
	ID string
	// NodeKey is nodekey:<hex>, as Headscale's REST API has it.
	NodeKey string
	// Name is the first label of the MagicDNS name, else the host name.
	Name string
	// DNSName is the whole MagicDNS name, in lower case without a final dot; "" where it has none.
	DNSName string
	IPs     []netip.Addr
	// Routes are those for which the node is primary now, without its own addresses.
	Routes []netip.Prefix
	// Allowed are all prefixes that WireGuard takes from the node; control sends only what is approved and primary.
	Allowed []netip.Prefix
	Tags    []string
	// Online tells whether control sees the node connected. A restart of the node's tailscaled clears it for a while.
	Online bool
	// Active tells that packets went to it within the last minutes.
	Active bool
	// CurAddr is the direct UDP address in use, "" when relayed or idle.
	CurAddr string
	// Relay is the DERP region's code.
	Relay string
	// KeyExpiry is the zero time where the key never expires.
	KeyExpiry time.Time
	// Handshake is when WireGuard last made or renewed a session with it that a packet has confirmed, zero for never or
	// not for long.
	Handshake time.Time
	// Bytes is what WireGuard has sent to it and received from it, handshakes included. tailscaled counts anew for a peer
	// that was idle for some minutes.
	Bytes int64
	// Received is the part of Bytes that came from it.
	Received int64
	// Expired tells that the key has.
	Expired bool
	// ExitNode tells that this node uses the peer as its exit node.
	ExitNode bool
}

// Path is how packets reach the peer: offline, idle, direct or relayed.
func (p Peer) Path() string {
	switch {
	case p.CurAddr != "":
		return "direct"
	case p.Active:
		return "relayed"
	case !p.Online:
		return "offline"
	}
	return "idle"
}

// PathCounts counts peers by Path, every path present.
func PathCounts(peers []Peer) map[string]int {
	n := map[string]int{"direct": 0, "relayed": 0, "idle": 0, "offline": 0}
	for _, p := range peers {
		n[p.Path()]++
	}
	return n
}

// stateless begins tailscaled's complaint that it has no store for its state (state-store-health of tailscale's feature/condregister).
const stateless = "State store failed"

// Stateless says why a tailscaled that answers has nowhere to keep who it is, and so joins nothing until it is started again; "" for
// one that has.
func (s Status) Stateless() string {
	i := slices.IndexFunc(s.Health, func(h string) bool { return strings.HasPrefix(h, stateless) })
	if s.State == Running || i < 0 {
		return ""
	}
	return s.Health[i]
}

// PeerByID finds a peer by its stable ID.
func (s Status) PeerByID(id string) (Peer, bool) {
	i := slices.IndexFunc(s.Peers, func(p Peer) bool { return p.ID == id })
	if i < 0 {
		return Peer{}, false
	}
	return s.Peers[i], true
}

// wireStatus is ipnstate.Status as far as it is used.
type wireStatus struct {
	Version        string
	TUN            bool
	BackendState   string
	HaveNodeKey    bool
	Health         []string
	MagicDNSSuffix string
	Self           *wirePeer
	Peer           map[string]*wirePeer
}

// wirePeer is ipnstate.PeerStatus as far as it is used.
type wirePeer struct {
	ID, PublicKey, HostName, DNSName  string
	TailscaleIPs                      []netip.Addr
	AllowedIPs, PrimaryRoutes         []netip.Prefix
	Tags                              []string
	CurAddr, Relay                    string
	Online, ExitNode, Active, Expired bool
	KeyExpiry                         *time.Time
	LastHandshake                     time.Time
	RxBytes, TxBytes                  int64
	CapMap                            map[string]present
	// Addrs are endpoints, of Self only.
	Addrs []string
}

func (w *wirePeer) peer() Peer {
	if w == nil {
		return Peer{}
	}
	p := Peer{
		ID: w.ID, NodeKey: w.PublicKey, IPs: w.TailscaleIPs, Routes: w.PrimaryRoutes, Allowed: w.AllowedIPs, Tags: w.Tags,
		Online: w.Online, Active: w.Active, CurAddr: w.CurAddr, Relay: w.Relay, Expired: w.Expired, ExitNode: w.ExitNode,
		DNSName: plainName(w.DNSName), Handshake: w.LastHandshake, Bytes: w.RxBytes + w.TxBytes, Received: w.RxBytes,
	}
	p.Name, _, _ = strings.Cut(w.DNSName, ".")
	if p.Name == "" {
		p.Name = w.HostName
	}
	if w.KeyExpiry != nil {
		p.KeyExpiry = *w.KeyExpiry
	}
	return p
}

// Status asks for the state of tailscaled and all its peers.
func (c *Client) Status(ctx context.Context) (Status, error) { return c.status(ctx, "status") }

// StatusWithoutPeers is Status at a cost that does not grow with the tailnet.
func (c *Client) StatusWithoutPeers(ctx context.Context) (Status, error) {
	return c.status(ctx, "status?peers=false")
}

func (c *Client) status(ctx context.Context, path string) (Status, error) {
	var w wireStatus
	if err := c.call(ctx, "GET", path, nil, &w); err != nil {
		return Status{}, fmt.Errorf("ask for the tailnet's status: %w", err)
	}
	return w.status(), nil
}

func (w wireStatus) status() Status {
	s := Status{
		Version: w.Version, State: w.BackendState, HaveNodeKey: w.HaveNodeKey, TUN: w.TUN,
		MagicDNSSuffix: w.MagicDNSSuffix, Health: w.Health, Self: w.Self.peer(),
	}
	if w.Self != nil {
		_, s.SharesCGNAT = w.Self.CapMap[AttrSharesCGNAT]
		for _, a := range w.Self.Addrs {
			if e, err := netip.ParseAddrPort(a); err == nil { // else of a form that nobody needs here
				s.Endpoints = append(s.Endpoints, e)
			}
		}
	}
	for _, p := range w.Peer {
		s.Peers = append(s.Peers, p.peer())
	}
	slices.SortFunc(s.Peers, func(a, b Peer) int {
		return strings.Compare(a.Name+"\x00"+a.ID, b.Name+"\x00"+b.ID)
	})
	return s
}

// LacksFamily warns of a family in which pods have addresses and this node has none in the tailnet: peers take no packet from a source
// that is not a pod's nor the node's there, and no masquerading finds one.
func (s *Status) LacksFamily(pods []netip.Prefix) error {
	if s == nil || s.State != Running || len(s.Self.IPs) == 0 {
		return nil
	}
	for name, is := range map[string]func(netip.Addr) bool{"IPv4": netip.Addr.Is4, "IPv6": netip.Addr.Is6} {
		if slices.ContainsFunc(pods, func(p netip.Prefix) bool { return is(p.Addr()) }) && !slices.ContainsFunc(s.Self.IPs, is) {
			return reconcile.Warning{Err: findings.Errorf(findings.FamilyLacking, "pods have %[1]s and this node has no %[1]s address in the tailnet: the node itself, its NodePorts and "+
				"host-network pods do not reach pods of other nodes by %[1]s; set prefixes.v%[2]s in Headscale's configuration, start it again, and run `headscale nodes backfillips`", name, name[3:])}
		}
	}
	return nil
}

// Elsewhere says that Headscale gives addresses outside Tailscale's ranges, in a family that pods have. Rules and guard know the tailnet by
// these: nodes and pods would not reach members, nor nodes other nodes' pods, and what is for members would leave in clear while the tunnel
// is away.
func (s *Status) Elsewhere(pods []netip.Prefix) error {
	if s == nil || s.State != Running {
		return nil
	}
	for _, a := range s.Self.IPs {
		name, in := "v4", netset.TailnetIPv4
		if a.Is6() {
			name, in = "v6", netset.TailnetIPv6
		}
		if !in.Contains(a) && slices.ContainsFunc(pods, func(p netip.Prefix) bool { return p.Addr().Is4() == a.Is4() }) {
			return findings.Errorf(findings.TailnetElsewhere, "this node is %s in the tailnet, which is outside %s: nodes and pods would not reach members of the tailnet there; set prefixes.%s in "+
				"Headscale's configuration to %[2]s or a part of it, start it again, delete its nodes (`headscale nodes delete`), and have them join anew", a, in, name)
		}
	}
	return nil
}

// SharedCGNAT warns that tailscaled keeps this host from a network of its own inside the tailnet's range, which no rule of ours can change.
// It is nil where tailscaled does not answer.
func (s *Status) SharedCGNAT(hostPrefixes []netip.Prefix) error {
	if s == nil || s.SharesCGNAT {
		return nil
	}
	for _, p := range hostPrefixes {
		if p.Overlaps(netset.TailnetIPv4) {
			return reconcile.Warning{Err: findings.Errorf(findings.HostInTailnet, "an interface of this host has %s, a part of the tailnet's %s: tailscaled's firewall drops what the host itself gets "+
				`from there (pods are not concerned); add "nodeAttrs": [{"target": ["*"], "attr": ["%s"]}] to Headscale's policy, and keep `+
				"prefixes.v4 in Headscale's configuration clear of that network", p, netset.TailnetIPv4, AttrSharesCGNAT)}
		}
	}
	return nil
}
