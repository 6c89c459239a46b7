package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// deadmanPatience is how long our routes may keep this node from Headscale or the API server before they are taken back.
	deadmanPatience = time.Minute
	deadmanInterval = 10 * time.Second
	deadmanDial     = 3 * time.Second
)

// deadman watches whether it is our rules, or routes that we made tailscaled accept, that cut the node off from
// Headscale or the API server. One that is down does not count: it cannot be reached past our rules either.
type deadman struct {
	reach func(ctx context.Context, mark int) error
	now   func() time.Time
	since time.Time // when it was first found so, zero = it is not
}

func newDeadman(address string) *deadman {
	return &deadman{now: time.Now, reach: func(ctx context.Context, mark int) error { return dialMarked(ctx, address, mark) }}
}

// look reports whether the node has been cut off for too long.
func (m *deadman) look(ctx context.Context) bool {
	if m.reach(ctx, 0) == nil || m.reach(ctx, names.BypassMark) != nil {
		m.since = time.Time{}
		return false
	}
	if m.since.IsZero() {
		m.since = m.now()
	}
	return m.now().Sub(m.since) >= deadmanPatience
}

// run looks until ctx ends and calls cutOff when it is time, and again where that has not helped: what could not be taken
// back is tried again.
func (m *deadman) run(ctx context.Context, cutOff func()) {
	for ctx.Err() == nil {
		if m.look(ctx) {
			cutOff()
			m.since = time.Time{}
		}
		reconcile.Sleep(ctx, deadmanInterval)
	}
}

// dialMarked connects and hangs up, with a firewall mark on the packets.
func dialMarked(ctx context.Context, address string, mark int) error {
	d := net.Dialer{Timeout: deadmanDial, Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark) }); e != nil {
			return e
		}
		return err
	}}
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return c.Close()
}

// hostPort is where a server listens: host:port of its URL, or of what may stand in its place in a kubeconfig; "" where there
// is none.
func hostPort(server string) string {
	if !strings.Contains(server, "://") {
		server = "https://" + server
	}
	u, err := url.Parse(server)
	if err != nil || u.Hostname() == "" {
		return ""
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// fingerprint tells whether the configuration has changed since it was taken back. The CIDRs of other Nodes, which come and
// go, are no part of it.
func fingerprint(c config.Config) string {
	sum := sha256.Sum256([]byte(c.String())) // secrets are masked in it
	return hex.EncodeToString(sum[:8])
}

// fingerprint is that of the configuration with our own pod CIDRs, wherever they are from.
func (d *Daemon) fingerprint() string {
	c := d.cfg
	if d.kubernetes != nil {
		c.Network.PodCIDRs = nil
		for _, p := range d.saved.Kubernetes.PodCIDRs {
			c.Network.PodCIDRs = append(c.Network.PodCIDRs, p.String())
		}
	}
	return fingerprint(c)
}

// errTakenBack is why nothing is applied any more.
func errTakenBack(address string) error {
	return fmt.Errorf("taken back: with our routes this node could not reach %s for %s, without them it could; look for a peer that "+
		"advertises its prefix (headscale nodes list-routes), set network.lanFirst: true or change the CIDRs: a changed configuration "+
		"is tried again", address, deadmanPatience)
}

// withdraw removes our rules, routes and prefs, but not the guard: what the node lost it gets back, and still nothing
// goes out in clear. It is noted first, so that no restart tries the same again. Once it is done, what cuts the node off is
// not ours any more.
func (d *Daemon) withdraw(ctx context.Context, address string) error {
	what := d.fingerprint()
	if what == d.withdrawn {
		return nil
	}
	d.note(func(s *state) { s.TakenBack, s.TakenBackFor = what, address })
	err := errors.Join(d.node.Remove(ctx), restorePrefs(ctx, d.cfg, d.saved))
	if err == nil {
		d.withdrawn = what
	}
	return err
}
