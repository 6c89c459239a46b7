package hosts

import (
	"context"
	"net/netip"
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
