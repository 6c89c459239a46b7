package conflist

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/golden"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
)

func TestMain(m *testing.M) {
	flag.Parse()
	nstest.Main(m)
}

// input is what the daemon makes of its configuration.
func input(c config.Config, adopted json.RawMessage, mtu int) Input {
	return Input{
		PodCIDRs: c.Network.PodCIDRs.Prefixes(), ServiceCIDRs: c.Network.ServiceCIDRs.Prefixes(), MTU: mtu, IPAM: c.IPAM, AdoptedIPAM: adopted,
		MagicDNS: c.DNS.MagicDNS, NetworkPolicy: c.Network.NetworkPolicy,
	}
}

func TestRender(t *testing.T) {
	c := config.Default()
	c.Network.PodCIDRs = config.CIDRs{"10.244.1.0/24", "fd00:244:1::/64"}
	c.Network.ServiceCIDRs = config.CIDRs{"10.96.0.0/16"}
	c.DNS.MagicDNS = config.MagicDNS{Enable: true, BaseDomain: "cluster.local", Nameservers: []string{"10.96.0.10"}}
	hostLocal := c
	hostLocal.IPAM.Type = "host-local"
	other := c
	other.Network.NetworkPolicy = false
	other.IPAM.Type = "whereabouts"
	for name, c := range map[string]config.Config{"dual.conflist": c, "host-local.conflist": hostLocal, "other.conflist": other} {
		t.Run(name, func(t *testing.T) {
			got, err := Render(input(c, nil, 1280))
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
	first, err := Render(input(c, nil, 1280))
	if err != nil {
		t.Fatal(err)
	}
	if changed, err := Write(dir, first, remember); err != nil || !changed || mode != 0 {
		t.Fatalf("first: changed %v, mode %v, %v", changed, mode, err)
	}
	if changed, err := Write(dir, first, remember); err != nil || changed {
		t.Fatalf("again: changed %v, %v", changed, err)
	}
	if err := Restore(dir, mode); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Fatalf("still there: %v", err)
	}

	static := []byte(`{"cniVersion":"0.4.0","name":"mine","plugins":[{"type":"headcni","auth_key":"k"}]}`)
	if err := os.WriteFile(path, static, 0o640); err != nil {
		t.Fatal(err)
	}
	second, err := Render(input(c, nil, 1400))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range [][]byte{first, second} { // the second write must not take ours for the original
		if changed, err := Write(dir, want, remember); err != nil || !changed {
			t.Fatalf("changed %v, %v", changed, err)
		}
	}
	if err := Restore(dir, mode); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != string(static) {
		t.Errorf("original: %s, %v", got, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err := Restore(dir, mode); err != nil { // not ours: left alone
		t.Error(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

// Advice is about the mount that is read-only.
func TestReadOnlyFolder(t *testing.T) {
	nstest.Require(t)
	conf := t.TempDir()
	nstest.Mount(t, conf, conf, "", unix.MS_BIND, "")
	nstest.Mount(t, "", conf, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	if changed, err := Write(conf, []byte("{}"), nil); changed || err == nil || !strings.Contains(err.Error(), "set cni.confDir") ||
		strings.Contains(err.Error(), "\n") {
		t.Errorf("read-only cni.confDir: %v, %v", changed, err)
	}
}

const ownersConflist = `{"name":"mine","cniVersion":"1.0.0","plugins":[{"type":"bridge"}]}`

// What somebody has put in our place since stays; without a place, one is made for the original.
func TestUninstallAndTheConflistOfOthers(t *testing.T) {
	nstest.FreshState(t)
	dir := filepath.Join(t.TempDir(), "net.d")
	path := filepath.Join(dir, paths.ConflistName)
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(originalPath(), ownersConflist)
	if err := Restore(dir, 0); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != ownersConflist {
		t.Errorf("where ours was deleted: %q, %v", b, err)
	}
	write(originalPath(), ownersConflist)
	write(path, `{"type":"newer"}`)
	if err := Restore(dir, 0o644); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != `{"type":"newer"}` {
		t.Errorf("where ours was replaced: %q, %v", b, err)
	}
	nstest.WantFiles(t, paths.StateDir)
}

// Meshes append themselves to our list. Their entries stay, in their order, when ours changes and when it does not.
func TestOthersInOurList(t *testing.T) {
	nstest.FreshState(t)
	dir := t.TempDir()
	c := config.Default()
	c.Network.PodCIDRs = config.CIDRs{"10.244.1.0/24"}
	render := func(mtu int) []byte {
		t.Helper()
		b, err := Render(input(c, nil, mtu))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	write := func(mtu int, want bool) {
		t.Helper()
		if changed, err := Write(dir, render(mtu), nil); err != nil || changed != want {
			t.Fatalf("changed %v, %v", changed, err)
		}
	}
	types := func() (out []string) {
		t.Helper()
		b, err := os.ReadFile(Path(dir))
		if err != nil {
			t.Fatal(err)
		}
		l, err := libcni.ConfListFromBytes(b)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range l.Plugins {
			out = append(out, p.Network.Type)
		}
		return out
	}
	write(1280, true)
	// As istio-cni does it: every key read, its plugin appended, every key written in an order of its own.
	var file map[string]any
	if err := json.Unmarshal(render(1280), &file); err != nil {
		t.Fatal(err)
	}
	own := file["plugins"].([]any)
	file["plugins"] = append([]any{map[string]any{"type": "tuning"}}, append(own, map[string]any{"type": "istio-cni", "log_level": "info"})...)
	file["disableCheck"] = true
	b, err := json.Marshal(file)
	if err == nil {
		err = os.WriteFile(Path(dir), b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"tuning", "headcni", "istio-cni"}
	for range 2 { // two writers do not fight
		write(1280, false)
	}
	write(1400, true)
	write(1400, false)
	if got := types(); !slices.Equal(got, want) {
		t.Errorf("plugins %v, want %v", got, want)
	}
	b, err = os.ReadFile(Path(dir))
	if err != nil || !strings.Contains(string(b), `"mtu": 1400`) || !strings.Contains(string(b), `"disableCheck": true`) || !strings.Contains(string(b), `"log_level": "info"`) {
		t.Errorf("%s, %v", b, err)
	}
	if adopted, _, err := Adopt(config.Config{CNI: config.CNI{ConfDir: dir}}, false); err != nil || len(adopted.Network.PodCIDRs) > 0 {
		t.Errorf("adopted from our own list: %v, %v", adopted.Network.PodCIDRs, err)
	}
	if err := Restore(dir, 0); err != nil {
		t.Fatal(err)
	}
	nstest.WantFiles(t, dir)
}
