package netconf_test

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/pkg/config/netconf"
	"github.com/headcni/headcni/pkg/config/paths"
)

func example(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "specification.conf"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ptr[T any](v T) *T { return &v }

func TestSpecificationExample(t *testing.T) {
	c, err := netconf.Parse(example(t))
	if err != nil {
		t.Fatal(err)
	}
	if c.IPAM.Raw == nil {
		t.Error("the ipam object is lost")
	}
	c.IPAM.Raw = nil
	want := netconf.Config{
		CNIVersion: "1.0.0", Name: "tailscale-cni",
		PodCIDR: netip.MustParsePrefix("10.244.0.0/24"), ServiceCIDR: netip.MustParsePrefix("10.96.0.0/16"),
		IPAM: netconf.IPAM{
			Type: "host-local", Subnets: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24")},
			Gateways: []netip.Addr{netip.MustParseAddr("10.244.0.1")},
		},
		MTU: 1280, EnableIPv6: ptr(false),
		MagicDNS: netconf.MagicDNS{
			Enable: true, BaseDomain: "cluster.local", Nameservers: []string{"10.2.0.1"}, SearchDomains: []string{"c.binrc.com"},
		},
		LogLevel: slog.LevelWarn, DaemonSocket: paths.DaemonSocket, NetworkPolicy: true,
	}
	if diff := cmp.Diff(want, c, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.AllowUnexported(want.AuthKey)); diff != "" {
		t.Error(diff)
	}
}

// base is a small valid configuration; with sets keys in it.
func with(t *testing.T, keys string) []byte {
	t.Helper()
	m := map[string]json.RawMessage{}
	base := `{"cniVersion":"1.1.0","name":"n","type":"headcni","ipam":{"type":"headcni-ipam","subnet":"10.244.1.0/24"}}`
	for _, s := range []string{base, keys} {
		if err := json.Unmarshal([]byte(s), &m); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestFaults(t *testing.T) {
	for _, tt := range []struct{ keys, want string }{
		{`{"mut":1280}`, "mut: unknown key (value 1280), did you mean mtu?"},
		{`{"MTU":{"a":[1,2]}}`, `MTU: unknown key (value {"a":[1,2]})`},
		{`{"mut":"` + strings.Repeat("ü", 99) + `"}`, `mut: unknown key (value "` + strings.Repeat("ü", 29) + "...)"},
		{`{"authkey":"s3cret"}`, "authkey: unknown key (value ***)"},
		{`{"headscale":{"api_key":"s3cret"}}`, "headscale: unknown key (value ***)"},
		{`{"magic_dns":{"enabled":true}}`, "magic_dns.enabled: unknown key (value true), did you mean enable?"},
		{`{"magic_dns":{"resolver":"10.0.0.1"}}`, "known keys are base_domain, enable, nameservers, search_domains"},
		{`{"gate":{"podCidrs":[]}}`, "gate.podCidrs: unknown key"},
		{`{"ipam":{"type":"host-local","subnet":"10.244.1.0/24","strategy":"random"}}`, "ipam.strategy: host-local has no such setting"},
		{`{"ipam":{"type":"host-local","subnet":"10.244.1.0/24","rangestart":"10.244.1.9"}}`, "ipam.rangestart: unknown key (value \"10.244.1.9\"), did you mean rangeStart?"},
		{`{"vlan":7}`, "vlan: unknown key (value 7), known keys are args, auth_key, "},
		{`{"podCIDR":"10.244.1.0/24"}`, "did you mean pod_cidr?"},
		{`{"log-level":"info"}`, "did you mean log_level?"},
		{`{"ipam":{"type":"../host-local"}}`, "ipam.type: \"../host-local\": want the name of a program"},
		{`{"ipam":[]}`, "ipam: is a JSON array; want an object"},
		{`{"ipam":{"type":"headcni-ipam","subnet":"10.244.1.0"}}`, "ipam subnet: \"10.244.1.0\": want a CIDR"},
		{`{"mtu":"1280"}`, "mtu: is a JSON string; want a whole number of bytes"},
		{`{"mtu":1280.5}`, "mtu: is a JSON number; want a whole number of bytes"},
		{`{"mtu":100}`, "mtu: 100: want 0 (as the tunnel's) or 576 to 65535 bytes"},
		{`{"mtu":1000,"ipam":{"subnet":"fd00:244:1::/64"}}`, "mtu: 1000: want 0 (as the tunnel's) or 1280 to 65535 bytes"},
		{`{"pod_cidr":"10.244.1.1/24"}`, "pod_cidr: \"10.244.1.1/24\": has bits set behind the prefix; want 10.244.1.0/24"},
		{`{"pod_cidr":"100.100.0.0/16","ipam":{}}`, "pod_cidr: 100.100.0.0/16: overlaps 100.64.0.0/10"},
		{`{"ipam":{"subnet":"fd7a:115c:a1e0:1::/64"}}`, "ipam subnet: fd7a:115c:a1e0:1::/64: overlaps fd7a:115c:a1e0::/48"},
		{`{"pod_cidr":"127.0.0.0/16","ipam":{}}`, "pod_cidr: 127.0.0.0/16: overlaps 127.0.0.0/8"},
		{`{"ipam":{"subnet":"169.254.1.0/24"}}`, "ipam subnet: 169.254.1.0/24: overlaps 169.254.0.0/16"},
		{`{"ipam":{"ranges":[[{"subnet":"fe80::/64"}]]}}`, "ipam subnet: fe80::/64: overlaps fe80::/10"},
		{`{"ipam":{"ranges":[[{"subnet":"ff02::/64"}]]}}`, "ipam subnet: ff02::/64: overlaps ff00::/8"},
		{`{"service_cidr":"10.0.0.0/8"}`, "ipam subnet: 10.244.1.0/24: overlaps service_cidr 10.0.0.0/8"},
		{`{"pod_cidr":"10.244.1.0/25"}`, "ipam subnet: 10.244.1.0/24: is not within pod_cidr 10.244.1.0/25"},
		{`{"pod_cidr":"10.245.0.0/16"}`, "ipam subnet: 10.244.1.0/24: is not within pod_cidr 10.245.0.0/16"},
		{`{"gate":{"podCIDRs":["10.244.2.0/24"]}}`, "ipam subnet: 10.244.1.0/24: is not within gate.podCIDRs"},
		{`{"gate":{}}`, "gate.podCIDRs: missing"},
		{`{"enable_ipv6":true}`, "enable_ipv6: true, but no IPv6 range is configured"},
		{`{"enable_ipv6":false,"ipam":{"ranges":[[{"subnet":"10.1.0.0/24"}],[{"subnet":"fd00::/64"}]]}}`, "enable_ipv6: false, but an IPv6 range"},
		{`{"ipMasq":true}`, "ipMasq: true: headcni-daemon masquerades"},
		{`{"headscale_url":"hs.example.com"}`, "headscale_url: want a URL that begins with https://"},
		{`{"tailscale_socket":"tailscaled.sock"}`, "tailscale_socket: \"tailscaled.sock\": want an absolute path"},
		{`{"magic_dns":{"enable":true,"nameservers":["dns.example"]}}`, "magic_dns.nameservers: \"dns.example\": want an IP address"},
		{`{"log_level":"loud"}`, "log_level: \"loud\": want debug, info, warn or error"},
		{`{"runtimeConfig":{"mac":"01:00:5e:00:00:01"}}`, "runtimeConfig.mac: \"01:00:5e:00:00:01\": want a unicast"},
		{`{"runtimeConfig":{"ips":["10.0.0.300"]}}`, "runtimeConfig.ips: \"10.0.0.300\": want an IP address"},
		{`{"auth_key":["s3cret"]}`, "auth_key: a secret must be a string"},
		{`{"mut":1,"mtu":1,"pod_cidr":"x"}`, "mut: unknown key (value 1), did you mean mtu?; " +
			"pod_cidr: \"x\": want a CIDR such as 10.244.0.0/24; mtu: 1: want"},
	} {
		t.Run(tt.keys, func(t *testing.T) {
			_, err := netconf.Parse(with(t, tt.keys))
			if !errors.Is(err, netconf.ErrInvalid) {
				t.Fatalf("got %v, want ErrInvalid", err)
			}
			if only := strings.Count(err.Error(), "unknown key") == 1+strings.Count(err.Error(), "; "); only != errors.Is(err, netconf.ErrUnsupported) {
				t.Errorf("unknown keys only: %v, ErrUnsupported: %v: %v", only, !only, err)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
			if strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("more than a line, or a secret: %v", err)
			}
		})
	}
}

func TestAccepted(t *testing.T) {
	for _, keys := range []string{
		`{"cni.dev/anything":{"a":[1]},"cniVersions":["0.4.0","1.1.0"],"disableCheck":false,"disableGC":true,"loadOnlyInlinedPlugins":true}`,
		`{"capabilities":{"mac":true,"ips":true,"portMappings":false},"runtimeConfig":{"portMappings":[{"hostPort":1}]}}`,
		`{"args":{"labels":[1,2]},"prevResult":{"cniVersion":"1.1.0"}}`,
		`{"args":"anything"}`,
		`{"prevResult":null,"ipam":null,"pod_cidr":"10.244.1.0/24"}`,
		`{"ipMasq":false,"enable_network_policy":true,"mtu":0}`,
		`{"ipam":{"type":"dhcp","daemonSocketPath":"/run/x","provide":[]}}`,
		`{"ipam":{"type":"host-local","subnet":"10.244.1.7/24","name":"x","resolvConf":"/etc/resolv.conf","routes":[]}}`,
		`{"disableCheck":"true","disableGC":"false"}`, // libcni takes the strings too
		`{"log_level":"","log_file":"","daemon_socket":"","headscale_url":"","tailscale_socket":"","pod_cidr":"","service_cidr":"","auth_key":""}`,
		`{"log_file":"/var/log/x","daemon_socket":"/run/y","log_level":"DEBUG","gate":{"podCIDRs":["10.244.0.0/16"]}}`,
	} {
		if _, err := netconf.Parse(with(t, keys)); err != nil {
			t.Errorf("%s: %v", keys, err)
		}
	}
}

// TestNullIsNotGiven: Go programs write null for what they left nil. Every key that can be null then reads as if it was not there,
// but for cni.dev/valid-attachments (TestAttachments).
func TestNullIsNotGiven(t *testing.T) {
	for _, keys := range []string{
		`{"type":null,"cniVersions":null,"disableCheck":null,"disableGC":null,"loadOnlyInlinedPlugins":null,"args":null,"capabilities":null,"runtimeConfig":null,
			"prevResult":null,"dns":null,"magic_dns":null,"gate":null,"portmap":null,"log_level":null,"log_file":null,"daemon_socket":null,"headscale_url":null,
			"tailscale_socket":null,"auth_key":null,"service_cidr":null,"mtu":null,"enable_ipv6":null,"enable_network_policy":null,"ipMasq":null,
			"ipam":{"type":null,"ranges":null,"subnet":null,"gateway":null,"routes":null,"exclude":null,"strategy":null}}`,
		`{"args":{"cni":null},"ipam":null}`, `{"args":{"cni":{"ips":null,"mac":null}},"deviceID":null,"mut":null,"other":null,"ipam":{"strateg":null}}`,
		`{"runtimeConfig":{"ips":null,"mac":null,"dns":null,"ipRanges":null,"portMappings":null,"bandwidth":null},"ipam":{}}`,
		`{"runtimeConfig":{"ipRanges":[],"portMappings":[],"dns":{"servers":null,"searches":null,"options":null}},"ipam":{}}`,
		`{"dns":{"nameservers":null,"domain":null,"search":null,"options":null},"magic_dns":{"enable":null,"nameservers":null,"search_domains":null},"ipam":{}}`,
	} {
		got, err := netconf.Parse(with(t, strings.TrimSuffix(keys, "}")+`,"pod_cidr":"10.244.1.0/24"}`))
		if err != nil {
			t.Errorf("%s: %v", keys, err)
			continue
		}
		want, err := netconf.Parse(with(t, `{"pod_cidr":"10.244.1.0/24","ipam":{}}`))
		if err != nil {
			t.Fatal(err)
		}
		if subnets := got.IPAM.Subnets; len(subnets) != 1 || subnets[0] != want.PodCIDR {
			t.Errorf("%s: pod_cidr is not the pool: %v", keys, subnets)
		}
		got.IPAM.Raw, want.IPAM.Raw = nil, nil
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.AllowUnexported(want.AuthKey)); diff != "" {
			t.Errorf("%s: %s", keys, diff)
		}
	}
}

// TestWhatOthersInject: a meta-plugin's keys are no reason to refuse a pod. Any other unknown key is (TestFaults).
func TestWhatOthersInject(t *testing.T) {
	for _, keys := range []string{
		`{"deviceID":"0000:03:00.0","pciBusID":"0000:03:00.0"}`, // multus
		`{"args":{"cni":{"pod":"x"},"io.kubernetes":[1]},"runtimeConfig":{"deviceID":"x","CNIDeviceInfoFile":"/x","a":{}}}`,
		`{"cni.dev/attachments":[{"containerID":"a","ifname":"b"}],"cni.dev/later":{"a":1}}`,
		`{"cniArgs":{"a":"b"},"ipamConfig":{"x":1},"k8s.v1.cni.cncf.io/x":1,"org.example.y":2}`,
	} {
		if _, err := netconf.Parse(with(t, keys)); err != nil {
			t.Errorf("%s: %v", keys, err)
		}
	}
}

func TestPodCIDRIsThePool(t *testing.T) {
	c, err := netconf.Parse([]byte(`{"cniVersion":"1.0.0","name":"n","type":"headcni","pod_cidr":"10.9.0.0/24","ipam":{"strategy":"random"}}`))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(c.IPAM.Raw), `{"strategy":"random","subnet":"10.9.0.0/24","type":"headcni-ipam"}`; got != want {
		t.Errorf("ipam is %s, want %s", got, want)
	}
}

func TestRuntime(t *testing.T) {
	c, err := netconf.Parse(with(t, `{"args":{"cni":{"ips":["10.244.1.9/24"]}},
		"runtimeConfig":{"ips":["10.244.1.8/24","fd00::8"],"mac":"02:00:00:00:00:09","dns":{"servers":["10.0.0.1"],"searches":["a"],"options":["b"]}}}`))
	if err != nil {
		t.Fatal(err)
	}
	got := []string{c.Runtime.IPs[0].String(), c.Runtime.IPs[1].String(), c.Runtime.MAC.String(),
		strings.Join(append(append(c.Runtime.DNS.Nameservers, c.Runtime.DNS.Search...), c.Runtime.DNS.Options...), " ")}
	if diff := cmp.Diff([]string{"10.244.1.8", "fd00::8", "02:00:00:00:00:09", "10.0.0.1 a b"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestAttachments(t *testing.T) {
	c, err := netconf.Parse(with(t, `{"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}`))
	if err != nil || !c.HasValidAttachments || len(c.ValidAttachments) != 1 {
		t.Errorf("got %v, %v, %v", c.HasValidAttachments, c.ValidAttachments, err)
	}
	if c, err = netconf.Parse(with(t, `{"cni.dev/valid-attachments":[]}`)); err != nil || !c.HasValidAttachments {
		t.Errorf("an empty list: got %v, %v", c.HasValidAttachments, err)
	}
	if c, err = netconf.Parse(with(t, `{"cni.dev/valid-attachments":null}`)); err != nil || !c.HasValidAttachments || len(c.ValidAttachments) > 0 {
		t.Errorf("null, as a nil list of Go is written: got %v, %v", c.HasValidAttachments, err)
	}
	if c, err = netconf.Parse(with(t, `{"cni.dev/attachments":[{"containerID":"a","ifname":"eth0"}],"cni.dev/valid-attachments":[{"containerID":"b","ifname":"eth0"}]}`)); err != nil || len(c.ValidAttachments) != 2 {
		t.Errorf("by both names: got %v, %v", c.ValidAttachments, err)
	}
	if c, err = netconf.Parse(with(t, `{"cni.dev/other":null}`)); err != nil || c.HasValidAttachments {
		t.Errorf("no list: got %v, %v", c.HasValidAttachments, err)
	}
	for _, item := range []string{`null`, `{}`, `{"containerID":"a"}`, `{"ifname":"eth0"}`, `{"containerID":"a","ifname":""}`} {
		if _, err := netconf.Parse(with(t, `{"cni.dev/valid-attachments":[`+item+`]}`)); !errors.Is(err, netconf.ErrInvalid) {
			t.Errorf("%s: got %v, want a fault", item, err)
		}
	}
}

func TestAuthKeyIsWarnedAbout(t *testing.T) {
	c, err := netconf.Parse(with(t, `{"auth_key":"s3cret"}`))
	if err != nil || len(c.Warnings) != 1 || strings.Contains(c.Warnings[0], "s3cret") {
		t.Errorf("got %q, %v", c.Warnings, err)
	}
}

func TestLogLevelFromEnvironment(t *testing.T) {
	t.Setenv(netconf.LogLevelEnv, "debug")
	if c, err := netconf.Parse(with(t, `{"log_level":"error"}`)); err != nil || c.LogLevel != slog.LevelDebug {
		t.Errorf("got %v, %v", c.LogLevel, err)
	}
	t.Setenv(netconf.LogLevelEnv, "loud")
	if _, err := netconf.Parse(with(t, `{}`)); err == nil || !strings.Contains(err.Error(), netconf.LogLevelEnv) {
		t.Errorf("got %v", err)
	}
}

// FuzzConfig: whatever comes in, Parse neither panics nor lets the secret out, and every error is one line of the right
// kind.
func FuzzConfig(f *testing.F) {
	f.Add(example(f))
	for _, s := range []string{
		`{"name":"n","auth_key":"s3cret","ipam":{"ranges":[[{"subnet":"10.0.0.0/8"}],[{"subnet":"fd00::/64"}]]},"mtu":1500}`,
		`{"gate":{"podCIDRs":["10.0.0.0/8"]},"prevResult":{"a":1},"runtimeConfig":{"ips":["::1"],"mac":"02::"},"args":[]}`,
		`{"cni.dev/valid-attachments":[{}],"pod_cidr":"0.0.0.0/0","service_cidr":"::/0"}`, `null`, `[]`, `{"ipam":null}`, ``,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := netconf.Parse(b)
		if err == nil {
			if c.MTU != 0 && (c.MTU < 576 || c.MTU > 65535) {
				t.Errorf("MTU %d passed", c.MTU)
			}
			if c.IPAM.Type == "" {
				t.Error("no IPAM type")
			}
			return
		}
		if !errors.Is(err, netconf.ErrInvalid) {
			t.Errorf("not ErrInvalid: %v", err)
		}
		if key := c.AuthKey.Reveal(); len(key) > 8 && strings.Contains(err.Error(), key) {
			t.Errorf("the secret is in: %v", err)
		}
	})
}
