package rtnl

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// open opens a socket in a namespace. It stays there, whichever thread uses it.
func open(t *testing.T, ns *nstest.NS) *Conn {
	t.Helper()
	var c *Conn
	ns.Do(t, func() (err error) { c, err = Open(unix.NETLINK_ROUTE); return err })
	t.Cleanup(c.Close)
	return c
}

func TestLookUps(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "sh", "-ec", `ip link add west type veth peer name east
		ip link set west mtu 1400 address 02:00:00:00:00:01 alias "who it is"; ip link set west up; ip link set east up
		ip route add 192.0.2.0/24 dev west; ip route add unreachable 198.51.100.0/24`)
	c := open(t, ns)
	west, err := c.LinkByName("west")
	if err != nil {
		t.Fatal(err)
	}
	east, err := c.LinkByName("east")
	if err != nil || west.Peer != east.Index || west.MTU != 1400 || west.Alias != "who it is" || west.Kind != "veth" ||
		west.MAC.String() != "02:00:00:00:00:01" || !west.Up {
		t.Errorf("west is %+v, east is %+v, error %v", west, east, err)
	}
	all := map[string]bool{}
	if err := c.Links(func(l Link) { all[l.Name] = true }); err != nil || !all["west"] || !all["east"] || !all["lo"] {
		t.Errorf("links %v, error %v", all, err)
	}
	if r, err := c.RouteTo(netip.MustParseAddr("192.0.2.7")); err != nil || r.OIF != west.Index || r.Type != unix.RTN_UNICAST || r.DstBits != 32 {
		t.Errorf("the way is %+v, error %v", r, err)
	}
	if r, err := c.MatchingRoute(netip.MustParseAddr("192.0.2.7")); err != nil || r.OIF != west.Index || r.DstBits != 24 {
		t.Errorf("the route is %+v, error %v", r, err)
	}
	if r, err := c.RouteTo(netip.MustParseAddr("198.51.100.7")); !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("unreachable: %+v, error %v", r, err)
	}
}

// A refused request does not keep the kernel from the rest, and is the one that the error names.
func TestBatch(t *testing.T) {
	ns := nstest.New(t)
	c := open(t, ns)
	replies, err := c.Do(GetLink("lo"), GetLink("none"), GetLink("lo"))
	if !errors.Is(err, unix.ENODEV) || !strings.HasPrefix(err.Error(), "look up link none: ") {
		t.Errorf("error %v", err)
	}
	for i, want := range []bool{true, false, true} {
		if got := i < len(replies) && len(replies[i]) > 0; got != want {
			t.Errorf("answer %d: %v, want %v", i, got, want)
		}
	}
}

// On a host that starts containers without pause no list of links is read undisturbed. What is there all along is in it all the same.
func TestLinksComeAndGo(t *testing.T) {
	const pairs = 1500
	ns := nstest.New(t)
	ns.LinksComeAndGo(t, pairs)
	c := open(t, ns)
	for range 2 {
		all := map[string]bool{}
		if err := c.Links(func(l Link) { all[l.Name] = true }); err != nil {
			t.Fatal(err)
		}
		for i := range pairs {
			if name := fmt.Sprintf("stay%d", i); !all[name] {
				t.Errorf("%s is missing among %d", name, len(all))
			}
		}
	}
}
