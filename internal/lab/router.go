package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// NAT is how a router gives what leaves its site another source.
type NAT string

const (
	// Easy keeps the port where it is free: what home routers do, and Linux' masquerade.
	Easy NAT = "easy"
	// Hard chooses a port at random for each destination: nobody can foretell where a node is reached.
	Hard NAT = "hard"
)

// PortMapping is how a router is asked to map ports of its outside address.
type PortMapping string

const (
	// UPnP is all that many home routers speak.
	UPnP PortMapping = "upnp"
	// NATPMP stands for PCP too, which is answered at the same port.
	NATPMP PortMapping = "natpmp"
)

// Site is where a node stands: the zero value is the underlay itself, anything else a LAN behind a router. The routers of
// all sites have their outside on the underlay, which is the internet to them.
type Site struct {
	// NAT is for IPv4. A site without has no IPv4 to the outside.
	NAT NAT
	// Carrier puts a second router before the first, the provider's, with the same NAT.
	Carrier bool
	// Opened has the router keep the port of the node's tailscaled, 41641, and pass on to it what comes to that.
	Opened bool
	// PortMapping has the router map ports for the nodes that ask it to. Its outside address is a public one. It does not go with Carrier.
	PortMapping PortMapping
	// NoUDP lets nothing out but TCP to the control host.
	NoUDP bool
	// Proxy lets nothing out at all, but has an HTTP proxy on the router that connects to port 443 of whoever is named to it. The
	// site knows no names of the outside. It goes with Options.TLS only.
	Proxy bool
	// OpenInput has the outermost router answer what is for its own address, as a bare Linux does; else it drops it.
	OpenInput bool
	// Strict has the router pass on no TCP whose beginning it has not seen: carriers and BSD's pf do so, Linux does not. What it
	// forgets hangs then, where else it goes on or is reset.
	Strict bool
	// IPv6 gives the LAN addresses of its own that are routed, behind a firewall that lets in what answers only.
	IPv6 bool
	// LAN is the IPv4 one, by default 192.168.1.0/24, for all sites the same.
	LAN netip.Prefix
	// MTU of the way from the router to the underlay in bytes, 0 = the underlay's.
	MTU int
	// Wire is between the outermost router and the underlay.
	Wire Wire
}

func (s Site) behind() bool { return s != Site{} }

func (s Site) maps() bool { return s.PortMapping != "" }

// homeLAN is what most homes have.
var homeLAN = netip.MustParsePrefix("192.168.1.0/24")

// LANAddr is the IPv4 address of host number n in the site.
func (s Site) LANAddr(n int) netip.Prefix {
	lan := s.LAN
	if !lan.IsValid() {
		lan = homeLAN
	}
	return hostIn(lan, n)
}

func hostIn(p netip.Prefix, n int) netip.Prefix {
	a := p.Masked().Addr().AsSlice()
	a[len(a)-1] += byte(n)
	addr, _ := netip.AddrFromSlice(a) // of the same length
	return netip.PrefixFrom(addr, p.Bits())
}

// Router stands between a site and the underlay.
type Router struct {
	*Machine
	Site Site
	// Proxy is its HTTP proxy, where it has one.
	Proxy *Process
	// Mapper maps ports, where the site has that.
	Mapper *Process
	node   *Node
}

const (
	lanLink = "lan"
	wanLink = "eth0"
	// tailscaledPort is where tailscaled listens unless it is told otherwise.
	tailscaledPort = 41641
	// proxyPort is where the router's HTTP proxy listens.
	proxyPort = 3128
	// routerHost is the router's number on its LAN, siteHost the node's.
	routerHost, siteHost = 1, 10
)

// carrierNet is between the two routers of a site with Carrier, as RFC 6598 has it.
var carrierNet = netip.MustParsePrefix("100.72.0.0/24")

// site is where node number i stands.
func (o Options) site(i int) Site {
	if len(o.Sites) == 0 {
		return Site{}
	}
	return o.Sites[i%len(o.Sites)]
}

// siteIPv6 is the IPv6 LAN behind the router with host number n on the underlay.
func siteIPv6(n int) netip.Prefix {
	a := underlay6.Addr().As16()
	a[7] = byte(n)
	return netip.PrefixFrom(netip.AddrFrom16(a), 64)
}

// addRouters makes the routers of the node's site, the outermost last.
func (n *Node) addRouters(ctx context.Context) error {
	site := n.lab.opt.site(n.index)
	if !site.behind() {
		return nil
	}
	names := []string{"router"}
	if site.Carrier {
		names = append(names, "carrier")
	}
	for _, name := range names {
		m, err := newMachine(ctx, n.lab.Dir, fmt.Sprintf("%s-%d", name, n.index+1), n.lab.hosts(false), n.lab.opt.path(), n.lab.lock)
		if err != nil {
			return err
		}
		n.Routers = append(n.Routers, &Router{Machine: m, Site: site, node: n})
	}
	return nil
}

// plugSite connects the node to its router, that one to the next, and the last to the underlay, whose port has the node's name.
func (n *Node) plugSite(ctx context.Context, control *Machine) error {
	outer := n.Routers[len(n.Routers)-1]
	site, opt, host := outer.Site, n.lab.opt, n.index+11
	mtu := site.MTU
	if mtu == 0 {
		mtu = opt.UnderlayMTU
	}
	if err := outer.Machine.plugBy(site.Wire, control, n.Port, mtu); err != nil {
		return err
	}
	wan := opt.outside(site, host)
	if !site.IPv6 {
		wan = slices.DeleteFunc(wan, func(p netip.Prefix) bool { return p.Addr().Is6() })
	}
	if err := outer.configure(wanLink, wan, gateways(opt.outside(site, 1), wan)); err != nil {
		return err
	}
	for i, inner := range n.Routers[:len(n.Routers)-1] {
		if err := inner.behind(n.Routers[i+1], hostIn(carrierNet, siteHost), hostIn(carrierNet, routerHost), opt.UnderlayMTU); err != nil {
			return err
		}
	}
	if err := n.plugIntoLAN(); err != nil {
		return err
	}
	for _, r := range n.Routers {
		if err := r.route(); err != nil {
			return err
		}
	}
	if site.Proxy {
		if err := n.Routers[0].StartProxy(ctx); err != nil {
			return err
		}
	}
	if site.maps() {
		if err := outer.StartMapper(ctx); err != nil {
			return err
		}
	}
	if !site.IPv6 {
		return nil
	}
	return routeTo(control, bridgeName, siteIPv6(host), underlayAddrs(host)[1].Addr())
}

// behind plugs a router's or a node's outside into a router's LAN.
func (m *Machine) behind(r *Router, addr, gateway netip.Prefix, mtu int) error {
	if err := m.plugLink(r.Machine, lanLink, 0, mtu); err != nil {
		return err
	}
	if err := r.configure(lanLink, []netip.Prefix{gateway}, nil); err != nil {
		return err
	}
	return m.configure(wanLink, []netip.Prefix{addr}, []netip.Prefix{gateway})
}

// plugIntoLAN gives the node its place in the LAN.
func (n *Node) plugIntoLAN() error {
	r := n.Routers[0]
	if err := n.Machine.behind(r, r.Site.LANAddr(siteHost), r.Site.LANAddr(routerHost), n.lab.opt.UnderlayMTU); err != nil || !r.Site.IPv6 {
		return err
	}
	lan := siteIPv6(n.index + 11)
	if err := r.configure(lanLink, []netip.Prefix{hostIn(lan, routerHost)}, nil); err != nil {
		return err
	}
	return n.configure(wanLink, []netip.Prefix{hostIn(lan, siteHost)}, []netip.Prefix{hostIn(lan, routerHost)})
}

// gateways are those of the families that addrs has.
func gateways(all, addrs []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(all), func(g netip.Prefix) bool {
		return !slices.ContainsFunc(addrs, func(a netip.Prefix) bool { return a.Addr().Is4() == g.Addr().Is4() })
	})
}

func routeTo(m *Machine, link string, to netip.Prefix, by netip.Addr) error {
	l, err := m.Net.LinkByName(link)
	if err != nil {
		return err
	}
	return m.Net.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: netipNet(to), Gw: by.AsSlice()})
}

// route has the router forward, and loads its rules.
func (r *Router) route() error {
	if err := r.forward(); err != nil {
		return err
	}
	if r.Site.Strict {
		if err := r.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0"); err != nil {
			return err
		}
	}
	_, err := run(context.Background(), r.ns, r.env, []byte(r.rules()), r.find("nft"), "-f", "-")
	return err
}

// forward has a machine forward packets of both families.
func (m *Machine) forward() error {
	return errors.Join(m.sysctl("net/ipv4/ip_forward", "1"), m.sysctl("net/ipv6/conf/all/forwarding", "1"))
}

// sysctl sets one of the machine's network.
func (m *Machine) sysctl(name, value string) error {
	return m.Do(func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0) })
}

// rules are the router's, as nft reads them.
func (r *Router) rules() string {
	s := r.Site
	outermost := r == r.node.Routers[len(r.node.Routers)-1]
	var head, forward, input, nat strings.Builder
	fmt.Fprintf(&forward, "ct state established,related accept\nct state invalid drop\n")
	// A wire that carries less swallows what is too large, and nobody says so: all home routers with such a WAN clamp TCP.
	if s.MTU != 0 {
		fmt.Fprintf(&head, "oifname %s tcp flags syn tcp option maxseg size set %d\n", wanLink, s.MTU-60)
	}
	switch {
	case s.Proxy:
	case s.NoUDP:
		fmt.Fprintf(&forward, "iifname %s ip daddr %s tcp dport { %d, %d } accept\n", lanLink, underlayAddrs(1)[0].Addr(), headscalePort, relayPort)
	default:
		fmt.Fprintf(&forward, "iifname %s accept\n", lanLink)
	}
	var opened string
	if s.Opened {
		opened = fmt.Sprintf("iifname %s udp dport %d dnat to %s\n", wanLink, tailscaledPort, s.LANAddr(siteHost).Addr())
		fmt.Fprintf(&forward, "ct status dnat accept\n")
		fmt.Fprintf(&nat, "oifname %s udp sport %d masquerade\n", wanLink, tailscaledPort)
	}
	var mapping string
	if s.maps() {
		mapping = mapperChains
		fmt.Fprintf(&forward, "jump %s\n", mapped)
	}
	if !outermost || !s.OpenInput {
		fmt.Fprintf(&input, "iifname %s ct state established,related accept\niifname %s meta l4proto ipv6-icmp accept\niifname %s drop\n", wanLink, wanLink, wanLink)
	}
	switch s.NAT {
	case Easy:
		fmt.Fprintf(&nat, "oifname %s masquerade\n", wanLink)
	case Hard:
		fmt.Fprintf(&nat, "oifname %s meta l4proto { tcp, udp } masquerade fully-random\noifname %s masquerade\n", wanLink, wanLink)
	default:
		fmt.Fprintf(&forward, "meta nfproto ipv4 drop\n")
	}
	return fmt.Sprintf(`add table inet router
delete table inet router
add table ip routernat
delete table ip routernat
table inet router {
%schain forward { type filter hook forward priority 0; policy drop;
%s%s}
chain input { type filter hook input priority 0;
%s}
}
table ip routernat {
chain prerouting { type nat hook prerouting priority -100;
%s}
chain postrouting { type nat hook postrouting priority 100;
%s}
}
`, mapping, head.String(), forward.String(), input.String(), opened, nat.String())
}

// Forget has the router lose all that it knows of connections, as a restart of it does.
func (r *Router) Forget() error {
	if err := r.Net.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		return fmt.Errorf("flush what %s knows of connections: %w", r.Name, err)
	}
	return nil
}

// Restart has the router begin anew, without what it knew of connections and without the ports that it mapped.
func (r *Router) Restart(ctx context.Context) error {
	if r.Mapper != nil {
		if err := r.Mapper.Kill(); err != nil {
			return err
		}
	}
	if err := errors.Join(r.route(), r.Forget()); err != nil || r.Mapper == nil {
		return err
	}
	return r.StartMapper(ctx)
}

// Connections is how the router translates, one connection a line, for whoever wants to know why two nodes do not meet.
func (r *Router) Connections() ([]string, error) {
	var lines []string
	flows, err := r.Net.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	for _, f := range flows {
		lines = append(lines, f.String())
	}
	return lines, err
}

// Renumber gives the outermost router of a site another IPv4 address outside, as providers do each night. The kernel
// forgets what it translated to the old one.
func (n *Node) Renumber(host int) error {
	r := n.Routers[len(n.Routers)-1]
	if err := r.loseIPv4(wanLink); err != nil {
		return err
	}
	addr := n.lab.opt.outside(r.Site, host)[:1]
	n.Underlay[0] = addr[0].Addr()
	return r.configure(wanLink, addr, n.lab.opt.outside(r.Site, 1)[:1])
}

// loseIPv4 takes a link's IPv4 addresses away.
func (m *Machine) loseIPv4(name string) error {
	link, err := m.Net.LinkByName(name)
	if err != nil {
		return err
	}
	addrs, err := m.Net.AddrList(link, netlink.FAMILY_V4)
	for _, a := range addrs {
		err = errors.Join(err, m.Net.AddrDel(link, &a))
	}
	if err != nil {
		return fmt.Errorf("take the addresses of %s on %s away: %w", name, m.Name, err)
	}
	return nil
}
