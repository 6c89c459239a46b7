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

// kernelTable is the table of the network namespace of its callers.
type kernelTable struct{}

// missing returns those of the prefixes for which tailscaled's table has no route over tun. A family in which tun has
// no address is left out: tailscaled has no routes there. So is everything while tun is down or gone.
//
// tailscaled puts each route there once. Whoever flushes the table takes them for good.
func (kernelTable) missing(tun string, prefixes []netip.Prefix) ([]netip.Prefix, error) {
	link, err := netlink.LinkByName(tun)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", tun, err)
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		return nil, nil
	}
	var out []netip.Prefix
	for _, f := range families {
		want := f.of(prefixes)
		if len(want) == 0 || !hasFamily(f) {
			continue
		}
		has, err := hasGlobal(link, f)
		if err != nil || !has {
			if err != nil {
				return nil, err
			}
			continue
		}
		have, err := tunnelRoutes(link, f)
		if err != nil {
			return nil, err
		}
		for _, p := range want {
			if !netset.Covers(have, p) {
				out = append(out, p)
			}
		}
	}
	return out, nil
}

// hasGlobal reports whether a link has an address of a family that is not link-local.
func hasGlobal(link netlink.Link, f family) (bool, error) {
	addrs, err := addrsOf(link.Attrs().Index, f)
	return slices.ContainsFunc(addrs, func(a netip.Addr) bool { return !a.IsLinkLocalUnicast() }), err
}

// tunnelRoutes returns the routes of tailscaled's table over its interface.
func tunnelRoutes(link netlink.Link, f family) ([]netip.Prefix, error) {
	filter := &netlink.Route{Table: tailscaleTable, LinkIndex: link.Attrs().Index}
	routes, err := retryInterrupted(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(f.af, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_OIF)
	})
	if err != nil {
		return nil, fmt.Errorf("list tailscaled's %s routes: %w", f.name, err)
	}
	var out []netip.Prefix
	for _, r := range routes {
		if r.Type == unix.RTN_UNICAST && r.MTU == 0 { // else it is ours (PeerMTU)
			out = append(out, routeTo(r, f))
		}
	}
	return out, nil
}

// widen has the routes that tailscaled accepts say the MTUs that are wanted.
func (kernelTable) widen(a Accepted) ([]string, error) {
	if a.MTUs == nil {
		return nil, removePeerMTUs()
	}
	wide := map[netip.Prefix]int{}
	for p, mtu := range a.MTUs {
		if slices.Contains(a.Routes, p) {
			wide[p] = mtu
		}
	}
	return syncPeerMTUs(a.TunName, wide, a.Routes)
}

// add puts routes into tailscaled's table as tailscaled itself does, which takes them for its own from then on.
func (kernelTable) add(tun string, prefixes []netip.Prefix) (added []string, err error) {
	link, err := netlink.LinkByName(tun)
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", tun, err)
	}
	for _, p := range prefixes {
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Table: tailscaleTable, Dst: ipNet(p)}
		what := fmt.Sprintf("add route %s dev %s table %d", p, tun, tailscaleTable)
		if err := netlink.RouteReplace(r); err != nil {
			return added, fmt.Errorf("%s: %w", what, explain(err))
		}
		added = append(added, what)
	}
	return added, nil
}
