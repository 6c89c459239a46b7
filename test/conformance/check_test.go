package conformance

import (
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
)

// TestCheckDeviations: each has its own words, and several are told together.
func TestCheckDeviations(t *testing.T) {
	for name, tt := range map[string]struct {
		damage func(n *node, pod *nstest.NS, host string)
		code   uint
		words  []string
	}{
		"lease":      {func(n *node, pod *nstest.NS, _ string) { n.run(ipamCall("DEL", pod, n)) }, 100, []string{"c1/eth0"}},
		"netns":      {func(_ *node, pod *nstest.NS, _ string) { end(t, pod) }, 8, []string{"open /run/netns/"}},
		"links":      {func(n *node, _ *nstest.NS, host string) { n.host.Run(t, "ip", "link", "del", host) }, 103, []string{"host link is missing", "pod interface eth0 is missing"}},
		"MAC":        {inPod(t, "link set eth0 address 02:00:00:00:00:77"), 103, []string{"hardware address 02:00:00:00:00:77"}},
		"larger MTU": {inPod(t, "link set eth0 mtu 9000"), 103, []string{"eth0 has MTU 9000", "1400"}},
		"host's MTU": {func(n *node, _ *nstest.NS, host string) { n.host.Run(t, "ip", "link", "set", host, "mtu", "1300") }, 103, []string{"MTU 1300, not 1400"}},
		"address":    {inPod(t, "addr del 10.244.1.2/32 dev eth0"), 103, []string{"pod address 10.244.1.2 is missing"}},
		"route":      {inPod(t, "route del default"), 103, []string{"pod route 0.0.0.0/0 via 169.254.1.1 is missing"}},
		"neighbour":  {inPod(t, "neigh del 169.254.1.1 dev eth0"), 103, []string{"pod neighbour 169.254.1.1 is missing"}},
		"down":       {inPod(t, "link set eth0 down"), 103, []string{"eth0 is down"}},
		"host route": {func(n *node, _ *nstest.NS, _ string) { n.host.Run(t, "ip", "route", "del", "10.244.1.2") }, 103, []string{"host route to 10.244.1.2"}},
		"host's entry": {func(n *node, _ *nstest.NS, host string) {
			n.host.Run(t, "ip", "neigh", "del", "10.244.1.2", "dev", host)
		}, 103, []string{"host neighbour 10.244.1.2 is missing"}},
		"two": {func(n *node, pod *nstest.NS, host string) {
			n.host.Run(t, "ip", "neigh", "del", "10.244.1.2", "dev", host)
			pod.Run(t, "ip", "-6", "route", "del", "default")
			n.run(ipamCall("DEL", pod, n))
		}, 103, []string{"host neighbour 10.244.1.2 is missing", "pod route ::/0 via fe80::1 is missing", "c1/eth0"}},
	} {
		t.Run(name, func(t *testing.T) {
			n, pod := newNode(t), nstest.New(t)
			l := n.list("", n.headcni(""))
			got := n.add(l, rt("c1", pod, nil))
			n.made()
			if err := n.check(l, rt("c1", pod, nil)); err != nil {
				t.Fatal(err)
			}
			asked := n.made()[0].conf
			tt.damage(n, pod, got.Interfaces[0].Name)
			n.fails(attach("CHECK", "c1", pod, asked), tt.code, tt.words...)
			if err := n.check(l, rt("c1", pod, nil)); err == nil {
				t.Error("libcni sees nothing")
			}
			l.DisableCheck = true
			if err := n.check(l, rt("c1", pod, nil)); err != nil {
				t.Errorf("with disableCheck: %v", err)
			}
			n.del(l, rt("c1", pod, nil))
			n.empty()
		})
	}
}

func inPod(t *testing.T, ip string) func(*node, *nstest.NS, string) {
	return func(_ *node, pod *nstest.NS, _ string) { pod.Run(t, "ip", strings.Fields(ip)...) }
}

func ipamCall(verb string, pod *nstest.NS, n *node) call {
	c := attach(verb, "c1", pod, n.conf(""))
	c.program = "headcni-ipam"
	return c
}

// TestCheckAllowsLaterPlugins: what plugins after us add or change is no deviation.
func TestCheckAllowsLaterPlugins(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	conf := n.conf("")
	out := n.must(attach("ADD", "c1", pod, conf))
	got := parse(t, out)
	for _, args := range []string{
		"addr add 198.51.100.9/24 dev eth0", "route add 203.0.113.0/24 via 169.254.1.1 dev eth0 onlink", "link set eth0 mtu 1300",
		"link add dummybr type bridge", "neigh add 169.254.1.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
	} {
		pod.Run(t, "ip", strings.Fields(args)...)
	}
	n.must(attach("CHECK", "c1", pod, n.previous(conf, out)))
	// As a plugin after us may pass the result on: more of everything, another MAC that the kernel has too.
	for was, is := range map[string]string{
		`"interfaces":[`: `"interfaces":[{"name":"ifb1","mac":"02:00:00:00:00:01"},{"name":"net1","sandbox":"/run/netns/other"},`,
		`"interface":1`:  `"interface":3`,
		`"ips":[`:        `"ips":[{"address":"192.0.2.99/32"},`,
		`"routes":[`:     `"routes":[{"dst":"203.0.113.0/24","gw":"169.254.1.1"},`,
	} {
		if !strings.Contains(out, was) {
			t.Fatalf("no %s in %s", was, out)
		}
		out = strings.ReplaceAll(out, was, is)
	}
	n.must(attach("CHECK", "c1", pod, n.previous(conf, out)))
	n.fails(attach("CHECK", "c1", pod, n.previous(conf, strings.ReplaceAll(out, got.Interfaces[1].Mac, "02:00:00:00:00:88"))), 103, "not 02:00:00:00:00:88")
	// Routes that another table got.
	pod.Run(t, "ip", "route", "add", "default", "via", "169.254.1.1", "dev", "eth0", "onlink", "table", "100")
	pod.Run(t, "ip", "rule", "add", "from", got.addrs()[0].String(), "table", "100")
	pod.Run(t, "ip", "route", "del", "default", "table", "main")
	n.must(attach("CHECK", "c1", pod, n.previous(conf, out)))
	n.must(attach("DEL", "c1", pod, conf))
	n.empty()
}

// TestCheckAtOnce: nothing is asynchronous that CHECK would have to wait for.
func TestCheckAtOnce(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	conf := n.conf("")
	for range 20 {
		out := n.must(attach("ADD", "c1", pod, conf))
		n.must(attach("CHECK", "c1", pod, n.previous(conf, out)))
		n.must(attach("DEL", "c1", pod, conf))
	}
	n.empty()
}

// TestCheckNeedsPrevResult: without it nothing can be expected.
func TestCheckNeedsPrevResult(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	conf := n.conf("")
	out := n.must(attach("ADD", "c1", pod, conf))
	n.fails(attach("CHECK", "c1", pod, conf), 7, "prevResult")
	n.fails(attach("CHECK", "c1", pod, n.previous(conf, `{"cniVersion":"9.9.9"}`)), 7, "prevResult")
	n.fails(attach("CHECK", "c1", pod, n.previous(conf, `[]`)), 7, "prevResult")
	n.fails(attach("CHECK", "c2", pod, n.previous(conf, out)), 7, "prevResult")
	n.fails(attach("CHECK", "c1", nil, n.previous(conf, out)), 4, "CNI_NETNS")
	for _, version := range []string{"0.4.0", "1.0.0"} { // a result of another version than the configuration's
		n.must(attach("CHECK", "c1", pod, n.with(n.previous(conf, out), `{"cniVersion":"`+version+`"}`)))
	}
	n.must(attach("DEL", "c1", pod, conf))
}
