package daemon

import (
	"context"
	"net/netip"
	"slices"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/tailscale"
)

// status gathers it from the last pass and, for what changes by the second, from tailscaled.
func (d *Daemon) status(ctx context.Context) nodestatus.Status {
	ready, parts := d.board.Ready()
	d.mu.Lock()
	s := nodestatus.Status{Version: d.version, Ready: ready, Parts: parts, Mode: d.last.Mode, Tun: d.last.tun, TunMTU: d.last.tunMTU}
	approved := slices.Clone(d.confirmed)
	ranges := d.last.ranges
	d.mu.Unlock()
	own := ranges.Pods
	t, prefs := d.member.Look(ctx)
	if t != nil {
		approved = append(approved, t.Self.Routes...)
		s.Tailnet = tailnetStatus(*t, prefs, netset.Union(own, ranges.Cluster, ranges.Remote))
	}
	for _, p := range own {
		s.PodCIDRs = append(s.PodCIDRs, nodestatus.PodCIDR{
			CIDR: p, Advertised: slices.Contains(prefs.AdvertiseRoutes, p), Approved: slices.Contains(approved, p),
		})
	}
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
