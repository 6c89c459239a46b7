package ipam

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// Result makes the abbreviated result of a delegated plugin from a lease (CNI specification, section 4): addresses,
// routes and DNS, no interfaces. A resolvConf that is not there is an ErrConfig.
func (c Config) Result(l Lease) (*types100.Result, error) {
	r := &types100.Result{CNIVersion: types100.ImplementedSpecVersion}
	for _, a := range l.Addrs {
		r.IPs = append(r.IPs, &types100.IPConfig{Address: ipNet(a.Addr), Gateway: ip(a.Gateway)})
	}
	for _, route := range c.Routes {
		r.Routes = append(r.Routes, &types.Route{
			Dst: ipNet(route.Dst), GW: ip(route.GW), MTU: route.MTU, AdvMSS: route.AdvMSS, Priority: route.Priority,
			Table: route.Table, Scope: route.Scope,
		})
	}
	if c.ResolvConf != "" {
		dns, err := readResolvConf(c.ResolvConf)
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w: ipam.resolvConf: %w", ErrConfig, err)
		}
		if err != nil {
			return nil, fmt.Errorf("read ipam.resolvConf: %w", err)
		}
		r.DNS = dns
	}
	return r, nil
}

func ip(a netip.Addr) net.IP { return a.AsSlice() }

func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// readResolvConf reads what resolv.conf(5) and the CNI result have in common. As in the resolver, the last domain or
// search line wins.
func readResolvConf(path string) (dns types.DNS, err error) {
	f, err := os.Open(path)
	if err != nil {
		return dns, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		word := strings.Fields(lines.Text())
		if len(word) < 2 || strings.HasPrefix(word[0], "#") || strings.HasPrefix(word[0], ";") {
			continue
		}
		switch word[0] {
		case "nameserver":
			dns.Nameservers = append(dns.Nameservers, word[1])
		case "domain":
			dns.Domain = word[1]
		case "search":
			dns.Search = word[1:]
		case "options":
			dns.Options = append(dns.Options, word[1:]...)
		}
	}
	return dns, lines.Err()
}
