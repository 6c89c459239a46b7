// Package leases looks after the addresses that the pods of this node have: how many there are, and which have no pod any more.
package leases

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/monitoring"
	"github.com/headcni/headcni/pkg/reconcile"
)

// InUse counts leases per network and family, going on past errors. How many there can be is known of the network of
// our conflist only: the ranges of others that use headcni-ipam are in their configurations.
func InUse(ctx context.Context, confDir string) ([]monitoring.Pool, error) {
	own, err := conflist.IPAM(confDir)
	errs := []error{err}
	networks, err := ipam.Networks(own.DataDir)
	errs = append(errs, err)
	if own.Network != "" && !slices.Contains(networks, own.Network) {
		networks = append(networks, own.Network) // no pod yet
	}
	var out []monitoring.Pool
	for _, n := range networks {
		c := ipam.Config{Network: n, DataDir: own.DataDir}
		if n == own.Network {
			c = own
		}
		found, err := poolInUse(ctx, c)
		if err != nil {
			errs = append(errs, fmt.Errorf("count the leases of network %s: %w", n, err))
		}
		out = append(out, found...)
	}
	return out, errors.Join(errs...)
}

// Full is a warning where a family of a network has no address left.
func Full(ctx context.Context, confDir string) error {
	pools, err := InUse(ctx, confDir)
	if err != nil {
		return nil // whoever makes a pod is told
	}
	var found []string
	for _, p := range pools {
		if p.Size > 0 && p.InUse >= p.Size {
			found = append(found, fmt.Sprintf("network %s has %.0f of %.0f %s addresses in use", p.Network, p.InUse, p.Size, p.Family))
		}
	}
	if found == nil {
		return nil
	}
	return reconcile.Warning{Err: findings.Errorf(findings.PoolFull, "no address is left for new pods: %s; see `headcnictl ipam list`", strings.Join(found, ", "))}
}

func poolInUse(ctx context.Context, c ipam.Config) ([]monitoring.Pool, error) {
	pool, err := ipam.Open(c)
	if err != nil {
		return nil, err
	}
	leases, err := pool.List(ctx)
	if err != nil {
		return nil, err
	}
	used, size := map[string]float64{}, map[string]float64{}
	for _, l := range leases {
		for _, a := range l.Addrs {
			used[familyOf(a.Addr)]++
		}
	}
	sets, err := pool.Usage(ctx)
	if err != nil {
		return nil, err
	}
	for _, s := range sets {
		size[familyOf(s.Subnets[0])] += float64(s.Size)
	}
	var out []monitoring.Pool
	for _, f := range []string{"ipv4", "ipv6"} {
		if used[f] > 0 || size[f] > 0 {
			out = append(out, monitoring.Pool{Network: c.Network, Family: f, InUse: used[f], Size: size[f]})
		}
	}
	return out, nil
}

func familyOf(p netip.Prefix) string {
	if p.Addr().Is4() {
		return "ipv4"
	}
	return "ipv6"
}
