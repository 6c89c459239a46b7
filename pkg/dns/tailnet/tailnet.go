// Package tailnet is what nodes say of the names of their tailnet, and who answers for them.
package tailnet

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/dns/corefile"
)

// Node is what counts of a node. Domain is what its tailscaled says, in any case and with or without a final dot; "" where it says none.
type Node struct {
	Name, Domain string
	PodCIDRs     []netip.Prefix
}

// Zone is the domain that all nodes say, with those who answer for it; ok is false where none says any. One node that was broken into must
// not lead a domain of its choice to itself, so all must agree.
func Zone(nodes []Node) (z corefile.Zone, ok bool, err error) {
	said := map[string][]string{}
	var domains []string
	for _, n := range nodes {
		d := strings.ToLower(strings.TrimSuffix(n.Domain, "."))
		if d == "" {
			continue
		}
		if said[d] == nil {
			domains = append(domains, d)
		}
		said[d] = append(said[d], n.Name)
	}
	slices.Sort(domains)
	switch len(domains) {
	case 0:
		return z, false, nil
	case 1:
		if err := corefile.CheckDomain(domains[0]); err != nil {
			return z, false, fmt.Errorf("%w: see dns.base_domain of Headscale", err)
		}
		return corefile.Zone{Name: domains[0], Upstreams: upstreams(nodes)}, true, nil
	}
	var each []string
	for _, d := range domains {
		who := said[d][0]
		if more := len(said[d]) - 1; more > 0 {
			who += fmt.Sprintf(" and %d more", more)
		}
		each = append(each, fmt.Sprintf("%s: %.253q", who, d))
	}
	return z, false, fmt.Errorf("nodes say different domains (%s): CoreDNS stays as it is until they agree", strings.Join(each, ", "))
}

// upstreams answer for the tailnet's domain on each node: the daemon, and tailscaled while the daemon is restarted or of a version that does
// not. CoreDNS asks those of its own node. Pods without IPv4 reach the other addresses.
func upstreams(nodes []Node) []netip.AddrPort {
	answerer, resolver := netset.AnswererIPv6, netset.ResolverIPv6
	for _, n := range nodes {
		if slices.ContainsFunc(n.PodCIDRs, func(p netip.Prefix) bool { return p.Addr().Is4() }) {
			answerer, resolver = netset.AnswererIPv4, netset.ResolverIPv4
		}
	}
	return []netip.AddrPort{netip.AddrPortFrom(answerer, 53), netip.AddrPortFrom(resolver, 53)}
}
