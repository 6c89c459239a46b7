package config

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/headcni/headcni/internal/netset"
)

// Validate returns all faults joined, each with the key, the value and what is allowed.
func (c Config) Validate() error {
	var v faults
	c.validateHeadscale(&v)
	c.validateTailscale(&v)
	c.validateNetwork(&v)
	v.oneOf("logging.level", c.Logging.Level, "debug", "info", "warn", "error")
	v.oneOf("logging.format", c.Logging.Format, "text", "json")
	v.absolute("cni.binDir", c.CNI.BinDir)
	v.absolute("cni.confDir", c.CNI.ConfDir)
	if c.DNS.Alias != "" && !domain.MatchString(c.DNS.Alias) {
		v.add("dns.alias", c.DNS.Alias, wantDomain)
	}
	v.oneOf("dns.manageCoreDNS", string(c.DNS.ManageCoreDNS), string(Auto), "true", "false")
	v.oneOf("kubernetes.enable", string(c.Kubernetes.Enable), string(Auto), "true", "false")
	if c.IPAM.Type == "" || strings.ContainsAny(c.IPAM.Type, "/ ") {
		v.add("ipam.type", c.IPAM.Type, "want headcni-ipam or the name of another IPAM plugin, such as host-local")
	}
	v.oneOf("ipam.strategy", c.IPAM.Strategy, "sequential", "random", "dense-pack")
	if d, err := time.ParseDuration(c.IPAM.GCInterval); err != nil || d < 0 || d > 0 && d < time.Second {
		v.add("ipam.gcInterval", c.IPAM.GCInterval, "want a duration of at least a second, such as 1m, or 0 for never")
	}
	if d, err := time.ParseDuration(c.Kubernetes.NodeGrace); err != nil || d < time.Second {
		v.add("kubernetes.nodeGrace", c.Kubernetes.NodeGrace, "want a duration of at least a second, such as 10m")
	}
	if l := c.Monitoring.Listen; l != "" {
		if _, port, err := net.SplitHostPort(l); err != nil || !isPort(port) {
			v.add("monitoring.listen", l, "want ADDRESS:PORT, such as 127.0.0.1:9669, or nothing")
		}
	}
	return errors.Join(v...)
}

// withoutUser masks what may be a password. It does not rely on s being a URL.
func withoutUser(s string) string {
	at := strings.LastIndex(s, "@")
	if at < 0 {
		return s
	}
	scheme, _, ok := strings.Cut(s[:at], "://")
	if !ok {
		return "***" + s[at:]
	}
	return scheme + "://***" + s[at:]
}

func (c Config) validateHeadscale(v *faults) {
	if c.Headscale.URL != "" {
		u, err := url.Parse(c.Headscale.URL)
		if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.User != nil {
			v.add("headscale.url", withoutUser(c.Headscale.URL), "want https://HOST[:PORT] without a password")
		}
	}
	c.Headscale.validateProxy(v)
	for _, f := range [][2]string{
		{"headscale.apiKeyFile", c.Headscale.APIKeyFile}, {"headscale.authKeyFile", c.Headscale.AuthKeyFile}, {"headscale.caFile", c.Headscale.CAFile},
	} {
		if f[1] != "" {
			v.absolute(f[0], f[1])
		}
	}
}

func (c Config) validateTailscale(v *faults) {
	v.oneOf("tailscale.mode", c.Tailscale.Mode, ModeAuto, ModeHost, ModeDaemon)
	if c.Tailscale.Socket != "" {
		v.absolute("tailscale.socket", c.Tailscale.Socket)
	}
	// IFNAMSIZ is 16 with the final zero. Pod links are hc and 10 hex digits, and tailscaled matches the prefix of its tun.
	if n := c.Tailscale.InterfaceName; n == "" || len(n) > 15 || strings.ContainsAny(n, "/ *\"") || strings.HasPrefix("hc", n) ||
		strings.HasPrefix(n, "hc") {
		v.add("tailscale.interfaceName", n, "want 1 to 15 characters without space, slash, star or quote, and not beginning with hc")
	}
	if p := c.Tailscale.Port; p < 0 || p > 65535 {
		v.add("tailscale.port", strconv.Itoa(p), "want 0 to 65535")
	}
	for _, tag := range c.Tailscale.Tags {
		if !strings.HasPrefix(tag, "tag:") || len(tag) == len("tag:") {
			v.add("tailscale.tags", tag, "want tag:NAME")
		}
	}
}

func (c Config) validateNetwork(v *faults) {
	n := c.Network
	v.oneOf("network.tailnetEgress", n.TailnetEgress, EgressMasquerade, EgressPreserve, EgressDeny)
	v.oneOf("network.tailnetSubnets", n.TailnetSubnets, SubnetsDeny, SubnetsAllow)
	v.oneOf("network.lanIngress", n.LANIngress, LANDeny, LANAllow)
	v.oneOf("network.policyStartup", n.PolicyStartup, PolicyStrict, PolicyOpen)
	v.oneOf("network.fastPath", n.FastPath, string(Auto), Off)
	v.oneOf("network.peerMTU", n.PeerMTU, string(Auto), Off)
	v.oneOf("network.lanFirst", string(n.LANFirst), string(Auto), "true", "false")
	if n.MTU != 0 && (n.MTU < 576 || n.MTU > 65520) {
		v.add("network.mtu", strconv.Itoa(n.MTU), "want 0 (the tun's, or by network.peerMTU) or 576 to 65520 bytes; IPv6 needs 1280")
	}
	lists := []struct {
		key   string
		cidrs CIDRs
	}{
		{"network.podCIDRs", n.PodCIDRs}, {"network.clusterCIDRs", n.ClusterCIDRs},
		{"network.remoteCIDRs", n.RemoteCIDRs}, {"network.serviceCIDRs", n.ServiceCIDRs},
	}
	for _, l := range lists {
		for _, s := range l.cidrs {
			v.cidr(l.key, s)
		}
	}
	for _, p := range n.Outside(n.PodCIDRs.Prefixes()) {
		var unusable faults
		if unusable.prefix("network.podCIDRs", p); len(unusable) > 0 {
			continue // wherever it lies, which validateRanges says
		}
		v.add("network.podCIDRs", p.String(), fmt.Sprintf("is outside network.clusterCIDRs %v: other nodes would send to it in clear or not at all; "+
			"choose a range inside, or widen network.clusterCIDRs on every node", []string(n.ClusterCIDRs)))
	}
	c.validateRanges(v, n.Ranges())
	n.AdvertiseServices.validate(v)
}

// label and labelValue match what Kubernetes takes as a label.
var (
	label      = regexp.MustCompile(`^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
	labelValue = regexp.MustCompile(`^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$`)
)

func (a AdvertiseServices) validate(v *faults) {
	const key = "network.advertiseServices."
	for _, name := range slices.Sorted(maps.Keys(a.NodeSelector)) {
		if value := a.NodeSelector[name]; !label.MatchString(name) || !labelValue.MatchString(value) {
			v.add(key+"nodeSelector", name+": "+value, `want a label as Kubernetes has them, such as node-restriction.kubernetes.io/services: "true"`)
		}
	}
	if a.Only != "" && a.Only != OnlyNamed {
		v.add(key+"only", a.Only, "want "+OnlyNamed+", or nothing for all services")
	}
	if a.HealthURL != "" {
		if u, err := url.Parse(a.HealthURL); err != nil || u.Scheme != "http" || u.Host == "" || u.User != nil {
			v.add(key+"healthURL", withoutUser(a.HealthURL), "want http://HOST:PORT/PATH without a password, or nothing")
		}
	}
}

// domain matches what may be a domain: labels of lower-case letters, digits and dashes (RFC 1123, section 2.1).
var domain = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

const wantDomain = "want a domain in lower case, such as east.k8s.example.com"

// validateRemote checks other clusters: no two may have one address, name or domain, since each would hide the other.
func (c Config) validateRemote(v *faults, r Ranges) {
	type owner struct {
		who      string
		prefixes []netip.Prefix
	}
	owners := []owner{{"this cluster's own pods", r.Cluster}, {"this node's own pods", r.Pods}, {"this cluster's own services", r.Services}}
	if host := c.Headscale.host(); host.IsValid() {
		owners = append(owners, owner{"Headscale", []netip.Prefix{netip.PrefixFrom(host, host.BitLen())}})
	}
	names, domains := map[string]bool{}, map[string]string{}
	if c.DNS.Alias != "" {
		domains[c.DNS.Alias] = "this cluster (dns.alias)"
	}
	for _, other := range c.Network.RemoteClusters {
		key := "network.remoteClusters[" + other.Name + "]"
		if !domain.MatchString(other.Name) || strings.Contains(other.Name, ".") || names[other.Name] {
			v.add("network.remoteClusters.name", other.Name, "want a name of lower-case letters, digits and dashes, that no other of them has")
		}
		names[other.Name] = true
		if len(other.ranges()) == 0 {
			v.add(key, "", "has neither podCIDRs nor serviceCIDRs: want what `headcnictl dns remote` prints in that cluster")
		}
		for _, s := range other.ranges() {
			v.cidr(key, s)
			p, err := netip.ParsePrefix(s)
			if err != nil {
				continue
			}
			v.prefix(key, p)
			for _, o := range owners {
				if i := slices.IndexFunc(o.prefixes, p.Overlaps); i >= 0 {
					v.add(key, s, fmt.Sprintf("overlaps %s of %s; clusters that reach each other need ranges of their own", o.prefixes[i], o.who))
					break
				}
			}
			owners = append(owners, owner{key, []netip.Prefix{p}})
		}
		other.validateDNS(v, key, domains)
	}
}

// validateDNS checks who answers for another cluster's names. domains are those of the clusters before, by whom.
func (c RemoteCluster) validateDNS(v *faults, key string, domains map[string]string) {
	d := c.DNS
	if d.Domain == "" && len(d.Servers) == 0 {
		return
	}
	if !domain.MatchString(d.Domain) {
		v.add(key+".dns.domain", d.Domain, wantDomain)
	} else if other, ok := domains[d.Domain]; ok {
		v.add(key+".dns.domain", d.Domain, "is the domain of "+other+" too; give one of them another (dns.alias there)")
	}
	domains[d.Domain] = key
	if len(d.Servers) == 0 {
		v.add(key+".dns.servers", "", "want the address of its DNS")
	}
	for _, s := range d.Servers {
		a, err := netip.ParseAddr(s)
		switch {
		case err != nil:
			v.add(key+".dns.servers", s, "want an address, such as 10.97.0.10")
		case !slices.ContainsFunc(c.ranges().Prefixes(), func(p netip.Prefix) bool { return p.Contains(a) }):
			v.add(key+".dns.servers", s, "is in none of the cluster's ranges: questions would not go by the tunnel")
		}
	}
}

// host is the control server's address where the URL has one instead of a name.
func (h Headscale) host() netip.Addr {
	u, err := url.Parse(h.URL)
	if err != nil {
		return netip.Addr{}
	}
	a, _ := netip.ParseAddr(u.Hostname()) // a name is none
	return a
}

// faults gathers what is wrong with a configuration.
type faults []error

func (f *faults) add(key, value, want string) {
	*f = append(*f, fmt.Errorf("%s: %q: %s", key, value, want))
}

func (f *faults) oneOf(key, value string, allowed ...string) {
	if !slices.Contains(allowed, value) {
		f.add(key, value, "want one of "+strings.Join(allowed, ", "))
	}
}

func (f *faults) absolute(key, path string) {
	if !filepath.IsAbs(path) {
		f.add(key, path, "want an absolute path")
	}
}

// cidr checks how a prefix is written, prefix what it is.
func (f *faults) cidr(key, s string) {
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		f.add(key, s, "want a CIDR such as 10.244.1.0/24 or fd00:244:1::/64")
	case p != p.Masked():
		f.add(key, s, "has host bits set; did you mean "+p.Masked().String()+"?")
	}
}

func (f *faults) prefix(key string, p netip.Prefix) {
	switch {
	case p.Bits() == 0:
		f.add(key, p.String(), "would take every address; give the pods' own range")
	case p.Overlaps(netset.TailnetIPv4):
		f.add(key, p.String(), "overlaps 100.64.0.0/10, the tailnet's own addresses; tailscaled drops pods there, choose for instance 10.244.0.0/16")
	case p.Overlaps(netset.TailnetIPv6):
		f.add(key, p.String(), "overlaps fd7a:115c:a1e0::/48, the tailnet's own addresses; choose for instance fd00:244::/32")
	case p.Addr().Is4In6():
		f.add(key, p.String(), "is an IPv4-mapped IPv6 prefix; write it as IPv4")
	}
}

func isPort(s string) bool {
	n, err := strconv.Atoi(s)
	return err == nil && n >= 0 && n <= 65535
}
