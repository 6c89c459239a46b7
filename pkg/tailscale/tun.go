package tailscale

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/findings"
)

// ErrNoTun means that no interface carries the tailnet addresses.
var ErrNoTun = findings.New(findings.NoTunnelDevice, "no interface has the tailnet addresses")

// Link is a network interface with its addresses.
type Link struct {
	Name string
	// MTU in bytes.
	MTU   int
	Up    bool
	Addrs []netip.Addr
}

// FindTun finds the interface of a running tailscaled: the one that has one of the node's tailnet addresses. list tells
// the interfaces; use Links for those of the current network namespace.
//
// The LocalAPI tells that there is a tun, not its name.
func FindTun(tailnet []netip.Addr, list func() ([]Link, error)) (Link, error) {
	links, err := list()
	if err != nil {
		return Link{}, fmt.Errorf("find tailscaled's interface: %w", err)
	}
	for _, l := range links {
		if slices.ContainsFunc(l.Addrs, func(a netip.Addr) bool { return slices.Contains(tailnet, a) }) {
			return l, nil
		}
	}
	return Link{}, fmt.Errorf("find tailscaled's interface: %w %v; tailscaled must run in this network namespace, with a tun, not "+
		"with userspace networking", ErrNoTun, tailnet)
}

// FindTunNear looks at the interface that it was before, and at all of them only if that is not it: a node has hundreds.
func FindTunNear(last string, tailnet []netip.Addr) (Link, error) {
	link, err := FindTun(tailnet, func() ([]Link, error) {
		l, err := LinkNamed(last)
		return []Link{l}, err
	})
	if err == nil {
		return link, nil
	}
	return FindTun(tailnet, Links)
}

// Links lists the interfaces of the current network namespace.
func Links() ([]Link, error) {
	ifaces, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	links := make([]Link, 0, len(ifaces))
	for _, i := range ifaces {
		if l, err := link(&i); err == nil { // else it is gone since, as pod links go
			links = append(links, l)
		}
	}
	return links, nil
}

// LinkNamed is one of them.
func LinkNamed(name string) (Link, error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return Link{}, err
	}
	return link(i)
}

func link(i *net.Interface) (Link, error) {
	l := Link{Name: i.Name, MTU: i.MTU, Up: i.Flags&net.FlagUp != 0}
	addrs, err := i.Addrs()
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				l.Addrs = append(l.Addrs, ip.Unmap())
			}
		}
	}
	return l, err
}

// Where tailscaled answers DNS, as routes, and the range of IPv6 tailnet addresses.
var (
	serviceAddr4 = netip.PrefixFrom(netset.ResolverIPv4, 32)
	serviceAddr6 = netip.PrefixFrom(netset.ResolverIPv6, 128)
	tailnet6     = netset.TailnetIPv6
)

// PeerAddrs4 are the peers' own IPv4 addresses, sorted.
func (s Status) PeerAddrs4() []netip.Addr {
	var out []netip.Addr
	for _, p := range s.Peers {
		for _, a := range p.IPs {
			if a.Is4() {
				out = append(out, a)
			}
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// TunnelRoutes are the routes that a running tailscaled which accepts routes has surely made into its interface: to its
// own service, and to the peers that are online. To others it may have some.
func (s Status) TunnelRoutes() []netip.Prefix {
	if s.State != Running {
		return nil
	}
	var out []netip.Prefix
	seen := map[netip.Prefix]bool{}
	add := func(p netip.Prefix) {
		if !seen[p] {
			seen[p] = true
			out = append(out, p)
		}
	}
	for _, a := range s.Self.IPs {
		if a.Is4() {
			add(serviceAddr4)
		} else {
			add(serviceAddr6)
		}
	}
	for _, p := range s.Peers {
		if !p.Online || p.Expired {
			continue
		}
		for _, r := range p.Allowed {
			switch {
			case r.Bits() == 0 && !p.ExitNode:
			case tailnet6.Contains(r.Addr()) && r.IsSingleIP():
				add(tailnet6) // as tailscaled does
			default:
				add(r)
			}
		}
	}
	return out
}
