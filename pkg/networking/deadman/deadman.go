// Package deadman finds that it is our own rules and routes that cut a node off from a server it needs.
package deadman

import (
	"context"
	"net"
	"net/url"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// Patience is how long our routes may keep this node from Headscale or the API server before they are taken back.
	Patience    = time.Minute
	interval    = 10 * time.Second
	dialTimeout = 3 * time.Second
)

// Watch watches whether it is our rules, or routes that we made tailscaled accept, that cut the node off from
// Headscale or the API server. One that is down does not count: it cannot be reached past our rules either.
type Watch struct {
	reach func(ctx context.Context, mark int) error
	now   func() time.Time
	since time.Time // when it was first found so, zero = it is not
}

// New returns a Watch of a server at host:port.
func New(address string) *Watch {
	return &Watch{now: time.Now, reach: func(ctx context.Context, mark int) error { return dialMarked(ctx, address, mark) }}
}

// look reports whether the node has been cut off for too long.
func (m *Watch) look(ctx context.Context) bool {
	if m.reach(ctx, 0) == nil || m.reach(ctx, names.BypassMark) != nil {
		m.since = time.Time{}
		return false
	}
	if m.since.IsZero() {
		m.since = m.now()
	}
	return m.now().Sub(m.since) >= Patience
}

// Run looks until ctx ends and calls cutOff when it is time, and again where that has not helped: what could not be taken
// back is tried again.
func (m *Watch) Run(ctx context.Context, cutOff func()) {
	for ctx.Err() == nil {
		if m.look(ctx) {
			cutOff()
			m.since = time.Time{}
		}
		reconcile.Sleep(ctx, interval)
	}
}

// dialMarked connects and hangs up, with a firewall mark on the packets.
func dialMarked(ctx context.Context, address string, mark int) error {
	d := net.Dialer{Timeout: dialTimeout, Control: func(_, _ string, c syscall.RawConn) error {
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

// HostPort is where a server listens: host:port of its URL, or of what may stand in its place in a kubeconfig; "" where there
// is none.
func HostPort(server string) string {
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
