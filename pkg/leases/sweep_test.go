package leases

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	pool := func(writer string) *ipam.Pool {
		p, err := ipam.Open(ipam.Config{
			Network: "net", DataDir: dir, Writer: writer, Sets: [][]ipam.Range{{{Subnet: netip.MustParsePrefix("10.244.1.0/24")}}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for id, writer := range map[string]string{"live": ipam.InProcess, "gone": ipam.InProcess, "late": ipam.InProcess, "bridge": ipam.Standalone} {
		if _, err := pool(writer).Allocate(t.Context(), ipam.Owner{ContainerID: id, IfName: "eth0"}, nil); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now()
	links := map[string]bool{podlink.Name("live", "eth0"): true}
	confDir := t.TempDir()
	conf := fmt.Sprintf(`{"name":"net","plugins":[{"type":"headcni","ipam":{"type":"headcni-ipam","dataDir":%q,"subnet":"10.244.1.0/24"}}]}`, dir)
	if err := os.WriteFile(filepath.Join(confDir, paths.ConflistName), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	s := NewSweeper(confDir, slog.New(slog.DiscardHandler), func(int) {})
	s.now, s.links = func() time.Time { return now }, func() (map[string]bool, error) { return links, nil }
	sweep := func(want ...string) {
		t.Helper()
		freed, err := s.sweep(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, l := range freed {
			got = append(got, l.ContainerID)
		}
		if len(got) != len(want) || len(got) == 1 && got[0] != want[0] {
			t.Fatalf("freed %v, want %v", got, want)
		}
	}
	sweep()
	now = now.Add(sweepGrace - time.Second)
	links[podlink.Name("late", "eth0")] = true // a slow ADD
	sweep()
	delete(links, podlink.Name("late", "eth0"))
	now = now.Add(2 * time.Second)
	sweep("gone")
	now = now.Add(sweepGrace - time.Second) // late's time without a link began anew
	sweep()
	now = now.Add(2 * time.Second)
	sweep("late")
	// ADD of an attachment is tried again right before its first lease would go.
	again := func() {
		t.Helper()
		if _, err := pool(ipam.InProcess).Release(t.Context(), "again", "eth0"); err != nil {
			t.Fatal(err)
		}
		if _, err := pool(ipam.InProcess).Allocate(t.Context(), ipam.Owner{ContainerID: "again", IfName: "eth0"}, nil); err != nil {
			t.Fatal(err)
		}
	}
	again()
	sweep()
	now = now.Add(sweepGrace + time.Second)
	again()
	sweep()
	now = now.Add(sweepGrace + time.Second)
	sweep("again")
	leases, err := pool(ipam.InProcess).List(t.Context())
	if err != nil || len(leases) != 2 {
		t.Errorf("left: %v, %v", leases, err)
	}
	if len(s.missing) != 0 {
		// The next sweep forgets what the last one freed.
		sweep()
		if len(s.missing) != 0 {
			t.Errorf("remembers %v", s.missing)
		}
	}
}
