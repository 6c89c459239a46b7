package selftest

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/nft"
)

func TestMain(m *testing.M) { nstest.Main(m) }

func typical() nft.Config {
	var p []netip.Prefix
	for _, s := range []string{"10.244.1.0/24", "fd00:244:1::/64", "10.244.0.0/16", "fd00:244::/32", "10.96.0.0/16", "fd00:96::/112"} {
		p = append(p, netip.MustParsePrefix(s))
	}
	return nft.Config{Own: p[:2], Cluster: p[2:4], KeepSource: p[4:], TunName: "headcni01", Masquerade: true, HostMode: true}
}

// It sees each packet stopped, by every configuration, and leaves the namespace of its caller alone.
func TestRun(t *testing.T) {
	ns := nstest.New(t)
	state := func() string {
		return ns.Run(t, "sh", "-c", "nft list ruleset; ip link; ip rule; ip -6 rule; ip route; ip netns")
	}
	before := state()
	for name, c := range map[string]struct {
		change func(*nft.Config)
		want   int
	}{
		"typical":       {func(*nft.Config) {}, 8},
		"deny":          {func(c *nft.Config) { c.TailnetEgress = config.EgressDeny }, 8},
		"LAN allowed":   {func(c *nft.Config) { c.LANIngress = true }, 8},
		"no masquerade": {func(c *nft.Config) { c.Masquerade = false }, 6},
		"no services":   {func(c *nft.Config) { c.KeepSource = nil }, 6},
		"no tun":        {func(c *nft.Config) { c.TunName = "" }, 8},
		"IPv4 alone":    {func(c *nft.Config) { c.Own, c.Cluster, c.KeepSource = c.Own[:1], c.Cluster[:1], c.KeepSource[:1] }, 4},
	} {
		cfg := typical()
		c.change(&cfg)
		ns.Do(t, func() error {
			done, err := Run(t.Context(), cfg)
			if err != nil || len(done) != c.want {
				t.Errorf("%s: %v, %v; want %d packets stopped", name, done, err, c.want)
			}
			return nil
		})
	}
	if now := state(); now != before {
		t.Errorf("the caller's namespace was\n%s\nand is\n%s", before, now)
	}
}

// It can fail: with tables that know nothing of the cluster, and without the right to make a namespace.
func TestRunFails(t *testing.T) {
	ns := nstest.New(t)
	blind := typical()
	blind.Shared = []netip.Prefix{netip.MustParsePrefix("100.64.0.0/11")}
	ns.Do(t, func() error {
		done, err := Run(t.Context(), blind)
		if err == nil || errors.Is(err, ErrNotRun) || !strings.Contains(err.Error(), nft.DropTailnetClear) {
			t.Errorf("a rule that lets a packet out: %v, %v", done, err)
		}
		return nil
	})
	if err := onlyControl(t.Context(), -1, netip.Addr{}, netip.Addr{}); !errors.Is(err, ErrNotRun) {
		t.Errorf("without a wire: %v", err)
	}
}
