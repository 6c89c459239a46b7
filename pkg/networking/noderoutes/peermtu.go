package noderoutes

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A route to a peer's pods that says an MTU of its own carries packets larger than the tun's (ip-route(8), mtu); tailscaled reads and writes
// those as well. It is the two halves of tailscaled's own route, in tailscaled's table: all rules that lead to that table hold for them, the
// tun takes them along, and tailscaled's own stay as they are for when ours go. Nobody else puts an MTU there.

// PeerMTU are these routes, and those by which echoes try a path (pathmtu.Wider).
type PeerMTU struct{}

// AddProbe gives echoes of a TOS to a peer's address a route over tun that says mtu bytes. IPv4 alone has routes by TOS.
func (PeerMTU) AddProbe(tun string, to netip.Addr, tos, mtu int) error {
	r, err := probeRoute(tun, to, tos)
	if err != nil {
		return err
	}
	r.MTU = mtu
	return explain(netlink.RouteReplace(r))
}

// RemoveProbe takes it away. That it is not there is no error.
func (PeerMTU) RemoveProbe(tun string, to netip.Addr, tos int) error {
	r, err := probeRoute(tun, to, tos)
	if err != nil {
		return err
	}
	if err := netlink.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
		return explain(err)
	}
	return nil
}

func probeRoute(tun string, to netip.Addr, tos int) (*netlink.Route, error) {
	link, err := netlink.LinkByName(tun)
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", tun, err)
	}
	return &netlink.Route{LinkIndex: link.Attrs().Index, Table: tailscaleTable, Tos: tos, Dst: ipNet(netip.PrefixFrom(to, to.BitLen()))}, nil
}

// Now are the ranges of peers' pods whose routes say an MTU, and how many bytes. The error is of the kernel.
func (PeerMTU) Now() (map[netip.Prefix]int, error) {
	out := map[netip.Prefix]int{}
	for _, f := range families {
		routes, err := peerRoutes(f)
		if err != nil {
			return nil, err
		}
		for _, r := range routes {
			if to := routeTo(r, f); !to.IsSingleIP() {
				out[netip.PrefixFrom(to.Addr(), to.Bits()-1).Masked()] = r.MTU
			}
		}
	}
	return out, nil
}

// halves are the two prefixes that are p together, nil where they would be single addresses, as probes' are.
func halves(p netip.Prefix) []netip.Prefix {
	if p.Bits() > p.Addr().BitLen()-2 {
		return nil
	}
	p = p.Masked()
	upper := p.Addr().AsSlice()
	upper[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	second, _ := netip.AddrFromSlice(upper)
	return []netip.Prefix{netip.PrefixFrom(p.Addr(), p.Bits()+1), netip.PrefixFrom(second, p.Bits()+1)}
}

// peerRoutes are ours in tailscaled's table.
func peerRoutes(f family) (out []netlink.Route, err error) {
	if !hasFamily(f) {
		return nil, nil
	}
	routes, err := retryInterrupted(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(f.af, &netlink.Route{Table: tailscaleTable}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list tailscaled's %s routes: %w", f.name, err)
	}
	for _, r := range routes {
		if r.Type == unix.RTN_UNICAST && r.MTU != 0 {
			out = append(out, r)
		}
	}
	return out, nil
}

// syncPeerMTUs has the routes over tun say the MTUs of want and no others, but for probes to addresses that are accepted, and says what it did.
func syncPeerMTUs(tun string, want map[netip.Prefix]int, accepted []netip.Prefix) (done []string, err error) {
	link, err := netlink.LinkByName(tun)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, nil // its routes went with it
	}
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", tun, err)
	}
	mtus := map[netip.Prefix]int{}
	for p, mtu := range want {
		for _, half := range halves(p) {
			mtus[half] = mtu
		}
	}
	var errs []error
	for _, f := range families {
		routes, err := peerRoutes(f)
		if err != nil {
			return done, err
		}
		for _, r := range routes {
			to := routeTo(r, f)
			if to.IsSingleIP() && slices.Contains(accepted, to) {
				continue // a probe's; once its peer is gone somebody else may have the address
			}
			if r.LinkIndex == link.Attrs().Index && mtus[to] == r.MTU {
				delete(mtus, to)
				continue
			}
			if mtus[to] != 0 && r.LinkIndex == link.Attrs().Index {
				continue // replaced below
			}
			if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("delete route %s table %d: %w", to, tailscaleTable, explain(err)))
				continue
			}
			done = append(done, fmt.Sprintf("delete route %s mtu %d table %d", to, r.MTU, tailscaleTable))
		}
	}
	for to, mtu := range mtus {
		r := &netlink.Route{
			LinkIndex: link.Attrs().Index, Table: tailscaleTable, MTU: mtu, Dst: ipNet(to),
			MTULock: to.Addr().Is6(), // IPv6 forwards by the link's MTU, if the route's is not locked (ip6_dst_mtu_maybe_forward)
		}
		what := fmt.Sprintf("add route %s dev %s mtu %d table %d", to, tun, mtu, tailscaleTable)
		if err := netlink.RouteReplace(r); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, explain(err)))
			continue
		}
		done = append(done, what)
	}
	return done, errors.Join(errs...)
}

// removePeerMTUs deletes all of them.
func removePeerMTUs() error {
	var errs []error
	for _, f := range families {
		routes, err := peerRoutes(f)
		errs = append(errs, err)
		for _, r := range routes {
			if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("delete route %s table %d: %w", routeTo(r, f), tailscaleTable, explain(err)))
			}
		}
	}
	return errors.Join(errs...)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
