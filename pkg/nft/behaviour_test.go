package nft

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/hostfirewall"
)

func TestSourcesAsSeenByTheReceiver(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	base := typical()
	with := func(change func(*Config)) Config { c := base; change(&c); return c }
	configs := map[string]Config{
		"default":       base,
		"preserve":      with(func(c *Config) { c.TailnetEgress = config.EgressPreserve }),
		"deny":          with(func(c *Config) { c.TailnetEgress = config.EgressDeny }),
		"no masquerade": with(func(c *Config) { c.Masquerade = false }),
		"LAN allowed":   with(func(c *Config) { c.LANIngress = true }),
		"daemon mode":   with(func(c *Config) { c.HostMode = false }),
	}
	for family, a := range worldAddrs {
		nothing, node := netip.Addr{}, a.node
		cases := []struct {
			name string
			packet
			want    netip.Addr
			configs []string // "" = default
		}{
			{"pod to pod", packet{from: w.podA, src: a.podA, to: w.podB, dst: a.podB}, a.podA, nil},
			{"pod to remote pod", packet{from: w.podA, src: a.podA, to: w.tn, dst: a.remote}, a.podA, nil},
			{"remote pod to pod", packet{from: w.tn, src: a.remote, to: w.podA, dst: a.podA}, a.remote, nil},
			{"device to pod", packet{from: w.tn, src: a.device, to: w.podA, dst: a.podA}, a.device, []string{"default", "deny"}},
			{"LAN to pod", packet{from: w.lan, src: a.lan, to: w.podA, dst: a.podA}, nothing, nil},
			{"LAN to pod, allowed", packet{from: w.lan, src: a.lan, to: w.podA, dst: a.podA}, a.lan, []string{"LAN allowed"}},
			{"pod to LAN", packet{from: w.podA, src: a.podA, to: w.lan, dst: a.lan}, node, nil},
			{"pod to LAN, no masquerade", packet{from: w.podA, src: a.podA, to: w.lan, dst: a.lan}, a.podA, []string{"no masquerade"}},
			{"pod to device", packet{from: w.podA, src: a.podA, to: w.tn, dst: a.device}, a.nodeTailnet, []string{"default", "no masquerade"}},
			{"pod to device, preserve", packet{from: w.podA, src: a.podA, to: w.tn, dst: a.device}, a.podA, []string{"preserve"}},
			{"pod to device, deny", packet{from: w.podA, src: a.podA, to: w.tn, dst: a.device}, nothing, []string{"deny"}},
			{"pod to remote pod, deny", packet{from: w.podA, src: a.podA, to: w.tn, dst: a.remote}, a.podA, []string{"deny"}},
			{"node to own pod, from docker0", packet{from: w.node, src: a.docker, to: w.podA, dst: a.podA}, node, nil},
			{"node to own pod, from the tun", packet{from: w.node, src: a.nodeTailnet, to: w.podA, dst: a.podA}, node, nil},
			{"node to own pod", packet{from: w.node, src: node, to: w.podA, dst: a.podA}, node, nil},
			{"node to remote pod, from eth0", packet{from: w.node, src: node, to: w.tn, dst: a.remote}, a.nodeTailnet, nil},
			{"LAN to remote pod", packet{from: w.lan, src: a.lan, to: w.tn, dst: a.remote}, nothing, nil},
			{"LAN to remote pod, allowed", packet{from: w.lan, src: a.lan, to: w.tn, dst: a.remote}, a.nodeTailnet, []string{"LAN allowed"}},
			{"device to LAN (exit node)", packet{from: w.tn, src: a.device, to: w.lan, dst: a.lan}, node, []string{"default"}},
			{"device to LAN, daemon mode", packet{from: w.tn, src: a.device, to: w.lan, dst: a.lan}, a.device, []string{"daemon mode"}},
			{"peer to peer lends no identity", packet{from: w.tn, src: a.device, to: w.tn, dst: a.remote2}, a.device, nil},
			{"tunnel in tunnel", packet{from: w.node, to: w.tn, dst: a.device, mark: 0x80000}, nothing, nil},
			{"the node's own to a device", packet{from: w.node, to: w.tn, dst: a.device, mark: 0x40}, a.nodeTailnet, nil},
		}
		for _, c := range cases {
			if c.configs == nil {
				c.configs = []string{"default"}
			}
			for _, name := range c.configs {
				t.Run(family+"/"+c.name+"/"+name, func(t *testing.T) {
					w.sync(configs[name])
					if c.name == "peer to peer lends no identity" {
						// The tailnet's namespace has both ends: the way over the node must be asked for.
						w.tn.Run(t, "ip", "rule", "add", "pref", "0", "iif", "tun", "lookup", "local")
						defer w.tn.Run(t, "ip", "rule", "del", "pref", "0", "iif", "tun", "lookup", "local")
					}
					hear := w.waitFor
					if !c.want.IsValid() {
						hear = w.heard
					}
					if got := hear(c.packet); got != c.want {
						t.Errorf("the receiver heard %v, want %v", got, c.want)
					}
				})
			}
		}
	}
}

// Under deny a pod still answers a device that may reach it.
// A device of the tailnet at services, by kube-proxy's DNAT without its masquerading: it gets to those that the node leads to, and whoever
// answers knows the way back.
func TestServicesOutOfTheTunnel(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for family, a := range worldAddrs {
		fam, prefix, all := "ip", "10.96.0.", "10.96.0.0/12"
		if family == "IPv6" {
			fam, prefix, all = "ip6", "fd00:96::", "fd00:96::/112"
		}
		service := func(n string) netip.Addr { return netip.MustParseAddr(prefix + n) }
		w.node.Run(t, "nft", "table "+fam+" kube-proxy { chain services { type nat hook prerouting priority dstnat; "+
			fam+" daddr "+prefix+"1 dnat to "+a.podA.String()+"; "+fam+" daddr "+prefix+"2 dnat to "+a.remote.String()+"; "+
			fam+" daddr "+prefix+"3 dnat to "+a.lan.String()+"; }; }")
		closed, open, one, daemon := typical(), typical(), typical(), typical()
		open.Served = prefixes(all)
		one.Served = prefixes(netip.PrefixFrom(service("1"), service("1").BitLen()).String())
		daemon.Served, daemon.HostMode, daemon.Masquerade, daemon.TailnetEgress = open.Served, false, false, config.EgressDeny
		nothing := netip.Addr{}
		for _, c := range []struct {
			name string
			cfg  Config
			packet
			want netip.Addr
		}{
			{"of a pod here, not led to", closed, packet{to: w.podA, dst: a.podA, asked: service("1")}, nothing},
			{"of a pod elsewhere, not led to", closed, packet{to: w.tn, dst: a.remote, asked: service("2")}, nothing},
			{"beside the node, not led to", closed, packet{to: w.lan, dst: a.lan, asked: service("3")}, nothing},
			{"of a pod here", open, packet{to: w.podA, dst: a.podA, asked: service("1")}, a.device},
			{"of a pod elsewhere", open, packet{to: w.tn, dst: a.remote, asked: service("2")}, a.nodeTailnet},
			{"beside the node", open, packet{to: w.lan, dst: a.lan, asked: service("3")}, a.node},
			{"of a pod here, in daemon mode and without egress", daemon, packet{to: w.podA, dst: a.podA, asked: service("1")}, a.device},
			{"of a pod elsewhere, likewise", daemon, packet{to: w.tn, dst: a.remote, asked: service("2")}, a.nodeTailnet},
			{"beside the node, likewise", daemon, packet{to: w.lan, dst: a.lan, asked: service("3")}, a.node},
			{"the only one", one, packet{to: w.podA, dst: a.podA, asked: service("1")}, a.device},
			{"not the only one", one, packet{to: w.tn, dst: a.remote, asked: service("2")}, nothing},
			{"a pod itself, as ever", closed, packet{to: w.podA, dst: a.podA}, a.device},
		} {
			t.Run(family+"/"+c.name, func(t *testing.T) {
				w.sync(c.cfg)
				c.from, c.src = w.tn, a.device
				hear := w.waitFor
				if !c.want.IsValid() {
					hear = w.heard
				}
				if got := hear(c.packet); got != c.want {
					t.Errorf("the receiver heard %v, want %v", got, c.want)
				}
			})
		}
		w.sync(closed)
		w.heard(packet{from: w.tn, src: a.device, to: w.podA, dst: a.podA, asked: service("1")})
		if text := w.node.Run(t, "nft", "list", "counter", fam, "headcni", DropTailnetService); strings.Contains(text, "packets 0 ") {
			t.Errorf("nothing was counted: %s", text)
		}
	}
}

func TestDenyLetsAnswersOut(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cfg := typical()
	cfg.TailnetEgress = config.EgressDeny
	w.sync(cfg)
	for family, a := range worldAddrs {
		var pod, device *net.UDPConn
		w.podA.Do(t, func() (err error) {
			pod, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a.podA, testPort)))
			return err
		})
		defer pod.Close()
		go func() {
			b := make([]byte, 16)
			for {
				_, from, err := pod.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				_, _ = pod.WriteToUDPAddrPort(b, from) // the reader times out when it fails
			}
		}()
		w.tn.Do(t, func() (err error) {
			device, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a.device, 0)),
				net.UDPAddrFromAddrPort(netip.AddrPortFrom(a.podA, testPort)))
			return err
		})
		defer device.Close()
		if _, err := device.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := device.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := device.Read(make([]byte, 16)); err != nil {
			t.Errorf("%s: no answer: %v", family, err)
		}
	}
}

func TestNobodyPosesAsAnother(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for family, a := range worldAddrs {
		for name, forged := range map[string]netip.Addr{"other pod": a.podB, "remote pod": a.remote, "node": a.node,
			"tailnet": a.device, "free pod address": a.hole, "anybody": a.forged} {
			w.own(w.podA, "eth0", forged)
			for target, p := range map[string]packet{
				"pod":    {from: w.podA, src: forged, to: w.podB, dst: a.podB},
				"LAN":    {from: w.podA, src: forged, to: w.lan, dst: a.lan},
				"remote": {from: w.podA, src: forged, to: w.tn, dst: a.remote2},
			} {
				if p.src == p.dst {
					continue
				}
				t.Run(family+"/pod as "+name+" to "+target, func(t *testing.T) {
					w.forgery(t, p)
				})
			}
			w.disown(w.podA, "eth0", forged)
		}
		w.own(w.lan, "eth0", a.remote, a.hole)
		for name, forged := range map[string]netip.Addr{"remote pod": a.remote, "free pod address": a.hole} {
			t.Run(family+"/LAN as "+name, func(t *testing.T) {
				w.forgery(t, packet{from: w.lan, src: forged, to: w.podA, dst: a.podA})
			})
		}
	}
}

// forgery must arrive without our tables, so that the test can fail, and must not with them.
func (w *world) forgery(t *testing.T, p packet) {
	w.sync(typical())
	w.say(w.tables, w.sources())
	if got := w.heard(p); got.IsValid() {
		t.Errorf("a forged packet arrived from %v", got)
	}
	w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
	if !w.waitFor(p).IsValid() {
		t.Error("nothing arrives without our tables: this test cannot fail")
	}
}

func TestNeverInClear(t *testing.T) {
	t.Parallel()
	for family, a := range worldAddrs {
		t.Run(family, func(t *testing.T) {
			w := newWorld(t)
			// The tunnel is dead and a static route takes the cluster to the LAN, where somebody listens.
			cluster := map[string]string{"IPv4": "10.244.0.0/16", "IPv6": "fd00:244::/32"}[family]
			w.node.Run(t, "ip", "route", "replace", cluster, "via", a.lan.String())
			w.own(w.lan, "eth0", a.remote)
			packets := map[string]packet{
				"pod":                    {from: w.podA, to: w.lan, dst: a.remote},
				"node":                   {from: w.node, to: w.lan, dst: a.remote},
				"node with another mark": {from: w.node, to: w.lan, dst: a.remote, mark: 0x80000},
			}
			for _, tun := range []string{"headcni01", ""} {
				cfg := typical()
				cfg.TunName = tun
				w.sync(cfg)
				for name, p := range packets {
					if got := w.heard(p); got.IsValid() {
						t.Errorf("tun %q: %s's packet went out in clear, from %v", tun, name, got)
					}
				}
			}
			w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
			if !w.waitFor(packets["pod"]).IsValid() {
				t.Error("nothing arrives without the guard: this test cannot fail")
			}
		})
	}
}

// What one tailnet address sends to another leaves by the tunnel or not at all, whoever has which: answers of the node carry what its
// pods were sent. From its other addresses the host reaches what is beside it in the same range, in IPv4, where no member of the tailnet is.
func TestTailnetNeverInClear(t *testing.T) {
	t.Parallel()
	for family, a := range worldAddrs {
		t.Run(family, func(t *testing.T) {
			w := newWorld(t)
			lost := map[string]netip.Addr{"IPv4": netip.MustParseAddr("100.64.0.50"), "IPv6": netip.MustParseAddr("fd7a:115c:a1e0::50")}[family]
			for _, dst := range []netip.Addr{a.device, lost} {
				w.node.Run(t, "ip", "route", "replace", dst.String(), "via", a.lan.String())
				w.own(w.lan, "eth0", dst)
			}
			w.tn.Run(t, "ip", "route", "replace", lost.String(), "via", a.nodeTailnet.String())
			packets := map[string]packet{
				"the node's tailnet address": {from: w.node, src: a.nodeTailnet, to: w.lan, dst: a.device},
				"a device":                   {from: w.tn, src: a.device, to: w.lan, dst: lost},
				"the node's address":         {from: w.node, src: a.node, to: w.lan, dst: a.device},
			}
			w.sync(typical())
			for name, p := range packets {
				if got := w.heard(p); got.IsValid() {
					t.Errorf("from %s: a packet went out in clear, as %v", name, got)
				}
			}
			if family == "IPv4" {
				for name, p := range map[string]packet{
					"the host's own neighbour": {from: w.node, src: a.node, to: w.lan, dst: lost},
					"a peer's endpoint":        {from: w.node, src: a.node, to: w.lan, dst: a.device, mark: names.BypassMark},
				} {
					if !w.waitFor(p).IsValid() {
						t.Errorf("%s is not reached", name)
					}
				}
			}
			w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
			for name, p := range packets {
				if !w.waitFor(p).IsValid() {
					t.Errorf("from %s: nothing arrives without the guard: this test cannot fail", name)
				}
			}
		})
	}
}

// What the node has to say of a packet out of the tunnel quotes it. While tailscaled's routes are away the sender is behind the default
// route. From what others sent the host's own neighbour in the tailnet's range hears errors as ever.
func TestErrorsNotInClear(t *testing.T) {
	t.Parallel()
	for family, a := range worldAddrs {
		t.Run(family, func(t *testing.T) {
			w := newWorld(t)
			ranges := map[string][]string{"IPv4": {"100.64.0.0/10", "192.168.50.0/24"}, "IPv6": {"fd7a:115c:a1e0::/48", "fd00:50::/64"}}[family]
			for _, r := range ranges {
				w.node.Run(t, "ip", "route", "replace", r, "via", a.lan.String())
			}
			w.tn.Run(t, "ip", "neigh", "replace", a.nodeTailnet.String(), "lladdr", w.mac("headcni01").String(), "nud", "permanent", "dev", "tun")
			w.disown(w.node, "headcni01", a.nodeTailnet)
			service := map[string]netip.Addr{"IPv4": netip.MustParseAddr("10.96.0.10"), "IPv6": netip.MustParseAddr("fd00:96::10")}[family]
			to := []netip.Addr{a.hole, a.remote2.Next(), service, a.nodeTailnet}
			var packets [][]byte
			for i, dst := range to {
				w.node.Run(t, "ip", "route", "replace", "unreachable", dst.String())
				for _, src := range []netip.Addr{a.device, behind[family]} {
					// The kernel limits its errors to each address.
					for range i {
						src = src.Next()
					}
					packets = append(packets, nstest.Packet(src, dst, unix.IPPROTO_UDP, nstest.UDP(src, dst, 9, testPort, "secret")))
				}
			}
			e := look(t, w.lan, "eth0")
			quoted := func() (n int) {
				for _, s := range e.until(t, "the end", func() { raw(t, w.node, saying(a.node, a.lan, "the end")) }) {
					if strings.Contains(s.rest, "secret") {
						n++
					}
				}
				return n
			}
			w.sync(withSubnets(func(c *Config) { c.Subnets.Open, c.Served = true, c.KeepSource }))
			raw(t, w.tn, packets...)
			if n := quoted(); n > 0 {
				t.Errorf("%d errors quote in clear what came out of the tunnel", n)
			}
			w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
			e = look(t, w.lan, "eth0")
			raw(t, w.tn, packets...)
			if n := quoted(); n != len(packets) {
				t.Errorf("%d errors without the guard, want %d: this test cannot fail", n, len(packets))
			}
		})
	}
}

// While the tables are written anew again and again, and while chains of an earlier release give way to ours, not one packet slips through.
func TestRewriteLeavesNoMoment(t *testing.T) {
	w := newWorld(t)
	a := worldAddrs["IPv4"]
	w.node.Run(t, "ip", "route", "replace", "10.244.0.0/16", "via", a.lan.String())
	w.own(w.lan, "eth0", a.remote)
	cfg := typical()
	w.sync(cfg)
	var in *net.UDPConn
	w.lan.Do(t, func() (err error) {
		in, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a.remote, testPort)))
		return err
	})
	var heard, sent atomic.Int64
	go func() {
		for b := make([]byte, 16); ; heard.Add(1) {
			if _, err := in.Read(b); err != nil {
				return
			}
		}
	}()
	stop := make(chan struct{})
	var flood sync.WaitGroup
	for _, from := range []*nstest.NS{w.node, w.podA} {
		var out *net.UDPConn
		from.Do(t, func() (err error) {
			out, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(a.remote, testPort)))
			return err
		})
		flood.Go(func() {
			defer out.Close()
			for {
				select {
				case <-stop:
					return
				default:
					_, _ = out.Write([]byte("x")) // EPERM is what we want
					sent.Add(1)
				}
			}
		})
	}
	for i := range 40 {
		cfg.KeepSource = prefixes("10.96.0.0/12", "10."+strconv.Itoa(100+i)+".0.0/24")
		w.sync(cfg)
	}
	for range 40 {
		w.node.Run(t, "nft", `add chain ip headcni earlier { type filter hook postrouting priority 0 ; }; add rule ip headcni earlier ip daddr 10.244.0.0/16 drop`)
		w.node.Run(t, "nft", "flush chain ip headcni guard; delete chain ip headcni guard")
		w.sync(cfg)
	}
	close(stop)
	flood.Wait()
	if n := heard.Load(); n != 0 {
		t.Errorf("%d of %d packets slipped through", n, sent.Load())
	}
	t.Logf("%d packets sent", sent.Load())
	w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
	w.send(packet{from: w.podA, src: a.podA, to: w.lan, dst: a.remote})
	for i := 0; heard.Load() == 0; i++ {
		if i == 100 {
			t.Fatal("nothing arrives without the guard: this test cannot fail")
		}
		w.send(packet{from: w.podA, src: a.podA, to: w.lan, dst: a.remote})
		time.Sleep(10 * time.Millisecond)
	}
	in.Close()
}

// A pod's connect waits while the tunnel is away, and still fails at once for what is not of the cluster.
func TestPatience(t *testing.T) {
	t.Parallel()
	for family, a := range worldAddrs {
		t.Run(family, func(t *testing.T) {
			w := newWorld(t)
			w.sync(typical())
			elsewhere := map[string]string{"IPv4": "203.0.113.7", "IPv6": "2001:db8:7::7"}[family]
			for _, dst := range []string{a.remote.String(), elsewhere} {
				// What rule 5192 does while table 52 is empty.
				w.node.Run(t, "ip", map[string]string{"IPv4": "-4", "IPv6": "-6"}[family], "rule", "add", "pref", "5192", "to", dst, "unreachable")
			}
			connect := func(from *nstest.NS, dst string, wait time.Duration) (err error) {
				from.Do(t, func() error {
					var c net.Conn
					c, err = net.DialTimeout("tcp", net.JoinHostPort(dst, "80"), wait)
					if err == nil {
						c.Close()
					}
					return nil
				})
				return err
			}
			// An error that arrives while connect holds the socket counts only at the next SYN, after 1 s.
			const long, short = 5 * time.Second, 1500 * time.Millisecond
			if err := connect(w.podA, elsewhere, long); err == nil || isTimeout(err) {
				t.Errorf("connect elsewhere waits: %v", err)
			}
			if err := connect(w.podA, a.remote.String(), short); !isTimeout(err) {
				t.Errorf("connect to a remote pod failed at once: %v", err)
			}
			w.node.Run(t, "nft", "flush chain "+nftFamily[family]+" headcni patience")
			// From the other pod: the kernel sends each only so many errors, dropped ones included.
			if err := connect(w.podB, a.remote.String(), long); isTimeout(err) {
				t.Error("connect waits without the rule: this test cannot fail")
			}
		})
	}
}

var nftFamily = map[string]string{"IPv4": "ip", "IPv6": "ip6"}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// Containers that a pod forwards for, as Docker in a pod, have a larger MTU than the pod, and many routers tell nobody that a packet
// was too large.
func TestContainersInAPod(t *testing.T) {
	t.Parallel()
	w, inner := newWorld(t), nstest.New(t)
	w.node.Run(t, "ip", "link", "set", "hca", "mtu", "1280")
	w.podA.Run(t, "sh", "-ec", fmt.Sprintf(`echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
		ip link set eth0 mtu 1280
		ip link add docker0 type veth peer name eth0 netns /run/netns/%s; ip link set docker0 up
		ip addr add 172.18.0.1/24 dev docker0; ip addr add fd00:18::1/64 dev docker0 nodad
		nft "table inet n { chain p { type nat hook postrouting priority 100; oifname eth0 masquerade; }; }"`, inner.Name))
	inner.Run(t, "sh", "-ec", `ip link set eth0 up; ip addr add 172.18.0.2/24 dev eth0; ip addr add fd00:18::2/64 dev eth0 nodad
		ip route add default via 172.18.0.1; ip route add default via fd00:18::1`)
	// The server, and a pod of another node by a tunnel that promises more than it keeps, hear no ICMP error.
	for _, ns := range []*nstest.NS{w.lan, w.tn} {
		ns.Run(t, "nft", `table inet n { chain i { type filter hook input priority 0; icmp type destination-unreachable drop; icmpv6 type packet-too-big drop; }; }`)
	}
	for family, a := range worldAddrs {
		for name, server := range map[string]struct {
			ns   *nstest.NS
			addr netip.Addr
		}{"outside": {w.lan, a.lan}, "remote pod": {w.tn, a.remote}} {
			t.Run(family+"/"+name, func(t *testing.T) {
				w.node.Do(t, func() error { return w.tables.Remove(t.Context()) })
				if mss, _ := w.download(inner, server.ns, server.addr, 0); mss <= 1240 {
					t.Fatalf("the server's segments have %d bytes without our tables: this test cannot fail", mss)
				}
				w.sync(typical())
				const size = 256 << 10
				if mss, n := w.download(inner, server.ns, server.addr, size); mss > 1240 || n != size {
					t.Errorf("%d of %d bytes came, by segments of %d", n, size, mss)
				}
			})
		}
	}
}

// download has a client read so many bytes from a server. It returns the size of the server's segments and what came.
func (w *world) download(client, server *nstest.NS, at netip.Addr, size int) (mss int, n int64) {
	w.t.Helper()
	var l net.Listener
	server.Do(w.t, func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(at, 0).String())
		return err
	})
	defer l.Close()
	segments := make(chan int, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			segments <- 0
			return
		}
		defer c.Close()
		raw, err := c.(*net.TCPConn).SyscallConn()
		segment := 0 // where it cannot be had
		if err == nil {
			_ = raw.Control(func(fd uintptr) { segment, _ = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG) })
		}
		segments <- segment
		_, _ = c.Write(make([]byte, size))
	}()
	client.Do(w.t, func() error {
		c, err := net.DialTimeout("tcp", l.Addr().String(), 10*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			return err
		}
		n, err = io.Copy(io.Discard, c)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil // n says how far it came
		}
		return err
	})
	return <-segments, n
}

func TestPodsTalkThoughForwardDrops(t *testing.T) {
	t.Parallel()
	for backend, programs := range map[string][]string{
		"iptables-nft":    {"iptables-nft", "ip6tables-nft"},
		"iptables-legacy": {"iptables-legacy", "ip6tables-legacy"},
	} {
		t.Run(backend, func(t *testing.T) {
			w := newWorld(t)
			for _, p := range programs {
				w.node.Run(t, p, "-P", "FORWARD", "DROP")
			}
			for family, a := range worldAddrs {
				paths := map[string]packet{
					"pod to pod":        {from: w.podA, src: a.podA, to: w.podB, dst: a.podB},
					"pod to LAN":        {from: w.podA, src: a.podA, to: w.lan, dst: a.lan},
					"pod to remote pod": {from: w.podA, src: a.podA, to: w.tn, dst: a.remote},
					"remote pod to pod": {from: w.tn, src: a.remote, to: w.podA, dst: a.podA},
					"LAN to tun":        {from: w.lan, src: a.lan, to: w.tn, dst: a.remote},
				}
				firewall := hostfirewall.New()
				if w.heard(paths["pod to pod"]).IsValid() {
					t.Fatalf("%s: FORWARD does not drop: this test cannot fail", family)
				}
				allowing := typical()
				allowing.LANIngress = true
				w.sync(allowing)
				w.node.Do(t, func() error {
					_, err := firewall.Sync(t.Context(), hostfirewall.Config{TunName: typical().TunName})
					return err
				})
				for name, p := range paths {
					if !w.waitFor(p).IsValid() {
						t.Errorf("%s: %s: nothing arrives", family, name)
					}
				}
				w.node.Do(t, func() error { return errors.Join(w.tables.Remove(t.Context()), firewall.Remove(t.Context())) })
			}
		})
	}
}
