package leases

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/monitoring"
)

func TestPoolsInUse(t *testing.T) {
	nstest.FreshState(t)
	confDir := t.TempDir()
	look := func(want ...monitoring.Pool) {
		t.Helper()
		got, err := InUse(t.Context(), confDir)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	look() // no conflist
	c := config.Default()
	c.Network.PodCIDRs = config.CIDRs{"10.244.1.0/24", "fd00:244:1::/64"}
	list, err := conflist.Render(conflist.Input{PodCIDRs: c.Network.PodCIDRs.Prefixes(), IPAM: c.IPAM, MTU: 1280})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(confDir, paths.ConflistName)
	if err := os.WriteFile(path, list, 0o600); err != nil {
		t.Fatal(err)
	}
	const size6 = 1<<64 - 2 // the network's own address and the gateway's are nobody's
	look(monitoring.Pool{Network: conflist.NetworkName, Family: "ipv4", Size: 253}, monitoring.Pool{Network: conflist.NetworkName, Family: "ipv6", Size: size6})

	own, err := conflist.IPAM(confDir)
	if err != nil {
		t.Fatal(err)
	}
	other := ipam.Config{Network: "other", Sets: [][]ipam.Range{{{Subnet: netip.MustParsePrefix("192.0.2.0/24")}}}}
	for _, a := range []struct {
		c  ipam.Config
		id string
	}{{own, "a"}, {own, "b"}, {other, "a"}} {
		p, err := ipam.Open(a.c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Allocate(t.Context(), ipam.Owner{ContainerID: a.id, IfName: "eth0"}, nil); err != nil {
			t.Fatal(err)
		}
	}
	look(monitoring.Pool{Network: conflist.NetworkName, Family: "ipv4", InUse: 2, Size: 253}, monitoring.Pool{Network: conflist.NetworkName, Family: "ipv6", InUse: 2, Size: size6},
		monitoring.Pool{Network: "other", Family: "ipv4", InUse: 1})

	c.IPAM.Type = "host-local" // has leases of its own; those of ours that are left still count
	if list, err = conflist.Render(conflist.Input{PodCIDRs: c.Network.PodCIDRs.Prefixes(), IPAM: c.IPAM, MTU: 1280}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, list, 0o600); err != nil {
		t.Fatal(err)
	}
	look(monitoring.Pool{Network: conflist.NetworkName, Family: "ipv4", InUse: 2}, monitoring.Pool{Network: conflist.NetworkName, Family: "ipv6", InUse: 2},
		monitoring.Pool{Network: "other", Family: "ipv4", InUse: 1})
}

// A range whose every address is leased is a warning, of the network and the family.
func TestFull(t *testing.T) {
	nstest.FreshState(t)
	confDir := t.TempDir()
	list, err := conflist.Render(conflist.Input{PodCIDRs: config.CIDRs{"10.244.1.0/29"}.Prefixes(), IPAM: config.Default().IPAM, MTU: 1280})
	if err == nil {
		err = os.WriteFile(filepath.Join(confDir, paths.ConflistName), list, 0o600)
	}
	own, err2 := conflist.IPAM(confDir)
	p, err3 := ipam.Open(own)
	if err := errors.Join(err, err2, err3); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		if err := Full(t.Context(), confDir); err != nil {
			t.Fatalf("%d of 5: %v", i, err)
		}
		if _, err := p.Allocate(t.Context(), ipam.Owner{ContainerID: string(rune('a' + i)), IfName: "eth0"}, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := Full(t.Context(), confDir); findings.IDOf(err) != findings.PoolFull || !strings.Contains(err.Error(), "5 of 5 ipv4 addresses") {
		t.Error(err)
	}
}
