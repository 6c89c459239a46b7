package plugin

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/headcni/headcni/pkg/config/netconf"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

// planPod says what the pod's link shall be. It is pure.
func planPod(r *Request, assigned IPAMResult) (podlink.Pod, error) {
	pod := podlink.Pod{
		Network: r.Config.Name, ContainerID: r.ContainerID, IfName: r.IfName, Label: r.podLabel(), UID: r.Args.PodUID,
		MTU: r.Config.MTU, MAC: r.requestedMAC(), Forward: r.Config.Gate == nil,
	}
	if len(assigned.IPs) == 0 {
		return pod, errors.New("take an address: the IPAM plugin gave none; check its configuration")
	}
	gateways := map[int]netip.Addr{} // by address length in bits: the family
	for _, ip := range assigned.IPs {
		pod.Addrs = append(pod.Addrs, ip.Addr)
		if bits := ip.Addr.BitLen(); !gateways[bits].IsValid() {
			gateways[bits] = nextHop(r.Config.IPAM, ip)
		}
	}
	if err := checkFamilies(r.Config.EnableIPv6, pod.Addrs); err != nil {
		return pod, err
	}
	var explicit [129]bool // families with routes of their own
	for _, route := range assigned.Routes {
		planned, err := planRoute(route, gateways)
		if err != nil {
			return pod, err
		}
		if !gateways[planned.Dst.Addr().BitLen()].IsValid() {
			r.Log.Debug("left out a route of a family that the pod has no address of", "route", planned.Dst)
			continue
		}
		explicit[planned.Dst.Addr().BitLen()] = true
		pod.Routes = append(pod.Routes, planned)
	}
	// Where IPAM names no route of a family, everything of that family goes through the node.
	for _, any := range []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)} {
		if bits := any.Addr().BitLen(); gateways[bits].IsValid() && !explicit[bits] {
			pod.Routes = append(pod.Routes, podlink.Route{Dst: any, Gateway: gateways[bits]})
		}
	}
	return pod, nil
}

// nextHop is the link-local gateway, unless a person has named one. host-local and headcni-ipam make one up where the
// configuration has none; what other plugins answer they were told.
func nextHop(ipam netconf.IPAM, ip IPAMAddress) netip.Addr {
	own := ipam.Type == netconf.IPAMType || ipam.Type == "host-local"
	if g := ip.Gateway; g.IsValid() && g.BitLen() == ip.Addr.BitLen() && (!own || slices.Contains(ipam.Gateways, g)) {
		return g
	}
	if ip.Addr.Is4() {
		return podlink.Gateway4
	}
	return podlink.Gateway6
}

func checkFamilies(enableIPv6 *bool, addrs []netip.Addr) error {
	has6 := slices.ContainsFunc(addrs, netip.Addr.Is6)
	if enableIPv6 != nil && *enableIPv6 != has6 {
		if has6 {
			return errors.New("take an address: enable_ipv6 is false but the IPAM plugin gave an IPv6 address; set it to true or " +
				"take the IPv6 range out of ipam")
		}
		return errors.New("take an address: enable_ipv6 is true but the IPAM plugin gave no IPv6 address; add an IPv6 range to " +
			"ipam or set it to false")
	}
	return nil
}

// scopeLink is the scope of destinations on the link itself, RT_SCOPE_LINK of linux/rtnetlink.h; the host's own are above it.
// The kernel takes no next hop with it.
const scopeLink = 253

func planRoute(route *types.Route, gateways map[int]netip.Addr) (podlink.Route, error) {
	dst, ok := netip.AddrFromSlice(route.Dst.IP)
	bits, size := route.Dst.Mask.Size()
	if !ok || size == 0 {
		return podlink.Route{}, fmt.Errorf("read route %s from the IPAM plugin: not a CIDR", &route.Dst)
	}
	if size == 32 {
		dst = dst.Unmap()
	}
	planned := podlink.Route{
		Dst: netip.PrefixFrom(dst, bits).Masked(), Gateway: gateways[size],
		MTU: route.MTU, AdvMSS: route.AdvMSS, Priority: route.Priority, Table: route.Table, Scope: route.Scope,
	}
	if route.Scope != nil && *route.Scope >= scopeLink {
		planned.Gateway = netip.Addr{}
	}
	if gw, ok := netip.AddrFromSlice(route.GW); ok {
		planned.Gateway = gw.Unmap()
	}
	return planned, nil
}

// mergeDNS lets the more specific speak, field by field: what the runtime asks for this pod, magic_dns, the well-known key
// dns, the IPAM plugin.
func mergeDNS(c netconf.Config, ipam types.DNS) types.DNS {
	dns := ipam
	layers := []netconf.DNS{c.DNS, {}, c.Runtime.DNS}
	if m := c.MagicDNS; m.Enable {
		layers[1] = netconf.DNS{Nameservers: m.Nameservers, Domain: m.BaseDomain, Search: m.SearchDomains}
	}
	for _, l := range layers {
		if len(l.Nameservers) > 0 {
			dns.Nameservers = l.Nameservers
		}
		if l.Domain != "" {
			dns.Domain = l.Domain
		}
		if len(l.Search) > 0 {
			dns.Search = l.Search
		}
		if len(l.Options) > 0 {
			dns.Options = l.Options
		}
	}
	return dns
}

// previous is the result of the plugins before us in a chain, or of ADD; nil where there is none.
func (r *Request) previous() (*types100.Result, error) {
	if r.Config.PrevResult == nil {
		return nil, nil
	}
	result, err := parseResult(r.Config.PrevResult, r.Config.CNIVersion)
	if err != nil {
		return nil, fmt.Errorf("%w: prevResult: %w", netconf.ErrInvalid, err)
	}
	// Specification section 5, "Success". One behind the last would be ours.
	for i, ip := range result.IPs {
		if n := len(result.Interfaces); ip.Interface != nil && (*ip.Interface < 0 || *ip.Interface >= n) {
			return nil, fmt.Errorf("%w: prevResult: ips[%d].interface: %d, and there are %d interfaces", netconf.ErrInvalid, i, *ip.Interface, n)
		}
	}
	return result, nil
}

// previousAddrs are the attachment's addresses by prevResult, as far as it is there and can be read.
func (r *Request) previousAddrs() []netip.Addr {
	state, err := expectedState(r)
	if err != nil {
		return nil
	}
	return state.Addrs
}

// buildResult says what the kernel has now: /32 and /128 addresses, the host's end first. It extends previous, if any.
func buildResult(r *Request, previous *types100.Result, pod podlink.Pod, links podlink.Pair, assigned IPAMResult) *types100.Result {
	result := previous
	if result == nil {
		result = &types100.Result{CNIVersion: types100.ImplementedSpecVersion}
	}
	inPod := len(result.Interfaces) + 1
	result.Interfaces = append(result.Interfaces,
		&types100.Interface{Name: links.HostName, Mac: links.HostMAC.String(), Mtu: links.HostMTU},
		&types100.Interface{Name: r.IfName, Mac: links.PodMAC.String(), Mtu: links.PodMTU, Sandbox: r.Netns})
	gateways := map[int]netip.Addr{}
	for _, route := range pod.Routes {
		if route.Dst.Bits() == 0 {
			gateways[route.Dst.Addr().BitLen()] = route.Gateway
		}
	}
	for _, a := range pod.Addrs {
		ip := &types100.IPConfig{
			Interface: types100.Int(inPod), Address: net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())},
		}
		if g := gateways[a.BitLen()]; g.IsValid() {
			ip.Gateway = g.AsSlice()
		}
		result.IPs = append(result.IPs, ip)
	}
	for _, route := range pod.Routes {
		d := route.Dst
		result.Routes = append(result.Routes, &types.Route{
			Dst: net.IPNet{IP: d.Addr().AsSlice(), Mask: net.CIDRMask(d.Bits(), d.Addr().BitLen())}, GW: route.Gateway.AsSlice(),
			MTU: route.MTU, AdvMSS: route.AdvMSS, Priority: cmp.Or(route.Priority, links.Metric), Table: route.Table, Scope: route.Scope,
		})
	}
	if dns := mergeDNS(r.Config, assigned.DNS); !dns.IsEmpty() {
		result.DNS = dns
	}
	return result
}

// expectedState reads prevResult for CHECK.
func expectedState(r *Request) (podlink.State, error) {
	s := podlink.State{ContainerID: r.ContainerID, IfName: r.IfName, Netns: r.Netns}
	result, err := r.previous()
	if err != nil {
		return s, err
	}
	if result == nil {
		return s, fmt.Errorf("%w: prevResult: missing; CHECK needs the result of ADD", netconf.ErrInvalid)
	}
	inPod := -1
	for i, link := range result.Interfaces {
		switch {
		case link.Sandbox != "" && link.Name == r.IfName:
			inPod, s.PodMAC, s.PodMTU = i, link.Mac, link.Mtu
		case link.Sandbox == "" && link.Name == podlink.Name(r.ContainerID, r.IfName):
			s.HostListed, s.HostMAC, s.HostMTU = true, link.Mac, link.Mtu
		}
	}
	if inPod < 0 || !s.HostListed {
		return s, fmt.Errorf("%w: prevResult: it lacks %s in the pod or the host's end of its link; is it of another attachment?",
			netconf.ErrInvalid, r.IfName)
	}
	for _, ip := range result.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok && ip.Interface != nil && *ip.Interface == inPod {
			s.Addrs = append(s.Addrs, a.Unmap())
		}
	}
	for _, route := range result.Routes {
		dst, ok := netip.AddrFromSlice(route.Dst.IP)
		bits, size := route.Dst.Mask.Size()
		gw, _ := netip.AddrFromSlice(route.GW) // zero: any
		if ok && size > 0 {
			if size == 32 {
				dst = dst.Unmap()
			}
			s.Routes = append(s.Routes, podlink.Route{Dst: netip.PrefixFrom(dst, bits), Gateway: gw.Unmap(), Priority: route.Priority, Table: route.Table})
		}
	}
	return s, nil
}
