package daemon

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/headcni/headcni/internal/golden"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
)

func TestMain(m *testing.M) {
	if os.Getenv(installLoopEnv) != "" {
		fmt.Fprintln(os.Stderr, installLoop())
		os.Exit(1)
	}
	if dir := os.Getenv(uninstallEnv); dir != "" {
		if err := uninstallOnce(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	flag.Parse()
	nstest.Main(m)
}

func TestPlanConflist(t *testing.T) {
	c := config.Default()
	c.Network.PodCIDRs = config.CIDRs{"10.244.1.0/24", "fd00:244:1::/64"}
	c.Network.ServiceCIDRs = config.CIDRs{"10.96.0.0/16"}
	c.DNS.MagicDNS = config.MagicDNS{Enable: true, BaseDomain: "cluster.local", Nameservers: []string{"10.96.0.10"}}
	hostLocal := c
	hostLocal.IPAM.Type = "host-local"
	other := c
	other.IPAM.Type = "whereabouts"
	for name, c := range map[string]config.Config{"dual.conflist": c, "host-local.conflist": hostLocal, "other.conflist": other} {
		t.Run(name, func(t *testing.T) {
			got, err := planConflist(c, nil, 1280)
			if err != nil {
				t.Fatal(err)
			}
			if !isOurs(got) {
				t.Error("not recognised as ours")
			}
			if _, err := libcni.ConfListFromBytes(got); err != nil {
				t.Errorf("libcni refuses it: %v", err)
			}
			golden.Check(t, "testdata/"+name, string(got))
		})
	}
}

func TestConflistReplacesAndPutsBack(t *testing.T) {
	nstest.Require(t) // writes to paths.StateDir
	if err := os.MkdirAll(paths.StateDir, 0o755); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "net.d")
	path := filepath.Join(dir, paths.ConflistName)
	var mode os.FileMode
	remember := func(m os.FileMode) error { mode = m; return nil }
	c := config.Default()
	c.Network.PodCIDRs = config.CIDRs{"10.244.1.0/24"}
	first, err := planConflist(c, nil, 1280)
	if err != nil {
		t.Fatal(err)
	}
	if changed, err := writeConflist(dir, first, remember); err != nil || !changed || mode != 0 {
		t.Fatalf("first: changed %v, mode %v, %v", changed, mode, err)
	}
	if changed, err := writeConflist(dir, first, remember); err != nil || changed {
		t.Fatalf("again: changed %v, %v", changed, err)
	}
	if err := removeConflist(dir, mode); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Fatalf("still there: %v", err)
	}

	static := []byte(`{"cniVersion":"0.4.0","name":"mine","plugins":[{"type":"headcni","auth_key":"k"}]}`)
	if err := os.WriteFile(path, static, 0o640); err != nil {
		t.Fatal(err)
	}
	second, err := planConflist(c, nil, 1400)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range [][]byte{first, second} { // the second write must not take ours for the original
		if changed, err := writeConflist(dir, want, remember); err != nil || !changed {
			t.Fatalf("changed %v, %v", changed, err)
		}
	}
	if err := removeConflist(dir, mode); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != string(static) {
		t.Errorf("original: %s, %v", got, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err := removeConflist(dir, mode); err != nil { // not ours: left alone
		t.Error(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}
