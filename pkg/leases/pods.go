package leases

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/cmdlog"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// mendAfter is how long something has to be lacking before it is put back: an ADD may be at work.
	mendAfter = 500 * time.Millisecond
	// settled is how long after a link was first seen plugins behind ours may still change its hardware address and MTU.
	settled = 10 * time.Second
)

// Mender puts back on the host's ends of pods' links what the plugin made once and others can take away or change (NetworkManager,
// systemd-networkd, a person). What a pod is to have is in its lease, which only we write. Of a pod whose addresses another IPAM
// plugin gave there is none of ours: it is to have what its ADD said and what it was seen to have since the daemon started. So it is with
// what no lease says of a link. Of the pod itself nothing is asked but its hardware address: it could name addresses of others.
type Mender struct {
	confDir string
	links   podlink.Handle
	since   map[string]time.Time // when it was first lacking
	settled time.Duration

	mu   sync.Mutex
	seen map[string]seen          // by the link's name
	told map[string]cmdlog.Record // likewise: ADDs since the last look
}

// seen is what a pod's link was seen to have.
type seen struct {
	podlink.Leased
	// ours tells that there was a lease: what it had is nobody's once that has gone.
	ours bool
	// first is when the link was first seen. From the first look on that finds it settled, Made stays.
	first  time.Time
	stands bool
}

// NewMender looks after the networks whose pools are where the conflist in confDir has its own.
func NewMender(confDir string) *Mender {
	return &Mender{confDir: confDir, settled: settled, seen: map[string]seen{}, told: map[string]cmdlog.Record{}}
}

// Tell notes what an ADD gave: its link may have lost that again before anybody looks.
func (m *Mender) Tell(r cmdlog.Record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case r.Command == "DEL":
		delete(m.told, r.HostIfName)
	case r.Command == "ADD" && r.ErrorCode == 0:
		m.told[r.HostIfName] = r
	}
}

// See notes what pods' links have now. lost tells that one no longer has all that its ADD gave it.
func (m *Mender) See() (lost bool, err error) {
	var links podlink.Handle
	defer links.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	now, err := links.Attached()
	if err != nil {
		return false, err
	}
	before := m.seen
	m.seen = map[string]seen{}
	for name, pod := range now {
		was := before[name]
		have := len(pod.Addrs)
		if was.Network == pod.Network && was.Made.Index == pod.Index {
			pod.Addrs = union(pod.Addrs, was.Addrs)
		}
		if told := m.told[name]; told.ContainerID == pod.ContainerID && told.IfName == pod.IfName {
			pod.Addrs = union(pod.Addrs, told.Addrs)
			lost = lost || len(pod.Addrs) > have
		}
		switch {
		case was.Made.Index != pod.Index:
			was.first, was.stands = time.Now(), false
		case was.stands:
			pod.Made = was.Made
		default:
			was.stands = time.Since(was.first) >= m.settled
		}
		m.seen[name] = seen{pod.Leased, was.ours, was.first, was.stands}
	}
	for name, was := range before {
		// By its name or alias it is nobody's now, but it is there.
		if _, there := now[name]; !there && links.Exists(was.Made.Index) {
			m.seen[name] = was
		}
	}
	clear(m.told)
	return lost, nil
}

// union appends to have those of more that it lacks.
func union(have, more []netip.Addr) []netip.Addr {
	for _, a := range more {
		if !slices.Contains(have, a) {
			have = append(have, a)
		}
	}
	return have
}

// pods are the attachments of all networks: as their leases have them, and without one as they were seen.
func (m *Mender) pods(ctx context.Context, own ipam.Config) ([]podlink.Leased, error) {
	out, err := leased(ctx, own.DataDir)
	if err != nil {
		return nil, err
	}
	if _, err := m.See(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	taken := map[netip.Addr]bool{}
	for i, p := range out {
		name := podlink.Name(p.ContainerID, p.IfName)
		if s, ok := m.seen[name]; ok {
			s.ours = true
			m.seen[name] = s
			out[i].Made = s.Made
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
	own, err := conflist.IPAM(m.confDir)
	if err != nil {
		return nil, err
	}
	pods, err := m.pods(ctx, own)
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
	return done, errors.Join(append(errs, m.strayed(own))...)
}

// strayed says which pods have addresses outside the node's ranges, as the conflist has them: no route leads there but this node's own.
func (m *Mender) strayed(own ipam.Config) error {
	var ranges []netip.Prefix
	for _, set := range own.Sets {
		for _, r := range set {
			ranges = append(ranges, r.Subnet)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for _, s := range m.seen {
		for _, a := range s.Addrs {
			family := netset.OfFamily(ranges, a.Is6())
			if s.Network == own.Network && len(family) > 0 && !netset.Contains(family, a) {
				errs = append(errs, fmt.Errorf("pod of container %.13s has %s, which is outside this node's %v: other nodes do not reach it; delete the pod, or, without Kubernetes, give the node the range that it had (network.podCIDRs)",
					s.ContainerID, a, family))
			}
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	if more := len(errs) - 3; more > 0 {
		errs = append(errs[:3], fmt.Errorf("and %d more addresses of pods", more))
	}
	return errors.Join(errs...)
}

// Lacking reports whether there is something to do for Sync. It may be called while that is at work.
func (m *Mender) Lacking(ctx context.Context) bool {
	own, err := conflist.IPAM(m.confDir)
	if err != nil {
		return false // Sync says so
	}
	pods, err := m.pods(ctx, own)
	if err != nil {
		return false
	}
	var links podlink.Handle
	defer links.Close()
	found, err := links.Lacks(pods)
	return err == nil && len(found) > 0
}

// leased are the attachments of all networks, as their leases have them.
func leased(ctx context.Context, dataDir string) (out []podlink.Leased, err error) {
	networks, err := ipam.Networks(dataDir)
	if err != nil {
		return nil, err
	}
	for _, n := range networks {
		pool, err := ipam.Open(ipam.Config{Network: n, DataDir: dataDir})
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
