package conflist

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/findings"
)

// TestCheckConflist: what the plugin would refuse is told before a pod asks for it.
func TestCheck(t *testing.T) {
	path := filepath.Join(t.TempDir(), paths.ConflistName)
	for plugin, want := range map[string]string{
		`{"type":"headcni","ipam":{"subnet":"10.1.0.0/24"}}`:                     "",
		`{"type":"headcni","ipam":{"type":"host-local","subnet":"10.1.0.0/24"}}`: "",
		`{"type":"portmap","mut":1}`:                                             "",
		`{"type":"headcni","mut":1,"ipam":{"subnet":"10.1.0.0/24"}}`:             "mut: unknown key",
		`{"type":"headcni"}`: "no ranges",
		`{"type":"headcni","ipam":{"subnet":"10.1.0.0/24","strategy":"best"}}`:       "ipam.strategy",
		`{"type":"headcni","auth_key":["s3cret"],"ipam":{"subnet":"10.1.0.0/24"}}`:   "auth_key: a secret must be a string",
		`{"type":"headcni","ipam":{"subnet":"10.1.0.0/24"}}],"name":"","disable":[7`: "name: missing",
		`7`: "not a list of plugins",
	} {
		list := `{"cniVersion":"1.0.0","name":"n","plugins":[` + plugin + `]}`
		if err := os.WriteFile(path, []byte(list), 0o600); err != nil {
			t.Fatal(err)
		}
		err := Check(path)
		if (err == nil) != (want == "") || err != nil && (!strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret")) {
			t.Errorf("%s: got %v, want %q", plugin, err, want)
		}
	}
	shipped, err := os.ReadFile("../../" + paths.ConflistName)
	if err == nil {
		err = os.WriteFile(path, shipped, 0o600)
	}
	if err == nil {
		err = Check(path)
	}
	if err != nil {
		t.Errorf("the shipped one: %v", err)
	}
}

func TestConvert(t *testing.T) {
	path := filepath.Join(t.TempDir(), paths.ConflistName)
	if err := Check(path); err != nil {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(path, []byte(flatExample), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Check(path); !errors.Is(err, ErrFlat) {
		t.Errorf("flat: %v", err)
	}
	for _, want := range []bool{true, false} {
		if did, err := Convert(path); err != nil || did != want {
			t.Fatalf("convert: %v, %v", did, err)
		}
		if err := Check(path); err != nil {
			t.Errorf("converted: %v", err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	list, err := libcni.ConfListFromBytes(b)
	if err != nil || list.Name != "tailscale-cni" || list.CNIVersion != "1.0.0" || len(list.Plugins) != 1 || list.Plugins[0].Network.Type != "headcni" {
		t.Errorf("%+v, %v", list, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	for _, bad := range []string{"{", "{}", "[]"} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Check(path); err == nil {
			t.Errorf("%s accepted", bad)
		}
		if _, err := Convert(path); err == nil {
			t.Errorf("%s converted", bad)
		}
	}
}

// The program that the configuration names must be there, and be one that can be run.
func TestPlugin(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "headcni")
	if err := Plugin(dir); findings.IDOf(err) != findings.PluginMissing {
		t.Errorf("none: %v", err)
	}
	for mode, ok := range map[os.FileMode]bool{0o644: false, 0o755: true} {
		err := errors.Join(os.WriteFile(path, nil, mode), os.Chmod(path, mode))
		if err != nil {
			t.Fatal(err)
		}
		if err := Plugin(dir); (err == nil) != ok || err != nil && !strings.Contains(err.Error(), "cannot be run (mode 0644)") {
			t.Errorf("mode %04o: %v", mode, err)
		}
	}
}

// What a list needs beside our programs must be there too.
func TestOthers(t *testing.T) {
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "bandwidth"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"": "",
		`{"plugins": [{"type": "headcni", "portmap": {}, "ipam": {"type": "headcni-ipam"}}, {"type": "bandwidth"}]}`:                                            "",
		`{"plugins": [{"type": "headcni", "ipam": {"type": "host-local"}}]}`:                                                                                    "names host-local, not in " + bin,
		`{"plugins": [{"type": "headcni", "ipam": {"type": "host-local"}}, {"type": "bandwidth"}, {"type": "istio-cni"}, {"type": "istio-cni", "ipam": null}]}`: "names host-local, istio-cni, not",
	} {
		conf := t.TempDir()
		if text != "" {
			if err := os.WriteFile(Path(conf), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err := Others(conf, bin)
		if (err != nil) != (want != "") || err != nil && (findings.IDOf(err) != findings.PluginMissing || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}
