package subnets

import (
	"net/netip"
	"testing"

	"github.com/headcni/headcni/pkg/networking/noderoutes"
	"github.com/headcni/headcni/pkg/nft"
)

func TestLearn(t *testing.T) {
	cluster := prefixes(taken)
	for _, c := range []struct {
		name             string
		before           Known
		news             News
		held, advertised string
	}{
		{"what devices advertise, but for the cluster's, the tailnet's and exits", Known{},
			News{Tailnet: true, NamedKnown: true, Cluster: cluster, Advertised: prefixes("192.168.50.0/24 10.244.3.0/24 100.64.0.7/32 fd7a:115c:a1e0::7/128 0.0.0.0/0 ::/0 128.0.0.0/1 10.0.0.0/8")},
			"", "10.0.0.0/8 192.168.50.0/24"},
		{"what is named", Known{}, News{Tailnet: true, NamedKnown: true, Named: prefixes("192.168.50.0/24")}, "192.168.50.0/24", ""},
		{"consent ends, and the device stays", Known{Named: prefixes("192.168.50.0/24"), Held: prefixes("192.168.50.0/24")},
			News{Tailnet: true, NamedKnown: true, Advertised: prefixes("192.168.50.0/24 192.168.60.0/24")}, "192.168.50.0/24", "192.168.50.0/24 192.168.60.0/24"},
		{"consent to too much ends: what the device has of it stays", Known{Held: prefixes("192.168.0.0/16")},
			News{Tailnet: true, NamedKnown: true, Advertised: prefixes("192.168.50.0/24 172.16.0.0/12")}, "192.168.50.0/24", "172.16.0.0/12 192.168.50.0/24"},
		{"consent to a part ends", Known{Held: prefixes("192.168.50.0/24")},
			News{Tailnet: true, NamedKnown: true, Advertised: prefixes("192.168.0.0/16")}, "192.168.50.0/24", "192.168.0.0/16"},
		{"consent ends, and the device with it", Known{Held: prefixes("192.168.50.0/24")}, News{Tailnet: true, NamedKnown: true}, "", ""},
		{"nobody can be asked", Known{Named: prefixes("192.168.50.0/24"), Held: prefixes("192.168.50.0/24 fd00:50::/64"), Advertised: prefixes("fd00:50::/64")},
			News{}, "192.168.50.0/24 fd00:50::/64", "fd00:50::/64"},
		{"tailscaled is dead, and consent comes and goes", Known{Named: prefixes("192.168.50.0/24"), Held: prefixes("192.168.50.0/24")},
			News{NamedKnown: true, Named: prefixes("192.168.60.0/24")}, "192.168.50.0/24 192.168.60.0/24", ""},
		{"the API server is away", Known{Named: prefixes("192.168.50.0/24"), Held: prefixes("192.168.50.0/24")},
			News{Tailnet: true}, "192.168.50.0/24", ""},
	} {
		got := c.before.Learn(c.news)
		if text(got.Held) != c.held || text(got.Advertised) != c.advertised {
			t.Errorf("%s: held %v, advertised %v", c.name, got.Held, got.Advertised)
		}
		if again := got.Learn(c.news); text(again.Held) != c.held {
			t.Errorf("%s: the second time %v", c.name, again.Held)
		}
	}
}

func TestHere(t *testing.T) {
	host := Host{
		Addrs: []netip.Addr{netip.MustParseAddr("10.1.2.3"), {}}, Links: prefixes("10.1.2.0/24 192.168.7.0/24 172.17.0.0/16"),
		Routes: prefixes("10.1.2.0/24 192.168.7.0/24 172.17.0.0/16 192.168.0.0/17 10.244.1.7/32 100.64.0.0/10 172.20.1.0/24"), Cluster: prefixes(taken),
	}
	for _, c := range []struct {
		name              string
		known             Known
		all               bool
		here, beside      string
		openHere, beside2 string
	}{
		{name: "named", known: Known{Held: prefixes("192.168.50.0/24"), Advertised: prefixes("192.168.50.0/24 192.168.60.0/24")}, here: "192.168.50.0/24"},
		{name: "all, but for what the host has a wider route to", all: true,
			known: Known{Held: prefixes("192.168.50.0/24"), Advertised: prefixes("192.168.50.0/24 192.168.60.0/24 192.168.200.0/24")}, here: "192.168.50.0/24 192.168.200.0/24"},
		{name: "the LAN", all: true, known: Known{Held: prefixes("192.168.7.0/24 192.168.7.128/25"), Advertised: prefixes("192.168.7.0/25")}},
		{name: "where the node is itself", all: true, known: Known{Held: prefixes("10.1.0.0/16"), Advertised: prefixes("10.0.0.0/8")}},
		{name: "where the node is itself, and a part of it elsewhere", known: Known{Held: prefixes("10.0.0.0/8 10.50.0.0/24")}, here: "10.50.0.0/24"},
		{name: "networks of the host inside", known: Known{Held: prefixes("172.16.0.0/12")}, here: "172.16.0.0/12", beside: "172.17.0.0/16 172.20.1.0/24"},
		{name: "a device that advertises the cluster and more", all: true, known: Known{Advertised: prefixes("10.224.0.0/11")}, here: "10.224.0.0/11"},
	} {
		here, beside := c.known.Here(host, c.all)
		if text(here) != c.here || text(beside) != c.beside {
			t.Errorf("%s: %v, beside %v", c.name, here, beside)
		}
	}
}

// Where the host's default route comes first, only what somebody has named is the tunnel's, unless all pods may use all.
func TestPlan(t *testing.T) {
	k := Known{Named: prefixes("192.168.50.0/24"), Held: prefixes("192.168.50.0/24"), Advertised: prefixes("192.168.50.0/24 192.168.60.0/24"), Exit: true}
	for _, c := range []struct {
		lanFirst, open bool
		want           string
	}{{true, false, "192.168.50.0/24"}, {false, false, "192.168.50.0/24 192.168.60.0/24"}, {true, true, "192.168.50.0/24 192.168.60.0/24"}} {
		node, firewall := noderoutes.Config{LANFirst: c.lanFirst}, nft.Config{}
		k.Plan(Host{}, c.open, &node, &firewall)
		if text(node.Subnets) != c.want || text(firewall.Subnets.Known) != c.want || firewall.Subnets.Open != c.open || !firewall.Subnets.Exit ||
			text(firewall.Subnets.Named) != "192.168.50.0/24" || text(firewall.Subnets.All) != "192.168.50.0/24 192.168.60.0/24" {
			t.Errorf("%+v: %v, %+v", c, node.Subnets, firewall.Subnets)
		}
	}
}
