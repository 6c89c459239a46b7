package noderoutes

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/golden"
)

// complete is the state of a node that has all that cfg asks for.
func complete(cfg Config) state {
	s := state{families: families, sysctls: map[string]string{}}
	for _, f := range families {
		s.rules = append(s.rules, wantedRules(f, cfg, nil)...)
		s.routes = append(s.routes, wantedRoutes(f, cfg)...)
		s.sysctls[f.forwarding] = "1"
	}
	return s
}

func planText(have state, cfg Config) string {
	var b strings.Builder
	for _, s := range plan(have, cfg) {
		fmt.Fprintln(&b, s)
	}
	return b.String()
}

func TestPlanGolden(t *testing.T) {
	fresh := state{families: families, links: []link{{name: "eth0", acceptRA: "1", raDefault: true}}}
	golden.Check(t, "testdata/plan-fresh.golden", planText(fresh, typical()))
	golden.Check(t, "testdata/plan-change.golden", planText(complete(typical()), Config{
		Own: prefixes("10.244.7.0/24"), Cluster: prefixes("10.244.0.0/16"), TunName: "headcni01"}))
}

func TestPlan(t *testing.T) {
	cfg := Config{Own: prefixes("10.244.1.0/24"), Cluster: prefixes("10.244.0.0/16"), TunName: "headcni01"}
	const first = "rule 5186: to 100.64.0.0/10 fwmark 0x0/0x80000 lookup 52"
	const second = "rule 5188: to 10.244.1.0/24 fwmark 0x0/0x80000 lookup main suppress_prefixlength 24"
	for name, c := range map[string]struct {
		change func(*state)
		want   string
	}{
		"steady":       {func(*state) {}, ""},
		"rule missing": {func(s *state) { s.rules = s.rules[1:] }, "add " + first + "\n"},
		"rule twice":   {func(s *state) { s.rules = append(s.rules, s.rules[0]) }, "delete " + first + "\n"},
		"rule without suppress": {func(s *state) { s.rules[2].suppress = noSuppress },
			"add " + second + "\ndelete rule 5188: to 10.244.1.0/24 fwmark 0x0/0x80000 lookup main\n"},
		"rule of another origin": {func(s *state) { s.rules[0].proto = unix.RTPROT_STATIC },
			"add " + first + "\ndelete " + first + " protocol 4\n"},
		"rule with more": {func(s *state) { s.rules[0].extra = " attribute 22=06" },
			"add " + first + "\ndelete " + first + " attribute 22=06\n"},
		"route missing": {func(s *state) { s.routes = nil }, "add route unreachable 10.244.0.0/16 metric 4278\n"},
		"route of another kind is replaced": {func(s *state) { s.routes[0].kind = unix.RTN_UNICAST },
			"add route unreachable 10.244.0.0/16 metric 4278\n"},
		"route too many": {func(s *state) {
			s.routes = append(s.routes, route{to: netip.MustParsePrefix("10.9.0.0/16"), kind: unix.RTN_UNREACHABLE})
		}, "delete route unreachable 10.9.0.0/16 metric 4278\n"},
		"no IPv6": {func(s *state) {
			s.families = families[:1]
			s.sysctls["net/ipv6/conf/all/forwarding"] = "0"
		}, ""},
		"forwarding": {func(s *state) {
			s.sysctls["net/ipv4/ip_forward"] = "0"
			s.sysctls["net/ipv6/conf/all/forwarding"] = "0"
		}, "set net.ipv4.ip_forward=1\nset net.ipv6.conf.all.forwarding=1\n"},
	} {
		have := complete(cfg)
		c.change(&have)
		if d := cmp.Diff(c.want, planText(have, cfg)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

func TestPlanRA(t *testing.T) {
	for _, c := range []struct {
		what string
		link link
		want bool
	}{
		{"gave a default route", link{name: "br0", acceptRA: "1", raDefault: true}, true},
		{"gave one, and forwards already", link{name: "br0", acceptRA: "1", raDefault: true, forwards: true}, true},
		{"a card that still waits", link{name: "eth0", acceptRA: "1", uplink: true}, true},
		{"a card that forwarded before us", link{name: "eth0", acceptRA: "1", uplink: true, forwards: true}, false},
		{"a container engine's bridge", link{name: "docker0", acceptRA: "1"}, false},
		{"networkd does it itself", link{name: "eth0", acceptRA: "0", uplink: true, raDefault: true}, false},
		{"done", link{name: "eth0", acceptRA: "2", uplink: true, raDefault: true}, false},
		{"a pod's link", link{name: "hc0123456789", acceptRA: "1", raDefault: true}, false},
		{"the tun", link{name: "headcni01", acceptRA: "1", raDefault: true, uplink: true}, false},
		{"loopback", link{name: "lo", acceptRA: "1", uplink: true}, false},
	} {
		if got := len(planRA([]link{c.link}, "headcni01")) == 1; got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
}

// What is encoded is what is read back, also for what the kernel leaves out.
func TestRuleCodec(t *testing.T) {
	for _, f := range families {
		for _, want := range wantedRules(f, typical(), nil) {
			msg := encodeRule(want).Serialize()[unix.NLMSG_HDRLEN:]
			got, err := decodeRule(msg)
			if err != nil || got != want {
				t.Errorf("%s: got %v, %v", want, got, err)
			}
		}
	}
	for _, bad := range [][]byte{nil, make([]byte, ruleMsgLen-1), append(make([]byte, ruleMsgLen), 200, 0, 1, 0)} {
		if r, err := decodeRule(bad); err == nil {
			t.Errorf("%x: read as %v", bad, r)
		}
	}
}

func TestRelevant(t *testing.T) {
	local := encodeRule(rule{af: unix.AF_INET, action: nl.FR_ACT_TO_TBL, table: unix.RT_TABLE_LOCAL, suppress: noSuppress}).Serialize()[unix.NLMSG_HDRLEN:]
	rule := func(pref uint32) []byte {
		return encodeRule(rule{af: unix.AF_INET, pref: pref, suppress: noSuppress}).Serialize()[unix.NLMSG_HDRLEN:]
	}
	route := func(bits byte, flags, metric uint32) []byte {
		b := make([]byte, unix.SizeofRtMsg)
		b[1] = bits
		binary.NativeEndian.PutUint32(b[8:], flags)
		return append(b, nl.NewRtAttr(unix.RTA_PRIORITY, binary.NativeEndian.AppendUint32(nil, metric)).Serialize()...)
	}
	conf := func(index int32) []byte {
		return append(make([]byte, netconfLen), nl.NewRtAttr(netconfIfindex, binary.NativeEndian.AppendUint32(nil, uint32(index))).Serialize()...)
	}
	for _, c := range []struct {
		what string
		typ  uint16
		msg  []byte
		want bool
	}{
		{"our rule", unix.RTM_DELRULE, rule(5192), true},
		{"another's rule before ours", unix.RTM_NEWRULE, rule(105), true},
		{"tailscaled's rule", unix.RTM_NEWRULE, rule(5210), false},
		{"the rule for the node's own addresses", unix.RTM_DELRULE, local, true},
		{"our route", unix.RTM_DELROUTE, route(16, 0, unreachableMetric), true},
		{"a default route", unix.RTM_NEWROUTE, route(0, 0, 100), true},
		{"a cached route", unix.RTM_NEWROUTE, route(0, 0x200, 100), false},
		{"a pod's route", unix.RTM_NEWROUTE, route(32, 0, 0), false},
		{"the switch", unix.RTM_NEWNETCONF, conf(netconfAll), true},
		{"a link's switch", unix.RTM_NEWNETCONF, conf(7), false},
		{"a neighbour", unix.RTM_NEWNEIGH, nil, false},
		{"cut short", unix.RTM_NEWROUTE, nil, true},
	} {
		if got := relevant(c.typ, c.msg); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
}

func TestSourceOf(t *testing.T) {
	addr := netip.MustParseAddr
	a := func(link int, p string, second bool) hostAddr {
		return hostAddr{link: link, prefix: netip.MustParsePrefix(p), notPreferred: second}
	}
	for name, c := range map[string]struct {
		hops  []hop
		addrs []hostAddr
		want  string
	}{
		"no route":             {nil, []hostAddr{a(1, "192.0.2.1/24", false)}, ""},
		"no address":           {[]hop{{link: 1}}, nil, ""},
		"route's own":          {[]hop{{1, addr("192.0.2.254"), addr("198.51.100.1")}}, []hostAddr{a(1, "192.0.2.1/24", false)}, "198.51.100.1"},
		"gateway's network":    {[]hop{{link: 1, gateway: addr("192.0.2.254")}}, []hostAddr{a(1, "198.51.100.1/24", false), a(1, "192.0.2.1/24", false)}, "192.0.2.1"},
		"primary first":        {[]hop{{link: 1}}, []hostAddr{a(1, "192.0.2.9/24", true), a(1, "192.0.2.1/24", false)}, "192.0.2.1"},
		"other links' are not": {[]hop{{link: 2}}, []hostAddr{a(1, "172.17.0.1/16", false), a(2, "192.0.2.1/24", false)}, "192.0.2.1"},
		"best metric":          {[]hop{{link: 2}, {link: 1}}, []hostAddr{a(1, "172.17.0.1/16", false), a(2, "192.0.2.1/24", false)}, "192.0.2.1"},
		"unnumbered link":      {[]hop{{link: 3}}, []hostAddr{a(2, "100.64.0.1/32", false), a(1, "192.0.2.1/32", false)}, "192.0.2.1"},
		"only the tailnet's":   {[]hop{{link: 3}}, []hostAddr{a(2, "100.64.0.1/32", false)}, ""},
		"a host inside CGNAT":  {[]hop{{link: 2}}, []hostAddr{a(2, "100.64.0.1/24", false)}, "100.64.0.1"},
	} {
		got, ok := sourceOf(c.hops, c.addrs)
		if ok != (c.want != "") || ok && got.String() != c.want {
			t.Errorf("%s: %v, %v; want %q", name, got, ok, c.want)
		}
	}
	hops := defaultHops([]defaultRoute{
		{kind: unix.RTN_UNREACHABLE, metric: 1, hops: []hop{{}}},
		{kind: unix.RTN_UNICAST, metric: 10, hops: []hop{{link: 3, source: addr("192.0.2.1")}, {4, addr("192.0.2.254"), addr("192.0.2.1")}}},
		{kind: unix.RTN_UNICAST, metric: 20, hops: []hop{{link: 2}}},
	})
	want := []hop{{link: 3, source: addr("192.0.2.1")}, {4, addr("192.0.2.254"), addr("192.0.2.1")}, {link: 2}}
	if d := cmp.Diff(want, hops, cmp.AllowUnexported(hop{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("hops (-want +got):\n%s", d)
	}
}
