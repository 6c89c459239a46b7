package antispoof

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/sysctl"
)

// Only pods' links and routes to single addresses in table main change what pods send from: others have thousands of events.
func TestRelevant(t *testing.T) {
	route := func(family, bits, table byte) []byte {
		return append([]byte{family, bits, 0, 0, table}, make([]byte, 7)...)
	}
	link := func(name string) []byte {
		b := append(make([]byte, unix.SizeofIfInfomsg), 0, 0, 0, 0)
		binary.NativeEndian.PutUint16(b[unix.SizeofIfInfomsg:], uint16(4+len(name)+1))
		binary.NativeEndian.PutUint16(b[unix.SizeofIfInfomsg+2:], unix.IFLA_IFNAME)
		return append(append(b, name...), make([]byte, 4)...)
	}
	for name, c := range map[string]struct {
		typ  uint16
		msg  []byte
		want bool
	}{
		"a pod's route":           {unix.RTM_NEWROUTE, route(unix.AF_INET, 32, unix.RT_TABLE_MAIN), true},
		"a pod's route that went": {unix.RTM_DELROUTE, route(unix.AF_INET6, 128, unix.RT_TABLE_MAIN), true},
		"a network":               {unix.RTM_NEWROUTE, route(unix.AF_INET, 24, unix.RT_TABLE_MAIN), false},
		"half an IPv6 network":    {unix.RTM_NEWROUTE, route(unix.AF_INET6, 32, unix.RT_TABLE_MAIN), false},
		"tailscaled's table":      {unix.RTM_NEWROUTE, route(unix.AF_INET, 32, 52), false},
		"a cut message":           {unix.RTM_NEWROUTE, []byte{unix.AF_INET}, true},
		"a pod's link":            {unix.RTM_DELLINK, link("hc0123456789"), true},
		"somebody's link":         {unix.RTM_NEWLINK, link("docker0"), false},
		"an address":              {unix.RTM_NEWADDR, make([]byte, 8), false},
	} {
		if got := relevant(c.typ, c.msg); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

type fake struct {
	err  error
	want map[int][]netip.Addr
}

func (f *fake) Sources() (map[int][]netip.Addr, error) { return map[int][]netip.Addr{7: nil}, f.err }

type kernel struct{ *fake }

// tableless is a kernel without our tables.
type tableless struct{}

func (tableless) Sources(map[int][]netip.Addr) (int, error) { return 0, fs.ErrNotExist }

// The kernel looks sources up itself while no table of ours does.
func TestNoTable(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "ip", "link", "add", "hc0123456789", "type", "veth", "peer", "name", "other")
	log := slog.New(slog.DiscardHandler)
	for _, step := range []struct {
		table Table
		want  string
	}{{kernel{new(fake)}, "1"}, {tableless{}, "0"}, {kernel{new(fake)}, "1"}} {
		ns.Do(t, func() error {
			New(log, step.table, new(fake)).pass(true)
			got, err := sysctl.Read(sysctl.IPv4LinkAcceptLocal("hc0123456789"))
			if got != step.want {
				t.Errorf("%T: accept_local is %s, want %s", step.table, got, step.want)
			}
			return err
		})
	}
}

func (k kernel) Sources(want map[int][]netip.Addr) (int, error) { k.want = want; return len(want), nil }

// A fault is told once, and again where it was right in between.
func TestFailureIsToldOnce(t *testing.T) {
	var log strings.Builder
	f := &fake{err: errors.New("no netlink")}
	c := New(slog.New(slog.NewTextHandler(&log, nil)), kernel{f}, f)
	for range 3 {
		if got := c.pass(true); got != retry {
			t.Errorf("next in %s, want %s", got, retry)
		}
	}
	f.err = nil
	if got := c.pass(true); got != fullCheck || len(f.want) != 1 {
		t.Errorf("next in %s with %v", got, f.want)
	}
	f.err = errors.New("no netlink")
	c.pass(true)
	if n := strings.Count(log.String(), "no netlink"); n != 2 {
		t.Errorf("told %d times:\n%s", n, log.String())
	}
}
