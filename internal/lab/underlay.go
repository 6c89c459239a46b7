package lab

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The underlay is one Ethernet segment, a bridge on the control host. Its addresses are private ones: to a control
// server at http://<public address> tailscaled dials port 443 whenever it reconnects within two minutes, and never comes
// back.
const bridgeName = "underlay"

var (
	underlay4 = netip.MustParsePrefix("192.168.77.0/24")
	underlay6 = netip.MustParsePrefix("fd77:77:77::/64")
	// public4 is a second network on the underlay, which the control host routes: no router maps ports to an outside address that is private.
	public4 = netip.MustParsePrefix("25.77.77.0/24")
)

// underlayAddrs are the addresses of host number n, 1 to 254, where the underlay has both families.
func underlayAddrs(n int) []netip.Prefix {
	a4, a6 := underlay4.Addr().As4(), underlay6.Addr().As16()
	a4[3], a6[15] = byte(n), byte(n)
	return []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4(a4), underlay4.Bits()), netip.PrefixFrom(netip.AddrFrom16(a6), underlay6.Bits())}
}

// underlay are the addresses of host number n.
func (o Options) underlay(n int) []netip.Prefix {
	all := underlayAddrs(n)
	if o.OnlyIPv6 {
		return all[1:]
	}
	return all
}

// outside are the addresses of host number n of the underlay, where it is the router of a site or a node without one.
func (o Options) outside(s Site, n int) []netip.Prefix {
	addrs := o.underlay(n)
	if s.maps() {
		addrs[0] = hostIn(public4, n)
	}
	return addrs
}

// addBridge makes the underlay on the control host, which is host 1 on it.
func (m *Machine) addBridge(opt Options) error {
	snooping := false // it would hold neighbour discovery back until its first query
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName, MTU: opt.UnderlayMTU}, MulticastSnooping: &snooping}
	if err := m.Net.LinkAdd(bridge); err != nil {
		return fmt.Errorf("add the underlay bridge: %w", err)
	}
	return m.configure(bridgeName, opt.underlay(1), nil)
}

// addPublic has the control host be the gateway of public4 too. What it sends itself still comes from its own address, at which alone nodes know its relay.
func (m *Machine) addPublic() error {
	gateway := netip.PrefixFrom(hostIn(public4, 1).Addr(), 32)
	if err := m.configure(bridgeName, []netip.Prefix{gateway}, nil); err != nil {
		return err
	}
	bridge, err := m.Net.LinkByName(bridgeName)
	if err != nil {
		return err
	}
	return m.Net.RouteReplace(&netlink.Route{
		LinkIndex: bridge.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: netipNet(public4), Src: underlayAddrs(1)[0].Addr().AsSlice(),
	})
}

// plug connects the machine to control by a veth pair eth0 - port, which is a port of the underlay or stands alone.
func (m *Machine) plug(control *Machine, port string, bridged bool, mtu int) error {
	master := 0
	if bridged {
		bridge, err := control.Net.LinkByName(bridgeName)
		if err != nil {
			return err
		}
		master = bridge.Attrs().Index
	}
	return m.plugLink(control, port, master, mtu)
}

// plugLink connects the machine to another one by a veth pair eth0 - port.
func (m *Machine) plugLink(other *Machine, port string, master, mtu int) error {
	veth := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: port, MTU: mtu, MasterIndex: master},
		PeerName:      "eth0",
		PeerMTU:       uint32(mtu),
		PeerNamespace: netlink.NsFd(int(m.ns.net.Fd())),
	}
	if err := other.Net.LinkAdd(veth); err != nil {
		return fmt.Errorf("plug %s into %s: %w", m.Name, other.Name, err)
	}
	return other.configure(port, nil, nil)
}

// addPort adds a port to the underlay, whose other end is a link on the same machine.
func (m *Machine) addPort(port, end string, mtu int) error {
	bridge, err := m.Net.LinkByName(bridgeName)
	if err != nil {
		return err
	}
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: port, MTU: mtu, MasterIndex: bridge.Attrs().Index}, PeerName: end, PeerMTU: uint32(mtu),
	}
	if err := m.Net.LinkAdd(veth); err != nil {
		return fmt.Errorf("add %s to the underlay: %w", port, err)
	}
	return m.configure(port, nil, nil)
}

// removeLinks removes links, and with each the other end of its pair.
func (m *Machine) removeLinks(names ...string) error {
	for _, name := range names {
		link, err := m.Net.LinkByName(name)
		if err == nil {
			err = m.Net.LinkDel(link)
		}
		if err != nil {
			return fmt.Errorf("unplug %s: %w", name, err)
		}
	}
	return nil
}

// configure sets a link up with addresses and default routes through gateways.
func (m *Machine) configure(name string, addrs, gateways []netip.Prefix) error {
	link, err := m.Net.LinkByName(name)
	if err != nil {
		return err
	}
	if err := m.Net.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	for _, a := range addrs {
		addr := &netlink.Addr{IPNet: netipNet(a)}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD // usable at once
		}
		if err := m.Net.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add %s to %s: %w", a, name, err)
		}
	}
	for _, g := range gateways {
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: g.Addr().AsSlice()}
		if err := m.Net.RouteAdd(route); err != nil {
			return fmt.Errorf("add default route via %s: %w", g.Addr(), err)
		}
	}
	return nil
}

// haveAll says which programs are missing in PATH.
func haveAll(path string, names ...string) (missing []string) {
	m := Machine{env: []string{"PATH=" + path}}
	for _, n := range names {
		if _, err := exec.LookPath(m.find(n)); err != nil {
			missing = append(missing, n)
		}
	}
	return missing
}

func netipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
