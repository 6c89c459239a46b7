package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Derper is a machine on the underlay with a relay of Tailscale's own.
type Derper struct {
	*Machine
	// Name is the relay's region, as tailscaled has it.
	Name    string
	Process *Process

	addrs []netip.Prefix
	// verify is where it asks whether a client is Headscale's.
	verify string
}

// derperName and derperHost are those of relay number i.
func derperName(i int) string { return fmt.Sprintf("derp-%d", i+1) }
func derperHost(i int) int    { return i + 2 }

// derperMap is what Headscale tells the nodes of n relays.
func derperMap(n int) string {
	var regions strings.Builder
	for i := range n {
		regions.WriteString(relayRegion(901+i, derperName(i), underlayAddrs(derperHost(i))))
	}
	return "regions:\n" + regions.String()
}

// addDerpers makes the machines of the relays.
func (l *Lab) addDerpers(ctx context.Context) error {
	for i, delay := range l.opt.Derpers {
		name := derperName(i)
		m, err := newMachine(ctx, l.Dir, name, l.hosts(false), l.opt.path(), l.lock)
		if err != nil {
			return err
		}
		headscale := netip.AddrPortFrom(underlayAddrs(1)[0].Addr(), headscalePort)
		d := &Derper{Machine: m, Name: name, addrs: underlayAddrs(derperHost(i)), verify: fmt.Sprintf("http://%s/verify", headscale)}
		l.Derpers = append(l.Derpers, d)
		if err := m.plugBy(Wire{Delay: delay}, l.Control.Machine, name, l.opt.UnderlayMTU); err != nil {
			return err
		}
		if err := m.configure("eth0", d.addrs, underlayAddrs(1)); err != nil {
			return err
		}
	}
	return nil
}

// StartDerper starts the relay and waits until it listens. Without certificates it speaks no TLS, as Headscale does here.
func (d *Derper) StartDerper(ctx context.Context) (err error) {
	d.Process, err = d.Start("derper", nil, "-c", "/var/lib/headscale/derper.json", "-a", fmt.Sprintf(":%d", relayPort), "-http-port", "-1",
		"-hostname", d.addrs[0].Addr().String(), "-verify-client-url", d.verify)
	if err != nil {
		return err
	}
	return until(ctx, 20*time.Millisecond, d.Process, func() error {
		c, err := d.Dial(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(relayPort)))
		if err != nil {
			return err
		}
		return c.Close()
	})
}
