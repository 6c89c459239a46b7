package hosts

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/netset"
)

// askName asks a node's name server, by Go's resolver, over UDP or TCP.
func askName(t *testing.T, from lab.Place, at netip.Addr, network, name string) ([]string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return from.Dial(ctx, network, netip.AddrPortFrom(at, 53).String())
	}}
	if _, err := netip.ParseAddr(name); err == nil {
		return r.LookupAddr(ctx, name)
	}
	return r.LookupHost(ctx, name+".")
}

// Pods and the node itself ask their node for the tailnet's names, and hear of who is not there too. It goes on while tailscaled is dead. Nobody
// beside the node hears anything.
func TestPodsAskTheirNodeForNames(t *testing.T) {
	w := surroundings.Enter(t)
	want := func(from lab.Place, what string) {
		t.Helper()
		for _, at := range []netip.Addr{netset.AnswererIPv4, netset.AnswererIPv6} {
			for _, network := range []string{"udp", "tcp"} {
				labtest.Eventually(t, what+" asks at "+at.String()+", "+network, func() error {
					addrs, err := askName(t, from, at, network, w.a.Name+"."+lab.BaseDomain)
					if err == nil && len(addrs) != 2 {
						err = errors.New("want an address of each family")
					}
					if err != nil {
						return err
					}
					for _, a := range addrs {
						if names, err := askName(t, from, at, network, a); err != nil || len(names) != 1 || names[0] != w.a.Name+"."+lab.BaseDomain+"." {
							t.Errorf("%s is %v, %v", a, names, err)
						}
					}
					return nil
				})
				_, err := askName(t, from, at, network, "nobody."+lab.BaseDomain)
				var dns *net.DNSError
				if !errors.As(err, &dns) || !dns.IsNotFound || dns.IsTemporary {
					t.Errorf("%s asks for nobody: %v", what, err)
				}
			}
		}
	}
	want(w.a1, "a pod in host mode")
	want(w.b1, "a pod in daemon mode")
	want(w.b, "the node")

	for i, at := range []netip.Addr{netset.AnswererIPv4, netset.AnswererIPv6} {
		route := []string{"ip route", "ip -6 route"}[i]
		labtest.Sh(t, w.Control.Machine, "%s add %s via %s", route, at, w.b.Underlay[i])
		_, err := askName(t, w.Control, at, "udp", w.a.Name+"."+lab.BaseDomain)
		var dns *net.DNSError
		if !errors.As(err, &dns) || !dns.IsTimeout {
			t.Errorf("a host beside the node asks at %s: %v", at, err)
		}
		labtest.Sh(t, w.Control.Machine, "%s del %s", route, at)
	}

	labtest.Kill(t, w.b.Tailscaled)
	want(w.b2, "a pod while tailscaled is dead")
	labtest.StartTailscaled(t, w.b)
	labtest.Ready(t, w.b)
	w.works(t)
}
