// Package serviceroute decides which routes to services this node advertises to the tailnet: those that headcni-controller asks for, while
// services work here.
package serviceroute

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// askInterval is how often kube-proxy is asked, askTimeout how long it may take.
	askInterval = 5 * time.Second
	askTimeout  = 3 * time.Second
	// patience is how long services may not work before the routes are withdrawn: kube-proxy's rules stand while it is restarted, and
	// ours while the daemon is.
	patience = 30 * time.Second
)

// Gate judges whether services work on this node. Make it with New. Its methods may be called side by side.
type Gate struct {
	url    string
	needs  []string // parts of the node
	client *http.Client
	now    func() time.Time

	mu       sync.Mutex
	asked    bool // whether somebody wants to know
	health   error
	badSince time.Time // zero while all is well
}

var errNotAsked = errors.New("kube-proxy has not been asked yet")

// New makes the Gate of a node whose kube-proxy says at url how it is; "" where it is not to be asked. needs are the parts of the node
// without which it would not forward to services.
func New(url string, needs ...string) *Gate {
	g := &Gate{url: url, needs: needs, now: time.Now, client: &http.Client{
		Timeout: askTimeout, Transport: &http.Transport{DisableKeepAlives: true}, // and no proxy of the environment's
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	if url != "" {
		g.health = errNotAsked
	}
	return g
}

// Run asks kube-proxy again and again, while Routes has something to decide, until ctx ends. It calls changed for news.
func (g *Gate) Run(ctx context.Context, changed func()) {
	for g.url != "" && ctx.Err() == nil {
		g.mu.Lock()
		asked, before := g.asked, g.health
		g.mu.Unlock()
		if asked {
			err := g.ask(ctx)
			g.mu.Lock()
			g.health = err
			g.mu.Unlock()
			if (before == nil) != (err == nil) || err != nil {
				changed() // and while it is not well, until patience ends
			}
		}
		reconcile.Sleep(ctx, askInterval)
	}
}

func (g *Gate) ask(ctx context.Context) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, g.url, nil)
	if err != nil {
		return err
	}
	resp, err := g.client.Do(r)
	if err != nil {
		return fmt.Errorf("kube-proxy does not say that services work on this node: %w; if it says so elsewhere, or another program does its work, set "+
			"network.advertiseServices.healthURL", errors.Unwrap(err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 200)) // what it says beside the status is for people
		return fmt.Errorf("kube-proxy says that services do not work on this node: %s %q", resp.Status, text)
	}
	return nil
}

// Routes are what this node is to advertise of want, the routes that it was asked to: all that lie in the ranges of services, while services
// work here. While they have not worked for a short time only, it keeps what it has; after that it has none. parts are how the
// node's parts stand. An error says what is missing, in whichever way.
func (g *Gate) Routes(want, ranges, has []netip.Prefix, parts []reconcile.Status) ([]netip.Prefix, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.asked = len(want) > 0; !g.asked {
		g.badSince = time.Time{}
		return nil, nil
	}
	var outside error
	inside := slices.DeleteFunc(slices.Clone(want), func(p netip.Prefix) bool { return !netset.Covers(ranges, p) })
	if len(inside) < len(want) {
		outside = fmt.Errorf("headcni-controller has this node advertise %v, which are in none of the ranges of services %v that are known here: "+
			"set network.serviceCIDRs to what kube-apiserver has as --service-cluster-ip-range", netset.Without(want, inside), ranges)
	}
	bad := errors.Join(g.lacks(parts), g.health)
	if bad == nil {
		g.badSince = time.Time{}
		return inside, outside
	}
	if g.badSince.IsZero() {
		g.badSince = g.now()
	}
	if g.now().Sub(g.badSince) < patience {
		kept := slices.DeleteFunc(inside, func(p netip.Prefix) bool { return !slices.Contains(has, p) })
		return kept, errors.Join(outside, reconcile.Waiting(bad.Error()))
	}
	return nil, errors.Join(outside, fmt.Errorf("the tailnet does not reach services by this node any more: %w", bad))
}

func (g *Gate) lacks(parts []reconcile.Status) error {
	for _, p := range parts {
		if !p.OK && slices.Contains(g.needs, p.Name) {
			return fmt.Errorf("%s: %s", p.Name, p.Error)
		}
	}
	return nil
}

// Served are the services that devices of the tailnet may reach over this node: those that it is to lead to, and what of the ranges of
// services its user advertises.
func Served(leads, users, ranges []netip.Prefix) []netip.Prefix {
	return slices.Concat(leads, slices.DeleteFunc(slices.Clone(users), func(p netip.Prefix) bool {
		return p.Bits() == 0 || !slices.ContainsFunc(ranges, p.Overlaps)
	}))
}
