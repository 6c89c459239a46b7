package netconf

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/headcni/headcni/pkg/config/secret"
)

// decoder gathers all faults instead of stopping at the first.
type decoder struct {
	c       *Config
	faults  []error
	unknown int // how many of the faults are unknown keys
}

func (d *decoder) fault(key, format string, args ...any) {
	d.faults = append(d.faults, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
}

func (d *decoder) err() error {
	if len(d.faults) == 0 {
		return nil
	}
	text := make([]string, len(d.faults))
	for i, f := range d.faults {
		text[i] = f.Error()
	}
	kind := ErrInvalid
	if d.unknown == len(d.faults) {
		kind = ErrUnsupported
	}
	return fmt.Errorf("%w: %s", kind, strings.Join(text, "; "))
}

// object gives each key to set, which reports whether it knows the key. Keys are case-sensitive, unlike encoding/json's
// own matching: a key that we take in one spelling would be unknown to the next plugin.
func (d *decoder) object(prefix string, keys map[string]json.RawMessage, set func(key string, v json.RawMessage) bool) {
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		if !set(key, keys[key]) {
			d.unknown++
			d.fault(prefix+key, "unknown key (value %s); see the configuration reference for the keys that headcni takes",
				shown(key, keys[key]))
		}
	}
}

const shownMax = 60 // bytes

// secretive are parts of the names of what others must not see.
var secretive = []string{"key", "secret", "token", "pass", "auth", "cred"}

// shown is the value of an unknown key, which the error must contain (specification section 5, code 2). One that may be a
// secret under a misspelled key is left out.
func shown(key string, v json.RawMessage) string {
	text := strings.ToLower(key + string(v))
	if slices.ContainsFunc(secretive, func(s string) bool { return strings.Contains(text, s) }) {
		return secret.New(text).String()
	}
	text = strings.ToValidUTF8(strings.Join(strings.Fields(string(v)), " "), "?")
	if len(text) > shownMax {
		return strings.ToValidUTF8(text[:shownMax], "") + "..."
	}
	return text
}

// to decodes v into p. The fault says what was wanted and never repeats the input.
func (d *decoder) to(key string, v json.RawMessage, p any, want string) bool {
	if err := json.Unmarshal(v, p); err != nil {
		var typ *json.UnmarshalTypeError
		if errors.As(err, &typ) {
			d.fault(key, "is a JSON %s; want %s", strings.SplitN(typ.Value, " ", 2)[0], want)
		} else {
			d.fault(key, "want %s", want)
		}
		return false
	}
	return true
}

func (d *decoder) top(key string, v json.RawMessage) bool {
	c := d.c
	if strings.HasPrefix(key, "cni.dev/") {
		// Reserved for the protocol (specification section 1): what a later version adds must not fail here.
		if key == "cni.dev/valid-attachments" {
			c.HasValidAttachments = d.to(key, v, &c.ValidAttachments, "a list of {containerID, ifname}") && string(v) != "null"
			for i, a := range c.ValidAttachments {
				if a.ContainerID == "" || a.IfName == "" { // GC would end an attachment that lives
					d.fault(key, "[%d]: want containerID and ifname", i)
				}
			}
		}
		return true
	}
	switch key {
	case "cniVersion":
		d.to(key, v, &c.CNIVersion, "a string")
	case "name":
		d.to(key, v, &c.Name, "a string")
	case "type":
		var s string
		d.to(key, v, &s, "a string")
	case "cniVersions", "disableCheck", "disableGC", "loadOnlyInlinedPlugins", "args", "capabilities", "runtimeConfig":
		d.protocol(key, v)
	case "prevResult":
		if string(v) != "null" {
			c.PrevResult = v
		}
	case "dns":
		d.to(key, v, &c.DNS, "{nameservers, domain, search, options}")
	case "ipam":
		d.ipam(v)
	case "magic_dns":
		d.nested(key, v, d.magicDNS)
	case "gate":
		c.Gate = &Gate{}
		d.nested(key, v, d.gate)
	case "log_level":
		var s string
		if d.to(key, v, &s, "a string") && c.LogLevel.UnmarshalText([]byte(s)) != nil {
			d.fault(key, "%q: want debug, info, warn or error", s)
		}
	case "portmap":
		d.to(key, v, &c.PortMap, "an object of the plugin portmap's own keys")
	case "log_file":
		d.absolute(key, v, &c.LogFile)
	case "daemon_socket":
		d.absolute(key, v, &c.DaemonSocket)
	default:
		return d.network(key, v)
	}
	return true
}

// network decodes the keys that describe the network.
func (d *decoder) network(key string, v json.RawMessage) bool {
	c := d.c
	switch key {
	case "headscale_url":
		// The daemon's business; a wrong one is told here because a person put it into this file.
		var s string
		if d.to(key, v, &s, "a URL") && s != "" && !strings.HasPrefix(s, "https://") && !strings.HasPrefix(s, "http://") {
			d.fault(key, "want a URL that begins with https:// or http://")
		}
	case "tailscale_socket":
		var s string
		d.absolute(key, v, &s)
	case "pod_cidr":
		d.cidr(key, v, &c.PodCIDR)
	case "service_cidr":
		d.cidr(key, v, &c.ServiceCIDR)
	case "mtu":
		d.to(key, v, &c.MTU, "a whole number of bytes")
	case "enable_ipv6":
		d.to(key, v, &c.EnableIPv6, "true or false")
	case "enable_network_policy":
		var b bool // the daemon enforces policy; the plugin takes no part in it
		d.to(key, v, &b, "true or false")
	case "ipMasq":
		var b bool
		if d.to(key, v, &b, "false") && b {
			d.fault(key, "true: headcni-daemon masquerades (network.masquerade in daemon.yaml); leave the key out")
		}
	case "auth_key":
		if err := json.Unmarshal(v, &c.AuthKey); err != nil {
			d.fault(key, "%v", err)
		} else if !c.AuthKey.Empty() {
			c.Warnings = append(c.Warnings, "auth_key stands in the CNI configuration, which others can read; "+
				"give it to headcni-daemon by HEADSCALE_API_KEY_FILE instead and take it out here")
		}
	default:
		return false
	}
	return true
}

func (d *decoder) protocol(key string, v json.RawMessage) {
	switch key {
	case "cniVersions":
		var s []string
		d.to(key, v, &s, "a list of strings")
	case "capabilities":
		var m map[string]bool
		d.to(key, v, &m, "an object of true and false")
	case "args":
		// args may hold anything (CONVENTIONS.md); only well-formed args.cni.ips, and mac as the plugin tuning has it, mean
		// something here.
		var a struct {
			CNI struct {
				IPs []string `json:"ips"`
				MAC string   `json:"mac"`
			} `json:"cni"`
		}
		if json.Unmarshal(v, &a) == nil {
			d.requested("args.cni.ips", a.CNI.IPs)
			d.requestedMAC("args.cni.mac", a.CNI.MAC)
		}
	case "runtimeConfig":
		d.runtime(v)
	default:
		var b bool
		d.to(key, v, &b, "true or false")
	}
}

func (d *decoder) runtime(v json.RawMessage) {
	var r struct {
		IPs []string `json:"ips"`
		MAC string   `json:"mac"`
		DNS struct {
			Servers  []string `json:"servers"`
			Searches []string `json:"searches"`
			Options  []string `json:"options"`
		} `json:"dns"`
		IPRanges json.RawMessage   `json:"ipRanges"`
		Ports    []json.RawMessage `json:"portMappings"`
	}
	if !d.to("runtimeConfig", v, &r, "an object as CNI's conventions describe it") {
		return
	}
	if len(r.IPs) > 0 {
		d.c.Runtime.IPs = nil // the capability is stronger than args
		d.requested("runtimeConfig.ips", r.IPs)
	}
	d.requestedMAC("runtimeConfig.mac", r.MAC)
	d.c.Runtime.DNS = DNS{Nameservers: r.DNS.Servers, Search: r.DNS.Searches, Options: r.DNS.Options}
	if len(r.IPRanges) > 0 && string(r.IPRanges) != "null" {
		d.c.Runtime.IPRanges = r.IPRanges
	}
	if len(r.Ports) > 0 {
		d.c.Runtime.Ports, _ = json.Marshal(r.Ports) // raw values always can be
	}
}

func (d *decoder) requested(key string, ips []string) {
	for _, s := range ips {
		ip, err := ParseIP(s)
		if err != nil {
			d.fault(key, "%v", err)
			continue
		}
		d.c.Runtime.IPs = append(d.c.Runtime.IPs, ip)
	}
}

func (d *decoder) requestedMAC(key, s string) {
	if s == "" {
		return
	}
	mac, err := ParseMAC(s)
	if err != nil {
		d.fault(key, "%v", err)
	}
	d.c.Runtime.MAC = mac
}

// ParseIP reads an address with or without a prefix length, as the conventions allow for requested addresses.
func ParseIP(s string) (netip.Addr, error) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p.Addr().Unmap(), nil
	}
	ip, err := netip.ParseAddr(s)
	if err != nil || ip.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q: want an IP address", s)
	}
	return ip.Unmap(), nil
}

// ParseMAC reads a unicast Ethernet address.
func ParseMAC(s string) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(s)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 || slices.Equal(mac, make(net.HardwareAddr, 6)) {
		return nil, fmt.Errorf("%q: want a unicast Ethernet address such as 02:00:00:00:00:01", s)
	}
	return mac, nil
}

func (d *decoder) nested(key string, v json.RawMessage, set func(string, json.RawMessage) bool) {
	keys := map[string]json.RawMessage{}
	if d.to(key, v, &keys, "an object") {
		d.object(key+".", keys, set)
	}
}

func (d *decoder) magicDNS(key string, v json.RawMessage) bool {
	m := &d.c.MagicDNS
	switch key {
	case "enable":
		d.to("magic_dns.enable", v, &m.Enable, "true or false")
	case "base_domain":
		d.to("magic_dns.base_domain", v, &m.BaseDomain, "a string")
	case "nameservers":
		d.to("magic_dns.nameservers", v, &m.Nameservers, "a list of IP addresses")
	case "search_domains":
		d.to("magic_dns.search_domains", v, &m.SearchDomains, "a list of strings")
	default:
		return false
	}
	return true
}

func (d *decoder) gate(key string, v json.RawMessage) bool {
	if key != "podCIDRs" {
		return false
	}
	var list []string
	if d.to("gate.podCIDRs", v, &list, "a list of CIDRs") {
		for _, s := range list {
			if p, err := parseCIDR(s); err != nil {
				d.fault("gate.podCIDRs", "%v", err)
			} else {
				d.c.Gate.PodCIDRs = append(d.c.Gate.PodCIDRs, p)
			}
		}
	}
	return true
}

func (d *decoder) absolute(key string, v json.RawMessage, to *string) {
	if d.to(key, v, to, "an absolute path") && *to != "" && !strings.HasPrefix(*to, "/") {
		d.fault(key, "%q: want an absolute path", *to)
	}
}

func (d *decoder) cidr(key string, v json.RawMessage, to *netip.Prefix) {
	var s string
	if !d.to(key, v, &s, "a CIDR") || s == "" {
		return
	}
	p, err := parseCIDR(s)
	if err != nil {
		d.fault(key, "%v", err)
		return
	}
	*to = p
}

func parseCIDR(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, fmt.Errorf("%q: want a CIDR such as 10.244.0.0/24", s)
	}
	if p != p.Masked() {
		return p, fmt.Errorf("%q: has bits set behind the prefix; want %s", s, p.Masked())
	}
	return p, nil
}
