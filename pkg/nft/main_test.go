package nft

import (
	"net/netip"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// typical is a dual-stack node of a cluster with a second cluster behind it.
func typical() Config {
	return Config{
		Own:        prefixes("10.244.1.0/24", "fd00:244:1::/64"),
		Cluster:    prefixes("10.244.0.0/16", "fd00:244::/32", "10.60.0.0/14"),
		KeepSource: prefixes("10.96.0.0/12", "fd00:96::/112"),
		Links:      prefixes("192.0.2.0/24", "2001:db8::/64"),
		Sites:      prefixes("203.0.113.0/24"),
		Members:    []netip.Addr{netip.MustParseAddr("100.64.0.2"), netip.MustParseAddr("100.64.0.9")},
		TunName:    "headcni01",
		NodeAddr4:  netip.MustParseAddr("192.0.2.11"),
		NodeAddr6:  netip.MustParseAddr("2001:db8::11"),
		Masquerade: true,
		HostMode:   true,
	}
}

func prefixes(ss ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range ss {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}
