package preflight

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/headscaletest"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/networking/ipvs"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// All of it, on a machine that has what is needed, and then with one fault after the other.
func TestChecks(t *testing.T) {
	nstest.Require(t)
	s := headscaletest.New(t)
	key := filepath.Join(t.TempDir(), "key")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	good := s.APIKey()
	write(key, good)
	c := config.Default()
	c.Headscale.URL, c.Headscale.APIKeyFile = s.URL, key
	c.Network.ClusterCIDRs = []string{"10.244.0.0/16"}
	c.CNI.ConfDir = t.TempDir()
	ids := func() (out []findings.ID) {
		t.Helper()
		for _, f := range doctor.NewReportOf("0", Checks(t.Context(), c, func(string) string { return "" })).Findings {
			out = append(out, f.ID)
		}
		slices.Sort(out)
		return out
	}
	want := func(what string, want ...findings.ID) {
		t.Helper()
		if diff := cmp.Diff(want, ids()); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
	}
	want("all there")
	write(filepath.Join(c.CNI.ConfDir, "05-flannel.conflist"), "{}")
	run(t, "ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "link", "del", "lan0").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	run(t, "ip", "link", "set", "lan1", "name", ipvs.Links[0])
	run(t, "ip", "address", "add", "10.244.7.1/24", "dev", "lan0")
	run(t, "ip", "link", "set", "lan0", "up")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c.Monitoring.Listen = l.Addr().String()
	write(key, "hskey-api-000000000000-"+strings.Repeat("0", 64))
	want("each fault", findings.RangeOverlapsHost, findings.OtherCNI, findings.PortInUse, findings.APIKeyRefused, findings.PolicyNot)
	for _, check := range Checks(t.Context(), c, func(string) string { return "" }) {
		for _, f := range check.Found {
			if strings.Contains(f.Cause, strings.Repeat("0", 20)) {
				t.Error("the key is in", f.Cause)
			}
		}
	}
	c.Network.NetworkPolicy = false
	s.Kill()
	c.Monitoring.Listen = ""
	want("no Headscale", findings.RangeOverlapsHost, findings.OtherCNI, findings.HeadscaleUnreached)
	c.Headscale.URL = "http://hs.example.invalid"
	want("a URL that does not last", findings.RangeOverlapsHost, findings.OtherCNI, findings.HeadscaleUnreached, findings.URLNotLasting)
	t.Setenv("PATH", "/none")
	if got := ids(); !slices.Contains(got, findings.NoNFT) || !slices.Contains(got, findings.KernelLacks) {
		t.Error("without nft:", got)
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v %s", name, args, err, out)
	}
}

func TestRecent(t *testing.T) {
	for text, want := range map[string]bool{
		"nftables v1.0.6 (Lester Gooch #5)": true, "nftables v1.0.1": true, "nftables v1.0": false, "nftables v0.9.8 (E.D.S.)": false, "nftables v2.0": true, "odd": true,
	} {
		if recent(text) != want {
			t.Errorf("%s: %v", text, !want)
		}
	}
}

// A node without IPv6 lacks nothing of it.
func TestNeeded(t *testing.T) {
	if len(needed(true)) != len(parts) {
		t.Error("something is not needed")
	}
	for _, p := range needed(false) {
		if p.family == "ip6" || strings.Contains(p.module, "ipv6") {
			t.Errorf("%s is needed without IPv6", p.module)
		}
	}
}
