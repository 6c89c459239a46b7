package conflist

import (
	"encoding/json"
	"net/netip"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/netconf"
)

// Input is what the node's conflist is made from.
type Input struct {
	PodCIDRs, ServiceCIDRs []netip.Prefix
	// MTU of pods in bytes.
	MTU  int
	IPAM config.IPAM
	// AdoptedIPAM is the ipam object of a person's conflist, nil = make one.
	AdoptedIPAM json.RawMessage
	MagicDNS    config.MagicDNS
	// NetworkPolicy: NetworkPolicies are enforced on this node.
	NetworkPolicy bool
}

// Render makes the conflist of this node. It does no I/O.
func Render(in Input) ([]byte, error) {
	p := plugin{
		Type: pluginType, Capabilities: map[string]bool{"portMappings": true}, PortMap: json.RawMessage("{}"), MTU: in.MTU,
		IPAM: in.AdoptedIPAM, Gate: &gate{PodCIDRs: texts(in.PodCIDRs)},
	}
	if in.NetworkPolicy {
		p.NetworkPolicy = &in.NetworkPolicy
	}
	if p.IPAM == nil {
		made, err := json.Marshal(makeIPAM(in))
		if err != nil {
			return nil, err
		}
		p.IPAM = made
	}
	for _, cidr := range in.PodCIDRs {
		p.EnableIPv6 = p.EnableIPv6 || cidr.Addr().Is6()
	}
	// The keys of the specification hold one CIDR each; the ranges of ipam hold all pod CIDRs.
	if len(in.PodCIDRs) > 0 {
		p.PodCIDR = in.PodCIDRs[0].String()
	}
	if len(in.ServiceCIDRs) > 0 {
		p.ServiceCIDR = in.ServiceCIDRs[0].String()
	}
	if m := in.MagicDNS; m.Enable {
		p.MagicDNS = &magicDNS{Enable: true, BaseDomain: m.BaseDomain, Nameservers: m.Nameservers, SearchDomains: m.SearchDomains}
	}
	own, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(list{
		CNIVersion: "0.4.0", CNIVersions: []string{"0.4.0", "1.0.0", "1.1.0"}, Name: NetworkName, Plugins: []json.RawMessage{own},
	}, "", "  ")
	return append(b, '\n'), err
}

func makeIPAM(in Input) ipamConf {
	i := ipamConf{Type: in.IPAM.Type}
	if i.Type != netconf.IPAMType && i.Type != "host-local" {
		return i // other plugins have ranges of their own
	}
	for _, cidr := range in.PodCIDRs {
		i.Ranges = append(i.Ranges, []ipamRange{{Subnet: cidr.String()}})
	}
	if i.Type == netconf.IPAMType {
		i.Strategy = in.IPAM.Strategy
	}
	return i
}

func texts(prefixes []netip.Prefix) []string {
	out := []string{}
	for _, p := range prefixes {
		out = append(out, p.String())
	}
	return out
}
