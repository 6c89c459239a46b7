package leases

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/reconcile"
)

// sweepGrace is how long a lease must have been without a link before it is free: an ADD has the lease before the link,
// and a DEL that failed is tried again by the runtime.
const sweepGrace = 5 * time.Minute

// Sweeper frees the leases of pods that went without a DEL, for instance because containerd never calls GC. A veth dies with
// its network namespace, so a lease without its link has no pod. Make it with NewSweeper.
type Sweeper struct {
	confDir  string // of the conflist, which says where the leases are
	log      *slog.Logger
	released func(addresses int)
	now      func() time.Time
	links    func() (map[string]bool, error)
	missing  map[string]time.Time // link name and time of the lease -> since when the link has not been seen
}

// NewSweeper returns a Sweeper for the networks of the conflist in confDir. It calls released with the number of addresses of
// each lease that it frees.
func NewSweeper(confDir string, log *slog.Logger, released func(addresses int)) *Sweeper {
	return &Sweeper{confDir: confDir, log: log, released: released, now: time.Now, links: linkNames, missing: map[string]time.Time{}}
}

// Run sweeps every interval until ctx ends.
func (s *Sweeper) Run(ctx context.Context, interval time.Duration) {
	for ctx.Err() == nil {
		freed, err := s.sweep(ctx)
		for _, l := range freed {
			s.log.Info("freed the lease of a pod that is gone", "pod", l.PodNamespace+"/"+l.PodName, "container", l.ContainerID, "addrs", l.Addrs)
			s.released(len(l.Addrs))
		}
		if err != nil && ctx.Err() == nil {
			s.log.Warn("sweep leases", "err", err)
		}
		reconcile.Sleep(ctx, interval)
	}
}

// sweep frees what has been without a link for longer than sweepGrace. Only leases that the headcni plugin itself wrote
// have such a link.
func (s *Sweeper) sweep(ctx context.Context) ([]ipam.Lease, error) {
	own, err := conflist.IPAM(s.confDir)
	errs := []error{err}
	networks, err := ipam.Networks(own.DataDir)
	if err != nil {
		return nil, fmt.Errorf("list the networks: %w", err)
	}
	// A lease that is given after this look has no link in it: that only starts its grace period.
	links, err := s.links()
	if err != nil {
		return nil, fmt.Errorf("list the links: %w", err)
	}
	now, seen := s.now(), map[string]bool{}
	keep := func(l ipam.Lease) bool {
		name := podlink.Name(l.ContainerID, l.IfName)
		if l.Writer != ipam.InProcess || links[name] {
			return true
		}
		name += " " + l.Time.String() // an ADD that is tried again has a new lease, with a grace of its own
		seen[name] = true
		since, known := s.missing[name]
		if !known {
			s.missing[name] = now
			return true
		}
		return now.Sub(since) < sweepGrace
	}
	var freed []ipam.Lease
	for _, n := range networks {
		pool, err := ipam.Open(ipam.Config{Network: n, DataDir: own.DataDir})
		if err == nil {
			var f []ipam.Lease
			f, err = pool.GC(ctx, keep)
			freed = append(freed, f...)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("network %s: %w", n, err))
		}
	}
	for name := range s.missing {
		if !seen[name] {
			delete(s.missing, name) // the link is back, or the lease is gone
		}
	}
	return freed, errors.Join(errs...)
}

func linkNames() (map[string]bool, error) {
	ifaces, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	names := make(map[string]bool, len(ifaces))
	for _, i := range ifaces {
		names[i.Name] = true
	}
	return names, nil
}
