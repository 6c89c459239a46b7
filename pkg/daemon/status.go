package daemon

import (
	"context"
	"net/netip"
	"slices"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/dns/nodedns"
	"github.com/headcni/headcni/pkg/membership"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/tailscale"
)

// status gathers it from the last pass and, for what changes by the second, from tailscaled. What tailscaled says now counts: a
// node that was logged out a moment ago is not ready, although no pass has come to that yet.
func (d *Daemon) status(ctx context.Context) nodestatus.Status {
	d.mu.Lock()
	last, confirmed := d.last, d.confirmed
	d.mu.Unlock()
	s := nodestatus.Status{Version: d.version, Mode: last.Mode, Tun: last.tun, TunMTU: last.tunMTU, SmallPath: last.path.Peer, SmallPathBytes: last.path.Bytes}
	s.Policy, s.FastPath, s.Names = d.policy.Status(), (*nodestatus.FastPath)(d.fast.State()), nodedns.RisksOf(last.dns, d.cfg.DNS.MagicDNS.BaseDomain).Texts()
	s.PeerMTU = (*nodestatus.PeerMTU)(d.paths.State())
	s.Dropped, s.GuardTest = nonZero(d.drops()), d.guardTest.Said()
	t, prefs := d.member.Look(ctx)
	var approved []netip.Prefix
	if t != nil {
		approved = t.Self.Routes
		s.Tailnet = tailnetStatus(*t, prefs, netset.Union(last.ranges.Pods, last.ranges.Cluster, last.ranges.Remote))
		nat, outside := t.NAT(last.hostPrefixes)
		s.Tailnet.NAT, s.Tailnet.Outside = string(nat), outside
	}
	if confirmed != nil {
		approved = *confirmed // Headscale's own word; tailscaled may learn of it hours later
	}
	if now := (membership.Seen{Tailnet: t}); !now.Running() {
		d.board.Doubt(partTailnet, now.NotRunning())
		d.loop.Wake()
	}
	s.Ready, s.Parts = d.board.Ready()
	known := func(routes []netip.Prefix) (out []nodestatus.PodCIDR) {
		for _, p := range routes {
			out = append(out, nodestatus.PodCIDR{CIDR: p, Advertised: slices.Contains(prefs.AdvertiseRoutes, p), Approved: slices.Contains(approved, p)})
		}
		return out
	}
	s.PodCIDRs, s.Services = known(last.ranges.Pods), known(last.serves)
	return s
}

func tailnetStatus(t tailscale.Status, prefs tailscale.Prefs, cluster []netip.Prefix) *nodestatus.Tailnet {
	out := &nodestatus.Tailnet{
		Version: t.Version, State: t.State, ControlURL: prefs.ControlURL, Name: t.Self.Name, IPs: t.Self.IPs, Health: t.Health,
		Peers: []nodestatus.Peer{},
	}
	if !t.Self.KeyExpiry.IsZero() {
		out.KeyExpiry = &t.Self.KeyExpiry
	}
	for _, p := range t.Peers {
		peer := nodestatus.Peer{Name: p.Name, IPs: p.IPs, Path: p.Path(), Routes: p.Routes}
		switch peer.Path {
		case "direct":
			peer.Endpoint = p.CurAddr
		case "relayed":
			peer.Endpoint = p.Relay
		}
		for _, r := range p.Routes {
			if netset.Covers(cluster, r) {
				peer.PodCIDRs = append(peer.PodCIDRs, r)
			}
		}
		out.Peers = append(out.Peers, peer)
	}
	return out
}
