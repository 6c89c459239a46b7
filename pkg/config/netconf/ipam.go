package netconf

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"

	"github.com/headcni/headcni/internal/jsonobj"
)

// hostLocalKeys are the keys of host-local's own configuration.
var hostLocalKeys = []string{
	"type", "name", "subnet", "rangeStart", "rangeEnd", "gateway", "ranges", "routes", "dataDir", "resolvConf",
}

func (d *decoder) ipam(key string, v json.RawMessage) {
	var o jsonobj.Object
	if !d.decode(key, v, &o, "an object") {
		return
	}
	i := &d.c.IPAM
	i.Raw = v
	if t := o["type"]; t != nil {
		d.decode("ipam.type", t, &i.Type, "a string")
	}
	if strings.ContainsAny(i.Type, "/\\") {
		d.fault("ipam.type", "%q: want the name of a program in CNI_PATH, without a folder", i.Type)
	}
	switch i.Type {
	case "host-local":
		d.hostLocal(o)
	case IPAMType, "": // its own reader looks at the keys
	default:
		return // a format of its own
	}
	d.ranges(o)
}

func (d *decoder) hostLocal(o jsonobj.Object) {
	known := readers{}
	for _, key := range hostLocalKeys {
		known[key] = func(string, json.RawMessage) {}
	}
	for _, key := range []string{"strategy", "exclude"} {
		known[key] = func(key string, _ json.RawMessage) {
			d.fault(key, "host-local has no such setting; use ipam.type %s or leave it out", IPAMType)
		}
	}
	d.strict("ipam.", o, known)
}

// ranges reads what host-local's format, which is also headcni-ipam's, says about subnets. The IPAM plugin validates the
// rest.
func (d *decoder) ranges(o jsonobj.Object) {
	var sets [][]jsonobj.Object
	if v := o["ranges"]; v != nil && !d.decode("ipam.ranges", v, &sets, "a list of lists of ranges") {
		return
	}
	for _, r := range slices.Concat([]jsonobj.Object{o}, slices.Concat(sets...)) {
		var subnet, gateway string
		if v := r["subnet"]; v != nil && d.decode("ipam subnet", v, &subnet, "a CIDR") && subnet != "" {
			// Bits behind the prefix are allowed here: host-local takes them, so existing files have them.
			p, err := netip.ParsePrefix(subnet)
			if err != nil {
				d.fault("ipam subnet", "%q: want a CIDR such as 10.244.0.0/24", subnet)
			} else {
				d.c.IPAM.Subnets = append(d.c.IPAM.Subnets, p.Masked())
			}
		}
		if v := r["gateway"]; v != nil && d.decode("ipam gateway", v, &gateway, "an IP address") && gateway != "" {
			a, err := netip.ParseAddr(gateway)
			if err != nil {
				d.fault("ipam gateway", "%q: want an IP address", gateway)
			} else {
				d.c.IPAM.Gateways = append(d.c.IPAM.Gateways, a.Unmap())
			}
		}
	}
}
