package hosts

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// Pods reach tailscaled's own address for names, and for nothing else: its web client takes what comes from the node for the
// node's administrator.
func TestPodsReachResolverOnly(t *testing.T) {
	w := surroundings.Enter(t)
	reach := func(from lab.Place, to netip.AddrPort) error {
		ctx, cancel := context.WithTimeout(t.Context(), labtest.Moment)
		defer cancel()
		conn, err := from.Dial(ctx, "tcp", to.String())
		if err == nil {
			conn.Close()
		}
		return err
	}
	web := []netip.AddrPort{netip.MustParseAddrPort("100.100.100.100:80"), netip.MustParseAddrPort("[fd7a:115c:a1e0::53]:80")}
	for _, to := range web {
		// Only the host's tailscaled has it; ours is built without.
		labtest.Eventually(t, "the node itself reaches the web client", func() error { return reach(w.a, to) })
		if reach(w.a1, to) == nil {
			t.Errorf("a pod reaches the web client at %s", to)
		}
	}
	addrs, err := lab.Lookup(labtest.Within(t), w.a1, w.a.Name+"."+lab.BaseDomain)
	if err != nil || len(addrs) == 0 {
		t.Errorf("a pod asks the resolver: %v, %v", addrs, err)
	}
}

// A host whose name server is in the tailnet's range, as some clouds' are: status says that pods do not reach it, until the host has a
// route of its own to it.
func TestFarResolver(t *testing.T) {
	w := surroundings.Enter(t)
	n := w.b // a host's own tailscaled writes resolv.conf itself
	const server = "100.101.2.136"
	labtest.Sh(t, n.Machine, "cp /etc/resolv.conf /etc/resolv.conf.before")
	t.Cleanup(func() {
		labtest.Sh(t, n.Machine, "mv /etc/resolv.conf.before /etc/resolv.conf; ip route del %s 2>/dev/null || :", server)
	})
	said := func(want bool) {
		t.Helper()
		labtest.Eventually(t, fmt.Sprintf("status names the name server: %t", want), func() error {
			if text, ready := labtest.Part(t, n, "foreign"); strings.Contains(text, server) != want || !ready {
				return fmt.Errorf("ready %t: %q", ready, text)
			}
			return nil
		})
	}
	said(false)
	// A rule that is gone makes the daemon look.
	labtest.Sh(t, n.Machine, "echo nameserver %s > /etc/resolv.conf; ip rule del pref 5194", server)
	said(true)
	labtest.Sh(t, n.Machine, "ip route add %s dev eth0", server)
	said(false)
}
