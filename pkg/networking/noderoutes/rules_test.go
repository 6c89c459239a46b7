package noderoutes

import (
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/headcni/headcni/internal/nstest"
)

// fibWorld is a node with a LAN behind eth0, a pod behind hca, and a veth that plays the tun. $own, $cluster, ... are
// replaced by the family's addresses.
const fibWorld = `for l in eth0 hca headcni01; do ip link add $l type veth peer name p$l; ip link set $l up; ip link set p$l up; done
ip addr add $lan1/$lanbits dev eth0 $nodad
ip route add default via $lan2 dev eth0
ip route add $pod dev hca
ip addr add $self dev headcni01 $nodad
ip rule add pref 5210 fwmark 0x80000/0xff0000 lookup main
ip rule add pref 5230 fwmark 0x80000/0xff0000 lookup default
ip rule add pref 5250 fwmark 0x80000/0xff0000 unreachable
ip rule add pref 5270 lookup 52
for r in $remotenet $foreign $lannet $ownhalf $tailnet $services; do ip route add $r dev headcni01 table 52; done`

var fibAddrs = map[string]*strings.Replacer{
	"-4": strings.NewReplacer("$frompod", "from 10.244.1.10 iif hca", "$lan1", "192.168.88.1", "$lan2", "192.168.88.254", "$lan3", "192.168.88.7", "$lanbits", "24",
		"$lannet", "192.168.88.0/24", "$pod", "10.244.1.10", "$hole", "10.244.1.99", "$remotenet", "10.244.2.0/24",
		"$remote", "10.244.2.20", "$foreign", "198.51.100.0/24", "$outside", "198.51.100.7", "$ownhalf", "10.244.1.0/25", "$services", "10.96.0.0/12", "$service", "10.96.0.1",
		"$resolver", "100.100.100.100", "$around", "100.100.0.0/16", "$tailnet", "100.64.0.9", "$self", "100.64.0.2", "$wide", "10.0.0.0/8", "$cgn", "100.64.0.0/10", "$cloudnet", "100.100.2.0/24", "$cloud", "100.100.2.136", "$nodad", "", "ip ", "ip -4 "),
	"-6": strings.NewReplacer("$frompod", "from fd00:244:1::10 iif hca", "$lan1", "fd88::1", "$lan2", "fd88::254", "$lan3", "fd88::7", "$lanbits", "64",
		"$lannet", "fd88::/64", "$pod", "fd00:244:1::10", "$hole", "fd00:244:1::99", "$remotenet", "fd00:244:2::/64",
		"$remote", "fd00:244:2::20", "$foreign", "2001:db8:7::/48", "$outside", "2001:db8:7::7", "$ownhalf", "fd00:244:1::/65", "$services", "fd00:96::/108", "$service", "fd00:96::1",
		"$resolver", "fd7a:115c:a1e0::53", "$around", "fd7a:115c:a1e0::/64", "$tailnet", "fd7a:115c:a1e0::9", "$self", "fd7a:115c:a1e0::2", "$wide", "fd00::/16", "$cgn", "fd00::/8", "$cloudnet", "fd7a:115c:a1e0:2::/64", "$cloud", "fd7a:115c:a1e0:2::136", "$nodad", "nodad", "ip ", "ip -6 "),
}

// Where does a packet go? The kernel is asked, with our rules beside tailscaled's, in each of these calamities.
func TestRulesDecide(t *testing.T) {
	const unreachable, blackhole = "unreachable", "blackhole"
	for flag, addrs := range fibAddrs {
		fromTun := unreachable
		if flag == "-4" {
			fromTun = blackhole
		}
		for _, c := range []struct {
			name, calamity string
			lanFirst       bool
			want           map[string]string // destination (and mark) -> link
		}{
			{"all well, though a peer advertises our CIDR, our LAN and the services", "true", false, map[string]string{
				"$service": "eth0", "$service $frompod": "eth0",
				"$pod": "hca", "$hole": unreachable, "$remote": "headcni01", "$lan3": "eth0", "$tailnet": "headcni01",
				"$outside": "headcni01", "$lan2 mark 0x80000": "eth0"}},
			{"the user wants no foreign routes", "true", true, map[string]string{
				"$outside": "eth0", "$remote": "headcni01", "$tailnet": "headcni01"}},
			{"the tunnel is dead", "ip route flush table 52", true, map[string]string{
				"$pod": "hca", "$hole": unreachable, "$remote": unreachable, "$remote mark 0x80000": unreachable,
				"$hole mark 0x80000": unreachable, "$outside": "eth0", "$lan3": "eth0"}},
			{"the tun is gone", "ip link del headcni01", false, map[string]string{"$remote": unreachable, "$pod": "hca"}},
			{"the tunnel is dead and a wider route is there", "ip route flush table 52; ip route add $wide via $lan2", true, map[string]string{
				"$remote": unreachable, "$hole": unreachable, "$pod": "hca"}},
			{"a wider route over the tailnet's addresses", "ip route add $cgn via $lan2", true, map[string]string{
				"$tailnet": "headcni01", "$remote": "headcni01"}},
			{"what pods send to the tailnet", "true", true, map[string]string{
				"$tailnet $frompod": "headcni01", "$cloud $frompod": unreachable}},
			{"the same, and the tunnel is dead", "ip route flush table 52; ip route add $cgn via $lan2", true, map[string]string{
				"$tailnet $frompod": unreachable, "$cloud $frompod": unreachable, "$outside $frompod": "eth0"}},
			{"the node's own answers into the tailnet, and the tunnel is dead", "ip route flush table 52; ip route add $cgn via $lan2", true, map[string]string{
				"$tailnet from $self": unreachable}},
			{"somebody took the node's own address from the tun", "ip addr del $self dev headcni01; ip route add $cgn via $lan2", true, map[string]string{
				"$self from $tailnet iif headcni01": fromTun, "$pod from $tailnet iif headcni01": "hca", "$lan3 from $tailnet iif headcni01": "eth0"}},
			{"the same, and the tun was made anew", "ip link del headcni01; ip link add headcni01 type veth peer name again; ip link set headcni01 up", true, map[string]string{
				"$self from $tailnet iif headcni01": fromTun}},
			{"tailscaled's resolver", "ip route add $resolver dev headcni01 table 52", true, map[string]string{
				"$resolver": "headcni01", "$resolver $frompod": "headcni01"}},
			{"the same, and the tunnel is dead, and the host has a network around it", "ip route flush table 52; ip route add $around via $lan2", true, map[string]string{
				"$resolver": unreachable, "$resolver $frompod": unreachable, "$resolver mark 0x80000": unreachable}},
			{"our rules are gone and the tunnel is dead", "for p in 5186 5187 5188 5189 5190 5191 5192 5193 5194 5195 5196 5197; do while ip rule del pref $p 2>/dev/null; do :; done; done; " +
				"ip route flush table 52", true, map[string]string{"$pod": "hca", "$remote": unreachable, "$hole": unreachable}},
		} {
			t.Run(flag+" "+c.name, func(t *testing.T) {
				ns := nstest.New(t)
				ns.Run(t, "sh", "-ec", addrs.Replace(fibWorld))
				cfg := Config{Own: prefixes("10.244.1.0/24", "fd00:244:1::/64"),
					Cluster: prefixes("10.244.0.0/16", "fd00:244::/32"), Services: prefixes("10.96.0.0/12", "fd00:96::/108"), TunName: "headcni01", LANFirst: c.lanFirst}
				mustSync(t, ns, New(Saved{}, nil), cfg)
				ns.Run(t, "sh", "-ec", addrs.Replace(c.calamity))
				for dst, want := range c.want {
					args := strings.Fields("route get " + addrs.Replace(dst))
					out, err := ns.Command("ip", args...).CombinedOutput()
					got := string(out)
					if err != nil && (strings.Contains(got, "unreachable") || strings.Contains(got, "No route to host")) {
						got = "dev unreachable "
					}
					if err != nil && strings.Contains(got, "Invalid argument") { // the kernel's word for a blackhole
						got = "dev blackhole "
					}
					if !strings.Contains(got, "dev "+want+" ") {
						t.Errorf("%s: %s; want %s", addrs.Replace(dst), strings.TrimSpace(string(out)), want)
					}
				}
			})
		}
	}
}

// On hosts with VRFs ifupdown2 moves the rule for the node's own addresses behind all others (32765). What is for the node stays there, and a
// host that moves it back, or has it before ours in another place, gets no rule that it does not need.
func TestLocalRuleMoved(t *testing.T) {
	for flag, addrs := range fibAddrs {
		t.Run(flag, func(t *testing.T) {
			ns := nstest.New(t)
			run := func(script string) string { return ns.Run(t, "sh", "-ec", addrs.Replace(script)) }
			run(fibWorld)
			cfg := typical()
			cfg.LANFirst = true
			n := New(Saved{}, nil)
			mustSync(t, ns, n, cfg)
			loopback := map[string]string{"-4": "127.0.0.1", "-6": "::1"}[flag]
			toItself := func() {
				t.Helper()
				for _, dst := range []string{loopback, "$lan1", "$self", loopback + " mark 0x80000", "$lan1 from $lan3 iif eth0", "$self from $tailnet iif headcni01"} {
					if got := run("ip route get " + dst); !strings.Contains(got, "table local") && !strings.HasPrefix(got, "local ") {
						t.Errorf("%s: %s; want the node itself", addrs.Replace(dst), strings.TrimSpace(got))
					}
				}
			}
			toItself()
			for _, c := range []struct {
				change string
				needed bool
			}{
				{"ip rule add pref 32765 table local; ip rule del pref 0 table local", true},
				{"ip rule add pref 100 lookup local", false}, // as Cilium has it
				{"ip rule del pref 100; ip rule add pref 100 iif lo lookup local", true},
				{"ip rule del pref 100; ip rule add pref 5190 lookup local", true}, // which is our number
				{"ip rule add pref 0 table local", false},
			} {
				var events <-chan struct{}
				ns.Do(t, func() (err error) { events, err = n.Changes(t.Context()); return err })
				run(c.change)
				select {
				case <-events:
				case <-time.After(5 * time.Second):
					t.Errorf("%s: no event", c.change)
				}
				mustSync(t, ns, n, cfg)
				toItself()
				if got := run("ip rule show pref 5185"); (got != "") != c.needed {
					t.Errorf("%s: rule %q, want one: %v", c.change, got, c.needed)
				}
				if again := mustSync(t, ns, n, cfg); len(again) != 0 {
					t.Errorf("%s: not steady: %q", c.change, again)
				}
			}
			remove := func() { ns.Do(t, func() error { return n.Remove(t.Context()) }) }
			run("ip rule del pref 0") // the one at 32765 is there
			mustSync(t, ns, n, cfg)
			remove()
			if got := run("ip rule show pref 5185"); got != "" {
				t.Errorf("it stays: %s", got)
			}
			run("ip rule add pref 5190 lookup local; ip rule del pref 32765 table local")
			mustSync(t, ns, n, cfg)
			remove()
			toItself() // nobody else leads there
		})
	}
}

// Rules without a number of their own get the one before our first, which is prefLocal. They are others', and stay.
func TestRulesWithoutNumber(t *testing.T) {
	ns := nstest.New(t)
	cfg := typical()
	n := New(Saved{}, nil)
	mustSync(t, ns, n, cfg)
	for _, flag := range []string{"-4", "-6"} {
		ns.Run(t, "ip", flag, "rule", "add", "not", "fwmark", "51820", "table", "51820") // as wg-quick does it
		before := ns.Run(t, "ip", flag, "rule", "show", "pref", "5185")
		if !strings.Contains(before, "51820") {
			t.Fatalf("the kernel gave it another number: %s", ns.Run(t, "ip", flag, "rule"))
		}
		if steps := mustSync(t, ns, n, cfg); len(steps) > 0 {
			t.Errorf("beside it: %q", steps)
		}
		ns.Run(t, "sh", "-ec", "ip "+flag+" rule add pref 32765 table local; ip "+flag+" rule del pref 0 table local")
		mustSync(t, ns, n, cfg)
		if got := ns.Run(t, "ip", flag, "rule", "show", "pref", "5185"); !strings.Contains(got, "51820") || !strings.Contains(got, "lookup local") {
			t.Errorf("where ours is needed too: %s", got)
		}
		if steps := mustSync(t, ns, n, cfg); len(steps) > 0 {
			t.Errorf("not steady: %q", steps)
		}
		ns.Run(t, "sh", "-ec", "ip "+flag+" rule add pref 0 table local; ip "+flag+" rule del pref 32765 table local")
		mustSync(t, ns, n, cfg)
		if got := ns.Run(t, "ip", flag, "rule", "show", "pref", "5185"); got != before {
			t.Errorf("where it is not needed any more: %s", got)
		}
	}
	ns.Do(t, func() error { return n.Remove(t.Context()) })
	for _, flag := range []string{"-4", "-6"} {
		if got := ns.Run(t, "ip", flag, "rule", "show", "pref", "5185"); !strings.Contains(got, "51820") {
			t.Errorf("after Remove: %q", got)
		}
	}
}

// 100.64.0.0/10 is not the tailnet's alone, and fd7a:115c:a1e0::/48 is: hosts reach what their cloud has in the former, pods what the
// host has a route of its own to.
func TestRulesShareTheTailnetsRange(t *testing.T) {
	ns := nstest.New(t)
	for _, c := range []struct{ flag, host, hostOwn, pod string }{
		{flag: "-4", host: "dev eth0 ", hostOwn: "dev eth0 ", pod: "dev eth0 "},
		{flag: "-6", host: "unreachable", hostOwn: "unreachable", pod: "unreachable"},
	} {
		addrs := fibAddrs[c.flag]
		world := fibWorld
		if c.flag == "-6" {
			_, world, _ = strings.Cut(fibWorld, "\n") // the links are there
		}
		ns.Run(t, "sh", "-ec", addrs.Replace(world))
		mustSync(t, ns, New(Saved{}, nil), Config{Own: prefixes("10.244.1.0/24", "fd00:244:1::/64"),
			Cluster: prefixes("10.244.0.0/16", "fd00:244::/32"), TunName: "headcni01", LANFirst: true})
		get := func(dst, want string) {
			t.Helper()
			out, _ := ns.Command("ip", strings.Fields("route get "+addrs.Replace(dst))...).CombinedOutput()
			if got := string(out); !strings.Contains(strings.ReplaceAll(got, "No route to host", "unreachable"), want) {
				t.Errorf("%s: %s; want %s", addrs.Replace(dst), strings.TrimSpace(got), want)
			}
		}
		get("$cloud", c.host)
		get("$cloud $frompod", "unreachable")
		ns.Run(t, "sh", "-ec", addrs.Replace("ip route add $cloudnet via $lan2"))
		get("$cloud", c.hostOwn)
		get("$cloud $frompod", c.pod)
	}
	ns.Run(t, "ip", "route", "add", "100.64.0.0/10", "via", "192.168.88.254")
	ns.Run(t, "ip", "route", "add", "unreachable", "100.65.0.0/16")
	var shared []netip.Prefix
	ns.Do(t, func() error {
		networks, err := HostNetworks()
		shared = SharedWithTailnet(networks)
		return err
	})
	if want := prefixes("100.100.2.0/24"); !slices.Equal(shared, want) {
		t.Errorf("shared with the tailnet: %v, want %v", shared, want)
	}
}

// Whatever is left of our rules when others have deleted some of them, one by one in any order: with nothing else of ours but the routes
// of last resort, what is for a device of the tailnet or for another node's pod takes the tunnel or goes nowhere while tailscaled's own
// rules and routes stand.
func TestAnyRulesLeft(t *testing.T) {
	for flag, addrs := range fibAddrs {
		for _, lanFirst := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, lanFirst %t", flag, lanFirst), func(t *testing.T) {
				ns := nstest.New(t)
				ns.Run(t, "sh", "-ec", addrs.Replace(fibWorld+"\nip route add $cgn via $lan2 dev eth0"))
				mustSync(t, ns, New(Saved{}, nil), Config{Own: prefixes("10.244.1.0/24", "fd00:244:1::/64"),
					Cluster: prefixes("10.244.0.0/16", "fd00:244::/32"), TunName: "headcni01", LANFirst: lanFirst})
				ns.Do(t, func() error { return anyRulesLeft(t, flag, addrs) })
			})
		}
	}
}

// anyRulesLeft goes through all sets of our rules, each of which differs from the one before by one rule (Gray's code).
func anyRulesLeft(t *testing.T, flag string, addrs *strings.Replacer) error {
	f := families[0]
	if flag == "-6" {
		f = families[1]
	}
	all, raws, _, _, err := listRules(f)
	if err != nil {
		return err
	}
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	pod := &netlink.RouteGetOptions{Iif: "hca", SrcAddr: net.ParseIP(addrs.Replace("$pod"))}
	tunnel := &netlink.RouteGetOptions{Iif: "headcni01", SrcAddr: net.ParseIP(addrs.Replace("$tailnet"))}
	gone := make([]bool, len(all))
	for i := 1; i <= 1<<len(all); i++ {
		for to, from := range map[string][]*netlink.RouteGetOptions{"$tailnet": {nil, pod, tunnel}, "$remote": {nil, pod, tunnel}} {
			for _, o := range from {
				routes, err := netlink.RouteGetWithOptions(net.ParseIP(addrs.Replace(to)), o)
				if err == nil && len(routes) == 1 && routes[0].LinkIndex == eth0.Attrs().Index {
					t.Errorf("%s (%+v) leaves by eth0; left are %v", addrs.Replace(to), o, left(all, gone))
				}
			}
		}
		at := bits.TrailingZeros(uint(i))
		if at == len(all) {
			return nil
		}
		if gone[at] = !gone[at]; gone[at] {
			err = deleteRule(raws[at])
		} else {
			err = addRule(all[at])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func left(all []rule, gone []bool) (out []rule) {
	for i, r := range all {
		if !gone[i] {
			out = append(out, r)
		}
	}
	return out
}

// Pods reach a subnet of the tailnet by the tunnel or not at all; the host goes its own way, and its own networks inside stay where they are.
func TestRulesOfSubnets(t *testing.T) {
	const unreachable = "unreachable"
	for flag, more := range map[string]*strings.Replacer{
		"-4": strings.NewReplacer("$part", "198.51.100.128/25", "$inpart", "198.51.100.200", "$around", "198.51.0.0/16"),
		"-6": strings.NewReplacer("$part", "2001:db8:7:8::/64", "$inpart", "2001:db8:7:8::9", "$around", "2001:db8::/32"),
	} {
		fill := func(text string) string { return fibAddrs[flag].Replace(more.Replace(text)) }
		for _, c := range []struct {
			name, calamity string
			want           map[string]string
		}{
			{"all well", "true", map[string]string{"$outside $frompod": "headcni01", "$outside": "eth0", "$inpart $frompod": "eth0", "$inpart": "eth0",
				"$remote $frompod": "headcni01", "$lan3 $frompod": "eth0"}},
			{"the tunnel is dead", "ip route flush table 52", map[string]string{"$outside $frompod": unreachable, "$outside": "eth0", "$inpart $frompod": "eth0"}},
			{"the tun is gone", "ip link del headcni01", map[string]string{"$outside $frompod": unreachable}},
			{"the tunnel is dead and a wider route is there", "ip route flush table 52; ip route add $around via $lan2 dev eth0",
				map[string]string{"$outside $frompod": unreachable, "$outside": "eth0"}},
			{"the host's own network is away", "ip route del $part", map[string]string{"$inpart $frompod": "headcni01"}},
			{"both", "ip route del $part; ip route flush table 52", map[string]string{"$inpart $frompod": unreachable}},
		} {
			t.Run(flag+" "+c.name, func(t *testing.T) {
				ns := nstest.New(t)
				ns.Run(t, "sh", "-ec", fill(fibWorld+"\nip route add $part via $lan2 dev eth0"))
				cfg := Config{Own: prefixes("10.244.1.0/24", "fd00:244:1::/64"), Cluster: prefixes("10.244.0.0/16", "fd00:244::/32"), TunName: "headcni01",
					LANFirst: true, Subnets: prefixes("198.51.100.0/24", "2001:db8:7::/48"), Beside: prefixes("198.51.100.128/25", "2001:db8:7:8::/64")}
				routes := New(Saved{}, nil)
				mustSync(t, ns, routes, cfg)
				ns.Run(t, "sh", "-ec", fill(c.calamity))
				for dst, want := range c.want {
					out, err := ns.Command("ip", strings.Fields("route get "+fill(dst))...).CombinedOutput()
					got := string(out)
					if err != nil && (strings.Contains(got, "unreachable") || strings.Contains(got, "No route to host")) {
						got = "dev unreachable "
					}
					if !strings.Contains(got, "dev "+want+" ") {
						t.Errorf("%s: %s; want %s", fill(dst), strings.TrimSpace(string(out)), want)
					}
				}
				cfg.Subnets, cfg.Beside = nil, nil
				mustSync(t, ns, routes, cfg)
				if left := ns.Run(t, "ip", flag, "rule"); strings.Contains(left, "198.51.100") || strings.Contains(left, "2001:db8:7") {
					t.Errorf("what nobody names any more is left: %s", left)
				}
			})
		}
	}
}
