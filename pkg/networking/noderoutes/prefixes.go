package noderoutes

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config/names"
)

// HostPrefixes are those of the host's own networks. Our links and tun are not among them.
func HostPrefixes(tun string) ([]netip.Prefix, error) {
	ifaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list the host's interfaces: %w", err)
	}
	var out []netip.Prefix
	for _, i := range ifaces {
		if i.Flags&net.FlagLoopback != 0 || i.Name == tun || strings.HasPrefix(i.Name, names.PodLinkPrefix) {
			continue
		}
		prefixes, err := prefixesOf(&i)
		if err != nil {
			continue // gone between the two requests, as pod links do
		}
		for _, p := range prefixes {
			if !p.Addr().IsLinkLocalUnicast() {
				out = append(out, p.Masked())
			}
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out), nil // kube-proxy's ipvs link has an address for each Service
}

// tailnetAddrs are the tun's addresses in the tailnet's IPv4 range, none where there is no tun, or none any more.
func tailnetAddrs(tun string) (out []netip.Prefix) {
	i, err := net.InterfaceByName(tun)
	if err != nil {
		return nil
	}
	all, _ := prefixesOf(i) // fails where it has just gone
	for _, p := range all {
		if netset.TailnetIPv4.Contains(p.Addr()) {
			out = append(out, netip.PrefixFrom(p.Addr(), p.Addr().BitLen()))
		}
	}
	return out
}

// prefixesOf are the interface's addresses with their prefix lengths.
func prefixesOf(i *net.Interface) ([]netip.Prefix, error) {
	addrs, err := i.Addrs()
	if err != nil {
		return nil, err
	}
	var out []netip.Prefix
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		ones, _ := n.Mask.Size()
		if ip, ok := netip.AddrFromSlice(n.IP); ok {
			out = append(out, netip.PrefixFrom(ip.Unmap(), ones))
		}
	}
	return out, nil
}
