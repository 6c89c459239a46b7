// Package nodedns is what a node does for names: it answers its pods for the tailnet, and finds what leads their questions in a circle,
// or to nobody.
package nodedns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/dns/answer"
	"github.com/headcni/headcni/pkg/reconcile"
	"github.com/headcni/headcni/pkg/tailscale"
)

// Answerer is the node's name server for the tailnet. Make it with New.
type Answerer struct {
	server answer.Server
	own    atomic.Pointer[[]netip.Prefix] // whose pods may ask
	wanted chan []netip.Addr              // where it is to answer, once

	mu sync.Mutex
	at []netip.Addr
	// listening tells that it answers, err why it does not; neither is known in the beginning.
	listening bool
	err       error
}

// New returns an Answerer of what ask says: it may be a tailscaled that tells no DNS, or does not answer.
func New(ask func(context.Context) (tailscale.Status, *tailscale.DNS, error)) *Answerer {
	a := &Answerer{wanted: make(chan []netip.Addr, 1)}
	a.server = answer.Server{
		Source: func(ctx context.Context) (answer.Names, error) { return namesOf(ask(ctx)) },
		May: func(client netip.Addr) bool {
			own := a.own.Load()
			return own != nil && slices.ContainsFunc(*own, func(p netip.Prefix) bool { return p.Contains(client) })
		},
	}
	return a
}

// namesOf are those of all devices and the extra records. A tailscaled that does not run knows nobody, which is no reason to forget them.
func namesOf(s tailscale.Status, dns *tailscale.DNS, err error) (answer.Names, error) {
	if err != nil {
		return answer.Names{}, err
	}
	if s.State != tailscale.Running || s.MagicDNSSuffix == "" {
		return answer.Names{}, fmt.Errorf("tailscaled says %s", s.State)
	}
	n := answer.Names{Domain: s.MagicDNSSuffix, Hosts: map[string][]netip.Addr{}, Incomplete: dns == nil}
	for _, p := range append(slices.Clone(s.Peers), s.Self) {
		if p.DNSName != "" {
			n.Hosts[p.DNSName] = p.IPs
		}
	}
	if dns != nil {
		for name, addrs := range dns.Records {
			if _, device := n.Hosts[name]; !device { // as tailscaled has it: nobody takes a device's name
				n.Hosts[name] = addrs
			}
		}
	}
	return n, nil
}

// errStarts passes as soon as the server listens, which wakes the next pass.
const errStarts = reconcile.Waiting("the name server for the tailnet starts")

// Sync has the node answer pods of these ranges, and says what it had to do. The server is where the families of the first ranges are.
func (a *Answerer) Sync(own []netip.Prefix) ([]string, error) {
	a.own.Store(&own)
	a.mu.Lock()
	if a.at == nil {
		if a.at = addrsFor(own); a.at != nil {
			a.wanted <- a.at
		}
	}
	at, listening, failed := a.at, a.listening, a.err
	a.mu.Unlock()
	a.server.Renew() // the pass may be of a change of peers
	if failed != nil {
		// Whoever listens on all addresses would be asked in the server's place, and CoreDNS would believe it.
		return nil, errors.Join(failed, answer.RemoveAddrs())
	}
	if !listening && at != nil {
		// Not when it listens, by when pods may have begun to talk: tailscaled binds its sockets anew for each address that comes.
		done, err := answer.Ahead(at)
		if err == nil {
			err = errStarts
		}
		return done, err
	}
	return answer.EnsureAddrs(at)
}

// addrsFor are where a node with pods of these ranges answers.
func addrsFor(own []netip.Prefix) (at []netip.Addr) {
	for i, addr := range []netip.Addr{netset.AnswererIPv4, netset.AnswererIPv6} {
		if len(netset.OfFamily(own, i == 1)) > 0 {
			at = append(at, addr)
		}
	}
	return at
}

// Ahead is for before a tailscaled of ours starts: answer.Ahead. Where the node's ranges are not known yet, as at the first start on
// Kubernetes, pods have no family that the host lacks.
func Ahead(own []netip.Prefix) error {
	at := addrsFor(own)
	if at == nil {
		host, err := net.InterfaceAddrs()
		if err != nil {
			return err
		}
		at = addrsFor(global(host))
	}
	_, err := answer.Ahead(at)
	return err
}

// global are the addresses by which a host is reached from elsewhere.
func global(host []net.Addr) (out []netip.Prefix) {
	for _, a := range host {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsGlobalUnicast() && p.Addr() != netset.AnswererIPv6 {
			out = append(out, p)
		}
	}
	return out
}

// set says whether it answers, and has a pass look at it.
func (a *Answerer) set(listening bool, err error, wake func()) {
	a.mu.Lock()
	a.listening, a.err = listening, err
	a.mu.Unlock()
	wake()
}

// Run answers until ctx ends. What keeps it from that is tried again each so often.
func (a *Answerer) Run(ctx context.Context, each time.Duration, wake func()) {
	var at []netip.Addr
	select {
	case <-ctx.Done():
		return
	case at = <-a.wanted:
	}
	a.server.Listening = func() { a.set(true, nil, wake) }
	for ctx.Err() == nil {
		if err := a.server.Run(ctx, at); err != nil {
			a.set(false, err, wake)
		}
		reconcile.Sleep(ctx, each)
	}
}
