// Package noderoutes gives the node what its pod network needs beside the firewall: ip rules, unreachable routes, sysctls, and
// the routes of tailscaled that somebody else took away.
package noderoutes

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/sysctl"
)

// Config is what the node's rules and routes are made from.
type Config struct {
	// Own are this node's pod CIDRs. Cluster are the pod CIDRs of all clusters, Own included.
	Own, Cluster []netip.Prefix
	// Services are the ranges of services.
	Services []netip.Prefix
	// Leaving are former pod CIDRs of this node whose pods still run here. The rest of them may be another node's by now.
	Leaving []netip.Prefix
	// TunName is tailscaled's interface, "" while it is not known.
	TunName string
	// Subnets are networks behind devices of the tailnet that pods reach by the tunnel or not at all, but for networks of the host's own
	// that lie in them, Beside.
	Subnets, Beside []netip.Prefix
	// LANFirst keeps the node's default route before routes that peers advertise: for hosts whose user had neither
	// accept-routes nor an exit node.
	LANFirst bool
}

// Routes keep the ip rules, the unreachable routes and the sysctls of the network namespace of its callers as wanted.
type Routes struct {
	mu    sync.Mutex
	saved Saved
	save  func(Saved) error
}

// passes bounds how often Sync looks again after a change.
const passes = 3

// New returns Routes that have touched nothing yet. saved is what an earlier process kept, so that Remove can put it
// back; save is called before a sysctl is changed for the first time, and its error keeps the sysctl as it is. nil: the
// state lives only here (Saved).
func New(saved Saved, save func(Saved) error) *Routes {
	if save == nil {
		save = func(Saved) error { return nil }
	}
	return &Routes{saved: saved, save: save}
}

// Sync makes rules, routes and sysctls what cfg says, and returns the changes that it made, also when it failed half-way.
// It adds before it deletes, goes on past errors, and in steady state writes nothing.
func (n *Routes) Sync(ctx context.Context, cfg Config) ([]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.forgetEarlierBoot(); err != nil {
		return nil, err
	}
	var done []string
	for range passes {
		have, raws, err := observe()
		if err != nil {
			return done, explain(err)
		}
		have.self = tailnetAddrs(cfg.TunName)
		steps := plan(have, cfg)
		if len(steps) == 0 {
			return done, nil
		}
		var errs []error
		for _, s := range steps {
			if ctx.Err() != nil {
				return done, ctx.Err()
			}
			if err := n.apply(s, raws); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", s, explain(err)))
				continue
			}
			done = append(done, s.String())
		}
		if err := errors.Join(errs...); err != nil {
			return done, err
		}
	}
	// Somebody undoes our work as fast as we do it. Name what.
	have, _, err := observe()
	if err != nil {
		return done, explain(err)
	}
	if steps := plan(have, cfg); len(steps) > 0 {
		return done, fmt.Errorf("%s: done %d times, and something undoes it at once: find the program that "+
			"manages this host's rules and routes (ip monitor rule route)", steps[0], passes)
	}
	return done, nil
}

// observe reads the kernel. raws has each rule of have as the kernel printed it.
func observe() (have state, raws map[rule]rawRule, err error) {
	have.sysctls, have.localLate, have.localOurs = map[string]string{}, map[int]bool{}, map[int]bool{}
	raws = map[rule]rawRule{}
	for _, f := range families {
		if !hasFamily(f) {
			continue
		}
		have.families = append(have.families, f)
		rules, raw, localLate, localOurs, err := listRules(f)
		if err != nil {
			return have, nil, err
		}
		have.localLate[f.af], have.localOurs[f.af] = localLate, localOurs
		for i, r := range rules {
			have.rules = append(have.rules, r)
			raws[r] = raw[i]
		}
		routes, err := listRoutes(f)
		if err != nil {
			return have, nil, err
		}
		have.routes = append(have.routes, routes...)
		if have.sysctls[f.forwarding], err = sysctl.Read(f.forwarding); err != nil {
			return have, nil, fmt.Errorf("read sysctl: %w", err)
		}
		if f.af == unix.AF_INET6 {
			if have.links, err = listLinks(); err != nil {
				return have, nil, err
			}
		}
	}
	return have, raws, nil
}

func (n *Routes) apply(s step, raws map[rule]rawRule) error {
	switch {
	case s.rule != nil && s.delete:
		return deleteRule(raws[*s.rule])
	case s.rule != nil:
		return addRule(*s.rule)
	case s.route != nil && s.delete:
		return deleteRoute(*s.route)
	case s.route != nil:
		return addRoute(*s.route)
	}
	return n.setSysctl(s.sysctl, s.value)
}

// Remove takes away every rule and route of our numbers, but for one without which the node would not know its own addresses, and puts the
// sysctls back that Sync changed. Twice is fine.
func (n *Routes) Remove(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	errs := []error{n.forgetEarlierBoot()}
	// The way into the network is closed first: without rules nothing may be forwarded.
	errs = append(errs, n.restore(), removePeerMTUs())
	have, raws, err := observe()
	if err != nil {
		return errors.Join(append(errs, explain(err))...)
	}
	// In the order of their numbers, in which no step opens what the next one would have closed, and the routes last. What leads to the
	// node itself goes behind all other rules.
	var steps, local []step
	for _, r := range have.rules {
		switch {
		case r.pref != prefLocal:
			steps = append(steps, step{delete: true, rule: &r})
		case !have.localOurs[r.af]: // else the host had its own among our numbers, or has lost it
			local = append(local, step{delete: true, rule: &r})
		}
	}
	steps = append(steps, local...)
	for _, r := range have.routes {
		steps = append(steps, step{delete: true, route: &r})
	}
	for _, s := range steps {
		if ctx.Err() != nil {
			return errors.Join(append(errs, ctx.Err())...)
		}
		if err := n.apply(s, raws); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s, explain(err)))
		}
	}
	return errors.Join(errs...)
}

// explain says what to do about an error of the kernel.
func explain(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w: run as root or with CAP_NET_ADMIN", err)
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("%w: this kernel lacks policy routing (CONFIG_IP_MULTIPLE_TABLES, CONFIG_IPV6_MULTIPLE_TABLES)", err)
	}
	return err
}
