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
	"github.com/headcni/headcni/pkg/cmdlog"
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
	// One that lost its route before anybody looked: its ADD said what it has.
	addrs["told"] = "10.244.1.202"
	link := podlink.Name("told", "eth0")
	host.Run(t, "ip", "link", "add", link, "type", "veth")
	host.Run(t, "ip", "link", "set", link, "alias", "net told/eth0", "up")
	m.Tell(cmdlog.Record{Command: "ADD", ContainerID: "told", IfName: "eth0", HostIfName: link, Addrs: []netip.Addr{netip.MustParseAddr(addrs["told"])}})
	host.Do(t, func() error {
		if lost, err := m.See(); err != nil || !lost {
			t.Errorf("lost %v, %v: the told link has no route", lost, err)
		}
		if lost, err := m.See(); err != nil || lost {
			t.Errorf("lost %v, %v: it was told once", lost, err)
		}
		return nil
	})
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
		if want := slices.Contains([]string{"leased", "foreign", "told"}, id); back != want {
			t.Errorf("%s: its route is back: %v, want %v", id, back, want)
		}
	}
}

// TestMendChanged: what somebody changes of a link itself comes back as it was seen to be, but what plugins behind ours change at first
// stays. A new link is compared with nothing that the last one of its name had.
func TestMendChanged(t *testing.T) {
	confDir, host := t.TempDir(), nstest.New(t)
	conf := fmt.Sprintf(`{"name":"net","plugins":[{"type":"headcni","ipam":{"type":"headcni-ipam","dataDir":%q,"subnet":"10.244.1.0/24"}}]}`, t.TempDir())
	if err := os.WriteFile(filepath.Join(confDir, paths.ConflistName), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	m := NewMender(confDir)
	link := podlink.Name("pod", "eth0")
	make := func(mac string) {
		host.Run(t, "sh", "-ec", strings.NewReplacer("LINK", link, "MAC", mac).Replace(
			`ip link add LINK mtu 1280 address MAC type veth; ip link set LINK alias "net pod/eth0"; ip link set LINK up; ip route add 10.244.1.7 dev LINK proto kernel`))
	}
	state := func() string {
		return host.Run(t, "sh", "-c", "ip link show "+link+" | sed 's/^[0-9]*: //'; ip route show 10.244.1.7")
	}
	see := func() {
		host.Do(t, func() error {
			_, err := m.See()
			return err
		})
	}
	mend := func() (done []string) {
		host.Do(t, func() error {
			_, _ = m.Sync(t.Context()) // it waits for what was just found
			time.Sleep(mendAfter + 50*time.Millisecond)
			got, err := m.Sync(t.Context())
			done = got
			return err
		})
		return done
	}
	make("02:00:00:00:00:01")
	see()
	host.Run(t, "ip", "link", "set", link, "address", "02:00:00:00:00:02")
	ofLink := func(done []string) bool { return strings.Contains(fmt.Sprint(done), "its ") }
	if done := mend(); ofLink(done) {
		t.Errorf("what a plugin behind ours has set is changed: %q", done)
	}
	m.settled = 0
	see()
	want := state()
	for _, damage := range []string{
		"ip link set LINK address 02:00:00:00:00:03", "ip link set LINK mtu 1400", "ip link set LINK alias other",
		"ip link set LINK down; ip link set LINK name other alias other address 02:00:00:00:00:03",
	} {
		host.Run(t, "sh", "-ec", strings.ReplaceAll(damage, "LINK", link))
		if done := mend(); !ofLink(done) {
			t.Errorf("%s: done %q", damage, done)
		}
		if got := state(); got != want {
			t.Errorf("%s: got\n%s\nwant\n%s", damage, got, want)
		}
	}
	host.Run(t, "ip", "link", "del", link)
	make("02:00:00:00:00:04")
	if done := mend(); ofLink(done) {
		t.Errorf("a new link of the same name: %q", done)
	}
}

// A pod whose address is in no range of its node any more is named; one of another network, or of a family without ranges, is not.
func TestStrayed(t *testing.T) {
	confDir := t.TempDir()
	conf := fmt.Sprintf(`{"name":"net","plugins":[{"type":"headcni","ipam":{"type":"headcni-ipam","dataDir":%q,"subnet":"10.244.1.0/24"}}]}`, t.TempDir())
	if err := os.WriteFile(filepath.Join(confDir, paths.ConflistName), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	host := nstest.New(t)
	for id, pod := range map[string][2]string{"within": {"net", "10.244.1.7"}, "former": {"net", "10.244.9.7"}, "foreign": {"other", "10.244.9.8"}, "sixth": {"net", "fd00:9::7"}} {
		link := podlink.Name(id, "eth0")
		host.Run(t, "ip", "link", "add", link, "type", "veth")
		host.Run(t, "ip", "link", "set", link, "alias", pod[0]+" "+id+"/eth0", "up")
		host.Run(t, "ip", "route", "add", pod[1], "dev", link, "proto", "static")
	}
	m := NewMender(confDir)
	host.Do(t, func() error {
		_, err := m.Sync(t.Context())
		if err == nil || !strings.Contains(err.Error(), "container former has 10.244.9.7, which is outside this node's [10.244.1.0/24]") || strings.Count(err.Error(), "outside") != 1 {
			t.Errorf("got %v", err)
		}
		return nil
	})
}
