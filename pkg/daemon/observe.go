package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/dns/nodedns"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/membership"
	"github.com/headcni/headcni/pkg/networking/noderoutes"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/tailscale"
	"github.com/headcni/headcni/pkg/tailscaled"
)

// observe looks at the host and at tailscaled. That tailscaled does not answer is an observation, kept in tailnetErr,
// and no error: the node is programmed from what was known before.
func (d *Daemon) observe(ctx context.Context) (o observation, err error) {
	o = observation{
		Seen: membership.Seen{Mode: d.cfg.Tailscale.Mode, Kubernetes: d.kubernetes.View(), PodCIDRs: d.cfg.Network.PodCIDRs.Prefixes()},
		tun:  d.saved.TunName, tunMTU: d.saved.TunMTU, ipam: d.ipam, ranges: d.cfg.Network.Ranges(),
	}
	if o.Mode == config.ModeAuto {
		o.Mode = tailscaled.Mode(d.cfg.Tailscale, d.saved.Mode)
	}
	if o.Mode == config.ModeDaemon || o.tun == "" {
		o.tun = d.cfg.Tailscale.InterfaceName
		if o.Mode == config.ModeHost {
			o.tun = names.HostTun
		}
	}
	d.member.Use(tailscaled.Socket(d.cfg.Tailscale, o.Mode))
	o.Tailnet, o.TailnetErr = d.member.Status(ctx, o.Mode)
	if o.Tailnet != nil {
		prefs, err := d.member.Prefs(ctx)
		if err == nil {
			users := prefs.Saved(tailscale.PrefsSpec{})
			o.prefs, o.controlURL, o.dns.CorpDNS = &users, prefs.ControlURL, prefs.CorpDNS
			if dns, err := d.member.DNS(ctx); err == nil { // an older tailscaled does not tell
				o.dns.Splits = dns.Splits
			}
			o.advertised, o.sites = prefs.AdvertiseRoutes, sites(o.Mode, prefs.AdvertiseRoutes)
		} else if o.TailnetErr == nil {
			o.TailnetErr = err
		}
	}
	if o.Tailnet != nil && len(o.Tailnet.Self.IPs) > 0 {
		if link, err := tailscale.FindTunNear(o.tun, o.Tailnet.Self.IPs); err == nil {
			o.tun, o.tunMTU = link.Name, link.MTU
		} else if o.Tailnet.State == tailscale.Running {
			o.TailnetErr = err
		}
	}
	if o.hostPrefixes, err = noderoutes.HostPrefixes(o.tun); err != nil {
		return o, err
	}
	if o.hostNetworks, err = noderoutes.HostNetworks(); err != nil {
		return o, err
	}
	o.ports, o.portsErr = d.ports.List()
	o.shared = noderoutes.SharedWithTailnet(o.hostNetworks)
	o.dns.Nameservers = nodedns.Nameservers("/")
	if o.nodeAddr4, err = sourceAddr(unix.AF_INET); err != nil {
		return o, err
	}
	if o.nodeAddr6, err = sourceAddr(unix.AF_INET6); err != nil {
		return o, err
	}
	if err := d.observeCluster(&o); err != nil {
		return o, err
	}
	o.path, _ = d.paths.Smallest()
	if o.wide = d.paths.Wide(); o.wide != nil {
		o.uplinkMTU = noderoutes.UplinkMTU()
	}
	if o.members = d.saved.Members; o.Running() {
		o.members = o.Tailnet.PeerAddrs4()
	}
	o.subnets = d.saved.Subnets.Learn(d.subnets.News(o.ranges.All(), o.Tailnet, o.prefs))
	return o, nil
}

// sites are what the host's own tailscaled advertises, ours for pods among them. An exit node's routes are no networks beside the node.
func sites(mode string, advertised []netip.Prefix) []netip.Prefix {
	if mode != config.ModeHost {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(advertised), func(p netip.Prefix) bool { return p.Bits() == 0 })
}

// observeCluster takes the pod CIDRs and the rest of the network from Kubernetes, and keeps what it said.
func (d *Daemon) observeCluster(o *observation) error {
	if o.Kubernetes == nil {
		return nil
	}
	l, err := d.saved.Kubernetes.Update(o.Kubernetes, d.kubernetes.Node())
	if err != nil {
		return err
	}
	if len(l.Leaving) > 0 {
		var pods podlink.Handle
		live, err := pods.Live(conflist.NetworkName)
		pods.Close()
		if err != nil {
			return fmt.Errorf("look for pods of former pod CIDRs: %w", err)
		}
		var addrs []netip.Addr
		for _, p := range live {
			addrs = append(addrs, p.Addrs...)
		}
		l = l.WithoutVacated(addrs)
	}
	d.note(func(s *state) { s.Kubernetes = l })
	if err := l.Usable(o.Kubernetes, time.Since(d.began)); err != nil {
		return err
	}
	o.leaving = l.Leaving
	for _, p := range l.PodCIDRs {
		if name := o.Kubernetes.Holder(p); name != "" {
			o.held = append(o.held, findings.Errorf(findings.RangeTaken, "pod range %s: Kubernetes has given it, or a part of it, to Node %s; delete this Node and let "+
				"kubelet register it again for another one", p, name))
		}
	}
	for _, p := range d.cfg.Network.Outside(l.PodCIDRs) {
		o.held = append(o.held, findings.Errorf(findings.RangeOutside, "pod range %s: Kubernetes gives it to this Node (Node.spec.podCIDRs), but it is outside network.clusterCIDRs %v: "+
			"make kube-controller-manager's --cluster-cidr and network.clusterCIDRs (Helm: config.network.clusterCIDRs) agree on every node",
			p, []string(d.cfg.Network.ClusterCIDRs)))
	}
	o.ranges, err = rangesInForce(d.cfg, l)
	o.PodCIDRs = o.ranges.Pods
	_, parts := d.board.Ready()
	o.serves, o.servesErr = d.services.Routes(l.Services, o.ranges.Services, d.saved.Advertised, parts)
	return err
}

// sourceAddr is the zero Addr where the node has no default route of the family.
func sourceAddr(family int) (netip.Addr, error) {
	a, err := noderoutes.DefaultSource(family)
	if errors.Is(err, noderoutes.ErrNoSource) {
		return netip.Addr{}, nil
	}
	return a, err
}
