package daemon

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/membership"
	"github.com/headcni/headcni/pkg/networking/noderoutes"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/tailscale"
)

func prefixes(ss ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range ss {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

var comparePrefixes = cmp.Options{
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
}

func typical() (config.Config, observation) {
	c := config.Default()
	c.Network.PodCIDRs = config.CIDRs{"10.244.1.0/24", "fd00:244:1::/64"}
	c.Network.ClusterCIDRs = config.CIDRs{"10.244.0.0/16", "fd00:244::/32"}
	c.Network.RemoteCIDRs = config.CIDRs{"10.245.0.0/16"}
	c.Network.ServiceCIDRs = config.CIDRs{"10.96.0.0/16"}
	return c, observation{
		ranges: c.Network.Ranges(),
		Seen:   membership.Seen{Mode: config.ModeDaemon, Tailnet: &tailscale.Status{State: tailscale.Running}},
		tun:    "headcni01", tunMTU: 1280, hostPrefixes: prefixes("192.0.2.0/24"),
		nodeAddr4: netip.MustParseAddr("192.0.2.7"),
	}
}

func TestMakePlan(t *testing.T) {
	c, o := typical()
	got, err := makePlan(c, o, state{Advertised: prefixes("10.244.1.0/24", "10.244.9.0/24")})
	if err != nil {
		t.Fatal(err)
	}
	own, cluster := prefixes("10.244.1.0/24", "fd00:244:1::/64"), prefixes("10.244.0.0/16", "10.245.0.0/16", "fd00:244::/32")
	off := false
	want := plan{
		node: noderoutes.Config{Own: own, Cluster: cluster, Services: prefixes("10.96.0.0/16"), TunName: "headcni01", LANFirst: true},
		firewall: nft.Config{
			Own: own, Cluster: cluster, KeepSource: prefixes("10.96.0.0/16"), TunName: "headcni01", NodeAddr4: o.nodeAddr4,
			Masquerade: true, TailnetEgress: "masquerade", Links: prefixes("192.0.2.0/24"),
		},
		prefs:    tailscale.PrefsSpec{AdvertiseRoutes: own, DropRoutes: prefixes("10.244.9.0/24"), CorpDNS: &off},
		conflist: got.conflist, // golden in TestPlanConflist
		mtu:      1280,
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(plan{}, nft.Config{}), comparePrefixes); diff != "" {
		t.Error(diff)
	}

	// A route to services, one that it no longer is to have, and two that its user has put there.
	leads := o
	leads.serves, leads.advertised = prefixes("10.96.0.7/32"), prefixes("10.96.0.7/32", "10.96.0.8/32", "10.96.128.0/17", "0.0.0.0/0")
	if got, err = makePlan(c, leads, state{Advertised: prefixes("10.244.1.0/24", "10.96.0.7/32", "10.96.0.8/32")}); err != nil {
		t.Fatal(err)
	}
	want.prefs.AdvertiseRoutes, want.prefs.DropRoutes = append(slices.Clone(own), leads.serves...), prefixes("10.96.0.8/32")
	want.firewall.Served = prefixes("10.96.0.7/32", "10.96.128.0/17")
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(plan{}, nft.Config{}), comparePrefixes); diff != "" {
		t.Error(diff)
	}

	o.Mode, o.sites = config.ModeHost, prefixes("10.244.1.0/24", "203.0.113.0/24")
	got, err = makePlan(c, o, state{})
	if err != nil {
		t.Fatal(err)
	}
	if s := got.firewall.Sites; !slices.Equal(s, prefixes("203.0.113.0/24")) {
		t.Errorf("host mode: sites %v: pods are not beside the node", s)
	}
	if !got.firewall.HostMode || got.prefs.CorpDNS != nil {
		t.Errorf("host mode: firewall %v, CorpDNS %v: the user's resolver is the user's", got.firewall.HostMode, got.prefs.CorpDNS)
	}
}

func TestLANFirst(t *testing.T) {
	found := func(routeAll, exit bool) state {
		return state{Prefs: &tailscale.SavedPrefs{RouteAll: routeAll, ExitNode: exit}}
	}
	tests := []struct {
		name, mode string
		set        config.Tristate
		s          state
		now        *tailscale.SavedPrefs
		want       bool
	}{
		{"dedicated", config.ModeDaemon, config.Auto, state{}, nil, true},
		{"host, nothing known", config.ModeHost, config.Auto, state{}, nil, false},
		{"host, first pass", config.ModeHost, config.Auto, state{}, &tailscale.SavedPrefs{}, true},
		{"host, first pass, routes accepted", config.ModeHost, config.Auto, state{}, &tailscale.SavedPrefs{RouteAll: true}, false},
		{"host, no routes accepted", config.ModeHost, config.Auto, found(false, false), nil, true},
		{"host, none accepted but by us", config.ModeHost, config.Auto, found(false, false), &tailscale.SavedPrefs{RouteAll: true}, true},
		{"host, routes accepted", config.ModeHost, config.Auto, found(true, false), nil, false},
		{"host, exit node", config.ModeHost, config.Auto, found(false, true), nil, false},
		{"host, exit node chosen later", config.ModeHost, config.Auto, found(false, false), &tailscale.SavedPrefs{ExitNode: true}, false},
		{"host, exit node no more", config.ModeHost, config.Auto, found(false, true), &tailscale.SavedPrefs{RouteAll: true}, true},
		{"told to", config.ModeHost, "true", found(true, true), nil, true},
		{"told not to", config.ModeDaemon, "false", state{}, nil, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := config.Default()
			c.Network.LANFirst = tt.set
			if got := lanFirst(c, observation{Seen: membership.Seen{Mode: tt.mode}, prefs: tt.now}, tt.s); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestRefuse(t *testing.T) {
	peer := func(online bool, routes ...string) *tailscale.Status {
		return &tailscale.Status{Peers: []tailscale.Peer{{Name: "other", Online: online, Routes: prefixes(routes...)}}}
	}
	tests := []struct {
		name   string
		change func(*config.Config, *observation)
		want   string // "" = accepted
	}{
		{"typical", func(*config.Config, *observation) {}, ""},
		{"the host's network", func(_ *config.Config, o *observation) { o.hostPrefixes = prefixes("10.244.7.0/24") }, "overlaps 10.244.7.0/24"},
		{"a peer has it", func(_ *config.Config, o *observation) { o.Tailnet = peer(true, "10.244.1.0/24") }, "other advertises 10.244.1.0/24"},
		{"a peer has half of it", func(_ *config.Config, o *observation) { o.Tailnet = peer(true, "10.244.1.128/25") }, "other advertises 10.244.1.128/25"},
		{"a dead peer had it", func(_ *config.Config, o *observation) { o.Tailnet = peer(false, "10.244.1.0/24") }, ""},
		{"an exit node", func(_ *config.Config, o *observation) { o.Tailnet = peer(true, "0.0.0.0/0", "::/0", "10.0.0.0/8") }, ""},
		{"ours already", func(_ *config.Config, o *observation) {
			o.Tailnet = peer(true, "10.244.1.0/25")
			o.Tailnet.Self.Routes = prefixes("10.244.1.0/24")
		}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, o := typical()
			tt.change(&c, &o)
			p, err := makePlan(c, o, state{})
			err = errors.Join(err, p.duplicate)
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("want %q in %v", tt.want, err)
			}
		})
	}
}

// Pods get no larger packets than the tun carries, whatever is configured.
func TestPodMTU(t *testing.T) {
	for _, tt := range []struct{ configured, tun, want int }{
		{0, 1280, 1280}, {0, 1400, 1400}, {0, 0, 1280}, {1200, 1280, 1200}, {9000, 1280, 1280}, {9000, 1400, 1400}, {9000, 0, 1280},
		{0, 1200, 1280}, {1400, 1200, 1280}, // somebody has made the tun too small for IPv6
	} {
		c, o := typical()
		c.Network.MTU, o.tunMTU = tt.configured, tt.tun
		p, err := makePlan(c, o, state{})
		if err != nil || p.mtu != tt.want || !strings.Contains(string(p.conflist), fmt.Sprintf(`"mtu": %d`, tt.want)) {
			t.Errorf("%+v: got %d, %v in\n%s", tt, p.mtu, err, p.conflist)
		}
	}
}

func TestAccepted(t *testing.T) {
	running := membership.Seen{Tailnet: &tailscale.Status{
		State: tailscale.Running, Self: tailscale.Peer{IPs: []netip.Addr{netip.MustParseAddr("100.64.0.1")}},
	}}
	accepts := &tailscale.SavedPrefs{RouteAll: true}
	got := observation{tun: "tun", Seen: running, prefs: accepts}.accepted()
	if want := running.Tailnet.TunnelRoutes(); got.TunName != "tun" || len(want) == 0 || !slices.Equal(got.Routes, want) {
		t.Errorf("got %v, want %v over tun", got, want)
	}
	for _, o := range []observation{{}, {Seen: running}, {Seen: running, prefs: &tailscale.SavedPrefs{}}, {Seen: membership.Seen{Tailnet: &tailscale.Status{}}, prefs: accepts}} {
		if got := o.accepted(); got.TunName != "" || got.Routes != nil {
			t.Errorf("%+v: %v", o, got)
		}
	}
}

// What a peer advertises outside our ranges is told, and widens nothing, whatever it is.
func TestStrangers(t *testing.T) {
	c, o := typical()
	o.Tailnet.Self.Tags = []string{"tag:headcni"}
	want, err := makePlan(c, o, state{})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, tag string
		routes    []netip.Prefix
		told      bool
	}{
		{"other pods", "tag:headcni", prefixes("10.99.1.0/24"), true},
		{"other pods of one family", "tag:headcni", prefixes("10.244.2.0/24", "fd99::/64"), true},
		{"pods", "tag:headcni", prefixes("10.244.2.0/24", "fd00:244:2::/64"), false},
		{"pods and the LAN", "tag:headcni", prefixes("10.244.2.0/24", "192.168.7.0/24"), false},
		{"exit node", "tag:headcni", prefixes("0.0.0.0/0", "::/0"), false},
		{"stolen, wide", "tag:headcni", prefixes("192.168.0.0/16"), true},
		{"site router", "tag:site", prefixes("192.168.0.0/16"), false},
	} {
		o.Tailnet.Peers = []tailscale.Peer{{Name: "b", Online: true, Tags: []string{test.tag}, Routes: test.routes}}
		if err := strangers(o); (err != nil) != test.told {
			t.Errorf("%s: %v; told: want %v", test.name, err, test.told)
		}
		got, err := makePlan(c, o, state{})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(plan{}, nft.Config{}), comparePrefixes); diff != "" {
			t.Errorf("%s changes the plan:\n%s", test.name, diff)
		}
	}
	o.Tailnet.Peers = []tailscale.Peer{{Name: "b", Online: true, Tags: []string{"tag:headcni"}, Routes: prefixes("10.244.2.0/24")}}
	o.ranges = config.Ranges{}
	if err := strangers(o); err != nil {
		t.Errorf("the ranges are not known yet: %v", err)
	}
}

// BenchmarkMakePlan plans on a node of clusters of several sizes, with what a pass asks of its peers beside it. The time for one peer
// should not grow with their number.
func BenchmarkMakePlan(b *testing.B) {
	for _, size := range []int{250, 1000, 5000} {
		c, o := typical()
		for i := range size {
			p := tailscale.Peer{Name: fmt.Sprint(i), Online: true, CurAddr: "192.0.2.1:41641", Tags: []string{"tag:headcni"}}
			p.IPs = []netip.Addr{netip.AddrFrom4([4]byte{100, 64, byte(i >> 8), byte(i)}), netip.MustParseAddr(fmt.Sprintf("fd7a:115c:a1e0::%x", i+1))}
			p.Routes = prefixes(fmt.Sprintf("10.%d.%d.0/24", 200+i>>8, i&255), fmt.Sprintf("fd00:0:0:%x::/64", i))
			o.Tailnet.Peers = append(o.Tailnet.Peers, p)
		}
		o.ranges.Cluster = prefixes("10.192.0.0/10", "fd00::/32")
		b.Run(fmt.Sprintf("peers=%d", size), func(b *testing.B) {
			for b.Loop() {
				o.members = o.Tailnet.PeerAddrs4()
				if _, err := makePlan(c, o, state{}); err != nil {
					b.Fatal(err)
				}
				_, _, _ = strangers(o), o.accepted(), o.directPeers()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*size), "ns/peer")
		})
	}
}
