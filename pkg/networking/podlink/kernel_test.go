package podlink

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/procfs"
	"github.com/headcni/headcni/pkg/config/names"
)

var (
	addr4   = netip.MustParseAddr("10.244.1.2")
	addr6   = netip.MustParseAddr("fd00:244:1::2")
	hostEnd = Name("c1", "eth0")
)

// node is a node of its own and one pod's namespace.
type node struct{ host, pod *nstest.NS }

func newNode(t *testing.T) node { return node{host: nstest.New(t), pod: nstest.New(t)} }

func (n node) spec(addrs ...netip.Addr) Pod {
	p := Pod{Network: "net", ContainerID: "c1", IfName: "eth0", Label: "ns/web", MTU: 1400, Addrs: addrs}
	for _, a := range addrs {
		gateway, any := Gateway4, netip.IPv4Unspecified()
		if a.Is6() {
			gateway, any = Gateway6, netip.IPv6Unspecified()
		}
		p.Routes = append(p.Routes, Route{Dst: netip.PrefixFrom(any, 0), Gateway: gateway})
	}
	return p
}

// on runs fn with a handle on the node of its own.
func on(t testing.TB, host *nstest.NS, fn func(h *Handle) error) {
	t.Helper()
	host.Do(t, func() error {
		var h Handle
		defer h.Close()
		return fn(&h)
	})
}

// attach makes pod's link in the namespace at netns. inject is Handle's.
func attach(t testing.TB, host *nstest.NS, netns string, inject func(string) error, pod Pod) (p Pair, err error) {
	on(t, host, func(h *Handle) error {
		ns, openErr := openNetns(netns)
		if openErr != nil {
			return openErr
		}
		defer ns.Close()
		h.inject = inject
		p, err = h.Attach(slog.New(slog.DiscardHandler), ns, pod)
		return nil
	})
	return p, err
}

func (n node) attach(t *testing.T, inject func(string) error, pod Pod) (Pair, error) {
	return attach(t, n.host, n.pod.Path, inject, pod)
}

func (n node) detach(t *testing.T) (err error) {
	on(t, n.host, func(h *Handle) error {
		_, err = h.Detach("c1", "eth0", n.pod.Path)
		return nil
	})
	return err
}

func (n node) mustAttach(t *testing.T, addrs ...netip.Addr) Pair {
	t.Helper()
	l, err := n.attach(t, nil, n.spec(addrs...))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// empty fails the test unless neither namespace has anything of a pod.
func (n node) empty(t *testing.T) {
	t.Helper()
	for _, ns := range []*nstest.NS{n.host, n.pod} {
		for _, args := range []string{"-o link", "route", "-6 route", "neigh"} {
			out := ns.Run(t, "ip", strings.Fields(args)...)
			for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
				if line != "" && !strings.Contains(line, " lo") && !strings.Contains(line, "dev lo") {
					t.Errorf("left in %s: %s", ns.Name, line)
				}
			}
		}
	}
}

// state renders what the pod's link is made of, as ip prints it.
func (n node) state(t *testing.T, l Pair) []string {
	t.Helper()
	clean := strings.NewReplacer(l.HostMAC.String(), "HOSTMAC", l.PodMAC.String(), "PODMAC", l.HostName, "HOST")
	spaces, leftOut := regexp.MustCompile(`\s+`), regexp.MustCompile(`^(fe80::/64|ff00|fd00.* proto kernel metric 256|.*linkdown)`)
	var lines []string
	for _, c := range []struct {
		ns   *nstest.NS
		side string
		link string
	}{{n.host, "host", l.HostName}, {n.pod, "pod", "eth0"}} {
		for _, what := range []string{"-4 -o addr show dev", "-6 -o addr show scope global dev", "-4 route show dev", "-6 route show dev", "neigh show dev"} {
			out := c.ns.Run(t, "ip", append(strings.Fields(what), c.link)...)
			for _, line := range strings.Split(strings.TrimSpace(clean.Replace(out)), "\n") {
				line, _, _ = strings.Cut(spaces.ReplaceAllString(strings.TrimSpace(line), " "), "\\")
				line = regexp.MustCompile(`^\d+: `).ReplaceAllString(line, "")
				if line != "" && !leftOut.MatchString(line) {
					lines = append(lines, c.side+" "+strings.TrimSpace(line))
				}
			}
		}
	}
	slices.Sort(lines)
	return lines
}

func TestAttach(t *testing.T) {
	want4 := []string{
		"host 10.244.1.2 lladdr PODMAC PERMANENT",
		"host 10.244.1.2 proto kernel scope link",
		"pod 169.254.1.1 lladdr HOSTMAC PERMANENT",
		"pod 169.254.1.1 proto static scope link",
		"pod default via 169.254.1.1 proto static onlink",
		"pod eth0 inet 10.244.1.2/32 scope global eth0",
	}
	want6 := []string{
		"host fd00:244:1::2 lladdr PODMAC PERMANENT",
		"host fd00:244:1::2 proto kernel metric 1024 pref medium",
		"pod default via fe80::1 proto static metric 1024 onlink pref medium",
		"pod eth0 inet6 fd00:244:1::2/128 scope global nodad",
		"pod fe80::1 lladdr HOSTMAC PERMANENT",
	}
	both := slices.Concat(want4, want6)
	slices.Sort(both)
	for _, tt := range []struct {
		name  string
		addrs []netip.Addr
		want  []string
	}{
		{"v4", []netip.Addr{addr4}, want4}, {"v6", []netip.Addr{addr6}, want6}, {"dual", []netip.Addr{addr4, addr6}, both},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			l := n.mustAttach(t, tt.addrs...)
			if diff := cmp.Diff(tt.want, n.state(t, l)); diff != "" {
				t.Error(diff)
			}
			if out := n.host.Run(t, "ip", "link", "show", "dev", l.HostName); !strings.Contains(out, "mtu 1400") || !strings.Contains(out, "alias net c1/eth0 ns/web") {
				t.Errorf("host link: %s", out)
			}
			want := ""
			if slices.Contains(tt.addrs, addr6) {
				want = "inet6 fe80::1/64 scope link nodad"
			}
			out := n.host.Run(t, "ip", "-6", "-o", "addr", "show", "dev", l.HostName)
			if strings.Count(out, "inet6") != strings.Count(want, "inet6") || !strings.Contains(out, want) {
				t.Errorf("host's IPv6 addresses: got %q, want %q alone", out, want)
			}
			for _, c := range []struct {
				ns   *nstest.NS
				link string
			}{{n.host, l.HostName}, {n.pod, "eth0"}} {
				c.ns.Do(t, func() error {
					if v, err := procfs.Read(sysctlPath(c.link, "accept_ra")); err != nil || v != "0" {
						return fmt.Errorf("accept_ra of %s is %q, %v", c.link, v, err)
					}
					return nil
				})
			}
			// As Kata Containers makes them anew: from what it lists, without the flag onlink.
			for _, family := range []string{"-4", "-6"} {
				for _, route := range strings.Split(strings.TrimSpace(n.pod.Run(t, "ip", family, "route", "show", "default")), "\n") {
					if route != "" {
						n.pod.Run(t, "ip", append([]string{family, "route", "replace"}, strings.Fields(strings.ReplaceAll(route, " onlink", ""))...)...)
					}
				}
			}
			if err := n.detach(t); err != nil {
				t.Fatal(err)
			}
			n.empty(t)
			if err := n.detach(t); err != nil {
				t.Errorf("second detach: %v", err)
			}
		})
	}
}

func TestRoutes(t *testing.T) {
	n := newNode(t)
	pod := n.spec(addr4, addr6)
	table := 1000
	gw4, gw6 := netip.MustParseAddr("10.244.1.1"), netip.MustParseAddr("fd00:244:1::1")
	pod.Routes = []Route{
		{Dst: netip.MustParsePrefix("0.0.0.0/0"), Gateway: gw4, MTU: 1300, AdvMSS: 1200, Priority: 7},
		{Dst: netip.MustParsePrefix("192.0.2.0/24"), Gateway: gw4, Table: &table},
		{Dst: netip.MustParsePrefix("::/0"), Gateway: gw6},
		{Dst: netip.MustParsePrefix("198.51.100.0/24"), Gateway: gw4, Priority: 7},
		{Dst: netip.MustParsePrefix("198.51.100.0/24"), Gateway: gw4},
		{Dst: netip.MustParsePrefix("2001:db8::/32"), Gateway: gw6, Priority: 7},
		{Dst: netip.MustParsePrefix("2001:db8::/32"), Gateway: gw6},
	}
	l, err := n.attach(t, nil, pod)
	if err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]string{
		"route show default":       "default via 10.244.1.1 dev eth0 proto static metric 7 onlink mtu 1300 advmss 1200",
		"route show table 1000":    "192.0.2.0/24 via 10.244.1.1 dev eth0 proto static onlink",
		"-6 route show default":    "default via fd00:244:1::1 dev eth0 proto static metric 1024 onlink pref medium",
		"neigh show 10.244.1.1":    "10.244.1.1 dev eth0 lladdr " + l.HostMAC.String() + " PERMANENT",
		"neigh show fd00:244:1::1": "fd00:244:1::1 dev eth0 lladdr " + l.HostMAC.String() + " PERMANENT",
	} {
		if got := strings.TrimSpace(n.pod.Run(t, "ip", strings.Fields(args)...)); strings.Join(strings.Fields(got), " ") != want {
			t.Errorf("ip %s\ngot  %s\nwant %s", args, got, want)
		}
	}
	state := State{ContainerID: "c1", IfName: "eth0", Netns: n.pod.Path, Addrs: []netip.Addr{addr4, addr6}, Routes: pod.Routes}
	on(t, n.host, func(h *Handle) error { return h.Check(state) })
	// Of two routes to one destination by one gateway each counts for itself.
	for del, want := range map[string]string{
		"route del 198.51.100.0/24 metric 7":     "pod route 198.51.100.0/24 via 10.244.1.1 is missing",
		"-6 route del 2001:db8::/32 metric 1024": "pod route 2001:db8::/32 via fd00:244:1::1 is missing",
	} {
		n.pod.Run(t, "ip", strings.Fields(del)...)
		on(t, n.host, func(h *Handle) error {
			if err := h.Check(state); err == nil || strings.Count(err.Error(), want) != 1 {
				t.Errorf("CHECK after ip %s: %v", del, err)
			}
			return nil
		})
	}
}

// TestSecondInterface: a pod may be attached twice. Its first interface stays the way out.
func TestSecondInterface(t *testing.T) {
	n := newNode(t)
	first := n.mustAttach(t, addr4, addr6)
	other4, other6 := netip.MustParseAddr("10.244.1.3"), netip.MustParseAddr("fd00:244:1::3")
	pod := n.spec(other4, other6)
	pod.IfName = "eth1"
	pod.Routes = append(pod.Routes, Route{Dst: netip.MustParsePrefix("192.0.2.0/24"), Gateway: Gateway4})
	second, err := n.attach(t, nil, pod)
	if err != nil {
		t.Fatal(err)
	}
	if first.Metric != 0 || second.Metric <= 1024 {
		t.Errorf("metrics %d and %d, want 0 and more than IPv6's default", first.Metric, second.Metric)
	}
	metric := fmt.Sprint(second.Metric)
	for args, want := range map[string]string{
		"route get 1.1.1.1 from 10.244.1.2":                "dev eth0",
		"-6 route get 2001:db8::1":                         "dev eth0",
		"route show default dev eth1":                      "default via 169.254.1.1 proto static metric " + metric + " onlink",
		"-6 route show default dev eth1":                   "default via fe80::1 proto static metric " + metric + " onlink pref medium",
		"route show 192.0.2.0/24":                          "192.0.2.0/24 via 169.254.1.1 dev eth1 proto static metric " + metric + " onlink",
		"route show default dev eth0 metric 0":             "default via 169.254.1.1 proto static onlink",
		"route get 1.1.1.1 from 10.244.1.3":                "dev eth1",
		"-6 route get 2001:db8::1 from " + other6.String(): "dev eth1",
		"-6 route get 2001:db8::1 from " + addr6.String():  "dev eth0",
	} {
		if got := strings.Join(strings.Fields(n.pod.Run(t, "ip", strings.Fields(args)...)), " "); !strings.Contains(got, want) || strings.Count(got, " via ") > 1 {
			t.Errorf("ip %s\ngot  %s\nwant %s", args, got, want)
		}
	}
	for _, c := range []struct {
		p    Pod
		l    Pair
		addr []netip.Addr
	}{{n.spec(addr4, addr6), first, []netip.Addr{addr4, addr6}}, {pod, second, []netip.Addr{other4, other6}}} {
		want := State{
			ContainerID: "c1", IfName: c.p.IfName, Netns: n.pod.Path, HostListed: true, HostMAC: c.l.HostMAC.String(),
			PodMAC: c.l.PodMAC.String(), HostMTU: c.l.HostMTU, PodMTU: c.l.PodMTU, Addrs: c.addr, Routes: c.p.Routes,
		}
		on(t, n.host, func(h *Handle) error { return h.Check(want) })
	}
	// CHECK sees rules that somebody took away, and DEL takes what is left of them.
	behind := State{ContainerID: "c1", IfName: "eth1", Netns: n.pod.Path, Addrs: []netip.Addr{other4, other6}, Routes: slices.Clone(pod.Routes)}
	for i := range behind.Routes {
		behind.Routes[i].Priority = second.Metric
	}
	on(t, n.host, func(h *Handle) error { return h.Check(behind) })
	n.pod.Run(t, "ip", "-6", "rule", "delete", "table", metric)
	on(t, n.host, func(h *Handle) error {
		if err := h.Check(behind); err == nil || !strings.Contains(err.Error(), "pod rule from "+other6.String()+" is missing") || strings.Contains(err.Error(), other4.String()) {
			t.Errorf("CHECK without a rule: %v", err)
		}
		_, err := h.Detach("c1", "eth1", n.pod.Path)
		return err
	})
	for _, f := range []string{"-4", "-6"} {
		if rules := n.pod.Run(t, "ip", f, "rule"); strings.Contains(rules, metric) {
			t.Errorf("rules are left:\n%s", rules)
		}
	}
	if second, err = n.attach(t, nil, pod); err != nil {
		t.Fatal(err)
	}
	pod.Routes = append(pod.Routes, pod.Routes[0]) // the same route twice is a fault, with or without another interface
	pod.IfName = "eth2"
	if _, err := n.attach(t, nil, pod); !errors.Is(err, unix.EEXIST) {
		t.Errorf("a route twice: got %v", err)
	}
}

// TestDetachWithAnothersNamespace: what a runtime names as the namespace may be another pod's by now, whose rules have the same
// numbers. They stay.
func TestDetachWithAnothersNamespace(t *testing.T) {
	n, other := newNode(t), nstest.New(t)
	for i, at := range []struct{ id, path string }{{"c1", n.pod.Path}, {"c2", other.Path}} {
		for _, ifName := range []string{"eth0", "eth1"} {
			pod := n.spec(netip.AddrFrom4([4]byte{10, 244, 1, byte(10+10*i) + ifName[3] - '0'}))
			pod.ContainerID, pod.IfName = at.id, ifName
			if _, err := attach(t, n.host, at.path, nil, pod); err != nil {
				t.Fatal(err)
			}
		}
	}
	before := other.Run(t, "ip", "rule")
	if !strings.Contains(before, "5190:") || strings.Count(before, "5190:") != strings.Count(n.pod.Run(t, "ip", "rule"), "5190:") {
		t.Fatalf("no rules of the same numbers:\n%s", before)
	}
	on(t, n.host, func(h *Handle) error { _, err := h.Detach("c1", "eth1", other.Path); return err })
	if after := other.Run(t, "ip", "rule"); after != before {
		t.Errorf("another pod's rules were\n%s\nand are\n%s", before, after)
	}
}

// TestAttachFailsAtEachStep fails every step in turn: the error says which, and Detach leaves nothing behind.
func TestAttachFailsAtEachStep(t *testing.T) {
	n := newNode(t)
	var steps []string
	record := func(step string) error { steps = append(steps, step); return nil }
	if _, err := n.attach(t, record, n.spec(addr4, addr6)); err != nil {
		t.Fatal(err)
	}
	if err := n.detach(t); err != nil {
		t.Fatal(err)
	}
	if len(steps) < 17 {
		t.Fatalf("only %d steps seen: %q", len(steps), steps)
	}
	boom := errors.New("boom")
	for i := range steps {
		t.Run(strings.ReplaceAll(fmt.Sprintf("%02d %s", i, steps[i]), "/", "_"), func(t *testing.T) {
			at := 0
			failing := func(string) error {
				at++
				if at-1 == i {
					return boom
				}
				return nil
			}
			if _, err := n.attach(t, failing, n.spec(addr4, addr6)); !errors.Is(err, boom) {
				t.Fatalf("got %v", err)
			}
			if err := n.detach(t); err != nil {
				t.Fatal(err)
			}
			n.empty(t)
		})
	}
}

func TestLeftoverIsReplaced(t *testing.T) {
	for _, killedAt := range []string{"name owner of link", "set pod link up"} {
		t.Run(killedAt, func(t *testing.T) {
			n := newNode(t)
			dying := func(step string) error {
				if step == killedAt {
					return errors.New("killed")
				}
				return nil
			}
			// The pod of the first try has gone, as after a restart of the sandbox; its link's host end stays for a moment.
			first := nstest.New(t)
			if _, err := attach(t, n.host, first.Path, dying, n.spec(addr4)); err == nil {
				t.Fatal("not killed")
			}
			n.mustAttach(t, addr4)
			if out := first.Run(t, "ip", "-o", "link"); strings.Contains(out, "eth0") {
				t.Errorf("the leftover is still there: %s", out)
			}
		})
	}
}

func TestNameCollision(t *testing.T) {
	n := newNode(t)
	n.host.Run(t, "ip", "link", "add", hostEnd, "type", "veth", "peer", "name", "x")
	n.host.Run(t, "ip", "link", "set", hostEnd, "alias", "net other/eth0")
	_, err := n.attach(t, nil, n.spec(addr4))
	if err == nil || !strings.Contains(err.Error(), "it exists and is another's") {
		t.Errorf("attach: %v", err)
	}
	if err := n.detach(t); err != nil {
		t.Errorf("detach: %v", err)
	}
	n.host.Run(t, "ip", "link", "show", "dev", hostEnd) // still there
}

func TestAddressElsewhere(t *testing.T) {
	n := newNode(t)
	n.host.Run(t, "ip", "route", "add", addr4.String(), "dev", "lo")
	if _, err := n.attach(t, nil, n.spec(addr4)); !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "something else on this node has the address") {
		t.Errorf("got %v", err)
	}
	if err := n.detach(t); err != nil {
		t.Fatal(err)
	}
	if out := n.host.Run(t, "ip", "route", "show", addr4.String()); !strings.Contains(out, "dev lo") {
		t.Errorf("the other's route has gone: %q", out)
	}
}

func TestVacant(t *testing.T) {
	n := newNode(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.pod.Run(t, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth9")
	for _, tt := range []struct {
		netns, ifName string
		want          error
	}{
		{n.pod.Path, "eth1", nil}, {n.pod.Path, "eth0", ErrLinkExists}, {file, "eth0", ErrNetns},
		{"/run/netns/none", "eth0", ErrNetns}, {n.host.Path, "eth0", ErrNetns},
	} {
		var err error
		on(t, n.host, func(h *Handle) error {
			var ns *Netns
			ns, err = h.OpenVacant(tt.netns, tt.ifName)
			ns.Close()
			return nil
		})
		if !errors.Is(err, tt.want) {
			t.Errorf("%s in %s: got %v, want %v", tt.ifName, tt.netns, err, tt.want)
		}
	}
	if _, err := n.attach(t, nil, n.spec(addr4)); !errors.Is(err, ErrLinkExists) {
		t.Errorf("attach over an interface: %v", err)
	}
}

func TestNetnsDisappears(t *testing.T) {
	n := newNode(t)
	gone := func(step string) error {
		if step == "set pod link up" {
			return errors.Join(unix.Unmount(n.pod.Path, unix.MNT_DETACH), os.Remove(n.pod.Path))
		}
		return nil
	}
	_, err := n.attach(t, gone, n.spec(addr4))
	if !errors.Is(err, ErrNetns) || !strings.Contains(err.Error(), "disappeared") {
		t.Errorf("got %v", err)
	}
	if err := n.detach(t); err != nil {
		t.Error(err)
	}
}

func setSysctl(t *testing.T, ns *nstest.NS, key, value string) {
	t.Helper()
	ns.Do(t, func() error { return os.WriteFile("/proc/sys/"+key, []byte(value), 0o600) })
}

func TestIPv6Disabled(t *testing.T) {
	t.Run("in the pod by default", func(t *testing.T) { // as Docker and CRI-O set sandboxes up
		n := newNode(t)
		setSysctl(t, n.pod, "net/ipv6/conf/default/disable_ipv6", "1")
		n.mustAttach(t, addr4, addr6)
		n.pod.Run(t, "ip", "-6", "addr", "show", "dev", "eth0", "to", addr6.String())
	})
	t.Run("on new links of the node", func(t *testing.T) { // as hardened hosts have it, whose own links have IPv6
		n := newNode(t)
		setSysctl(t, n.host, "net/ipv6/conf/default/disable_ipv6", "1")
		l := n.mustAttach(t, addr4, addr6)
		n.host.Run(t, "ip", "-6", "addr", "show", "dev", l.HostName, "to", Gateway6.String())
		n.host.Run(t, "ping", "-6", "-c", "1", "-W", "5", addr6.String())
	})
	t.Run("on the node", func(t *testing.T) {
		n := newNode(t)
		setSysctl(t, n.host, "net/ipv6/conf/all/disable_ipv6", "1")
		setSysctl(t, n.host, "net/ipv6/conf/default/disable_ipv6", "1")
		_, err := n.attach(t, nil, n.spec(addr4, addr6))
		if !errors.Is(err, ErrNoIPv6) || !strings.Contains(err.Error(), "on this node") {
			t.Errorf("dual stack: %v", err)
		}
		if err := n.detach(t); err != nil {
			t.Fatal(err)
		}
		n.mustAttach(t, addr4)
	})
}

// deviation is a change behind the plugin's back and the words that CHECK must find for it.
type deviation struct {
	inPod bool
	ip    string
	want  string
}

func TestCheck(t *testing.T) {
	deviations := []deviation{
		{false, "link del HOST", "host link is missing; pod interface eth0 is missing"},
		{true, "link set eth0 name eth7", "pod interface eth0 is missing"},
		{false, "link set HOST alias other", "host link HOST is not this pod's"},
		{false, "link set HOST down", "host link HOST is down"},
		{true, "link set eth0 down", "pod interface eth0 is down"},
		{true, "link set eth0 address 02:00:00:00:00:77", "pod interface eth0 has hardware address 02:00:00:00:00:77"},
		{false, "link set HOST address 02:00:00:00:00:77", "host link HOST has hardware address 02:00:00:00:00:77"},
		{true, "link set eth0 mtu 1500", "pod interface eth0 has MTU 1500, not 1400"},
		{false, "link set HOST mtu 1500", "host link HOST has MTU 1500, not 1400"},
		{true, "addr del 10.244.1.2/32 dev eth0", "pod address 10.244.1.2 is missing"},
		{true, "addr del fd00:244:1::2/128 dev eth0", "pod address fd00:244:1::2 is missing"},
		{true, "route del default", "pod route 0.0.0.0/0 via 169.254.1.1 is missing"},
		{true, "-6 route del default", "pod route ::/0 via fe80::1 is missing"},
		{true, "neigh del 169.254.1.1 dev eth0", "pod neighbour 169.254.1.1 is missing"},
		{true, "neigh replace fe80::1 lladdr 02:00:00:00:00:78 nud permanent dev eth0", "pod neighbour fe80::1 has hardware address 02:00:00:00:00:78"},
		{false, "route del 10.244.1.2", "host route to 10.244.1.2"},
		{false, "-6 route del fd00:244:1::2", "host route to fd00:244:1::2"},
		{false, "neigh del 10.244.1.2 dev HOST", "host neighbour 10.244.1.2 is missing"},
		{false, "neigh replace fd00:244:1::2 lladdr 02:00:00:00:00:79 nud permanent dev HOST", "host neighbour fd00:244:1::2 has hardware address 02:00:00:00:00:79"},
	}
	for _, d := range deviations {
		t.Run(strings.ReplaceAll(d.ip, "/", "_"), func(t *testing.T) {
			n := newNode(t)
			n.host.Run(t, "ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
			l := n.mustAttach(t, addr4, addr6)
			state := State{
				ContainerID: "c1", IfName: "eth0", Netns: n.pod.Path, HostListed: true, HostMAC: l.HostMAC.String(),
				PodMAC: l.PodMAC.String(), HostMTU: l.HostMTU, PodMTU: l.PodMTU, Addrs: []netip.Addr{addr4, addr6},
				Routes: n.spec(addr4, addr6).Routes,
			}
			check := func() (err error) {
				on(t, n.host, func(h *Handle) error { err = h.Check(state); return nil })
				return err
			}
			if err := check(); err != nil {
				t.Fatalf("right after Attach: %v", err)
			}
			ns := n.host
			if d.inPod {
				ns = n.pod
			}
			ns.Run(t, "ip", strings.Fields(strings.ReplaceAll(d.ip, "HOST", l.HostName))...)
			err := check()
			if err == nil {
				t.Fatal("not noticed")
			}
			got := strings.ReplaceAll(strings.ReplaceAll(err.Error(), "\n", "; "), l.HostName, "HOST")
			if !strings.Contains(got, d.want) {
				t.Errorf("got  %s\nwant %s", got, d.want)
			}
		})
	}
}

func TestSweep(t *testing.T) {
	host := nstest.New(t)
	var names []string
	for i, id := range []string{"keep", "stale", "other"} {
		pod := Pod{Network: "net", ContainerID: id, IfName: "eth0", MTU: 1400, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 2)})}}
		if id == "other" {
			pod.Network = "net2"
		}
		if _, err := attach(t, host, nstest.New(t).Path, nil, pod); err != nil {
			t.Fatal(err)
		}
		names = append(names, Name(id, "eth0"))
	}
	host.Run(t, "ip", "link", "add", "hcnotours", "type", "veth", "peer", "name", "y")
	on(t, host, func(h *Handle) error {
		left, err := h.Sweep("net", func(name string) bool { return name == names[0] })
		if len(left) > 0 {
			t.Errorf("left: %q", left)
		}
		if !h.HasPods() {
			t.Error("HasPods says no")
		}
		return err
	})
	out := host.Run(t, "ip", "-o", "link")
	for name, want := range map[string]bool{names[0]: true, names[1]: false, names[2]: true, "hcnotours": true} {
		if strings.Contains(out, name) != want {
			t.Errorf("%s there: %v, want %v", name, !want, want)
		}
	}
}

func TestGate(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		nstest.Skip(t, "nft is not installed (Debian package nftables)")
	}
	n := nstest.New(t)
	cidrs := []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:244:1::/64")}
	policy := false
	gate := func() (err error) {
		on(t, n, func(h *Handle) error { err = h.Gate(cidrs, policy); return nil })
		return err
	}
	// A node after a reboot: an uplink with default routes, nothing of ours.
	n.Run(t, "ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1")
	for _, cmd := range []string{
		"link set up0 up", "link set up1 up", "addr add 192.0.2.2/24 dev up0", "addr add 2001:db8::2/64 dev up0 nodad",
		"route add default via 192.0.2.1", "-6 route add default via 2001:db8::1",
	} {
		n.Run(t, "ip", strings.Fields(cmd)...)
	}
	want := func(step, words string) {
		t.Helper()
		err := gate()
		if words == "" && err != nil || words != "" && (!errors.Is(err, ErrNotProgrammed) || !strings.Contains(err.Error(), words)) {
			t.Errorf("%s: got %v, want %q", step, err, words)
		}
	}
	want("nothing", "10.244.1.0, which is free, would leave the node")
	n.Run(t, "ip", "rule", "add", "pref", "5189", "to", "10.244.1.0/24", "unreachable")
	want("v4 closed", "fd00:244:1::, which is free, would leave the node")
	n.Run(t, "ip", "-6", "rule", "add", "pref", "5189", "to", "fd00:244:1::/64", "unreachable")
	want("both closed", "nft table ip headcni")
	// A table comes before its rules.
	for _, table := range []string{"ip headcni", "ip6 headcni"} {
		n.Run(t, "nft", "add table "+table)
		want("a table without rules", "nft table "+table)
		n.Run(t, "nft", "add chain "+table+" guard")
		want("a chain without rules", "guard of nft table "+table+" has no rules")
		n.Run(t, "nft", "add rule "+table+" guard drop")
	}
	want("all", "")
	policy = true
	want("policy is on", "nft table inet headcni-policy")
	n.Run(t, "nft", "add table inet headcni-policy; add chain inet headcni-policy egress")
	want("policies are on their way", "nft table inet headcni-policy")
	n.Run(t, "nft", "add chain inet headcni-policy ingress; add rule inet headcni-policy ingress drop")
	want("all, and policy", "")
	for _, table := range []string{"inet headcni-policy", "ip6 headcni", "ip headcni"} { // in the order in which they are asked for, from behind
		n.Run(t, "nft", "flush table "+table) // which leaves chains and sets
		want("flushed", table+" has no rules")
	}
	n.Run(t, "nft", "add rule ip headcni guard drop; add rule ip6 headcni guard drop; add rule inet headcni-policy ingress drop")
	want("all again", "")
	n.Run(t, "ip", "rule", "del", "pref", "5189")
	n.Run(t, "ip", "route", "add", "unreachable", "10.244.1.0/24")
	want("an unreachable route", "")
	n.Run(t, "nft", "flush", "ruleset")
	want("flushed", "nft table")
}

func TestName(t *testing.T) {
	seen := map[string]bool{}
	for i := range 20000 {
		name := Name(fmt.Sprintf("%064x", i), "eth0")
		if len(name) != 12 || !names.IsPodLink(name) {
			t.Fatalf("%q", name)
		}
		if seen[name] {
			t.Fatalf("%q twice", name)
		}
		seen[name] = true
	}
	if Name("ab", "c") == Name("a", "bc") {
		t.Error("the border between ID and interface does not count")
	}
}

func TestAlias(t *testing.T) {
	long := strings.Repeat("x", 400)
	for _, tt := range []struct {
		alias, id string
		want      bool
	}{
		{aliasOf(Pod{Network: "n", ContainerID: "c1", IfName: "eth0", Label: "ns/p", UID: "u"}), "c1", true},
		{aliasOf(Pod{Network: "n", ContainerID: "c1", IfName: "eth0"}), "c1", true},
		{aliasOf(Pod{Network: "n", ContainerID: "c12", IfName: "eth0"}), "c1", false},
		{aliasOf(Pod{Network: "n", ContainerID: long, IfName: "eth0", Label: "ns/p"}), long, true},
		{aliasOf(Pod{Network: "n", ContainerID: "c1", IfName: "eth0", Label: long, UID: "u"}), "c1", true},
		{"", "c1", true}, {"something", "c1", false},
	} {
		if got := belongsTo(tt.alias, tt.id, "eth0"); got != tt.want || len(tt.alias) > aliasMax {
			t.Errorf("%.40q of %.20q: %v", tt.alias, tt.id, got)
		}
	}
}

func TestAddressInUse(t *testing.T) {
	n := newNode(t)
	n.mustAttach(t, addr4, addr6)
	for _, args := range []string{
		"-4 addr add 10.244.1.1/32 dev lo", "-4 route add default dev lo", "-6 route add default dev lo",
		"-4 route add unreachable 10.244.1.8", "-6 route add unreachable fd00:244:1::8", "-4 route add blackhole 10.244.1.9",
		"-4 rule add to 10.244.2.0/24 unreachable", "-6 rule add to fd00:244:2::/64 unreachable",
	} {
		n.host.Run(t, "ip", strings.Fields(args)...)
	}
	for text, want := range map[string]bool{
		"10.244.1.2": true, "fd00:244:1::2": true, "10.244.1.1": true, "10.244.1.3": false, "fd00:244:1::3": false, "10.9.9.9": false,
		"10.244.1.8": false, "fd00:244:1::8": false, "10.244.1.9": false, "10.244.2.2": false, "fd00:244:2::2": false,
	} {
		on(t, n.host, func(h *Handle) error {
			if got := h.InUse(netip.MustParseAddr(text)); got != want {
				t.Errorf("%s in use: %v, want %v", text, got, want)
			}
			return nil
		})
	}
}

// A host may forward and yet give new links a switch that says no: what a pod sends would go nowhere.
func TestLinkForwards(t *testing.T) {
	n := newNode(t)
	n.host.Run(t, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv4/conf/default/forwarding")
	n.mustAttach(t, addr4)
	if got := n.host.Run(t, "cat", "/proc/sys/net/ipv4/conf/"+hostEnd+"/forwarding"); strings.TrimSpace(got) != "1" {
		t.Errorf("the pod's link forwards: %s", got)
	}
}

// A pod that asks for the node's address in the name of hundreds makes the node learn none of them, and answers where the node has to
// ask for it.
func TestPodFillsNoNeighbours(t *testing.T) {
	n := newNode(t)
	l := n.mustAttach(t, addr4)
	n.host.Run(t, "ip", "address", "add", "192.0.2.1/24", "dev", "lo")
	link, err := n.pod.Handle.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	flood := func() int {
		var frames [][]byte
		for i := range 100 {
			from := netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)})
			frames = append(frames, nstest.ARPRequest([6]byte(l.PodMAC), from, netip.MustParseAddr("192.0.2.1")))
		}
		n.pod.Do(t, func() error { return nstest.SendFrames(link.Attrs().Index, frames...) })
		return strings.Count(n.host.Run(t, "ip", "neigh", "show", "dev", l.HostName), "\n")
	}
	if got := flood(); got != 1 {
		t.Errorf("the node knows %d neighbours by the pod's link, want the pod alone", got)
	}
	n.host.Run(t, "ip", "neigh", "delete", addr4.String(), "dev", l.HostName)
	n.host.Run(t, "ping", "-c", "1", "-W", "5", "-I", "192.0.2.1", addr4.String())
	setSysctl(t, n.host, "net/ipv4/conf/"+l.HostName+"/arp_ignore", "0")
	if got := flood(); got < 50 {
		t.Errorf("%d neighbours without the sysctl: this test cannot fail", got)
	}
}

// A pod's own end is in a network of its own alone: without any right it could ask there for as many neighbours as it likes, and the
// kernel's table of them is one for all namespaces.
func TestPodHasNoNeighboursToAskFor(t *testing.T) {
	n := newNode(t)
	n.mustAttach(t, addr4, addr6)
	flood := func() int {
		n.pod.Do(t, func() error {
			for i := range 60 {
				c, err := net.Dial("udp6", fmt.Sprintf("[fe80::9:%x%%eth0]:9", i+1))
				if err != nil {
					continue // there is no way: as good
				}
				_, _ = c.Write([]byte("x"))
				c.Close()
			}
			return nil
		})
		return strings.Count(n.pod.Run(t, "ip", "-6", "neigh", "show", "dev", "eth0"), "fe80::9:")
	}
	if got := flood(); got != 0 {
		t.Errorf("the pod has asked for %d neighbours", got)
	}
	n.host.Run(t, "ip", "address", "add", "2001:db8::1/128", "dev", "lo", "nodad")
	n.host.Run(t, "ping", "-6", "-c", "4", "-i", "0.2", "-W", "2", "-I", "2001:db8::1", addr6.String())
	n.pod.Run(t, "ip", "route", "add", "fe80::/64", "dev", "eth0")
	if got := flood(); got < 30 {
		t.Errorf("%d neighbours with a network to ask in: this test cannot fail", got)
	}
}

// TestGroup: a new link is in group 0 and says whose it is; its group is set while it is up, by its index, and one that has gone
// disturbs nobody.
func TestGroup(t *testing.T) {
	n := newNode(t)
	pod := n.spec(addr4, addr6)
	pod.UID = "4be5a08a-17ba-4ab0-ac38-5ae8d42ed1a3"
	made, err := n.attach(t, nil, pod)
	if err != nil {
		t.Fatal(err)
	}
	other := pod
	other.ContainerID, other.Label, other.Addrs = "c2", strings.Repeat("n", 63)+"/"+strings.Repeat("p", 253), []netip.Addr{netip.MustParseAddr("10.244.1.3")}
	second := nstest.New(t)
	if _, err := attach(t, n.host, second.Path, nil, other); err != nil {
		t.Fatal(err)
	}
	look := func() (l map[string]Attachment) {
		t.Helper()
		on(t, n.host, func(h *Handle) (err error) {
			l, err = h.Attached()
			return err
		})
		return l
	}
	got := look()[hostEnd]
	want := Attachment{
		Leased: Leased{Network: "net", ContainerID: "c1", IfName: "eth0", Addrs: []netip.Addr{addr4, addr6}, Made: got.Made},
		Name:   hostEnd, Index: got.Index, Label: "ns/web", UID: pod.UID, Ready: true,
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	if long := look()[Name("c2", "eth0")]; !long.Cut || long.UID != "" || !strings.HasPrefix(other.Label, long.Label) || long.Label == "" {
		t.Errorf("of an alias that is too long: %+v", long)
	}
	const gone = 1 << 20
	on(t, n.host, func(h *Handle) error { return h.SetGroup(names.PolicyLinkGroup, gone, got.Index, gone+1) })
	for name, l := range look() {
		if set := l.Group == names.PolicyLinkGroup; set != (name == hostEnd) {
			t.Errorf("%s is in group %d", name, l.Group)
		}
	}
	if out := n.host.Run(t, "ip", "link", "show", made.HostName); !strings.Contains(out, "group 4278") || !strings.Contains(out, "state UP") {
		t.Error(out)
	}
	n.pod.Run(t, "ip", "link", "set", "eth0", "down")
	end := time.Now().Add(5 * time.Second) // the kernel tells the host's end in a work queue
	for look()[hostEnd].Ready {
		if time.Now().After(end) {
			t.Fatal("ready with the pod's end down")
		}
		time.Sleep(10 * time.Millisecond)
	}
}
