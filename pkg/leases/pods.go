package leases

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/reconcile"
)

// mendAfter is how long something has to be lacking before it is put back: an ADD may be at work.
const mendAfter = 500 * time.Millisecond

// Mender puts back on the host's ends of pods' links what the plugin made once and others can take away (NetworkManager,
// systemd-networkd, a person). What a pod is to have is in its lease, which only we write. Of a pod whose addresses another IPAM
// plugin gave there is none of ours: it is to have what it was seen to have since the daemon started. Nothing is asked of the pod
// itself, which could name addresses of others.
type Mender struct {
	confDir string
	links   podlink.Handle
	since   map[string]time.Time // when it was first lacking

	mu   sync.Mutex
	seen map[string]seen // by the link's name
}

// seen is what a pod's link was seen to have.
type seen struct {
	podlink.Leased
	// ours tells that there was a lease: what it had is nobody's once that has gone.
	ours bool
}

// NewMender looks after the networks whose pools are where the conflist in confDir has its own.
func NewMender(confDir string) *Mender { return &Mender{confDir: confDir, seen: map[string]seen{}} }

// See notes what pods' links have now.
func (m *Mender) See() error {
	var links podlink.Handle
	defer links.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	now, err := links.Attached()
	if err != nil {
		return err
	}
	before := m.seen
	m.seen = map[string]seen{}
	for name, pod := range now {
		was := before[name]
		for _, a := range was.Addrs {
			if was.Network == pod.Network && !slices.Contains(pod.Addrs, a) {
				pod.Addrs = append(pod.Addrs, a)
			}
		}
		m.seen[name] = seen{pod.Leased, was.ours}
	}
	return nil
}

// pods are the attachments of all networks: as their leases have them, and without one as they were seen.
func (m *Mender) pods(ctx context.Context) ([]podlink.Leased, error) {
	out, err := leased(ctx, m.confDir)
	if err != nil {
		return nil, err
	}
	if err := m.See(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	taken := map[netip.Addr]bool{}
	for _, p := range out {
		name := podlink.Name(p.ContainerID, p.IfName)
		if s, ok := m.seen[name]; ok {
			s.ours = true
			m.seen[name] = s
		}
		for _, a := range p.Addrs {
			taken[a] = true
		}
	}
	for _, s := range m.seen {
		if !s.ours && !slices.ContainsFunc(s.Addrs, func(a netip.Addr) bool { return taken[a] }) {
			out = append(out, s.Leased)
		}
	}
	return out, nil
}

// Sync puts back what has been lacking for a while and waits for the rest.
func (m *Mender) Sync(ctx context.Context) (done []string, err error) {
	pods, err := m.pods(ctx)
	if err != nil {
		return nil, err
	}
	found, err := m.links.Lacks(pods)
	if err != nil {
		m.links.Close()
		return nil, err
	}
	since := map[string]time.Time{}
	var errs []error
	for _, l := range found {
		what := l.String()
		at, known := m.since[what]
		if !known {
			at = time.Now()
		}
		if time.Since(at) < mendAfter {
			since[what] = at
			errs = append(errs, reconcile.Soon{Waiting: reconcile.Waiting(what), In: mendAfter})
			continue
		}
		if err := m.links.Mend(l); err != nil {
			since[what] = at
			errs = append(errs, fmt.Errorf("%s, which cannot be put back: %w; start the pod again", what, err))
			continue
		}
		done = append(done, "mend "+what)
	}
	m.since = since
	return done, errors.Join(errs...)
}

// Lacking reports whether there is something to do for Sync. It may be called while that is at work.
func (m *Mender) Lacking(ctx context.Context) bool {
	pods, err := m.pods(ctx)
	if err != nil {
		return false // Sync says so
	}
	var links podlink.Handle
	defer links.Close()
	found, err := links.Lacks(pods)
	return err == nil && len(found) > 0
}

// leased are the attachments of all networks, as their leases have them.
func leased(ctx context.Context, confDir string) (out []podlink.Leased, err error) {
	own, err := conflist.IPAM(confDir)
	if err != nil {
		return nil, err
	}
	networks, err := ipam.Networks(own.DataDir)
	if err != nil {
		return nil, err
	}
	for _, n := range networks {
		pool, err := ipam.Open(ipam.Config{Network: n, DataDir: own.DataDir})
		if err != nil {
			return nil, err
		}
		leases, err := pool.List(ctx)
		if err != nil {
			return nil, err
		}
		for _, l := range leases {
			p := podlink.Leased{Network: n, ContainerID: l.ContainerID, IfName: l.IfName}
			for _, a := range l.Addrs {
				p.Addrs = append(p.Addrs, a.Addr.Addr())
			}
			out = append(out, p)
		}
	}
	return out, nil
}
