package noderoutes

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/netset"
)

// ErrNoSource means that the node has no default route, or no address to use it with.
var ErrNoSource = errors.New("no default route with a source address")

// DefaultSource returns the address that the node uses towards the world outside by main's default route: pods see it as
// their node's address unless the configuration names another. family is unix.AF_INET or unix.AF_INET6.
// Without one the error is ErrNoSource.
func DefaultSource(af int) (netip.Addr, error) {
	f := families[slices.IndexFunc(families, func(f family) bool { return f.af == af })]
	if !hasFamily(f) {
		return netip.Addr{}, fmt.Errorf("find the node's %s address: %w", f.name, ErrNoSource)
	}
	routes, err := listDefaults(f)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("find the node's address: %w", err)
	}
	var addrs []hostAddr
	err = eachAddr(f, func(a hostAddr) {
		if ip := a.prefix.Addr(); a.scope == unix.RT_SCOPE_UNIVERSE && !ip.IsLinkLocalUnicast() && ip != netset.AnswererIPv6 {
			addrs = append(addrs, a)
		}
	})
	if err != nil {
		return netip.Addr{}, fmt.Errorf("find the node's address: %w", err)
	}
	a, ok := sourceOf(defaultHops(routes), addrs)
	if !ok {
		return netip.Addr{}, fmt.Errorf("find the node's address: %w", ErrNoSource)
	}
	return a, nil
}

// hop is one next hop of a default route.
type hop struct {
	link    int
	gateway netip.Addr // zero: none
	source  netip.Addr // preferred source, zero: none
}

// hostAddr is an address of the node.
type hostAddr struct {
	link         int
	prefix       netip.Prefix
	scope        uint8 // unix.RT_SCOPE_*
	notPreferred bool  // not what the kernel would choose first: secondary, temporary, deprecated or not yet usable
}

// defaultHops returns the next hops, in the order of their routes.
func defaultHops(routes []defaultRoute) []hop {
	var out []hop
	for _, r := range routes {
		if r.kind == unix.RTN_UNICAST {
			out = append(out, r.hops...)
		}
	}
	return out
}

// sourceOf chooses as the kernel does: the route's own source; else the link's first address in the gateway's network;
// else the link's first; else, for a link without addresses, the first address of the node outside the tailnet.
func sourceOf(hops []hop, addrs []hostAddr) (netip.Addr, bool) {
	slices.SortStableFunc(addrs, func(a, b hostAddr) int {
		switch {
		case a.notPreferred == b.notPreferred:
			return 0
		case b.notPreferred:
			return -1
		}
		return 1
	})
	for _, h := range hops {
		if h.source.IsValid() {
			return h.source, true
		}
		for _, ok := range []func(hostAddr) bool{
			func(a hostAddr) bool { return a.link == h.link && a.prefix.Contains(h.gateway) },
			func(a hostAddr) bool { return a.link == h.link },
		} {
			if i := slices.IndexFunc(addrs, ok); i >= 0 {
				return addrs[i].prefix.Addr(), true
			}
		}
	}
	if len(hops) == 0 {
		return netip.Addr{}, false
	}
	i := slices.IndexFunc(addrs, func(a hostAddr) bool {
		return !slices.ContainsFunc(families, func(f family) bool { return f.tailnet.Contains(a.prefix.Addr()) })
	})
	if i < 0 {
		return netip.Addr{}, false
	}
	return addrs[i].prefix.Addr(), true
}

// uplinks are the links of each family's first default route.
func uplinks() (out []netlink.Link) {
	for _, f := range families {
		routes, err := listDefaults(f)
		if hops := defaultHops(routes); err == nil && len(hops) > 0 {
			if link, err := netlink.LinkByIndex(hops[0].link); err == nil {
				out = append(out, link)
			}
		}
	}
	return out
}

// UplinkMTU is the least that the uplinks carry in bytes, 0 without any.
func UplinkMTU() (least int) {
	for _, link := range uplinks() {
		if mtu := link.Attrs().MTU; least == 0 || mtu < least {
			least = mtu
		}
	}
	return least
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
