package leases

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

// TestMendWithoutLease: a pod whose addresses another IPAM plugin gave gets back what its link had. What a lease of ours had is
// nobody's once that has gone, and neither is an address that somebody else's lease has now.
func TestMendWithoutLease(t *testing.T) {
	dir, confDir := t.TempDir(), t.TempDir()
	conf := fmt.Sprintf(`{"name":"net","plugins":[{"type":"headcni","ipam":{"type":"headcni-ipam","dataDir":%q,"subnet":"10.244.1.0/24"}}]}`, dir)
	if err := os.WriteFile(filepath.Join(confDir, paths.ConflistName), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	pool, err := ipam.Open(ipam.Config{Network: "net", DataDir: dir, Sets: [][]ipam.Range{{{Subnet: netip.MustParsePrefix("10.244.1.0/24")}}}})
	if err != nil {
		t.Fatal(err)
	}
	lease := func(id string) string {
		t.Helper()
		l, err := pool.Allocate(t.Context(), ipam.Owner{ContainerID: id, IfName: "eth0"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return l.Addrs[0].Addr.Addr().String()
	}
	leased, released := lease("leased"), lease("released")
	addrs := map[string]string{"leased": leased, "released": released, "foreign": "10.244.1.200", "retaken": leased, "another's": "10.244.1.201"}
	host := nstest.New(t)
	for id, addr := range addrs {
		link, alias := podlink.Name(id, "eth0"), "net "+id+"/eth0"
		if id == "another's" {
			alias = "net somebody/eth0"
		}
		host.Run(t, "ip", "link", "add", link, "type", "veth")
		host.Run(t, "ip", "link", "set", link, "alias", alias, "up")
		host.Run(t, "ip", "route", "add", addr, "dev", link, "proto", "static", "metric", fmt.Sprint(len(id)))
	}
	m := NewMender(confDir)
	sync := func() {
		host.Do(t, func() error {
			_, _ = m.Sync(t.Context()) // it waits for what was just found
			return nil
		})
	}
	sync()
	if _, err := pool.Release(t.Context(), "released", "eth0"); err != nil {
		t.Fatal(err)
	}
	for id := range addrs {
		host.Run(t, "ip", "route", "flush", "dev", podlink.Name(id, "eth0"))
	}
	host.Do(t, func() error {
		if !m.Lacking(t.Context()) {
			t.Error("nothing is lacking")
		}
		return nil
	})
	sync()
	time.Sleep(mendAfter + 50*time.Millisecond)
	sync()
	for id, addr := range addrs {
		back := strings.Contains(host.Run(t, "ip", "route", "show", "dev", podlink.Name(id, "eth0")), addr+" ")
		if want := slices.Contains([]string{"leased", "foreign"}, id); back != want {
			t.Errorf("%s: its route is back: %v, want %v", id, back, want)
		}
	}
}
