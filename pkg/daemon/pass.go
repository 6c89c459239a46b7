package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/tailscale"
)

// The parts of a node in the order in which they are made right: the guard stands before anything can be routed, the
// tailnet learns of the pods when they are safe, and the runtime when everything else is.
const (
	partConfig   = "config"
	partFirewall = "firewall"
	partRoutes   = "routes"
	partTailnet  = "tailnet"
	partPrefs    = "prefs"
	// partTunnel are tailscaled's routes to its peers, which it makes once and does not look at again.
	partTunnel   = "tunnel"
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
	// partState is what must be on disk for our next start.
	partState = "state"
	// partPolicy says that what network.networkPolicy asks for is not done.
	partPolicy = "policy"
)

// partsOf are the parts that a node has.
func partsOf(c config.Config, kubernetes bool) []string {
	parts := []string{
		partConfig, partFirewall, partRoutes, partTailnet, partPrefs, partTunnel, partApproval, partConflist, partHeadscale,
		partForeign, partState,
	}
	if c.Network.NetworkPolicy {
		parts = append(parts, partPolicy)
	}
	if kubernetes {
		parts = append(parts, partRuntime, partKubernetes)
	}
	return parts
}

// errNoPolicy: what somebody relies on for safety must not be missing silently.
var errNoPolicy = warning{errors.New("network.networkPolicy is true, but this version enforces no NetworkPolicy: every pod can be reached by " +
	"every other; keep apart what must be apart in other ways, or set it to false to say that you know")}

// pass observes, plans and applies once. It reports whether everything is right.
func (d *Daemon) pass(ctx context.Context) bool {
	if done, right := d.leave(ctx); done {
		return right
	}
	o, err := d.observe(ctx)
	var p plan
	if err == nil && d.saved.TakenBack == d.fingerprint() {
		err = errTakenBack(d.saved.TakenBackFor)
	}
	if err == nil {
		p, err = makePlan(o.config, o, d.saved)
	}
	if o.tailnet != nil {
		d.metrics.Peers(o.tailnet.PathCounts())
	}
	right := d.board.run(ctx, d.parts(o, p, err))
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last, d.confirmed = o, d.member.confirmed.routes
	return right
}

// parts are what makes the node as p says, in order. refused is why nothing of it may be applied, nil where it may.
func (d *Daemon) parts(o observation, p plan, refused error) []part {
	up := false
	parts := []part{
		{name: partConfig, run: func(context.Context) ([]string, error) {
			if refused != nil {
				return nil, refused
			}
			d.note(func(s *state) { s.Mode, s.TunName, s.TunMTU = o.settled() })
			return nil, nil
		}},
		{name: partFirewall, needs: []string{partConfig}, run: func(ctx context.Context) ([]string, error) {
			return d.tables.Sync(ctx, p.firewall)
		}},
		{name: partRoutes, needs: []string{partFirewall}, run: func(ctx context.Context) ([]string, error) {
			return d.node.Sync(ctx, p.node)
		}},
		{name: partTailnet, needs: []string{partRoutes}, run: func(ctx context.Context) ([]string, error) {
			return d.member.join(ctx, o)
		}},
		{name: partPrefs, needs: []string{partTailnet}, run: func(ctx context.Context) ([]string, error) {
			return d.syncPrefs(ctx, p)
		}},
		{name: partTunnel, needs: []string{partPrefs}, optional: true, run: func(context.Context) ([]string, error) {
			return d.tunnel.sync(d.node, o)
		}},
		{name: partApproval, needs: []string{partPrefs}, run: func(ctx context.Context) ([]string, error) {
			return d.member.approve(ctx, o, p.prefs)
		}},
		{name: partConflist, needs: []string{partPrefs}, run: func(context.Context) (done []string, err error) {
			done, err = d.syncConflist(p)
			up = err == nil
			return done, err
		}},
		{name: partHeadscale, needs: []string{partTailnet}, optional: true, run: func(ctx context.Context) ([]string, error) {
			return d.member.check(ctx, o)
		}},
		{name: partForeign, optional: true, run: func(context.Context) ([]string, error) {
			return nil, errors.Join(d.foreignDrops(o.tun), sharedCGNAT(o))
		}},
		{name: partState, optional: true, run: func(context.Context) ([]string, error) { return nil, d.keepErr }},
	}
	if d.cfg.Network.NetworkPolicy {
		parts = append(parts, part{name: partPolicy, optional: true, run: func(context.Context) ([]string, error) { return nil, errNoPolicy }})
	}
	if o.cluster != nil {
		parts = append(parts, part{name: partRuntime, needs: []string{partConflist}, run: func(context.Context) ([]string, error) {
			return nil, runtimeUse(o.cluster.node, d.conflistAt, time.Now(), d.cfg.CNI, "/")
		}}, part{name: partKubernetes, optional: true, run: func(ctx context.Context) ([]string, error) {
			return d.syncNode(ctx, o, up)
		}})
	}
	return parts
}

// foreignDrops says which firewalls of others drop what pods send and get, and what to do about it.
func (d *Daemon) foreignDrops(tun string) error {
	drops, err := d.tables.ForeignDrops()
	if err != nil || len(drops) == 0 {
		return err
	}
	return fmt.Errorf("another program's firewall drops what pods send and get, which no rule of ours can change: %s; let %s* and %s "+
		"pass there, for instance `firewall-cmd --permanent --zone=trusted --add-interface=%[2]s+ --add-interface=%[3]s && "+
		"firewall-cmd --reload`", strings.Join(drops, ", "), names.PodLinkPrefix, tun)
}

// cgnat is where IPv4 tailnet addresses are from, and networks of providers too.
var cgnat = netip.MustParsePrefix("100.64.0.0/10")

// sharedCGNAT says that tailscaled keeps this host from a network of its own, which no rule of ours can change.
func sharedCGNAT(o observation) error {
	if o.tailnet == nil || o.tailnet.SharesCGNAT {
		return nil
	}
	for _, p := range o.hostPrefixes {
		if p.Overlaps(cgnat) {
			return warning{fmt.Errorf("an interface of this host has %s, a part of the tailnet's %s: tailscaled's firewall drops what the host itself gets "+
				`from there (pods are not concerned); add "nodeAttrs": [{"target": ["*"], "attr": ["%s"]}] to Headscale's policy, and keep `+
				"prefixes.v4 in Headscale's configuration clear of that network", p, cgnat, tailscale.AttrSharesCGNAT)}
		}
	}
	return nil
}

// settled is what later passes, and a boot without tailscaled, go by.
func (o observation) settled() (mode, tun string, mtu int) {
	if o.tailnet == nil {
		return "", o.tun, o.tunMTU
	}
	return o.mode, o.tun, o.tunMTU
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
	have, err := d.member.client.Prefs(ctx)
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
	changes, err := d.member.client.EnsurePrefs(ctx, p.prefs)
	if len(changes) > 0 {
		d.member.advertisedAt = time.Now()
	}
	if err != nil {
		return changes, err
	}
	return changes, d.remember(func(s *state) { s.Advertised = p.prefs.AdvertiseRoutes })
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
	if _, err := os.Stat(filepath.Join(d.cfg.CNI.BinDir, "headcni")); err != nil {
		return nil, fmt.Errorf("the CNI plugin is missing: %w; run `headcni-daemon install`, or set cni.binDir to where it is", err)
	}
	changed, err := writeConflist(d.cfg.CNI.ConfDir, p.conflist, func(mode os.FileMode) error {
		return d.remember(func(s *state) { s.ConflistMode = mode })
	})
	if err != nil {
		return nil, err
	}
	done, err = standFirst(d.cfg.CNI.ConfDir, d.cfg.CNI.Exclusive, func(names []string) error {
		return d.remember(func(s *state) { s.Hidden = slices.Compact(slices.Sorted(slices.Values(append(s.Hidden, names...)))) })
	})
	if changed {
		done = append(done, "write "+filepath.Join(d.cfg.CNI.ConfDir, paths.ConflistName))
	}
	return done, err
}

// errStopped: the user's `tailscale down` is theirs to undo.
var errStopped = errors.New("tailscaled is stopped: run `tailscale up`")

// running reports whether the tailnet carries traffic.
func running(s *tailscale.Status) bool { return s != nil && s.State == tailscale.Running }
