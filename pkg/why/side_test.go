package why

import (
	"net"
	"net/netip"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/tailscale"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// Where does a packet of a pod's go? The kernel is asked as it would be asked by the packet.
func TestLookup(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "sh", "-ec", `for l in eth0 hca tun0; do ip link add $l type veth peer name p$l; ip link set $l up; ip link set p$l up; done
ip addr add 192.0.2.11/24 dev eth0; ip addr add 100.64.0.1/32 dev tun0
ip route add default via 192.0.2.1; ip route add 10.244.1.7 dev hca; ip route add 10.244.7.0/24 dev tun0 table 52
ip rule add pref 5191 to 10.244.0.0/16 lookup 52; ip rule add pref 5188 to 10.244.1.0/24 lookup main suppress_prefixlength 24
ip rule add pref 5192 to 10.244.0.0/16 unreachable; sysctl -q -w net.ipv4.ip_forward=1
nft 'add table ip headcni; add set ip headcni cluster { type ipv4_addr; flags interval; elements = { 10.60.0.0/14, 10.244.0.0/16 } }'`)
	own, far := netip.MustParseAddr("10.244.1.7"), netip.MustParseAddr("10.244.7.3")
	ns.Do(t, func() error {
		for what, c := range map[string]struct {
			dst, src netip.Addr
			iif      string
			want     Route
		}{
			"by the tunnel":               {far, own, "hca", Route{Dev: "tun0", Table: 52}},
			"a range of nobody":           {netip.MustParseAddr("10.244.9.1"), own, "hca", Route{Error: "network is unreachable", Unreachable: true}},
			"out of the tunnel":           {own, far, "tun0", Route{Dev: "hca", Table: 254}},
			"the node's own":              {netip.MustParseAddr("192.0.2.11"), own, "hca", Route{Dev: "lo", Table: 255, Local: true}},
			"outside, from the node":      {netip.MustParseAddr("198.51.100.1"), netip.Addr{}, "", Route{Dev: "eth0", Table: 254, Via: netip.MustParseAddr("192.0.2.1"), Src: netip.MustParseAddr("192.0.2.11")}},
			"a source that is the node's": {far, netip.MustParseAddr("192.0.2.11"), "hca", Route{Error: "the kernel does not take 192.0.2.11 for a source on hca (invalid argument)"}},
		} {
			got := lookup(c.dst, c.src, c.iif)
			if c.src.IsValid() {
				got.Src = netip.Addr{} // the kernel repeats it
			}
			if got != c.want && !(c.want.Error != "" && c.want.Unreachable == got.Unreachable && got.Error != "" && got.Dev == "") {
				t.Errorf("%s: %+v, want %+v", what, got, c.want)
			}
		}
		if g := guardOf(own, netip.MustParseAddr("10.64.0.1")); g != (Guard{SrcCluster: true}) {
			t.Errorf("the sets: %+v", g)
		}
		if g := guardOf(netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")); g.Error == "" {
			t.Error("there is no table of IPv6, and no error")
		}
		if !isOwn(netip.MustParseAddr("192.0.2.11")) || isOwn(own) {
			t.Error("which addresses are the node's own is wrong")
		}
		return nil
	})
}

func TestTryPort(t *testing.T) {
	listens, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listens.Close()
	hears, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := func(a net.Addr) uint16 { return netip.MustParseAddrPort(a.String()).Port() }
	open, taken, at := port(listens.Addr()), port(hears.LocalAddr()), netip.MustParseAddr("127.0.0.1")
	for name, c := range map[string]struct {
		q    Question
		want string
	}{
		"open":  {Question{Protocol: tcp, Port: open}, portOpen},
		"taken": {Question{Protocol: udp, Port: taken}, portTaken},
	} {
		if got, why := tryPort(t.Context(), at, c.q); got != c.want {
			t.Errorf("%s: %s, %s", name, got, why)
		}
	}
	listens.Close()
	hears.Close()
	for _, q := range []Question{{Protocol: tcp, Port: open}, {Protocol: udp, Port: taken}} {
		if got, why := tryPort(t.Context(), at, q); got != portRefused {
			t.Errorf("%s %d: %s, %s", q.Protocol, q.Port, got, why)
		}
	}
}

func TestAddrsOf(t *testing.T) {
	addr := netip.MustParseAddr
	links := map[string]podlink.Attachment{"hc1": {Leased: podlink.Leased{Addrs: []netip.Addr{addr("fd00::7"), addr("10.244.1.7")}}, Label: "shop/web"}}
	st := tailscale.Status{Self: tailscale.Peer{Name: "fra-1"}, Peers: []tailscale.Peer{{Name: "home-1", DNSName: "home-1.example.com", IPs: ips(7)}}}
	for end, want := range map[string]int{"node": 0, "node/fra-1": 0, "fra-1": 0, "10.0.0.1": 1, "::ffff:10.0.0.1": 1, "shop/web": 2, "home-1": 1, "node/home-1": 1, "home-1.example.com": 1, "shop/none": -1, "": -1} {
		got, err := addrsOf(end, links, st)
		if err != nil {
			got = make([]netip.Addr, 20)
			want += 21
		}
		if len(got) != want || len(got) == 2 && !got[0].Is4() {
			t.Errorf("%q: %v, %v", end, got, err)
		}
	}
}
