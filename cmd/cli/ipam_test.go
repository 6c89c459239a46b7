package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/program"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

func headcnictl(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := root()
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(t.Context())
	if errors.As(err, new(noAnswer)) || errors.As(err, new(program.Usage)) { // as main does
		err = exitCode(codeOf(err, &out))
	}
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
		if err == nil || strings.Contains(out, "no leases") || strings.Contains(out, "nothing") {
			t.Errorf("%s of what cannot be read: %v\n%s", command, err, out)
		}
	}
	// The lease has no link, but is too young to be called leaked.
	for _, args := range [][]string{{"ipam", "gc", "--dry-run"}, {"ipam", "gc"}} {
		if out, err := headcnictl(t, append(args, "--data-dir", dir)...); err != nil || out != "nothing to free\n" {
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
	// An hour later it is.
	record := filepath.Join(filepath.Dir(boots[0]), "leases", "c1:eth0")
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	old := regexp.MustCompile(`(?m)^time .*$`).ReplaceAllString(string(text), "time "+time.Now().UTC().Add(-time.Hour).Format(time.RFC3339Nano))
	if err := os.WriteFile(record, []byte(old), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"ipam", "gc", "--dry-run"}, {"ipam", "list"}, {"ipam", "gc", "-o", "json"}} {
		if out, err := headcnictl(t, append(args, "--data-dir", dir)...); err != nil || !strings.Contains(out, "10.244.1.2") {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
	if out, err := headcnictl(t, "ipam", "list", "--data-dir", dir); err != nil || out != "no leases\n" {
		t.Errorf("list of none: %v\n%s", err, out)
	}
	if out, err := headcnictl(t, "ipam", "list", "-o", "json", "--data-dir", dir); err != nil || out != "[]\n" {
		t.Errorf("list after gc: %v\n%s", err, out)
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
	if out, err := headcnictl(t, "ipam", "check", "-o", "json", "--data-dir", dir); err != nil || out != "[]\n" {
		t.Errorf("check -o json: %v\n%s", err, out)
	}
	if err := os.Truncate(filepath.Join(filepath.Dir(boots[0]), "layout"), 0); err != nil {
		t.Fatal(err)
	}
	var code exitCode
	if out, err := headcnictl(t, "ipam", "check", "--data-dir", dir); !errors.As(err, &code) || code != 2 || !strings.Contains(out, "headcni rebuilds it") {
		t.Errorf("check of what cannot be read: %v\n%s", err, out)
	}
	for _, command := range []string{"list", "gc", "check"} {
		out, err := headcnictl(t, "ipam", command, "--data-dir", dir+"/none")
		if !errors.As(err, &code) || code != 2 || !strings.Contains(out, "there is no such folder") {
			t.Errorf("%s of nothing: %v\n%s", command, err, out)
		}
	}
	if out, err := headcnictl(t, "ipam", "list", "-o", "xml"); !errors.As(err, &code) || code != 2 || !strings.Contains(out, "table or json") {
		t.Errorf("bad format: %v\n%s", err, out)
	}
}

func TestLeaked(t *testing.T) {
	now := time.Now()
	lease := func(id, writer string, age time.Duration) ipam.Lease {
		return ipam.Lease{Owner: ipam.Owner{ContainerID: id, IfName: "eth0"}, Writer: writer, Time: now.Add(-age)}
	}
	links := map[string]bool{podlink.Name("live", "eth0"): true}
	for _, c := range []struct {
		lease ipam.Lease
		want  bool
	}{
		{lease("dead", ipam.InProcess, time.Hour), true},
		{lease("dead", ipam.InProcess, time.Second), false},      // its ADD may be under way
		{lease("live", ipam.InProcess, time.Hour), false},        // it has its link
		{lease("dead", ipam.Standalone, time.Hour), false},       // another plugin's pods have other links
		{lease("dead", ipam.InProcess, -time.Hour), false},       // the clock went back
		{lease("dead", "somebody", 1000*time.Hour), false},       //
		{ipam.Lease{Owner: ipam.Owner{ContainerID: "x"}}, false}, // what a killed ADD left, without a writer
	} {
		if got := leaked(c.lease, links, now); got != c.want {
			t.Errorf("%+v: leaked %v, want %v", c.lease, got, c.want)
		}
	}
}
