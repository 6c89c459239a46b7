package leases

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/reconcile"
)

// mendAfter is how long something has to be lacking before it is put back: an ADD may be at work.
const mendAfter = 500 * time.Millisecond

// Mender puts back on the host's ends of pods' links what the plugin made once and others can take away (NetworkManager,
// systemd-networkd, a person). What a pod is to have is in its lease, which only we write. So pods whose addresses another IPAM
// plugin gave are not looked after.
type Mender struct {
	confDir string
	links   podlink.Handle
	since   map[string]time.Time // when it was first lacking
}

// NewMender looks after the networks whose pools are where the conflist in confDir has its own.
func NewMender(confDir string) *Mender { return &Mender{confDir: confDir} }

// Sync puts back what has been lacking for a while and waits for the rest.
func (m *Mender) Sync(ctx context.Context) (done []string, err error) {
	pods, err := pods(ctx, m.confDir)
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

// Lacking reports whether there is something to do for Sync.
func Lacking(ctx context.Context, confDir string) bool {
	pods, err := pods(ctx, confDir)
	if err != nil {
		return false // Sync says so
	}
	var links podlink.Handle
	defer links.Close()
	found, err := links.Lacks(pods)
	return err == nil && len(found) > 0
}

// pods are the attachments of all networks, as their leases have them.
func pods(ctx context.Context, confDir string) (out []podlink.Leased, err error) {
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
