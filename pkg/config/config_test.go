package config

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/config/secret"
)

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "daemon.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoadDefaultsFileEnvSet(t *testing.T) {
	path := write(t, "network: {podCIDRs: [10.244.1.0/24], lanFirst: true}\nheadscale: {url: 'http://192.0.2.1:8080', authKey: abc}\n")
	got, err := Load(path, false,
		[]string{"HEADCNI_NETWORK_CLUSTERCIDRS=10.244.0.0/16, fd00:244::/32", "HEADCNI_LOGGING_LEVEL=debug", "HEADCNI_UNKNOWN=1"},
		[]string{"logging.level=warn", "network.masquerade=false", "tailscale.port=0"})
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Network.PodCIDRs = CIDRs{"10.244.1.0/24"}
	want.Network.ClusterCIDRs = CIDRs{"10.244.0.0/16", "fd00:244::/32"}
	want.Network.LANFirst = "true"
	want.Network.Masquerade = false
	want.Tailscale.Port = 0
	want.Headscale.URL = "http://192.0.2.1:8080"
	want.Headscale.AuthKey = secret.New("abc")
	want.Logging.Level = "warn"
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(secret.Secret{})); diff != "" {
		t.Error(diff)
	}
	if strings.Contains(got.String(), "abc") {
		t.Errorf("secret printed:\n%s", got)
	}
}

func TestLoadFaults(t *testing.T) {
	tests := []struct {
		name, yaml string
		sets       []string
		want       []string // all must be in the error
	}{
		{"unknown key", "netwrk: {}", nil, []string{"line 1: netwrk: no such key; did you mean network?", "docs/daemon.yaml"}},
		{"unknown key below", "network:\n  mtu: 1400\n  podCIDR: [10.244.1.0/24]\n  bridge: x", nil,
			[]string{"line 3: network.podCIDR: no such key; did you mean podCIDRs?", "line 4: network.bridge: no such key; the keys here are ", "clusterCIDRs"}},
		{"wrong type", "network:\n  mtu: big", nil, []string{"line 2: network.mtu: is a string, want a whole number"}},
		{"wrong type of a list", "network:\n\n  podCIDRs: 10.244.1.0/24", nil, []string{"line 3: network.podCIDRs: is a string, want a list"}},
		{"wrong type with a vowel", "network:\n  podCIDRs: {a: b}", nil, []string{"line 2: network.podCIDRs: is an object, want a list"}},
		{"wrong type of a section", "network: 7", nil, []string{"line 1: network: is a number, want other keys below it"}},
		{"broken line", "network:\n  mtu: 1400\n podCIDRs: []", nil, []string{"line 2: did not find expected key"}},
		{"twice", "network:\n  mtu: 1400\n  mtu: 1300", nil, []string{"line 3", "mtu"}},
		{"secret of the wrong type", "headscale:\n  authKey: [s3cret]", nil, []string{"a secret must be a string"}},
		{"two documents", "# mine\n---\nlogging: {level: debug}\n---\nnetwork: {mtu: 1400}", nil, []string{"more than one YAML document"}},
		{"not yaml", "a: [", nil, []string{"read "}},
		{"tailnet range", "network: {podCIDRs: [100.64.3.0/24]}", nil, []string{"network.podCIDRs", "100.64.0.0/10", "10.244.0.0/16"}},
		{"tailnet range v6", "network: {clusterCIDRs: ['fd7a:115c:a1e0:1::/64']}", nil, []string{"network.clusterCIDRs", "fd7a:115c:a1e0::/48"}},
		{"pods outside the cluster", "network: {podCIDRs: [10.99.1.0/24], clusterCIDRs: [10.244.0.0/16]}", nil,
			[]string{"network.podCIDRs", "10.99.1.0/24", "network.clusterCIDRs", "10.244.0.0/16"}},
		{"pods wider than the cluster", "network: {podCIDRs: [10.0.0.0/8], clusterCIDRs: [10.244.0.0/16]}", nil, []string{"is outside network.clusterCIDRs"}},
		{"a family of the pods outside", "network: {podCIDRs: [10.244.1.0/24, 'fd00:244:1::/64'], clusterCIDRs: [10.244.0.0/16]}", nil,
			[]string{`network.podCIDRs: "fd00:244:1::/64": is outside network.clusterCIDRs`}},
		{"another cluster inside our pods", "network: {podCIDRs: [10.244.1.0/24], remoteCIDRs: [10.244.1.128/25]}", nil,
			[]string{"network.remoteCIDRs", "network.podCIDRs 10.244.1.0/24"}},
		{"host bits", "network: {podCIDRs: [10.244.1.7/24]}", nil, []string{"10.244.1.0/24?"}},
		{"not a CIDR", "network: {podCIDRs: [pods]}", nil, []string{`"pods"`, "want a CIDR"}},
		{"everything", "network: {clusterCIDRs: [0.0.0.0/0]}", nil, []string{"every address"}},
		{"overlap", "network: {podCIDRs: [10.244.1.0/24, 10.244.0.0/16]}", nil, []string{"overlaps 10.244.1.0/24"}},
		{"services", "network: {podCIDRs: [10.96.3.0/24], serviceCIDRs: [10.96.0.0/12]}", nil, []string{"service CIDR 10.96.0.0/12"}},
		{"several", "tailscale: {mode: both, port: 70000, interfaceName: hc0}\nlogging: {level: loud}", nil,
			[]string{"tailscale.mode", "tailscale.port", "tailscale.interfaceName", "logging.level"}},
		{"gc", "ipam: {gcInterval: often}", nil, []string{"ipam.gcInterval", "1m"}},
		{"grace", "kubernetes: {nodeGrace: 0}", nil, []string{"kubernetes.nodeGrace", "10m"}},
		{"mtu", "network: {mtu: 100}", nil, []string{"network.mtu", "65520"}},
		{"mtu v6", "network: {mtu: 1000, podCIDRs: ['fd00:244:1::/64']}", nil, []string{"1280"}},
		{"headscale inside", "headscale: {url: 'http://10.244.3.4:8080'}\nnetwork: {clusterCIDRs: [10.244.0.0/16]}", nil, []string{"Headscale's own address 10.244.3.4"}},
		{"url", "headscale: {url: headscale.example}", nil, []string{"headscale.url", "https://"}},
		{"url with a password", "headscale: {url: 'https://me:s3cret@h.example'}", nil, []string{"https://***@h.example", "without a password"}},
		{"password without a scheme", "headscale: {url: 'me:s3cret@h.example'}", nil, []string{`"***@h.example"`}},
		{"listen", "monitoring: {listen: '9669'}", nil, []string{"monitoring.listen"}},
		{"relative", "cni: {binDir: bin}", nil, []string{"cni.binDir", "absolute"}},
		{"set without value", "", []string{"network.mtu"}, []string{"key=value"}},
		{"set unknown", "", []string{"x.y=1"}, []string{"no such key", "network.podCIDRs"}},
		{"secret in argv", "", []string{"headscale.authKey=x"}, []string{"command line"}},
		{"set bad number", "", []string{"network.mtu=big"}, []string{"whole number"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load(write(t, tt.yaml), false, nil, tt.sets)
			if err == nil {
				t.Fatal("want an error")
			}
			if strings.Contains(err.Error(), "s3cret") {
				t.Errorf("tells a secret: %v", err)
			}
			for _, w := range tt.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("want %q in %q", w, err)
				}
			}
		})
	}
}

// A variable that only looks like one of ours is refused with the one that was meant. Others are none of our business.
func TestLoadMistypedVariable(t *testing.T) {
	for name, meant := range map[string]string{
		"HEADCNI_NETWORK_PODCIDR": "HEADCNI_NETWORK_PODCIDRS", "HEADCNI_NETWORK_POD_CIDRS": "HEADCNI_NETWORK_PODCIDRS", "HEADCNI_NETWRK_MTU": "HEADCNI_NETWORK_MTU",
		"HEADCNI_AUTHKEY_FILE": "HEADCNI_AUTH_KEY_FILE", "HEADCNI_HEADSCALE_ULR": "HEADCNI_HEADSCALE_URL",
		"HEADCNI_AUTH_KEY": "", "HEADCNI_AUTH_KEY_FILE": "", "HEADCNI_TAILSCALED": "", "HEADCNI_CACHE": "", "HEADCNI_TEST_REQUIRE": "", "HEADCNI_TOOLS": "",
		"HEADCNI_LOG_LEVEL": "", "HEADCNI_TAILSCALE_SERVICE_HOST": "", "HEADCNI_MONITORING_PORT_9669_TCP_ADDR": "", "HEADCNI_NETWORK_PORT": "", "HEADSCALE_API_KEY": "",
	} {
		_, err := Load(write(t, ""), false, []string{name + "=s3cret"}, nil)
		switch {
		case meant == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case meant != "" && (err == nil || !strings.Contains(err.Error(), "did you mean "+meant+"?") || strings.Contains(err.Error(), "s3cret")):
			t.Errorf("%s: want %s in %v", name, meant, err)
		}
	}
}

func TestLoadMissing(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "none")
	if _, err := Load(missing, false, nil, nil); err == nil || !strings.Contains(err.Error(), "--config") {
		t.Errorf("want advice, got %v", err)
	}
	if _, err := Load(missing, true, nil, nil); err != nil {
		t.Error(err)
	}
}

func TestCredentialOrder(t *testing.T) {
	file := write(t, " from-file \n")
	empty := write(t, "\n")
	all := map[string]string{
		"HEADSCALE_API_KEY": "k1", "HEADCNI_AUTH_KEY": "k2", "HEADSCALE_API_KEY_FILE": file, "HEADCNI_AUTH_KEY_FILE": file,
	}
	h := Headscale{APIKeyFile: file, AuthKeyFile: file, AuthKey: secret.New("plain")}
	order := []struct {
		drop, source, value string
		plain               bool
	}{
		{"", "HEADSCALE_API_KEY", "k1", false},
		{"HEADSCALE_API_KEY", "HEADCNI_AUTH_KEY", "k2", false},
		{"HEADCNI_AUTH_KEY", "HEADSCALE_API_KEY_FILE", "from-file", false},
		{"HEADSCALE_API_KEY_FILE", "HEADCNI_AUTH_KEY_FILE", "from-file", false},
		{"HEADCNI_AUTH_KEY_FILE", "headscale.apiKeyFile", "from-file", false},
	}
	getenv := func(k string) string { return all[k] }
	for _, o := range order {
		delete(all, o.drop)
		c, err := h.Credential(getenv)
		if err != nil || c.Source != o.source || c.Key.Reveal() != o.value || c.Plain != o.plain {
			t.Errorf("without %s: got %s %q %v, %v", o.drop, c.Source, c.Key.Reveal(), c.Plain, err)
		}
	}
	h.APIKeyFile, h.AuthKeyFile = "", ""
	if c, err := h.Credential(getenv); err != nil || !c.Plain || c.Key.Reveal() != "plain" {
		t.Errorf("plain: %v, %v", c.Source, err)
	}
	if _, err := (Headscale{}).Credential(getenv); err != ErrNoCredential {
		t.Errorf("none: %v", err)
	}
	// A source that is set but unreadable must not fall through to the next.
	all["HEADSCALE_API_KEY_FILE"] = empty
	if _, err := h.Credential(getenv); err == nil || !strings.Contains(err.Error(), "empty") {
		t.Errorf("empty file: %v", err)
	}
	all["HEADSCALE_API_KEY_FILE"] = "/nonexistent"
	if _, err := h.Credential(getenv); err == nil || !strings.Contains(err.Error(), "HEADSCALE_API_KEY_FILE") {
		t.Errorf("missing file: %v", err)
	}
}

func TestCNIFoldersAreFound(t *testing.T) {
	root := t.TempDir()
	file := filepath.Join(root, "/var/snap/microk8s/current/args/containerd.toml")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("[plugins.x.cni]\nbin_dir = \"/found/bin\"\nconf_dir = \"/found/conf\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ have, want CNI }{
		{CNI{}, CNI{BinDir: "/found/bin", ConfDir: "/found/conf"}},
		{CNI{BinDir: paths.CNIBinDir}, CNI{BinDir: paths.CNIBinDir, ConfDir: "/found/conf"}}, // given is given
	} {
		got := tc.have
		got.find(root)
		if got != tc.want {
			t.Errorf("%+v becomes %+v; want %+v", tc.have, got, tc.want)
		}
	}
}

func TestReadEnvFile(t *testing.T) {
	path := write(t, "# mine\n; too\nHEADSCALE_API_KEY=\"s3cret\"\n\n HEADCNI_NETWORK_MTU = 1300 \nno variable\nX='a b'\nEMPTY=\n")
	want := []string{"HEADSCALE_API_KEY=s3cret", "HEADCNI_NETWORK_MTU=1300", "X=a b", "EMPTY="}
	for mode, exposed := range map[os.FileMode]bool{0o600: false, 0o640: false, 0o644: true} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		got, err := ReadEnvFile(path)
		if exposed != (err != nil) || exposed && (!strings.Contains(err.Error(), "chmod 0600 "+path) || strings.Contains(err.Error(), "s3cret")) {
			t.Errorf("mode %o: %v", mode, err)
		}
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if got, err := ReadEnvFile(path + ".missing"); got != nil || err != nil {
		t.Errorf("missing: %v, %v", got, err)
	}
}
