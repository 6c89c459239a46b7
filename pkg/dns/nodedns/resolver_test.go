package nodedns

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/headcni/headcni/pkg/tailscale"
)

func TestNameservers(t *testing.T) {
	for name, c := range map[string]struct{ etc, resolved, want string }{
		"plain":            {"# nameserver 192.0.2.9\nsearch x\nnameserver 100.100.2.136\nnameserver 2001:db8::1 \nnameserver x\nnameserver\n", "nameserver 192.0.2.1\n", "100.100.2.136 2001:db8::1"},
		"systemd-resolved": {"nameserver 127.0.0.53\n", "nameserver 100.100.2.138\n", "100.100.2.138"},
		"a stub alone":     {"nameserver 127.0.0.1\n", "", ""},
		"none":             {"", "", ""},
	} {
		root := t.TempDir()
		for i, text := range []string{c.etc, c.resolved} {
			if path := filepath.Join(root, resolvConfs[i]); text != "" {
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		var got []string
		for _, a := range Nameservers(root) {
			got = append(got, a.String())
		}
		if !slices.Equal(got, strings.Fields(c.want)) {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

func TestFarResolver(t *testing.T) {
	tailnet := &tailscale.Status{Self: tailscale.Peer{IPs: []netip.Addr{netip.MustParseAddr("100.64.0.1")}}, Peers: []tailscale.Peer{
		{IPs: []netip.Addr{netip.MustParseAddr("100.64.0.2")}, Routes: []netip.Prefix{netip.MustParsePrefix("100.99.0.0/16")}}}}
	shared := []netip.Prefix{netip.MustParsePrefix("100.100.2.0/24")}
	for name, c := range map[string]struct {
		server string
		tail   *tailscale.Status
		want   bool
	}{
		"a cloud's by the default route":  {"100.100.3.1", tailnet, true},
		"a cloud's by a route of its own": {"100.100.2.136", tailnet, false},
		"the tailnet's own":               {"100.100.100.100", tailnet, false},
		"a device of the tailnet":         {"100.64.0.2", tailnet, false},
		"the node itself":                 {"100.64.0.1", tailnet, false},
		"behind a device":                 {"100.99.1.1", tailnet, false},
		"elsewhere":                       {"192.0.2.1", tailnet, false},
		"IPv6":                            {"2001:db8::1", tailnet, false},
		"no tailscaled":                   {"100.100.3.1", nil, false},
	} {
		err := FarResolver(c.tail, []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr(c.server)}, shared)
		if (err != nil) != c.want || err != nil && !strings.Contains(err.Error(), "ip route add "+c.server) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
