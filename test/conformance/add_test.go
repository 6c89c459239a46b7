package conformance

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/nstest"
)

var versions = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// seen is a link as the kernel has it.
func seen(t testing.TB, ns *nstest.NS, name string) link {
	t.Helper()
	var links []struct {
		Address string
		MTU     int
	}
	if err := json.Unmarshal([]byte(ns.Run(t, "ip", "-j", "link", "show", "dev", name)), &links); err != nil || len(links) != 1 {
		t.Fatalf("ip link show %s: %v", name, err)
	}
	return link{Name: name, Mac: links[0].Address, Mtu: links[0].MTU}
}

// TestResult compares a result of each version with what the kernel has.
func TestResult(t *testing.T) {
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			n, pod := newNode(t), nstest.New(t)
			ipam := strings.TrimSuffix(n.dual(), "}") + `,"routes":[{"dst":"0.0.0.0/0","mtu":1300,"advmss":1200,"priority":7},
				{"dst":"198.51.100.0/24","gw":"169.254.1.1","table":1000,"scope":0},{"dst":"::/0"}]}`
			l := n.list(fmt.Sprintf(`{"cniVersion":%q}`, version), n.headcni(`{"ipam":`+ipam+`}`))
			got := n.add(l, rt("c1", pod, nil))
			if got.CNIVersion != version || len(got.Interfaces) != 2 {
				t.Fatalf("got %+v", got)
			}
			v1_1, family := version == "1.1.0", version < "1.0.0"
			host, inPod := seen(t, n.host, got.Interfaces[0].Name), seen(t, pod, "eth0")
			inPod.Sandbox = pod.Path
			if !v1_1 { // mtu came with 1.1.0
				host.Mtu, inPod.Mtu = 0, 0
			}
			if diff := cmp.Diff([]link{host, inPod}, got.Interfaces); diff != "" {
				t.Errorf("interfaces (-kernel +result): %s", diff)
			}
			var addrs []string
			for i, ip := range got.IPs {
				if ip.Interface == nil || *ip.Interface != 1 || family != (ip.Version != "") || family && ip.Version != []string{"4", "6"}[i] {
					t.Errorf("ips[%d]: %+v", i, ip)
				}
				addrs = append(addrs, ip.Address+" by "+ip.Gateway)
				pod.Run(t, "ip", "addr", "show", "dev", "eth0", "to", ip.Address)
			}
			if diff := cmp.Diff([]string{"10.244.1.2/32 by 169.254.1.1", "fd00:244:1::2/128 by fe80::1"}, addrs); diff != "" {
				t.Error(diff)
			}
			wantRoutes(t, got, pod, v1_1)
			ping(t, n.host, got.addrs()...)
			n.del(l, rt("c1", pod, nil))
			n.empty()
		})
	}
}

func wantRoutes(t *testing.T, got result, pod *nstest.NS, v1_1 bool) {
	t.Helper()
	kernel := pod.Run(t, "ip", "route", "show", "table", "all") + pod.Run(t, "ip", "-6", "route", "show", "table", "all")
	for _, want := range []string{
		"default via 169.254.1.1 dev eth0 proto static metric 7 onlink mtu 1300 advmss 1200",
		"198.51.100.0/24 via 169.254.1.1 dev eth0 table 1000 proto static", "default via fe80::1 dev eth0",
	} {
		if !strings.Contains(strings.ReplaceAll(kernel, "  ", " "), want) {
			t.Errorf("no route %q in\n%s", want, kernel)
		}
	}
	var routes []string
	for _, r := range got.Routes {
		table, scope := -1, -1
		if r.Table != nil {
			table = *r.Table
		}
		if r.Scope != nil {
			scope = *r.Scope
		}
		routes = append(routes, fmt.Sprintf("%s via %s mtu %d advmss %d priority %d table %d scope %d", r.Dst, r.GW, r.MTU, r.AdvMSS, r.Priority, table, scope))
	}
	want := []string{
		"0.0.0.0/0 via 169.254.1.1 mtu 1300 advmss 1200 priority 7 table -1 scope -1",
		"198.51.100.0/24 via 169.254.1.1 mtu 0 advmss 0 priority 0 table 1000 scope 0",
		"::/0 via fe80::1 mtu 0 advmss 0 priority 0 table -1 scope -1",
	}
	if !v1_1 { // the rest came with 1.1.0
		for i := range want {
			want[i] = strings.Join(strings.Fields(want[i])[:3], " ") + " mtu 0 advmss 0 priority 0 table -1 scope -1"
		}
	}
	if diff := cmp.Diff(want, routes); diff != "" {
		t.Errorf("routes (-want +got): %s", diff)
	}
}

// TestRouteScope: a destination on the link itself has no next hop.
func TestRouteScope(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	ipam := strings.TrimSuffix(n.pool("10.244.1.0/24"), "}") + `,"routes":[{"dst":"0.0.0.0/0"},{"dst":"198.51.100.0/24","scope":253}]}`
	conf := n.conf(`{"ipam":` + ipam + `}`)
	out := n.must(attach("ADD", "c1", pod, conf))
	got := parse(t, out)
	if len(got.Routes) != 2 || got.Routes[1].GW != "" || got.Routes[1].Scope == nil || *got.Routes[1].Scope != 253 {
		t.Errorf("routes: %+v", got.Routes)
	}
	if kernel := pod.Run(t, "ip", "route"); !strings.Contains(kernel, "198.51.100.0/24 dev eth0 proto static scope link") {
		t.Errorf("routes:\n%s", kernel)
	}
	n.must(attach("CHECK", "c1", pod, n.previous(conf, out)))
	n.must(attach("DEL", "c1", pod, conf))
	n.empty()
}

// TestSecondInterface: one container, two attachments; each answers by its own link, in each family, and ends for itself. The node
// takes a pod's packets by the link of their source only, as the daemon's rules have it.
func TestSecondInterface(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	n.host.Run(t, "nft", `add table inet strict
		add chain inet strict in { type filter hook prerouting priority raw; }
		add rule inet strict in iifname "hc*" meta l4proto { icmp, icmpv6 } fib saddr . iif oif missing drop`)
	conf := n.conf("")
	first, second := attach("ADD", "c1", pod, conf), attach("ADD", "c1", pod, conf)
	second.ifName = "net1"
	out1, out2 := n.must(first), n.must(second)
	ping(t, n.host, slices.Concat(parse(t, out1).addrs(), parse(t, out2).addrs())...)
	n.fails(second, 104, "net1") // an interface of the name exists
	second.verb, second.conf = "CHECK", n.previous(conf, out2)
	n.must(second)
	first.verb = "DEL"
	n.must(first)
	n.must(second)
	ping(t, n.host, parse(t, out2).addrs()...)
	first.verb = "ADD"
	ping(t, n.host, slices.Concat(parse(t, n.must(first)).addrs(), parse(t, out2).addrs())...)
	first.verb = "DEL"
	n.must(first)
	second.verb = "DEL"
	n.must(second)
	for _, family := range []string{"-4", "-6"} {
		if rules := pod.Run(t, "ip", family, "rule"); strings.Count(rules, "\n") > 3 {
			t.Errorf("rules are left:\n%s", rules)
		}
	}
	n.empty()
}

// TestBesideAnother: an attachment answers by its own link, in each family, whichever way out the pod has already, and whether its own
// routes lead everywhere or not.
func TestBesideAnother(t *testing.T) {
	somebodys := func(n *node, pod *nstest.NS) {
		for _, args := range []string{
			"link add eth0 type veth peer name away", "link set away up", "link set eth0 up", "addr add 198.51.100.2/24 dev eth0",
			"-6 addr add 2001:db8:9::2/64 dev eth0 nodad", "route add default via 198.51.100.1 metric 50", "-6 route add default via 2001:db8:9::1 metric 50",
		} {
			pod.Run(t, "ip", strings.Fields(args)...)
		}
	}
	ours := func(n *node, pod *nstest.NS) { n.must(attach("ADD", "c1", pod, n.conf(""))) }
	for name, tt := range map[string]struct {
		first  func(*node, *nstest.NS)
		routes string
	}{
		"somebody's":                {somebodys, ""},
		"somebody's, narrow routes": {somebodys, `,"routes":[{"dst":"203.0.113.0/24"},{"dst":"2001:db8:3::/64"}]`},
		"ours, narrow routes":       {ours, `,"routes":[{"dst":"203.0.113.0/24"},{"dst":"2001:db8:3::/64"}]`},
	} {
		t.Run(name, func(t *testing.T) {
			n, pod := newNode(t), nstest.New(t)
			tt.first(n, pod)
			conf := n.conf(`{"ipam":` + strings.TrimSuffix(n.dual(), "}") + tt.routes + `}}`)
			c := attach("ADD", "c1", pod, conf)
			c.ifName = "net1"
			out := n.must(c)
			addrs := parse(t, out).addrs()
			if len(addrs) != 2 {
				t.Fatalf("addresses %s", addrs)
			}
			for i, from := range []string{"192.0.2.1", "2001:db8::1"} {
				if way := pod.Run(t, "ip", "route", "get", from, "from", addrs[i].String()); !strings.Contains(way, "dev net1") {
					t.Errorf("answers to %s: %s", from, way)
				}
			}
			ping(t, n.host, addrs...)
			c.verb, c.conf = "CHECK", n.previous(conf, out)
			n.must(c)
			pod.Run(t, "ip", "rule", "del", "from", addrs[0].String())
			n.fails(c, 103, "pod rule from "+addrs[0].String()+" is missing")
			c.verb = "DEL"
			n.must(c)
			if rules := pod.Run(t, "ip", "rule") + pod.Run(t, "ip", "-6", "rule"); strings.Contains(rules, "5190") {
				t.Errorf("rules are left:\n%s", rules)
			}
			n.must(attach("DEL", "c1", pod, conf))
			n.empty()
		})
	}
}

// TestExistingInterface: what another has made is not touched, whoever that was.
func TestExistingInterface(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	pod.Run(t, "ip", "link", "add", "eth0", "type", "bridge")
	n.fails(attach("ADD", "c1", pod, n.conf("")), 104, "eth0", pod.Path)
	pod.Run(t, "ip", "link", "show", "dev", "eth0", "type", "bridge")
	lo := attach("ADD", "c1", pod, n.conf(""))
	lo.ifName = "lo"
	n.fails(lo, 104, "lo")
	n.empty()
}

// TestPrevResult: a result of each version is passed on, with the attachment's own behind it.
func TestPrevResult(t *testing.T) {
	for _, version := range versions {
		n, pod := newNode(t), nstest.New(t)
		family := ""
		if version < "1.0.0" {
			family = `"version":"4",`
		}
		previous := fmt.Sprintf(`{"cniVersion":%q,"interfaces":[{"name":"hst"},{"name":"net9","mac":"02:00:00:00:00:09","sandbox":%q}],
			"ips":[{%s"address":"203.0.113.9/24","gateway":"203.0.113.1","interface":1}],"routes":[{"dst":"203.0.113.0/24"}],
			"dns":{"nameservers":["203.0.113.53"],"domain":"example.org","options":["ndots:2"]}}`, version, pod.Path, family)
		conf := n.conf(fmt.Sprintf(`{"cniVersion":%q,"prevResult":%s}`, version, previous))
		out := n.must(attach("ADD", "c1", pod, conf))
		got, was := parse(t, out), parse(t, previous)
		if got.CNIVersion != version || len(got.Interfaces) != 4 || len(got.IPs) != 3 || len(got.Routes) != 3 {
			t.Fatalf("got %s", out)
		}
		if diff := cmp.Diff(was, result{was.CNIVersion, got.Interfaces[:2], got.IPs[:1], got.Routes[:1], got.DNS}); diff != "" {
			t.Errorf("%s: what was passed in (-) is not what came out (+): %s", version, diff)
		}
		for _, ip := range got.IPs[1:] {
			if *ip.Interface != 3 {
				t.Errorf("%s: %s is said to be on interface %d", version, ip.Address, *ip.Interface)
			}
		}
		n.must(attach("DEL", "c1", pod, conf))
		n.empty()
	}
}

// TestDNS: of IPAM, dns, magic_dns and the capability dns the most specific speaks, field by field.
func TestDNS(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	keys := `{"dns":{"nameservers":["198.51.100.53"],"domain":"conf.example","search":["conf.example"],"options":["ndots:1"]},
		"magic_dns":{"enable":true,"base_domain":"tail.example","nameservers":["100.100.100.100"]},"capabilities":{"dns":true}}`
	l := n.list("", n.headcni(keys))
	type dns = struct {
		Nameservers     []string
		Domain          string
		Search, Options []string
	}
	for id, tt := range map[string]struct {
		asked map[string]any
		want  dns
	}{
		"plain": {nil, dns{[]string{"100.100.100.100"}, "tail.example", []string{"conf.example"}, []string{"ndots:1"}}},
		"asked": {
			map[string]any{"dns": map[string]any{"servers": []string{"192.0.2.53"}, "searches": []string{"ns.svc"}, "options": []string{"ndots:5"}}},
			dns{[]string{"192.0.2.53"}, "tail.example", []string{"ns.svc"}, []string{"ndots:5"}},
		},
	} {
		got := n.add(l, rt(id, pod, tt.asked))
		if diff := cmp.Diff(dns(got.DNS), tt.want); diff != "" {
			t.Errorf("%s (-got +want): %s", id, diff)
		}
		n.del(l, rt(id, pod, tt.asked))
	}
}

// TestCapabilities: what a runtime asks for an attachment it gets, or an error.
func TestCapabilities(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	l := n.list("", n.headcni(`{"capabilities":{"ips":true,"mac":true,"portMappings":true,"bandwidth":true}}`))
	asked := map[string]any{
		"ips": []string{"10.244.1.77/24", "fd00:244:1::77"}, "mac": "02:00:00:00:00:77",
		"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}, // another plugin's
		"bandwidth":    map[string]any{"ingressRate": 1000},                                          // another plugin's
	}
	got := n.add(l, rt("c1", pod, asked))
	want := []netip.Addr{netip.MustParseAddr("10.244.1.77"), netip.MustParseAddr("fd00:244:1::77")}
	if !slices.Equal(got.addrs(), want) || got.Interfaces[1].Mac != "02:00:00:00:00:77" || seen(t, pod, "eth0").Mac != "02:00:00:00:00:77" {
		t.Errorf("got %+v", got)
	}
	if err := n.check(l, rt("c1", pod, asked)); err != nil {
		t.Error(err)
	}
	ping(t, n.host, want...)
	other := nstest.New(t)
	if _, err := n.cni().AddNetworkList(t.Context(), l, rt("c2", other, asked)); err == nil || !strings.Contains(err.Error(), "10.244.1.77") {
		t.Errorf("an address that another has: %v", err)
	}
	// A list that does not declare the capability does not pass it on.
	silent := n.list("", n.headcni(""))
	if got := n.add(silent, rt("c3", other, asked)); slices.Equal(got.addrs(), want) {
		t.Errorf("got %+v", got)
	}
	n.del(silent, rt("c3", other, asked))
	n.del(l, rt("c1", pod, asked))
	n.empty()
}

// TestArgs: CNI_ARGS and args. Keys of other plugins mean nothing here, with and without IgnoreUnknown.
func TestArgs(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	for _, tt := range []struct {
		args, keys string
		addr, mac  string // empty: any
		code       uint   // 0: none
	}{
		{args: "FOO=BAR;ABC=123"},
		{args: "IgnoreUnknown=true;K8S_POD_NAME=x;FOO=a=b;"},
		{args: "IgnoreUnknown=1;IP=10.244.1.9;MAC=02:00:00:00:00:09", addr: "10.244.1.9", mac: "02:00:00:00:00:09"},
		{args: "IP=10.244.1.9/24", addr: "10.244.1.9"},
		{args: "IP=;MAC="},
		{keys: `{"args":{"cni":{"ips":["10.244.1.8"],"mac":"02:00:00:00:00:08"},"labels":{"a":"b"}}}`, addr: "10.244.1.8", mac: "02:00:00:00:00:08"},
		{args: "IP=10.244.1.9", keys: `{"args":{"cni":{"ips":["10.244.1.8"]}}}`, addr: "10.244.1.8"}, // args goes before CNI_ARGS
		{args: "IP=10.244.1.9", keys: `{"args":{"cni":{"ips":["10.244.1.8"]}},"runtimeConfig":{"ips":["10.244.1.7"]}}`, addr: "10.244.1.7"},
		{keys: `{"args":{"cni":7}}`}, // optional meta-data that is not understood is left alone
		{args: "FOO", code: 4}, {args: "IP=junk", code: 4}, {args: "MAC=junk", code: 4},
		{keys: `{"runtimeConfig":{"mac":"junk"}}`, code: 7}, {keys: `{"runtimeConfig":{"ips":["junk"]}}`, code: 7},
		{args: "IP=192.0.2.77", code: 100},
	} {
		c := attach("ADD", "c1", pod, n.with(n.conf(`{"ipam":`+n.pool("10.244.1.0/24")+`}`), tt.keys))
		c.args = tt.args
		switch {
		case tt.code == 4:
			n.fails(c, 4, "CNI_ARGS")
		case tt.code != 0:
			n.fails(c, tt.code)
		default:
			got := parse(t, n.must(c))
			if addr := got.addrs()[0].String(); tt.addr != "" && addr != tt.addr || tt.mac != "" && got.Interfaces[1].Mac != tt.mac {
				t.Errorf("%q %s: got %+v", tt.args, tt.keys, got)
			}
		}
		c.verb = "DEL"
		n.must(c)
		n.empty()
	}
}

// TestLongArgs: CNI_ARGS of any length are taken. What is written down of them is for people.
func TestLongArgs(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	for _, size := range []int{5_000, 100_000} {
		value := strings.Repeat("x", size)
		for _, args := range []string{"K8S_POD_NAME=" + value, "K8S_POD_NAMESPACE=" + value, "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=\n\"\xff" + value[:size/8], "A=" + value} {
			for _, program := range []string{"headcni", "headcni-ipam"} {
				c := attach("ADD", "c1", pod, n.conf(""))
				c.program, c.args = program, args
				out := n.must(c)
				if program == "headcni" {
					ping(t, n.host, parse(t, out).addrs()...)
				}
				c.verb, c.conf = "CHECK", n.previous(n.conf(""), out)
				n.must(c)
				c.verb = "DEL"
				n.must(c)
				n.empty()
			}
		}
	}
}

// TestArgsOfIPAM: what args and runtimeConfig ask for goes before CNI_ARGS here too.
func TestArgsOfIPAM(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	for keys, want := range map[string]string{
		`{}`: "10.244.1.9", `{"args":{"cni":{"ips":["10.244.1.8"]}}}`: "10.244.1.8", `{"runtimeConfig":{"ips":["10.244.1.7/24"]}}`: "10.244.1.7",
	} {
		c := attach("ADD", "c1", pod, n.with(n.conf(`{"ipam":`+n.pool("10.244.1.0/24")+`}`), keys))
		c.program, c.args = "headcni-ipam", "FOO=BAR;IP=10.244.1.9"
		if got := parse(t, n.must(c)).addrs()[0].String(); got != want {
			t.Errorf("%s: got %s, want %s", keys, got, want)
		}
		c.verb = "DEL"
		n.must(c)
		n.empty()
	}
}

// TestNames: container IDs and interface names that are allowed work; others are refused with the variable's name.
func TestNames(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	long := strings.Repeat("0123456789abcdef", 32)
	for _, id := range []string{"c", "7", "A_b.c-d", "x--", strings.Repeat("f", 64), long} {
		c := attach("ADD", id, pod, n.conf(""))
		out := n.must(c)
		c.verb, c.conf = "CHECK", n.previous(c.conf, out)
		n.must(c)
		c.verb = "DEL"
		n.must(c)
		n.empty()
	}
	for _, id := range []string{"", "-c", "_", ".", "a/b", "a b", "ä", "a\n", "../x"} {
		n.fails(attach("ADD", id, pod, n.conf("")), 4, "CNI_CONTAINERID")
		n.fails(attach("DEL", id, pod, n.conf("")), 4, "CNI_CONTAINERID")
	}
	for _, name := range []string{"e", "eth0.100", "a23456789012345", "ä", "-", "net-1_x"} {
		c := attach("ADD", "c1", pod, n.conf(""))
		c.ifName = name
		out := n.must(c)
		c.verb, c.conf = "CHECK", n.previous(c.conf, out)
		n.must(c)
		c.verb = "DEL"
		n.must(c)
		n.empty()
	}
	for _, name := range []string{"", ".", "..", "a/b", "a b", "a:1", "a234567890123456", "all", "default", "eth%d", "%", "a\tb", "a\u00a0b"} {
		c := attach("ADD", "c1", pod, n.conf(""))
		c.ifName = name
		n.fails(c, 4, "CNI_IFNAME")
		n.empty()
	}
}

// TestFirstPacket: when ADD is over the pod can be reached, with nothing left to settle.
func TestFirstPacket(t *testing.T) {
	n := newNode(t)
	for i := range 60 {
		pod, id := nstest.New(t), fmt.Sprintf("c%d", i)
		got := parse(t, n.must(attach("ADD", id, pod, n.conf(""))))
		local := pod.Run(t, "ip", "-6", "route", "show", "table", "local")
		if !strings.Contains(local, "local "+got.addrs()[1].String()+" ") {
			t.Errorf("round %d: the pod does not know its address yet:\n%s", i, local)
		}
		ping(t, n.host, got.addrs()...)
		n.must(attach("DEL", id, pod, n.conf("")))
	}
	n.empty()
}
