package hosts

import (
	"encoding/json"
	"errors"
	"fmt"

	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// raLifetime is how long a router's word holds, raInterval how often it is given.
const (
	raLifetime = 5 * time.Second
	raInterval = 250 * time.Millisecond
)

// advertiser is the control host as the IPv6 router of one node.
type advertiser struct{ quiet atomic.Bool }

// startRouter advertises the control host to a node alone until the test ends. The others have their routes.
func startRouter(t *testing.T, w *world, n *lab.Node) *advertiser {
	t.Helper()
	to := &unix.SockaddrInet6{Addr: linkLocal(t, n).As16()}
	bridge, err := w.Control.Net.LinkByName("underlay")
	if err != nil {
		t.Fatal(err)
	}
	to.ZoneId = uint32(bridge.Attrs().Index)
	fd := -1
	err = w.Control.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	const hops = 255 // proves that it comes from the link (RFC 4861, section 6.1.2)
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, hops); err != nil {
		t.Fatal(err)
	}
	// Type 134, code 0, checksum (the kernel's), hop limit 64, no flags, lifetime, reachable and retransmission time.
	ra := []byte{134, 0, 0, 0, 64, 0, 0, byte(raLifetime / time.Second), 0, 0, 0, 0, 0, 0, 0, 0}
	r, done, ended := &advertiser{}, make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		defer unix.Close(fd)
		for {
			if !r.quiet.Load() {
				_ = unix.Sendto(fd, ra, 0, to) // the next one makes up for it
			}
			select {
			case <-done:
				return
			case <-time.After(raInterval):
			}
		}
	}()
	t.Cleanup(func() { close(done); <-ended })
	return r
}

// linkLocal is the address of a node's uplink that routers know it by.
func linkLocal(t *testing.T, n *lab.Node) (addr netip.Addr) {
	t.Helper()
	labtest.Eventually(t, "wait for a link-local address", func() error {
		link, err := n.Net.LinkByName("eth0")
		if err != nil {
			return err
		}
		addrs, err := n.Net.AddrList(link, netlink.FAMILY_V6)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if a.IP.IsLinkLocalUnicast() && a.Flags&unix.IFA_F_TENTATIVE == 0 {
				addr, _ = netip.AddrFromSlice(a.IP)
				return nil
			}
		}
		return errors.New("none")
	})
	return addr
}

// A host that has its IPv6 default route from router advertisements keeps it, although it forwards from now on.
func TestUplinkRouterAdvertisements(t *testing.T) {
	w := surroundings.Enter(t)
	n := w.Nodes[behindRouter]
	far := netip.MustParseAddr("fd98::1")
	labtest.Sh(t, w.Control.Machine, "ip address add %s/128 dev lo nodad", far)
	target := labtest.Service(t, w.Control, netip.AddrPortFrom(far, 0))
	labtest.Sh(t, n.Machine, "ip -6 route delete default")
	router := startRouter(t, w, n)
	byRA := func() error {
		if routes := labtest.Sh(t, n.Machine, "ip -6 route show default"); !strings.Contains(routes, "proto ra") {
			return fmt.Errorf("default routes: %q", routes)
		}
		return nil
	}
	labtest.Eventually(t, "wait for a default route", byRA)
	monitor, err := n.Start("ip", nil, "-ts", "-6", "monitor", "route")
	if err != nil {
		t.Fatal(err)
	}
	defer labtest.Kill(t, monitor)
	sysctls := func() string {
		return labtest.Sh(t, n.Machine, "cd /proc/sys/net/ipv6/conf; echo $(<eth0/accept_ra) $(<eth0/forwarding) $(<all/forwarding)")
	}
	before := sysctls()
	if before != "1 0 0\n" {
		t.Fatalf("the host is not as hosts are: %q", before)
	}

	labtest.Start(t, n, nil)
	labtest.Ready(t, n)
	if now := sysctls(); now != "2 1 1\n" {
		t.Errorf("accept_ra and forwarding: %q", now)
	}
	p := labtest.AddPod(t, n, "p", lab.PodOptions{})
	works := func(what string) {
		labtest.WantTCP(t, "pod to outside, "+what, p, target, n.Underlay[1])
		labtest.WantTCP(t, "node to outside, "+what, n, target, n.Underlay[1])
	}
	works("at first")
	for _, v6 := range []bool{false, true} {
		labtest.WantTCP(t, "to a pod of another node", p, labtest.Echo(w.a1, v6), p.Addr(v6))
		labtest.WantTCP(t, "from a pod of another node", w.b1, labtest.Echo(p, v6), w.b1.Addr(v6))
		labtest.WantTCP(t, "node to its pod", n, labtest.Echo(p, v6), n.Underlay[labtest.Index(v6)])
	}
	hangsOnAdvertisements(t, n, router, monitor, target, byRA, works)

	if err := p.Remove(labtest.Within(t)); err != nil {
		t.Fatal(err)
	}
	labtest.Stop(t, n.Daemon)
	labtest.Sh(t, n.Machine, "headcni-daemon uninstall")
	if now := sysctls(); now != before {
		t.Errorf("after uninstall: %q, want %q", now, before)
	}
	labtest.Eventually(t, "wait for a default route without us", byRA)
	labtest.WantTCP(t, "node to outside, without us", n, target, n.Underlay[1])
}

// hangsOnAdvertisements says that the default route outlives the first advertisement, has always been there, and goes
// with the last one.
func hangsOnAdvertisements(t *testing.T, n *lab.Node, router *advertiser, monitor *lab.Process, target netip.AddrPort,
	byRA func() error, works func(string),
) {
	t.Helper()
	time.Sleep(raLifetime + labtest.Moment)
	if err := byRA(); err != nil {
		t.Errorf("when the first advertisement has run out: %v", err)
	}
	works("renewed")
	log, err := os.ReadFile(monitor.Log)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(log), "Deleted default") {
		t.Errorf("the host was without its default route:\n%s", log)
	}
	// The proof that it hung on advertisements all the time.
	router.quiet.Store(true)
	labtest.Eventually(t, "wait until the last advertisement has run out", func() error {
		if _, err := lab.Ask(t.Context(), n, target); err == nil {
			return errors.New("the outside is still reached")
		}
		return nil
	})
	router.quiet.Store(false)
	works("advertised again")
}

// A host whose only resolver is the tailnet's own: nothing that makes the tailnet may need it.
func TestUplinkOwnResolver(t *testing.T) {
	w := surroundings.Enter(t)
	n := w.Nodes[ownResolver]
	resolv := func(n *lab.Node) { labtest.Sh(t, n.Machine, "echo nameserver 100.100.100.100 > /etc/resolv.conf") }
	names := func(what string, from *lab.Pod) {
		labtest.Eventually(t, what+": ask MagicDNS", func() error {
			addrs, err := lab.Lookup(t.Context(), from, w.a.Name+"."+lab.BaseDomain)
			if err != nil {
				return err
			}
			if want := labtest.TailnetAddrs(t, w.a)[0]; len(addrs) == 0 || addrs[0] != want {
				return fmt.Errorf("%s is %v, want %v", w.a.Name, addrs, want)
			}
			return nil
		})
	}
	resolv(n)
	labtest.Start(t, n, nil) // joins
	labtest.Ready(t, n)
	p := labtest.AddPod(t, n, "p", lab.PodOptions{})
	flows := func() {
		for _, v6 := range []bool{false, true} {
			labtest.WantTCP(t, "to a pod of another node", p, labtest.Echo(w.b1, v6), p.Addr(v6))
			labtest.WantTCP(t, "from a pod of another node", w.b1, labtest.Echo(p, v6), w.b1.Addr(v6))
			labtest.WantTCP(t, "pod to outside", p, w.outside[labtest.Index(v6)], n.Underlay[labtest.Index(v6)])
		}
		names("pod of "+n.Name, p)
	}
	flows()
	// The process that asks the host's resolver, as every program does.
	if got, want := labtest.Sh(t, n.Machine, "getent ahostsv4 %s.%s", w.b.Name, lab.BaseDomain), labtest.TailnetAddrs(t, w.b)[0].String(); !strings.HasPrefix(got, want+" ") {
		t.Errorf("the host's resolver says %q, want %s", got, want)
	}
	labtest.Sh(t, w.b.Machine, "cp /etc/resolv.conf /etc/resolv.conf.before")
	t.Cleanup(func() { labtest.Sh(t, w.b.Machine, "mv /etc/resolv.conf.before /etc/resolv.conf") })
	resolv(w.b)
	for _, m := range []*lab.Node{n, w.b} {
		labtest.Kill(t, m.Daemon, m.Tailscaled)
		resolv(m) // whatever tailscaled had made of it
		labtest.StartTailscaled(t, m)
		labtest.StartDaemon(t, m)
	}
	flows()
	names("daemon mode", w.b1)
	w.works(t)
}

// Hosts with a network of their own inside 100.64.0.0/10, which the tailnet has too.
func TestUplinkOwnCGNAT(t *testing.T) {
	w := surroundings.Enter(t)
	const neighbour = "100.64.200.9"
	labtest.Sh(t, w.Control.Machine, "ip address add %s/24 dev underlay", neighbour)
	t.Cleanup(func() { labtest.Sh(t, w.Control.Machine, "ip address delete %s/24 dev underlay", neighbour) })
	own := []netip.Addr{netip.MustParseAddr("100.64.200.1"), netip.MustParseAddr("100.64.200.2")}
	for i, n := range w.nodes() {
		labtest.Sh(t, n.Machine, "ip address add %s/24 dev eth0", own[i])
		defer labtest.Sh(t, n.Machine, "ip address delete %s/24 dev eth0", own[i])
	}
	at := labtest.Service(t, w.Control, netip.AddrPortFrom(netip.MustParseAddr(neighbour), 0))
	said := func(n *lab.Node, want bool) func() error {
		return func() error {
			text, ready := labtest.Part(t, n, "foreign")
			for _, part := range []string{"100.64.200.0/24", "disable-linux-cgnat-drop-rule"} {
				if strings.Contains(text, part) != want {
					return fmt.Errorf("the daemon says %q", text)
				}
			}
			if !ready {
				return errors.New("the node is not ready")
			}
			return nil
		}
	}
	for _, n := range w.nodes() {
		labtest.Eventually(t, "wait until the daemon names it", said(n, true))
	}
	// Pods do not mind. The host does: tailscaled drops what it gets from there.
	w.works(t)
	pods := []*lab.Pod{w.a1, w.b1}
	for i, n := range w.nodes() {
		labtest.WantTCP(t, "pod to its host's neighbour", pods[i], at, own[i])
		labtest.WantRefused(t, "host to its neighbour, by tailscaled's firewall", n, at)
	}
	allowCGNAT(t, w)
	for i, n := range w.nodes() {
		labtest.WantTCP(t, "host to its neighbour", n, at, own[i])
		labtest.WantTCP(t, "pod to its host's neighbour", pods[i], at, own[i])
		here := labtest.Service(t, n, netip.AddrPortFrom(own[i], 0))
		labtest.WantTCP(t, "neighbour to host", w.Control, here, netip.MustParseAddr(neighbour))
		labtest.Eventually(t, "wait until the daemon is content", said(n, false))
	}
	w.works(t)
}

// allowCGNAT has Headscale's policy tell all tailscaleds to leave 100.64.0.0/10 of other interfaces alone, as the daemon
// advises, until the test ends.
func allowCGNAT(t *testing.T, w *world) {
	t.Helper()
	path := w.Control.Path("/etc/headscale/policy.hujson")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var policy map[string]any
	if err := json.Unmarshal(b, &policy); err != nil {
		t.Fatal(err)
	}
	set := func(text []byte) {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		// Headscale reads its policy again.
		if err := unix.Kill(w.Control.Headscale.PID(), unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { set(b) })
	policy["nodeAttrs"] = []map[string]any{{"target": []string{"*"}, "attr": []string{"disable-linux-cgnat-drop-rule"}}}
	allowing, err := json.Marshal(policy)
	if err != nil {
		t.Fatal(err)
	}
	set(allowing)
}
