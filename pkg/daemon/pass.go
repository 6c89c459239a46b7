package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/dns/nodedns"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/hostfirewall"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/leases"
	"github.com/headcni/headcni/pkg/monitoring"
	"github.com/headcni/headcni/pkg/networking/noderoutes"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/reconcile"
	"github.com/headcni/headcni/pkg/tailscale"
	"github.com/headcni/headcni/pkg/tailscaled"
)

// The parts of a node in the order in which they are made right: the guard stands before anything can be routed, the
// tailnet learns of the pods when they are safe, and the runtime when everything else is.
const (
	partConfig   = "config"
	partFirewall = "firewall"
	partRoutes   = "routes"
	// partPods are the host's ends of pods' links: what concerns one pod, and not the node.
	partPods    = "pods"
	partTailnet = "tailnet"
	partPrefs   = "prefs"
	// partTunnel are tailscaled's routes to its peers, which it makes once and does not look at again.
	partTunnel = "tunnel"
	// partLinks are the links that pods' packets pass, as far as others can change them: the tun's state and addresses, and
	// whether each link forwards.
	partLinks    = "links"
	partApproval = "approval"
	partConflist = "conflist"
	// partHeadscale is this node as Headscale sees it. Pods do not wait for it: Headscale may be down for hours.
	partHeadscale = "headscale"
	// partForeign are other programs' firewalls, tailscaled's too. Nothing of ours can help where they drop, and they may not
	// mean pods.
	partForeign = "foreign"
	// partKubernetes is the API server: pods do not wait for it either.
	partKubernetes = "kubernetes"
	// partRuntime is whether the container runtime uses our conflist. Only kubelet can tell.
	partRuntime = "runtime"
	// partGuard is whether the guard stops what is sent in clear on purpose, with this kernel and these rules.
	partGuard = "guard"
	// partNames is the node's name server for the tailnet, and whether questions for names can go in a circle.
	partNames = "names"
	// partSubnets is who may use networks behind devices of the tailnet.
	partSubnets = "subnets"
	// partState is what must be on disk for our next start.
	partState = "state"
	// partPolicy are NetworkPolicies: in force, or off and nothing of them left.
	partPolicy = "policy"
	// partServices is whether the tailnet reaches services by this node, where it is to.
	partServices = "services"
)

// pass is what one pass observed and planned.
type pass struct {
	seen observation
	plan plan
	// refused is why nothing of the plan may be applied, nil where it may.
	refused error
	// programmed is true once the conflist stands: pods can start.
	programmed bool
}

// wantOfNode is what our Node object should say.
func (s *pass) wantOfNode() nodeview.Want {
	w := nodeview.Want{Mode: s.seen.Mode, Up: s.programmed}
	if s.seen.Running() {
		w.NodeKey, w.TailnetIPs = s.seen.Tailnet.Self.NodeKey, s.seen.Tailnet.Self.IPs
		w.TailnetDomain = s.seen.Tailnet.MagicDNSSuffix
	}
	return w
}

// pass observes, plans and applies once. It returns when the next one is due.
func (d *Daemon) pass(ctx context.Context) time.Duration {
	if asked, next := d.uninstallIfAsked(ctx); asked {
		return next
	}
	var s pass
	s.seen, s.refused = d.observe(ctx)
	if s.refused == nil && d.saved.TakenBack == d.fingerprint() {
		s.refused = errTakenBack(d.saved.TakenBackFor)
	}
	if s.refused == nil {
		s.plan, s.refused = makePlan(d.cfg, s.seen, d.saved)
	}
	if s.refused == nil && d.kubernetes == nil {
		s.refused = tailscaled.SameMachine()
	}
	if s.seen.Tailnet != nil {
		d.metrics.Tailnet(monitoring.Tailnet{
			Peers: tailscale.PathCounts(s.seen.Tailnet.Peers), PodPeers: tailscale.PathCounts(s.seen.podPeers()),
			KeyExpiry: s.seen.Tailnet.Self.KeyExpiry, SmallestPath: cmp.Or(s.seen.path.Bytes, s.seen.tunMTU),
		})
	}
	if !s.seen.Running() {
		d.board.Doubt(partTailnet, s.seen.NotRunning())
	}
	next := d.board.Run(ctx, &s)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last, d.confirmed = s.seen, nil
	if s.seen.Tailnet != nil {
		if routes, ok := d.member.Routes(s.seen.Tailnet.Self.NodeKey); ok {
			d.confirmed = &routes
		}
	}
	return next
}

// parts are those of this node, in order: what /readyz and status show, and what a pass goes through.
func (d *Daemon) parts() []reconcile.Part[*pass] {
	parts := []reconcile.Part[*pass]{
		{Name: partConfig, Finding: findings.ConfigUnusable, Run: func(_ context.Context, s *pass) ([]string, error) {
			if s.refused == nil {
				d.note(func(saved *state) {
					saved.Mode, saved.TunName, saved.TunMTU = s.seen.lastKnown()
					saved.Path, saved.Subnets, saved.Members = s.seen.path, s.seen.subnets, s.seen.members
				})
			}
			return nil, s.refused
		}},
		{Name: partFirewall, Finding: findings.FirewallRules, Needs: []string{partConfig}, Run: func(ctx context.Context, s *pass) ([]string, error) {
			renewed, err := d.renewConflist(s)
			if err != nil {
				return nil, err
			}
			done, err := d.syncTables(ctx, s.plan.firewall)
			more, err2 := d.hostFirewall.Sync(ctx, hostfirewall.Config{TunName: s.plan.firewall.TunName})
			return slices.Concat(renewed, done, more), errors.Join(err, err2)
		}},
		{Name: partRoutes, Finding: findings.RoutingRules, Needs: []string{partFirewall}, Run: func(ctx context.Context, s *pass) ([]string, error) {
			return d.node.Sync(ctx, s.plan.node)
		}},
		// It does not wait for the tailnet: without its addresses the tun is not found, and the tailnet not either.
		{Name: partLinks, Finding: findings.Links, Needs: []string{partRoutes}, Run: func(_ context.Context, s *pass) ([]string, error) {
			return d.links.Sync(s.seen.tunLink())
		}},
		{Name: partPods, Finding: findings.PodLinks, Needs: []string{partRoutes}, Optional: true, Run: func(ctx context.Context, s *pass) ([]string, error) {
			done, err := d.pods.Sync(ctx)
			return done, errors.Join(err, s.seen.portsErr)
		}},
		// Before the node joins and pods start: tailscaled binds its sockets anew for the addresses.
		{Name: partNames, Finding: findings.NameServer, Needs: []string{partFirewall}, Optional: true, Run: func(_ context.Context, s *pass) ([]string, error) {
			done, err := d.answerer.Sync(s.plan.firewall.Own)
			if d.kubernetes != nil { // elsewhere nothing is known to ask the host's resolver for pods, and status has it
				err = errors.Join(err, nodedns.RisksOf(s.seen.dns, d.cfg.DNS.MagicDNS.BaseDomain).Err())
			}
			return done, err
		}},
		{Name: partTailnet, Finding: findings.NotInTailnet, Needs: []string{partRoutes}, Run: func(ctx context.Context, s *pass) ([]string, error) {
			return d.member.Join(ctx, s.seen.Seen)
		}},
		{Name: partPrefs, Finding: findings.Prefs, Needs: []string{partTailnet}, Run: func(ctx context.Context, s *pass) ([]string, error) {
			return d.syncPrefs(ctx, s.plan)
		}},
		{Name: partTunnel, Finding: findings.TunnelRoutes, Needs: []string{partPrefs}, Optional: true, Run: func(_ context.Context, s *pass) ([]string, error) {
			return d.table52.Sync(s.seen.accepted())
		}},
		{Name: partApproval, Finding: findings.NotApproved, Needs: []string{partPrefs}, Run: func(ctx context.Context, s *pass) ([]string, error) {
			return d.member.Approve(ctx, s.seen.Seen, s.plan.prefs)
		}},
		{Name: partConflist, Finding: findings.Conflist, Needs: []string{partPrefs}, Run: func(_ context.Context, s *pass) (done []string, err error) {
			if !s.seen.subnets.Asked {
				return nil, reconcile.Waiting("asks the API server which subnets of the tailnet Namespaces name")
			}
			if !conflist.Stands(d.cfg.CNI.ConfDir) {
				if err := d.member.Unsettled(); err != nil {
					return nil, err
				}
			}
			done, err = d.syncConflist(s.plan)
			s.programmed = err == nil
			return done, err
		}},
		// A pass does not wait for policies, nor they for it. Switched off, they go when ADD does not ask for them any more.
		{Name: partPolicy, Finding: findings.PolicyNot, Needs: policyNeeds(d.policy), Run: func(ctx context.Context, _ *pass) ([]string, error) {
			if d.policy != nil {
				return nil, d.policy.Err()
			}
			return nil, d.switchPolicyOff(ctx)
		}},
		{Name: partHeadscale, Finding: findings.HeadscaleOther, Needs: []string{partTailnet}, Optional: true, Run: func(ctx context.Context, s *pass) ([]string, error) {
			done, err := d.member.Check(ctx, s.seen.Seen)
			return done, errors.Join(losesHeadscale(d.cfg.Headscale.URL, s.seen), s.seen.Tailnet.LacksFamily(s.seen.PodCIDRs), err)
		}},
		{Name: partForeign, Finding: findings.ForeignFirewall, Optional: true, Run: func(_ context.Context, s *pass) ([]string, error) {
			return nil, errors.Join(d.hostFirewall.Foreign(s.seen.tun), d.conntrack.Err(), s.seen.Tailnet.SharedCGNAT(s.seen.hostPrefixes), nodedns.FarResolver(s.seen.Tailnet, s.seen.dns.Nameservers, s.seen.shared), strangers(s.seen), s.seen.path.Err(), noderoutes.OffloadsOff(), noderoutes.Ahead(s.seen.ranges.Pods, netset.Union(s.seen.ranges.Cluster, s.seen.ranges.Remote)), noderoutes.NamedAsPods(), conflist.Others(d.cfg.CNI.ConfDir, d.cfg.CNI.BinDir))
		}},
		{Name: partGuard, Finding: findings.GuardFails, Needs: []string{partFirewall}, Optional: true, Run: func(ctx context.Context, s *pass) ([]string, error) {
			return nil, d.guardTest.Result(ctx, s.plan.firewall, func(passed *bool) {
				d.metrics.SelfTest(passed)
				d.loop.Wake()
			})
		}},
		{Name: partSubnets, Finding: findings.Subnets, Needs: []string{partFirewall}, Optional: true, Run: func(context.Context, *pass) ([]string, error) {
			return nil, d.subnets.Err()
		}},
		{Name: partState, Finding: findings.StateNotKept, Optional: true, Run: func(ctx context.Context, _ *pass) ([]string, error) {
			return nil, errors.Join(d.keepErr, leases.Full(ctx, d.cfg.CNI.ConfDir))
		}},
	}
	if d.kubernetes != nil {
		parts = append(parts, reconcile.Part[*pass]{Name: partRuntime, Finding: findings.RuntimeElsewhere, Needs: []string{partConflist}, Run: func(_ context.Context, s *pass) ([]string, error) {
			return nil, conflist.RuntimeUse(s.seen.Kubernetes.PluginNotReady(), d.conflistAt, time.Now(), d.cfg.CNI, "/")
		}}, reconcile.Part[*pass]{Name: partKubernetes, Finding: findings.APIServer, Optional: true, Run: func(ctx context.Context, s *pass) ([]string, error) {
			return d.kubernetes.Sync(ctx, s.seen.Kubernetes, s.wantOfNode())
		}}, reconcile.Part[*pass]{Name: partServices, Finding: findings.ServicesNotHere, Needs: []string{partPrefs}, Optional: true, Run: func(_ context.Context, s *pass) ([]string, error) {
			return nil, s.seen.servesErr
		}})
	}
	return parts
}

// losesHeadscale says that tailscaled will not come back to its control server. A node that joined by such a URL works until a link of it
// changes.
func losesHeadscale(url string, o observation) error {
	if err := lastingURL(cmp.Or(url, o.controlURL)); err != nil {
		return reconcile.Warning{Err: findings.Errorf(findings.URLNotLasting, "this node is in the tailnet until its tailscaled has to connect anew: %w", err)}
	}
	return nil
}

// lastKnown is what later passes, and a boot without tailscaled, go by.
func (o observation) lastKnown() (mode, tun string, mtu int) {
	if o.Tailnet == nil {
		return "", o.tun, o.tunMTU
	}
	return o.Mode, o.tun, o.tunMTU
}

// remember changes the saved state and writes it before what it describes is done: without, uninstall could not put the
// host back.
func (d *Daemon) remember(change func(*state)) error {
	next := d.changed(change)
	if err := d.keep(next); err != nil {
		return err
	}
	d.saved = next
	return nil
}

// note changes the saved state and goes by it also where it cannot be written now, as on a full disk: it is of use after
// our next start only. Each pass tries again.
func (d *Daemon) note(change func(*state)) {
	d.saved = d.changed(change)
	d.keepErr = d.keep(d.saved)
}

func (d *Daemon) changed(change func(*state)) state {
	next := d.saved.clone()
	change(&next)
	if next.Mode == "" {
		next.Mode = d.saved.Mode
	}
	return next
}

func (d *Daemon) keep(s state) error {
	if err := s.save(d.kept); err != nil {
		return fmt.Errorf("keep the daemon's state: %w; what runs goes on; make room on the file system of %s, or make it writable", err, paths.StateDir)
	}
	d.kept, d.keepErr = s, nil
	return nil
}

func (d *Daemon) syncPrefs(ctx context.Context, p plan) ([]string, error) {
	if p.duplicate != nil {
		return nil, p.duplicate
	}
	have, err := d.member.Prefs(ctx)
	if err != nil {
		return nil, err
	}
	err = d.remember(func(s *state) {
		if s.Prefs == nil {
			found := have.Saved(p.prefs)
			s.Prefs = &found
		}
		for _, r := range p.prefs.AdvertiseRoutes {
			if !slices.Contains(s.Advertised, r) {
				s.Advertised = append(s.Advertised, r)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	changes, err := d.member.EnsurePrefs(ctx, p.prefs)
	if err != nil {
		return changes, err
	}
	return changes, d.remember(func(s *state) { s.Advertised = p.prefs.AdvertiseRoutes })
}

func (d *Daemon) syncTables(ctx context.Context, c nft.Config) ([]string, error) {
	d.firewallMu.Lock()
	defer d.firewallMu.Unlock()
	d.firewall = &c
	return d.tables.Sync(ctx, c)
}

// putTablesBack does not wait for a pass, which asks tailscaled first: where that hangs, so long as somebody has taken our tables away pods
// would be without the guard.
func (d *Daemon) putTablesBack(ctx context.Context) {
	d.firewallMu.Lock()
	defer d.firewallMu.Unlock()
	if d.firewall == nil {
		return
	}
	done, err := d.tables.Sync(ctx, *d.firewall)
	if len(done) > 0 {
		d.log.Info("corrected", "part", partFirewall, "changes", done)
	}
	if err != nil && ctx.Err() == nil {
		d.log.Warn("put our nftables back; the next pass tries again", "err", err)
	}
}

// renewConflist has a conflist that stands, as one of an earlier boot does, say the node's ranges and what its gate is to wait for, before the
// gate opens. The gate cannot tell: it asks whether a range is closed, and one that is another node's by now may be.
func (d *Daemon) renewConflist(s *pass) (done []string, err error) {
	outdated, err := conflist.Outdated(d.cfg.CNI.ConfDir, s.seen.ranges.Pods, d.cfg.Network.NetworkPolicy)
	if err != nil || !outdated || s.plan.duplicate != nil {
		return nil, err // what another node has pods do not get either; the part prefs says it
	}
	return d.writeConflist(s.plan)
}

func (d *Daemon) writeConflist(p plan) (done []string, err error) {
	changed, err := conflist.Write(d.cfg.CNI.ConfDir, p.conflist, func(mode os.FileMode) error {
		return d.remember(func(s *state) { s.ConflistMode = mode })
	})
	if changed {
		done = []string{"write " + conflist.Path(d.cfg.CNI.ConfDir)}
	}
	return done, err
}

func (d *Daemon) syncConflist(p plan) (done []string, err error) {
	defer func() {
		switch {
		case err != nil:
			d.conflistAt = time.Time{}
		case d.conflistAt.IsZero():
			d.conflistAt = time.Now()
		}
	}()
	if err := conflist.Plugin(d.cfg.CNI.BinDir); err != nil {
		return nil, err
	}
	wrote, err := d.writeConflist(p)
	if err != nil {
		return nil, err
	}
	done, err = conflist.StandFirst(d.cfg.CNI.ConfDir, d.cfg.CNI.Exclusive, func(names []string) error {
		return d.remember(func(s *state) { s.Hidden = slices.Compact(slices.Sorted(slices.Values(append(s.Hidden, names...)))) })
	})
	if len(wrote) > 0 {
		if want := d.cfg.Network.MTU; want > p.mtu {
			d.log.Warn("network.mtu is more than the tailnet carries: pods get what it carries", "network.mtu", want, "mtu", p.mtu)
		}
	}
	return append(done, wrote...), err
}
