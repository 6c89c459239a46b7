package netconf

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
)

// hostLocalKeys are the keys of host-local's own configuration.
var hostLocalKeys = []string{
	"type", "name", "subnet", "rangeStart", "rangeEnd", "gateway", "ranges", "routes", "dataDir", "resolvConf",
}

// keyed is a JSON object. Decoding into it is several times faster than into a struct that is decoded once.
type keyed = map[string]json.RawMessage

func (d *decoder) ipam(v json.RawMessage) {
	keys := keyed{}
	if !d.to("ipam", v, &keys, "an object") || keys == nil {
		return
	}
	i := &d.c.IPAM
	i.Raw = v
	if t, ok := keys["type"]; ok {
		d.to("ipam.type", t, &i.Type, "a string")
	}
	if strings.ContainsAny(i.Type, "/\\") {
		d.fault("ipam.type", "%q: want the name of a program in CNI_PATH, without a folder", i.Type)
	}
	switch i.Type {
	case "host-local":
		d.object("ipam.", keys, func(key string, _ json.RawMessage) bool {
			if key == "strategy" || key == "exclude" {
				d.fault("ipam."+key, "host-local has no such setting; use ipam.type %s or leave it out", IPAMType)
				return true
			}
			return slices.Contains(hostLocalKeys, key)
		})
	case IPAMType, "":
	default:
		return // a format of its own
	}
	d.ranges(keys)
}

// ranges reads what host-local's format, which is also headcni-ipam's, says about subnets. The IPAM plugin validates the
// rest.
func (d *decoder) ranges(keys keyed) {
	var sets [][]keyed
	if v := keys["ranges"]; v != nil && !d.to("ipam.ranges", v, &sets, "a list of lists of ranges") {
		return
	}
	for _, r := range slices.Concat([]keyed{keys}, slices.Concat(sets...)) {
		var subnet, gateway string
		if v := r["subnet"]; v != nil && d.to("ipam subnet", v, &subnet, "a CIDR") && subnet != "" {
			// Bits behind the prefix are allowed here: host-local takes them, so existing files have them.
			p, err := netip.ParsePrefix(subnet)
			if err != nil {
				d.fault("ipam subnet", "%q: want a CIDR such as 10.244.0.0/24", subnet)
			} else {
				d.c.IPAM.Subnets = append(d.c.IPAM.Subnets, p.Masked())
			}
		}
		if v := r["gateway"]; v != nil && d.to("ipam gateway", v, &gateway, "an IP address") && gateway != "" {
			a, err := netip.ParseAddr(gateway)
			if err != nil {
				d.fault("ipam gateway", "%q: want an IP address", gateway)
			} else {
				d.c.IPAM.Gateways = append(d.c.IPAM.Gateways, a.Unmap())
			}
		}
	}
}
