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

// rangesPart is what host-local's format, which is also headcni-ipam's, says about subnets. The IPAM plugin validates
// the rest.
type rangesPart struct {
	rangePart
	Ranges [][]rangePart `json:"ranges"`
}

type rangePart struct {
	Subnet  string `json:"subnet"`
	Gateway string `json:"gateway"`
}

func (d *decoder) ipam(v json.RawMessage) {
	keys := map[string]json.RawMessage{}
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
	d.ranges(v)
}

func (d *decoder) ranges(v json.RawMessage) {
	var r rangesPart
	if !d.to("ipam", v, &r, "subnet, gateway and ranges as host-local has them") {
		return
	}
	i := &d.c.IPAM
	for _, set := range append([][]rangePart{{r.rangePart}}, r.Ranges...) {
		for _, part := range set {
			if part.Subnet != "" {
				// Bits behind the prefix are allowed here: host-local takes them, so existing files have them.
				p, err := netip.ParsePrefix(part.Subnet)
				if err != nil {
					d.fault("ipam subnet", "%q: want a CIDR such as 10.244.0.0/24", part.Subnet)
				} else {
					i.Subnets = append(i.Subnets, p.Masked())
				}
			}
			if part.Gateway != "" {
				a, err := netip.ParseAddr(part.Gateway)
				if err != nil {
					d.fault("ipam gateway", "%q: want an IP address", part.Gateway)
				} else {
					i.Gateways = append(i.Gateways, a.Unmap())
				}
			}
		}
	}
}
