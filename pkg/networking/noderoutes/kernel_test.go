package noderoutes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/golden"
	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/internal/nstest"
)

func typical() Config {
	return Config{
		Own:      prefixes("10.244.1.0/24", "fd00:244:1::/64"),
		Cluster:  prefixes("10.244.0.0/16", "fd00:244::/32", "10.60.0.0/14"),
		TunName:  "headcni01",
		LANFirst: true,
	}
}

func prefixes(ss ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range ss {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func mustSync(t *testing.T, ns *nstest.NS, n *Routes, cfg Config) []string {
	t.Helper()
	var changes []string
	ns.Do(t, func() (err error) {
		changes, err = n.Sync(t.Context(), cfg)
		return err
	})
	return changes
}

// rulesAndRoutes is what `ip` shows of one namespace, in all tables.
func rulesAndRoutes(t *testing.T, ns *nstest.NS) string {
	t.Helper()
	return ns.Run(t, "sh", "-c", "for f in -4 -6; do ip $f rule; ip $f route show table all; done")
}

// sysctls is every sysctl of a namespace that we could touch.
func sysctls(t *testing.T, ns *nstest.NS) string {
	t.Helper()
	return ns.Run(t, "sh", "-c", "cd /proc/sys/net && grep -H . ipv4/ip_forward ipv?/conf/*/forwarding "+
		"ipv?/conf/*/accept_r* ipv4/conf/*/rp_filter ipv4/conf/*/send_redirects | sort")
}

func TestKernelHoldsTheGoldenNode(t *testing.T) {
	ns := nstest.New(t)
	mustSync(t, ns, New(Saved{}, nil), typical())
	golden.Check(t, "testdata/node.golden", ns.Run(t, "sh", "-c", "for f in -4 -6; do ip $f rule; ip $f route show; done"))
	if out := ns.Run(t, "cat", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"); out != "1\n1\n" {
		t.Errorf("forwarding: %q", out)
	}
}

func TestSteadyState(t *testing.T) {
	ns := nstest.New(t)
	n := New(Saved{}, nil)
	if got := mustSync(t, ns, n, typical()); len(got) == 0 {
		t.Fatal("the first sync reports no change")
	}
	var events <-chan struct{}
	ns.Do(t, func() (err error) { events, err = n.Changes(t.Context()); return err })
	for _, node := range []*Routes{n, New(Saved{}, nil)} {
		if got := mustSync(t, ns, node, typical()); len(got) != 0 {
			t.Errorf("steady state changes %q", got)
		}
	}
	select {
	case <-events:
		t.Error("steady state wrote something")
	case <-time.After(200 * time.Millisecond):
	}
}

func TestConfigurationChange(t *testing.T) {
	ns, fresh := nstest.New(t), nstest.New(t)
	other := Config{Own: prefixes("10.244.7.0/24"), Cluster: prefixes("10.244.0.0/17"), TunName: "tailscale0"}
	n := New(Saved{}, nil)
	mustSync(t, ns, n, typical())
	changes := mustSync(t, ns, n, other)
	mustSync(t, fresh, New(Saved{}, nil), other)
	if d := cmp.Diff(rulesAndRoutes(t, fresh), rulesAndRoutes(t, ns)); d != "" {
		t.Errorf("the earlier configuration left something (-fresh +changed):\n%s", d)
	}
	firstDelete := slices.IndexFunc(changes, func(s string) bool { return strings.HasPrefix(s, "delete") })
	lastAdd := -1
	for i, s := range changes {
		if strings.HasPrefix(s, "add") {
			lastAdd = i
		}
	}
	if firstDelete < lastAdd {
		t.Errorf("deletes before it adds: %q", changes)
	}
}

func TestDamage(t *testing.T) {
	for name, damage := range map[string]string{
		"delete a rule":                 "ip rule del pref 5188",
		"delete a v6 rule":              "ip -6 rule del pref 5192",
		"flush rules":                   "ip rule flush; ip -6 rule flush; ip rule add pref 32766 lookup main proto kernel; ip rule add pref 32767 lookup default proto kernel; ip -6 rule add pref 32766 lookup main proto kernel",
		"change a rule's table":         "ip rule del pref 5188; ip rule add pref 5188 fwmark 0/0x80000 to 10.244.1.0/24 lookup main proto kernel",
		"rule without the mark":         "ip rule del pref 5191 to 10.244.0.0/16; ip rule add pref 5191 to 10.244.0.0/16 lookup 52 proto kernel",
		"unreachable made a lookup":     "ip rule del pref 5192 to 10.244.0.0/16; ip rule add pref 5192 fwmark 0/0x80000 to 10.244.0.0/16 lookup main proto kernel",
		"rule narrowed by a port":       "ip rule del pref 5189; ip rule add pref 5189 fwmark 0/0x80000 to 10.244.1.0/24 dport 80 unreachable proto kernel",
		"rule narrowed by an interface": "ip rule del pref 5189; ip rule add pref 5189 iif lo fwmark 0/0x80000 to 10.244.1.0/24 unreachable proto kernel",
		"rule inverted":                 "ip rule del pref 5195; ip rule add pref 5195 to 100.64.0.0/10 fwmark 0/0x80000 lookup main proto kernel",
		"rule of another origin":        "ip rule del pref 5195; ip rule add pref 5195 not to 100.64.0.0/10 fwmark 0/0x80000 lookup main",
		"rule added at our number":      "ip rule add pref 5190 to 10.0.0.0/8 lookup main",
		"rule added beside ours":        "ip rule add pref 5188 fwmark 0/0x80000 to 10.244.1.0/24 lookup main",
		"delete the route":              "ip route del unreachable 10.244.0.0/16 metric 4278",
		"delete the v6 route":           "ip -6 route del unreachable fd00:244::/32 metric 4278",
		"route made a blackhole":        "ip route replace blackhole 10.244.0.0/16 metric 4278",
		"route turned":                  "ip route replace 10.244.0.0/16 dev lo metric 4278",
		"foreign route at our number":   "ip route add unreachable 10.9.0.0/16 metric 4278",
		"flush main":                    "ip route flush table main; ip -6 route flush table main; ip route flush proto kernel; ip -6 route flush proto kernel",
		"v4 forwarding off":             "echo 0 >/proc/sys/net/ipv4/ip_forward",
		"v6 forwarding off":             "echo 0 >/proc/sys/net/ipv6/conf/all/forwarding",
	} {
		t.Run(name, func(t *testing.T) {
			ns := nstest.New(t)
			n := New(Saved{}, nil)
			mustSync(t, ns, n, typical())
			state := func() string {
				return ns.Run(t, "sh", "-c", "for f in -4 -6; do ip -d $f rule; ip $f route; done; "+
					"cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding")
			}
			want := sortedLines(state())
			var events <-chan struct{}
			ns.Do(t, func() (err error) { events, err = n.Changes(t.Context()); return err })
			ns.Run(t, "sh", "-c", damage)
			if sortedLines(state()) == want {
				t.Fatal("the damage did nothing")
			}
			select {
			case <-events:
			case <-time.After(time.Second):
				t.Error("no event within a second")
			}
			changes := mustSync(t, ns, n, typical())
			t.Logf("changes: %q", changes)
			if len(changes) == 0 {
				t.Error("no change reported")
			}
			if d := cmp.Diff(want, sortedLines(state())); d != "" {
				t.Errorf("not repaired (-want +got):\n%s", d)
			}
			if again := mustSync(t, ns, n, typical()); len(again) != 0 {
				t.Errorf("not steady: %q", again)
			}
		})
	}
}

// sortedLines: among rules of one number the order means nothing here, as they have different destinations.
func sortedLines(s string) string {
	lines := strings.Split(s, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func TestPodsWakeNobody(t *testing.T) {
	ns := nstest.New(t)
	n := New(Saved{}, nil)
	mustSync(t, ns, n, typical())
	ctx, cancel := context.WithCancel(t.Context())
	var events <-chan struct{}
	ns.Do(t, func() (err error) { events, err = n.Changes(ctx); return err })
	ns.Run(t, "sh", "-c", "ip link add hc0123456789 type veth peer name hc0123456788; ip addr add fe80::1/64 dev hc0123456789 nodad; "+
		"ip link set hc0123456789 up; ip link set hc0123456788 up; ip route add 10.244.1.9 dev hc0123456789; "+
		"ip route add 10.244.2.0/24 dev hc0123456789 table 52; ip link del hc0123456789")
	select {
	case <-events:
		t.Error("a pod woke us")
	case <-time.After(300 * time.Millisecond):
	}
	ns.Run(t, "ip", "addr", "add", "192.0.2.9/32", "dev", "lo")
	select {
	case <-events:
	case <-time.After(time.Second):
		t.Error("a new address went unseen")
	}
	cancel()
	for range events { // until it is closed
	}
}

func TestRemoveLeavesTheHostAsItWas(t *testing.T) {
	for name, setUp := range map[string]string{
		"fresh":             "true",
		"busy":              "ip rule add pref 100 lookup 7; ip route add unreachable 10.244.0.0/16 metric 100; ip rule add pref 5210 lookup 52",
		"router":            "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding",
		"one link forwards": "echo 1 >/proc/sys/net/ipv4/conf/u0/forwarding; echo 1 >/proc/sys/net/ipv6/conf/u1/forwarding; echo 0 >/proc/sys/net/ipv4/conf/all/accept_redirects",
		"with VRFs":         "for f in -4 -6; do ip $f rule add pref 32765 table local; ip $f rule del pref 0 table local; done",
		"one does not":      "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv4/conf/u0/forwarding",
	} {
		t.Run(name, func(t *testing.T) {
			ns := nstest.New(t)
			// Else the links' own addresses, and the routes to them, come when nobody has answered for a second.
			ns.Run(t, "sh", "-c", "echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad; ip link add u0 type veth peer name u1; ip link set u0 up; ip link set u1 up; "+
				"ip addr add 192.0.2.1/24 dev u0; ip addr add 2001:db8::1/64 dev u0 nodad; ip route add default via 192.0.2.254; "+setUp)
			time.Sleep(50 * time.Millisecond) // the kernel's own multicast routes appear after the link is up
			before := rulesAndRoutes(t, ns) + sysctls(t, ns)
			var file []byte // as the daemon keeps it
			save := func(s Saved) (err error) { file, err = json.Marshal(s); return err }
			mustSync(t, ns, New(Saved{}, save), typical())
			if rulesAndRoutes(t, ns)+sysctls(t, ns) == before {
				t.Fatal("sync did nothing")
			}
			for range 2 {
				var saved Saved
				if file != nil {
					if err := json.Unmarshal(file, &saved); err != nil {
						t.Fatal(err)
					}
				}
				ns.Do(t, func() error { return New(saved, save).Remove(t.Context()) })
				if d := cmp.Diff(before, rulesAndRoutes(t, ns)+sysctls(t, ns)); d != "" {
					t.Errorf("not as before (-before +after):\n%s", d)
				}
			}
		})
	}
}

func TestRemoveRespectsOthersSysctls(t *testing.T) {
	ns := nstest.New(t)
	n := New(Saved{}, nil)
	mustSync(t, ns, n, typical())
	// Somebody turned it off and does not want it back.
	ns.Run(t, "sh", "-c", "echo 0 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv4/conf/lo/forwarding")
	ns.Do(t, func() error { return n.Remove(t.Context()) })
	if out := ns.Run(t, "cat", "/proc/sys/net/ipv4/conf/lo/forwarding"); out != "1\n" {
		t.Errorf("lo: %q", out)
	}
}

func TestSaveComesFirst(t *testing.T) {
	ns := nstest.New(t)
	full := errors.New("disk full")
	n := New(Saved{}, func(Saved) error { return full })
	ns.Do(t, func() error {
		changes, err := n.Sync(t.Context(), typical())
		if !errors.Is(err, full) {
			t.Errorf("error %v", err)
		}
		if !slices.ContainsFunc(changes, func(s string) bool { return strings.HasPrefix(s, "add rule 5192") }) {
			t.Errorf("it did not go on past the error: %q", changes)
		}
		return nil
	})
	if out := ns.Run(t, "cat", "/proc/sys/net/ipv4/ip_forward"); out != "0\n" {
		t.Errorf("ip_forward is %q though it could not be saved", out)
	}
}

func TestSavedOfAnotherBootIsForgotten(t *testing.T) {
	ns := nstest.New(t)
	old := Saved{BootID: "another", Sysctls: map[string]string{"net/ipv4/ip_forward": "0"},
		Set: map[string]string{"net/ipv4/ip_forward": "1"}}
	ns.Run(t, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
	ns.Do(t, func() error { return New(old, nil).Remove(t.Context()) })
	if out := ns.Run(t, "cat", "/proc/sys/net/ipv4/ip_forward"); out != "1\n" {
		t.Errorf("ip_forward %q: put back to another boot's value", out)
	}
}

func TestWithIPv6Disabled(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")
	n := New(Saved{}, nil)
	mustSync(t, ns, n, typical())
	if got := mustSync(t, ns, n, typical()); len(got) != 0 {
		t.Errorf("not steady: %q", got)
	}
}

func TestWithoutIPv6(t *testing.T) {
	ns := nstest.New(t)
	nstest.Require(t)
	// As on a host started with ipv6.disable=1: there is no such folder.
	ns.Do(t, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return err
		}
		empty := t.TempDir()
		if err := os.Mkdir(filepath.Join(empty, "ipv4"), 0o755); err != nil {
			return err
		}
		if err := unix.Mount("/proc/sys/net/ipv4", filepath.Join(empty, "ipv4"), "", unix.MS_BIND, ""); err != nil {
			return err
		}
		if err := unix.Mount(empty, "/proc/sys/net", "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
		_, err := New(Saved{}, nil).Sync(t.Context(), typical())
		return err
	})
	if out := ns.Run(t, "ip", "-6", "rule"); strings.Contains(out, "5194") {
		t.Errorf("IPv6 rules:\n%s", out)
	}
	if out := ns.Run(t, "ip", "rule"); !strings.Contains(out, "5194") {
		t.Errorf("IPv4 rules:\n%s", out)
	}
}

func TestWithoutPermission(t *testing.T) {
	ns := nstest.New(t)
	ns.Do(t, func() error {
		// The thread ends with the test, and with it the loss.
		var none [2]unix.CapUserData
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
			return err
		}
		_, err := New(Saved{}, nil).Sync(t.Context(), typical())
		if err == nil || !strings.Contains(err.Error(), "run as root or with CAP_NET_ADMIN") {
			t.Errorf("error %v", err)
		}
		return nil
	})
}

func TestKeepsTheRADefaultRoute(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "sh", "-c", "ip link add u0 type veth peer name r0; ip link set u0 up; ip link set r0 up; "+
		"ip addr add fe80::99/64 dev r0 nodad; echo 0 >/proc/sys/net/ipv6/conf/u0/accept_dad")
	router := func() {
		for i := range 100 {
			if i%10 == 0 { // again, as routers do: the first may come before the link takes any
				sendRA(t, ns, "r0")
			}
			if strings.Contains(ns.Run(t, "ip", "-6", "route", "show", "default"), "proto ra") {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Fatalf("the kernel took no default route from the advertisement:\n%s", ns.Run(t, "ip", "-6", "route"))
	}
	router()
	n := New(Saved{}, nil)
	changes := mustSync(t, ns, n, typical())
	ra := slices.Index(changes, "set net.ipv6.conf.u0.accept_ra=2")
	if fwd := slices.Index(changes, "set net.ipv6.conf.all.forwarding=1"); ra < 0 || fwd < ra {
		t.Errorf("accept_ra=2 must come before forwarding: %q", changes)
	}
	if out := ns.Run(t, "ip", "-6", "route", "show", "default"); !strings.Contains(out, "proto ra") {
		t.Errorf("the default route is gone: %q", out)
	}
	ns.Run(t, "ip", "-6", "route", "flush", "proto", "ra")
	router() // and it still takes new ones
	ns.Do(t, func() error { return n.Remove(t.Context()) })
	if out := ns.Run(t, "cat", "/proc/sys/net/ipv6/conf/u0/accept_ra"); out != "1\n" {
		t.Errorf("accept_ra after removal: %q", out)
	}
}

// sendRA sends a router advertisement out of link, from its link-local address to all nodes (RFC 4861 section 4.2).
func sendRA(t *testing.T, ns *nstest.NS, link string) {
	t.Helper()
	ns.Do(t, func() error {
		l, err := ns.Handle.LinkByName(link)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for opt, v := range map[int]int{unix.IPV6_MULTICAST_HOPS: 255, unix.IPV6_MULTICAST_IF: l.Attrs().Index} {
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, opt, v); err != nil {
				return err
			}
		}
		const routerAdvertisement, hopLimit, lifetime = 134, 64, 1800 // seconds
		ra := []byte{routerAdvertisement, 0, 0, 0, hopLimit, 0, lifetime >> 8, lifetime & 0xff, 0, 0, 0, 0, 0, 0, 0, 0}
		to := &unix.SockaddrInet6{Addr: netip.MustParseAddr("ff02::1").As16(), ZoneId: uint32(l.Attrs().Index)}
		for range 100 { // until the link-local address may be used
			if err = unix.Sendto(fd, ra, 0, to); err == nil {
				return nil
			}
			time.Sleep(10 * time.Millisecond)
		}
		return err
	})
}

func TestDefaultSource(t *testing.T) {
	ns := nstest.New(t)
	find := func(family int) (a netip.Addr, err error) {
		ns.Do(t, func() error { a, err = DefaultSource(family); return nil })
		return a, err
	}
	for _, f := range families {
		if _, err := find(f.af); !errors.Is(err, ErrNoSource) {
			t.Errorf("%s without routes: %v", f.name, err)
		}
	}
	// The host has docker0 with its address before the uplink, so the kernel would take docker0's for the source.
	ns.Run(t, "sh", "-c", "ip link add docker0 type bridge; ip addr add 172.17.0.1/16 dev docker0; "+
		"ip link add u0 type veth peer name u1; ip addr add 198.51.100.7/24 dev u0; ip addr add 192.0.2.7/24 dev u0; "+
		"ip addr add fd00:17::1/64 dev docker0 nodad; ip addr add 2001:db8::7/64 dev u0 nodad; "+
		"for l in docker0 u0 u1; do ip link set $l up; done; "+
		"ip route add default via 192.0.2.254 dev u0; ip -6 route add default via fe80::1 dev u0")
	for family, want := range map[int]string{unix.AF_INET: "192.0.2.7", unix.AF_INET6: "2001:db8::7"} {
		if got, err := find(family); err != nil || got.String() != want {
			t.Errorf("got %v, %v; want %s", got, err, want)
		}
	}
	ns.Run(t, "ip", "route", "add", "default", "dev", "u0", "src", "198.51.100.7", "metric", "1")
	ns.Run(t, "ip", "route", "del", "default", "metric", "0")
	if got, err := find(unix.AF_INET); err != nil || got.String() != "198.51.100.7" {
		t.Errorf("got %v, %v; want the route's source", got, err)
	}
	// Nobody outside knows where the node answers for names.
	ns.Run(t, "sh", "-c", "ip link del docker0; ip -6 addr flush dev u0 scope global; ip -6 addr add "+netset.AnswererIPv6.String()+" dev lo; ip link set lo up")
	if got, err := find(unix.AF_INET6); !errors.Is(err, ErrNoSource) {
		t.Errorf("got %v, %v; want no source", got, err)
	}
}

// Routes are read as the kernel lists them: next hops, sources, kinds, and tables of any number.
func TestDefaults(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "sh", "-ec", "for l in u0 u1; do ip link add $l type veth peer name p$l; ip link set $l up; ip link set p$l up; done; "+
		"ip addr add 192.0.2.1/24 dev u0; ip addr add 198.51.100.1/24 dev u1; ip addr add 2001:db8::1/64 dev u0 nodad; ip addr add 2001:db8:1::1/64 dev u1 nodad; "+
		"ip route add unreachable default metric 4000; ip route add default via 192.0.2.254 metric 300 src 192.0.2.1; "+
		"ip route add default metric 200 src 198.51.100.1 nexthop via 192.0.2.253 nexthop via 198.51.100.254; ip route add default via 192.0.2.9 table 7000; "+
		"ip -6 route add default metric 50 nexthop via 2001:db8::254 nexthop via 2001:db8:1::254; ip -6 route add default via 2001:db8::253 proto ra metric 60")
	var got, elsewhere []string
	ns.Do(t, func() error {
		name := func(h hop) string {
			return fmt.Sprintf("%s %v %v", linkName(h.link), h.gateway, h.source)
		}
		for _, f := range families {
			routes, err := listDefaults(f)
			if err != nil {
				return err
			}
			for _, r := range routes {
				line := fmt.Sprintf("%d kind %d proto %d:", r.metric, r.kind, r.proto)
				for _, h := range r.hops {
					line += " " + name(h) + ";"
				}
				got = append(got, line)
			}
		}
		return eachRoute(ipv4, 7000, func(m routeMsg) { elsewhere = append(elsewhere, fmt.Sprint(m.to, " ", name(m.hops()[0]))) })
	})
	want := []string{
		"200 kind 1 proto 3: u0 192.0.2.253 198.51.100.1; u1 198.51.100.254 198.51.100.1;",
		"300 kind 1 proto 3: u0 192.0.2.254 192.0.2.1;",
		"4000 kind 7 proto 3:  invalid IP invalid IP;",
		"50 kind 1 proto 3: u0 2001:db8::254 invalid IP; u1 2001:db8:1::254 invalid IP;",
		"60 kind 1 proto 9: u0 2001:db8::253 invalid IP;",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{"0.0.0.0/0 u0 192.0.2.9 invalid IP"}, elsewhere); d != "" {
		t.Errorf("of another table (-want +got):\n%s", d)
	}
}

// A router that speaks BGP has a million routes in main. The daemon, which looks at them all the time, never has them all in memory.
func TestManyRoutes(t *testing.T) {
	const many = 50_000
	ns := nstest.New(t)
	var batch strings.Builder
	for i := range many {
		fmt.Fprintf(&batch, "route add 20.%d.%d.0/24 via 192.0.2.254\n", i>>8, i&255)
	}
	file := filepath.Join(t.TempDir(), "routes")
	if err := os.WriteFile(file, []byte(batch.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	ns.Run(t, "sh", "-ec", "ip link add u0 type veth peer name u1; ip link set u0 up; ip link set u1 up; ip addr add 192.0.2.1/24 dev u0; ip route add default via 192.0.2.254")
	n := New(Saved{}, nil)
	mustSync(t, ns, n, typical())
	pass := func() (bytes uint64) {
		ns.Do(t, func() error {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, syncErr := n.Sync(t.Context(), typical())
			_, sourceErr := DefaultSource(unix.AF_INET)
			UplinkMTU()
			runtime.ReadMemStats(&after)
			bytes = after.TotalAlloc - before.TotalAlloc
			return errors.Join(syncErr, sourceErr)
		})
		return bytes
	}
	few := pass()
	ns.Run(t, "ip", "-batch", file)
	if lots := pass(); lots > few+(1<<20) {
		t.Errorf("with %d routes more a pass allocates %d bytes, without %d", many, lots, few)
	}
	ns.Do(t, func() error {
		networks, err := HostNetworks()
		if len(networks) < many {
			t.Errorf("%d networks of the host's, of %d", len(networks), many)
		}
		return err
	})
}

// On a host that starts containers without pause no list of links or addresses is read undisturbed. The node is right all the same.
func TestLinksComeAndGo(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "sh", "-ec", "ip link add u0 type veth peer name u1; ip link set u0 up; ip link set u1 up; ip addr add 192.0.2.1/24 dev u0; ip addr add 2001:db8::1/64 dev u0 nodad; "+
		"ip route add default via 192.0.2.254; ip -6 route add default via 2001:db8::254")
	n := New(Saved{}, nil)
	mustSync(t, ns, n, typical())
	ns.LinksComeAndGo(t, 1500)
	for range 3 {
		if got := mustSync(t, ns, n, typical()); len(got) != 0 {
			t.Errorf("changes %q", got)
		}
		ns.Do(t, func() error {
			for _, f := range families {
				if a, err := DefaultSource(f.af); err != nil || a != netip.MustParseAddr(map[string]string{"IPv4": "192.0.2.1", "IPv6": "2001:db8::1"}[f.name]) {
					t.Errorf("the node's %s address is %v, error %v", f.name, a, err)
				}
			}
			return nil
		})
	}
}
