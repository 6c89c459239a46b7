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

	"github.com/headcni/headcni/internal/jsonobj"
	"github.com/headcni/headcni/internal/nearest"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/config/secret"
)

// injected are the keys that meta-plugins put into the configuration of every plugin that they run: a device of the pod, by multus, and
// arguments. Others have a domain in their name, as the protocol's own have: what a later version adds must not fail here.
var injected = []string{"deviceID", "pciBusID", "cniArgs", "ipamConfig"}

// decoder gathers all faults instead of stopping at the first.
type decoder struct {
	c       *Config
	faults  []error
	unknown int // the number of faults that are unknown keys
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

// reader reads the value of a key, which faults name.
type reader func(key string, v json.RawMessage)

// readers are the keys that an object may have.
type readers map[string]reader

// object calls the reader of each member, in the order of the keys. Keys are case-sensitive, unlike encoding/json's own matching: a key that
// we take in one spelling would be unknown to the next plugin. What is null is not given, whatever the key.
func (d *decoder) object(prefix string, o jsonobj.Object, known readers, unknown reader) {
	for _, key := range slices.Sorted(maps.Keys(o)) {
		read, ok := known[key]
		if !ok {
			read = unknown
		}
		if o[key] != nil {
			read(prefix+key, o[key])
		}
	}
}

// strict is like object, but every unknown key is a fault, which names the key that was meant or all known ones.
func (d *decoder) strict(prefix string, o jsonobj.Object, known readers) {
	d.object(prefix, o, known, func(key string, v json.RawMessage) {
		help := "known keys are " + strings.Join(slices.Sorted(maps.Keys(known)), ", ")
		if like := nearest.Key(strings.TrimPrefix(key, prefix), slices.Collect(maps.Keys(known))); like != "" {
			help = "did you mean " + like + "?"
		}
		d.unknownKey(key, v, help)
	})
}

// isForeign reports whether a program, not a person, put this key into the configuration.
func isForeign(key string) bool {
	return slices.Contains(injected, key) || strings.ContainsAny(key, "./")
}

func (d *decoder) unknownKey(key string, v json.RawMessage, help string) {
	d.unknown++
	d.fault(key, "unknown key (value %s), %s", redacted(key, v), help)
}

const valueMax = 60 // bytes

// secretWords are parts of the names of keys whose values others must not see.
var secretWords = []string{"key", "secret", "token", "pass", "auth", "cred"}

// redacted is the value of an unknown key, which the error must contain (specification section 5, code 2). One that may be a
// secret under a misspelled key is left out.
func redacted(key string, v json.RawMessage) string {
	text := strings.ToLower(key + string(v))
	if slices.ContainsFunc(secretWords, func(s string) bool { return strings.Contains(text, s) }) {
		return secret.New(text).String()
	}
	text = strings.ToValidUTF8(strings.Join(strings.Fields(string(v)), " "), "?")
	if len(text) > valueMax {
		return strings.ToValidUTF8(text[:valueMax], "") + "..."
	}
	return text
}

// decode reads v into p. The fault says what was wanted and never repeats the input.
func (d *decoder) decode(key string, v json.RawMessage, p any, want string) bool {
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

// decodeInto returns a reader that decodes into p.
func (d *decoder) decodeInto(p any, want string) reader {
	return func(key string, v json.RawMessage) { d.decode(key, v, p, want) }
}

// checked decodes a value only to find its faults: the plugin does not use it.
func checked[T any](d *decoder, want string) reader { return d.decodeInto(new(T), want) }

// ignore is the reader of keys that runtimes write for themselves.
func ignore(string, json.RawMessage) {}

func (d *decoder) top(o jsonobj.Object) {
	c := d.c
	_, now := o[names.ValidAttachments]
	_, first := o[names.AttachmentsAsReleased]
	if c.HasValidAttachments = now || first; c.HasValidAttachments {
		c.ValidAttachments = []Attachment{}
	}
	o = maps.Clone(o)
	maps.DeleteFunc(o, func(key string, _ json.RawMessage) bool {
		return key != names.ValidAttachments && key != names.AttachmentsAsReleased && isForeign(key)
	})
	d.strict("", o, readers{
		"cniVersion": d.decodeInto(&c.CNIVersion, "a string"), "name": d.decodeInto(&c.Name, "a string"), "type": checked[string](d, "a string"),
		"cniVersions": ignore, "capabilities": ignore, "disableCheck": ignore, "disableGC": ignore, "loadOnlyInlinedPlugins": ignore,
		"args": d.args, "runtimeConfig": d.runtime, names.ValidAttachments: d.attachments, names.AttachmentsAsReleased: d.attachments,
		"prevResult": func(_ string, v json.RawMessage) { c.PrevResult = v },
		"dns":        d.decodeInto(&c.DNS, "{nameservers, domain, search, options}"),
		"ipam":       d.ipam, "magic_dns": d.magicDNS, "gate": d.gate,
		"portmap":   d.decodeInto(&c.PortMap, "an object of the plugin portmap's own keys"),
		"log_level": d.logLevel, "log_file": d.absolute(&c.LogFile), "daemon_socket": d.absolute(&c.DaemonSocket),
		"headscale_url": d.url, "tailscale_socket": d.absolute(new(string)), "auth_key": d.authKey,
		"pod_cidr": d.cidr(&c.PodCIDR), "service_cidr": d.cidr(&c.ServiceCIDR), "mtu": d.decodeInto(&c.MTU, "a whole number of bytes"),
		"enable_ipv6":           d.decodeInto(&c.EnableIPv6, "true or false"),
		"enable_network_policy": d.decodeInto(&c.NetworkPolicy, "true or false"),
		"ipMasq":                d.ipMasq,
	})
}

func (d *decoder) attachments(key string, v json.RawMessage) {
	var list []Attachment
	d.decode(key, v, &list, "a list of {containerID, ifname}")
	d.c.ValidAttachments = append(d.c.ValidAttachments, list...)
	for i, a := range list {
		if a.ContainerID == "" || a.IfName == "" { // GC would end an attachment that lives
			d.fault(key, "[%d]: want containerID and ifname", i)
		}
	}
}

func (d *decoder) logLevel(key string, v json.RawMessage) {
	var s string
	if d.decode(key, v, &s, "a string") && s != "" && d.c.LogLevel.UnmarshalText([]byte(s)) != nil {
		d.fault(key, "%q: want debug, info, warn or error", s)
	}
}

// url is of Headscale. The daemon needs it; a wrong one is told here because a person put it into this file.
func (d *decoder) url(key string, v json.RawMessage) {
	var s string
	if d.decode(key, v, &s, "a URL") && s != "" && !strings.HasPrefix(s, "https://") && !strings.HasPrefix(s, "http://") {
		d.fault(key, "want a URL that begins with https:// or http://")
	}
}

func (d *decoder) authKey(key string, v json.RawMessage) {
	c := d.c
	if err := json.Unmarshal(v, &c.AuthKey); err != nil {
		d.fault(key, "%v", err)
	} else if !c.AuthKey.Empty() {
		c.Warnings = append(c.Warnings, "auth_key stands in the CNI configuration, which others can read; "+
			"give it to headcni-daemon by HEADSCALE_API_KEY_FILE instead and take it out here")
	}
}

func (d *decoder) ipMasq(key string, v json.RawMessage) {
	var b bool
	if d.decode(key, v, &b, "false") && b {
		d.fault(key, "true: headcni-daemon masquerades (network.masquerade in daemon.yaml); leave the key out")
	}
}

// args may hold anything (CONVENTIONS.md); only well-formed args.cni.ips, and mac as the plugin tuning has it, mean something here.
func (d *decoder) args(_ string, v json.RawMessage) {
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
}

func (d *decoder) runtime(key string, v json.RawMessage) {
	var r struct {
		IPs []string `json:"ips"`
		MAC string   `json:"mac"`
		DNS struct {
			Servers  []string `json:"servers"`
			Searches []string `json:"searches"`
			Options  []string `json:"options"`
		} `json:"dns"`
		IPRanges []json.RawMessage `json:"ipRanges"`
		Ports    []json.RawMessage `json:"portMappings"`
	}
	if !d.decode(key, v, &r, "an object as CNI's conventions describe it") {
		return
	}
	if len(r.IPs) > 0 {
		d.c.Runtime.IPs = nil // the capability is stronger than args
		d.requested("runtimeConfig.ips", r.IPs)
	}
	d.requestedMAC("runtimeConfig.mac", r.MAC)
	d.c.Runtime.DNS = DNS{Nameservers: r.DNS.Servers, Search: r.DNS.Searches, Options: r.DNS.Options}
	d.c.Runtime.IPRanges, d.c.Runtime.Ports = list(r.IPRanges), list(r.Ports)
}

// list is nil where there is nothing in it.
func list(values []json.RawMessage) json.RawMessage {
	if len(values) == 0 {
		return nil
	}
	b, _ := json.Marshal(values) // raw values always can be
	return b
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

func (d *decoder) nested(key string, v json.RawMessage, known readers) {
	var o jsonobj.Object
	if d.decode(key, v, &o, "an object") {
		d.strict(key+".", o, known)
	}
}

func (d *decoder) magicDNS(key string, v json.RawMessage) {
	m := &d.c.MagicDNS
	d.nested(key, v, readers{
		"enable": d.decodeInto(&m.Enable, "true or false"), "base_domain": d.decodeInto(&m.BaseDomain, "a string"),
		"nameservers": d.decodeInto(&m.Nameservers, "a list of IP addresses"), "search_domains": d.decodeInto(&m.SearchDomains, "a list of strings"),
	})
}

func (d *decoder) gate(key string, v json.RawMessage) {
	d.c.Gate = &Gate{}
	d.nested(key, v, readers{"podCIDRs": func(key string, v json.RawMessage) {
		var list []string
		d.decode(key, v, &list, "a list of CIDRs")
		for _, s := range list {
			if p, err := parseCIDR(s); err != nil {
				d.fault(key, "%v", err)
			} else {
				d.c.Gate.PodCIDRs = append(d.c.Gate.PodCIDRs, p)
			}
		}
	}})
}

func (d *decoder) absolute(to *string) reader {
	return func(key string, v json.RawMessage) {
		var s string
		switch {
		case !d.decode(key, v, &s, "an absolute path") || s == "":
		case !strings.HasPrefix(s, "/"):
			d.fault(key, "%q: want an absolute path", s)
		default:
			*to = s
		}
	}
}

func (d *decoder) cidr(to *netip.Prefix) reader {
	return func(key string, v json.RawMessage) {
		var s string
		if !d.decode(key, v, &s, "a CIDR") || s == "" {
			return
		}
		p, err := parseCIDR(s)
		if err != nil {
			d.fault(key, "%v", err)
			return
		}
		*to = p
	}
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
