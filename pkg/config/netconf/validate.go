package netconf

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/headcni/headcni/internal/jsonobj"
)

// Tailnet addresses. tailscaled drops packets from the first range that do not come out of its own tun, and routes both
// to the tailnet.
var tailnet = []netip.Prefix{netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("fd7a:115c:a1e0::/48")}

// unusable are the ranges whose addresses no pod can have: this network, loopback, link-local, where pods have their gateways, and
// multicast (RFC 6890, RFC 4291).
var unusable = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("::/127"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

const (
	minMTU = 576 // every IPv4 host must take datagrams of this size (RFC 791)
	// MinMTU6 is IPv6's (RFC 8200, section 5): below it the kernel takes IPv6 off the link.
	MinMTU6 = 1280
	maxMTU  = 65535 // veth's
	maxPort = 65535
)

// portMapBackends are the ways in which the plugin portmap can be told to lead ports to pods.
var portMapBackends = []string{"iptables", "nftables"}

// keyedCIDR is a CIDR and the key it stands under.
type keyedCIDR struct {
	key  string
	cidr netip.Prefix
}

func (d *decoder) validate() {
	c := d.c
	if c.IPAM.Type == "" {
		c.IPAM.Type = IPAMType
	}
	d.defaultRange()
	pods := d.podRanges()
	for _, p := range pods {
		for _, t := range tailnet {
			if p.cidr.Overlaps(t) {
				d.fault(p.key, "%s: overlaps %s, the tailnet's own addresses; choose a range outside it", p.cidr, t)
			}
		}
		for _, n := range unusable {
			if p.cidr.Overlaps(n) {
				d.fault(p.key, "%s: overlaps %s, whose addresses no pod can have; choose a range outside it", p.cidr, n)
			}
		}
		if s := c.ServiceCIDR; s.IsValid() && p.cidr.Overlaps(s) {
			d.fault(p.key, "%s: overlaps service_cidr %s; pods and services need ranges of their own", p.cidr, s)
		}
	}
	d.contradictions()
	d.validateMTU()
	d.validateDNS()
	d.validatePorts()
	if c.Gate != nil && len(c.Gate.PodCIDRs) == 0 {
		d.fault("gate.podCIDRs", "missing; name the node's pod CIDRs or leave gate out")
	}
}

// defaultRange lets pod_cidr stand for the pool where our own IPAM is given none.
func (d *decoder) defaultRange() {
	c := d.c
	if c.IPAM.Type != IPAMType || len(c.IPAM.Subnets) > 0 || !c.PodCIDR.IsValid() || c.Runtime.IPRanges != nil {
		return
	}
	keys := jsonobj.Object{}
	if c.IPAM.Raw != nil && json.Unmarshal(c.IPAM.Raw, &keys) != nil {
		return // already a fault
	}
	if keys["subnet"] != nil || keys["ranges"] != nil {
		return
	}
	keys["type"], keys["subnet"] = json.RawMessage(`"`+IPAMType+`"`), json.RawMessage(strconv.Quote(c.PodCIDR.String()))
	raw, err := json.Marshal(keys)
	if err != nil {
		d.fault("ipam", "%v", err)
		return
	}
	c.IPAM.Raw, c.IPAM.Subnets = raw, []netip.Prefix{c.PodCIDR}
}

func (d *decoder) podRanges() []keyedCIDR {
	var list []keyedCIDR
	if d.c.PodCIDR.IsValid() {
		list = append(list, keyedCIDR{"pod_cidr", d.c.PodCIDR})
	}
	for _, s := range d.c.IPAM.Subnets {
		if s != d.c.PodCIDR {
			list = append(list, keyedCIDR{"ipam subnet", s})
		}
	}
	return list
}

func (d *decoder) contradictions() {
	c := d.c
	have6, known := c.PodCIDR.IsValid() && c.PodCIDR.Addr().Is6(), len(c.IPAM.Subnets) > 0
	for _, s := range c.IPAM.Subnets {
		have6 = have6 || s.Addr().Is6()
		if p := c.PodCIDR; p.IsValid() && p.Addr().BitLen() == s.Addr().BitLen() && (!p.Contains(s.Addr()) || s.Bits() < p.Bits()) {
			d.fault("ipam subnet", "%s: is not within pod_cidr %s", s, p)
		}
	}
	if c.EnableIPv6 != nil && !*c.EnableIPv6 && have6 {
		d.fault("enable_ipv6", "false, but an IPv6 range is configured; set it to true or take the range out")
	}
	if c.EnableIPv6 != nil && *c.EnableIPv6 && !have6 && known {
		d.fault("enable_ipv6", "true, but no IPv6 range is configured; add one to ipam.ranges or set it to false")
	}
	if c.Gate == nil {
		return
	}
	for _, s := range c.IPAM.Subnets {
		within := false
		for _, g := range c.Gate.PodCIDRs {
			within = within || g.Contains(s.Addr()) && s.Bits() >= g.Bits()
		}
		if !within {
			d.fault("ipam subnet", "%s: is not within gate.podCIDRs, so its traffic would not be guarded", s)
		}
	}
}

func (d *decoder) validateMTU() {
	c := d.c
	low := minMTU
	for _, s := range c.IPAM.Subnets {
		if s.Addr().Is6() {
			low = MinMTU6
		}
	}
	if c.MTU != 0 && (c.MTU < low || c.MTU > maxMTU) {
		d.fault("mtu", "%d: want 0 (as the tunnel's) or %d to %d bytes", c.MTU, low, maxMTU)
	}
}

func (d *decoder) validateDNS() {
	c := d.c
	check := func(key string, servers []string) {
		for _, s := range servers {
			if _, err := netip.ParseAddr(s); err != nil {
				d.fault(key, "%q: want an IP address", s)
			}
		}
	}
	check("magic_dns.nameservers", c.MagicDNS.Nameservers)
	check("dns.nameservers", c.DNS.Nameservers)
	check("runtimeConfig.dns.servers", c.Runtime.DNS.Nameservers)
	if c.MagicDNS.Enable && len(c.MagicDNS.Nameservers) == 0 {
		c.MagicDNS.Nameservers = []string{MagicDNSServer}
	}
}

// validatePorts keeps from the plugin portmap what it would refuse to read. It refuses that at DEL too, without a look at what there is to
// take back, so a pod that got as far as ADD could not go and kept its address. DEL goes on with what is right.
func (d *decoder) validatePorts() {
	c := d.c
	if c.PortMap == nil {
		return // another plugin's
	}
	var backend string
	if v := c.PortMap["backend"]; v != nil && (json.Unmarshal(v, &backend) != nil || !slices.Contains(portMapBackends, backend)) {
		d.fault("portmap.backend", "want %s", strings.Join(portMapBackends, " or "))
		delete(c.PortMap, "backend")
	}
	var asked, right []json.RawMessage
	_ = json.Unmarshal(c.Runtime.Ports, &asked) // nil: none
	for i, v := range asked {
		var m struct {
			HostPort      int    `json:"hostPort"`
			ContainerPort int    `json:"containerPort"`
			Protocol      string `json:"protocol"`
			HostIP        string `json:"hostIP"`
		}
		known := json.Unmarshal(v, &m) == nil
		if !known || m.HostPort < 1 || m.HostPort > maxPort || m.ContainerPort < 1 || m.ContainerPort > maxPort {
			d.fault(fmt.Sprintf("runtimeConfig.portMappings[%d]", i), "want {hostPort, containerPort, protocol, hostIP}, ports from 1 to %d", maxPort)
			continue
		}
		right = append(right, v)
	}
	c.Runtime.Ports = list(right)
}
