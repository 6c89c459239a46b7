package main

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headcni/headcni/pkg/ipam"
)

func headcnictl(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := root()
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func TestIPAM(t *testing.T) {
	dir := t.TempDir()
	p, err := ipam.Open(ipam.Config{
		Network: "net", DataDir: dir, Writer: ipam.InProcess, Sets: [][]ipam.Range{{{Subnet: netip.MustParsePrefix("10.244.1.0/24")}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Allocate(t.Context(), ipam.Owner{ContainerID: "c1", IfName: "eth0", PodNamespace: "shop", PodName: "cart"}, nil); err != nil {
		t.Fatal(err)
	}
	out, err := headcnictl(t, "ipam", "list", "--data-dir", dir)
	if err != nil || !strings.Contains(out, "10.244.1.2") || !strings.Contains(out, "shop/cart") {
		t.Errorf("list: %v\n%s", err, out)
	}
	out, err = headcnictl(t, "ipam", "list", "--data-dir", dir, "-o", "json")
	var leases []map[string]any
	if err != nil || json.Unmarshal([]byte(out), &leases) != nil || len(leases) != 1 || leases[0]["network"] != "net" || leases[0]["writer"] != "headcni" {
		t.Errorf("list -o json: %v\n%s", err, out)
	}
	for _, command := range []string{"list", "gc"} {
		out, err := headcnictl(t, "ipam", command, "--data-dir", "/proc/self/exe")
		if err == nil || strings.Contains(out, "no leases") {
			t.Errorf("%s of what cannot be read: %v\n%s", command, err, out)
		}
	}
	// The lease has no link, but is too young to be called leaked.
	for _, args := range [][]string{{"ipam", "gc", "--dry-run"}, {"ipam", "gc"}} {
		if out, err := headcnictl(t, append(args, "--data-dir", dir)...); err != nil || out != "no leases\n" {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
	if out, err := headcnictl(t, "ipam", "check", "--data-dir", dir); err != nil || out != "all well\n" {
		t.Errorf("check: %v\n%s", err, out)
	}
	boots, err := filepath.Glob(filepath.Join(p.Dir(), "*", "addresses"))
	if err != nil || len(boots) != 1 {
		t.Fatalf("%v, %v", boots, err)
	}
	if err := os.WriteFile(filepath.Join(boots[0], "10.244.1.9"), []byte("junk"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := headcnictl(t, "ipam", "check", "--data-dir", dir); err == nil || !strings.Contains(out, "10.244.1.9") {
		t.Errorf("check of a damaged store: %v\n%s", err, out)
	}
	if out, err := headcnictl(t, "ipam", "check", "--repair", "--data-dir", dir); err != nil || !strings.Contains(out, "repaired") {
		t.Errorf("repair: %v\n%s", err, out)
	}
	if _, err := headcnictl(t, "ipam", "list", "-o", "xml"); err == nil || !strings.Contains(err.Error(), "table or json") {
		t.Errorf("bad format: %v", err)
	}
}
