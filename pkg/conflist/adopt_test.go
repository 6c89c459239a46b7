package conflist

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/config/secret"
)

const flatExample = `{
  "cniVersion": "1.0.0", "name": "tailscale-cni", "type": "headcni", "headscale_url": "https://hs.example.com",
  "tailscale_socket": "/var/run/tailscale/tailscaled.sock", "pod_cidr": "10.244.0.0/24", "service_cidr": "10.96.0.0/16",
  "auth_key": "from-conflist",
  "ipam": {"type": "host-local", "subnet": "10.244.0.0/24", "rangeStart": "10.244.0.10", "gateway": "10.244.0.1"},
  "magic_dns": {"enable": true, "base_domain": "cluster.local", "nameservers": ["10.2.0.1"], "search_domains": ["c.example.com"]},
  "mtu": 1280, "enable_ipv6": false, "enable_network_policy": true
}`

func TestAdopt(t *testing.T) {
	list := `{"cniVersion":"1.0.0","name":"x","plugins":[{"type":"portmap"},` + flatExample + `]}`
	for name, text := range map[string]string{"flat": flatExample, "list": list} {
		t.Run(name, func(t *testing.T) {
			c := config.Default()
			c.CNI.ConfDir = t.TempDir()
			if err := os.WriteFile(filepath.Join(c.CNI.ConfDir, paths.ConflistName), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			want := c
			want.Headscale.URL = "https://hs.example.com"
			want.Headscale.AuthKey = secret.New("from-conflist")
			want.Network.PodCIDRs = config.CIDRs{"10.244.0.0/24"}
			want.Network.ServiceCIDRs = config.CIDRs{"10.96.0.0/16"}
			want.Network.MTU = 1280
			want.IPAM.Type = "host-local"
			want.DNS.MagicDNS = config.MagicDNS{
				Enable: true, BaseDomain: "cluster.local", Nameservers: []string{"10.2.0.1"}, SearchDomains: []string{"c.example.com"},
			}
			got, ipam, err := Adopt(c, false)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got, cmp.AllowUnexported(secret.Secret{})); diff != "" {
				t.Error(diff)
			}
			rendered, err := Render(input(got, ipam, 1280))
			if err != nil || !strings.Contains(string(rendered), `"rangeStart": "10.244.0.10"`) || strings.Contains(string(rendered), "from-conflist") {
				t.Errorf("the ranges are lost, or a key is not: %v\n%s", err, rendered)
			}

			// What daemon.yaml says wins.
			c.Headscale.URL, c.Headscale.AuthKey = "https://other", secret.New("own")
			c.Network.PodCIDRs, c.Network.MTU = config.CIDRs{"10.9.0.0/24"}, 1300
			got, ipam, err = Adopt(c, false)
			if err != nil || ipam != nil || got.Headscale.URL != "https://other" || got.Headscale.AuthKey.Reveal() != "own" ||
				got.Network.PodCIDRs[0] != "10.9.0.0/24" || got.Network.MTU != 1300 || got.IPAM.Type != "headcni-ipam" {
				t.Errorf("%+v, %s, %v", got, ipam, err)
			}
		})
	}
}

// A conflist's tailscale_socket is the host's tailscaled's: of use unless a dedicated one is asked for.
func TestAdoptsTheHostsSocket(t *testing.T) {
	c := config.Default()
	c.CNI.ConfDir = t.TempDir()
	const own = "/run/mine/tailscaled.sock"
	text := strings.ReplaceAll(flatExample, paths.HostTailscaleSocket, own)
	if err := os.WriteFile(filepath.Join(c.CNI.ConfDir, paths.ConflistName), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	for mode, want := range map[string]string{config.ModeAuto: own, config.ModeHost: own, config.ModeDaemon: ""} {
		c.Tailscale.Mode = mode
		if got, _, err := Adopt(c, false); err != nil || got.Tailscale.Socket != want {
			t.Errorf("%s: %q, %v", mode, got.Tailscale.Socket, err)
		}
	}
}

func TestAdoptFaults(t *testing.T) {
	c := config.Default()
	c.CNI.ConfDir = t.TempDir()
	path := filepath.Join(c.CNI.ConfDir, paths.ConflistName)
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(flatExample, "10.244.0.", "100.64.0.")), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Adopt(c, false); err == nil || !strings.Contains(err.Error(), "100.64.0.0/10") || !strings.Contains(err.Error(), "conflist") {
		t.Errorf("got %v", err)
	}
	for _, text := range []string{"{", `{"plugins":[{"type":"bridge"}]}`, `[]`} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		got, _, err := Adopt(c, false)
		if diff := cmp.Diff(c, got, cmp.AllowUnexported(secret.Secret{})); err != nil || diff != "" {
			t.Errorf("%s: %v %s", text, err, diff)
		}
	}
}
