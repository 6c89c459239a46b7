package podlink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/rtnl"
)

// A pod with another way out answers by that one, whichever of its addresses was asked, and the node drops what comes from a
// pod's address by a link that is not the address's. So where Attach finds another interface in the pod, whoever made it, packets
// of the new interface's addresses get rules and a table of their own. Its number is that of the metric. A pod with one
// interface has none: its look-ups stay as short as they are.
const (
	rulePref  = 5190 // before the main table's
	ruleToTbl = 1    // FR_ACT_TO_TBL of linux/fib_rules.h
)

// hasOthers reports whether the pod has another interface that can be a way out. It lists the links of the pod, which has few; the
// node's are never listed here.
func hasOthers(inside *rtnl.Conn, index int) (others bool, err error) {
	err = inside.Links(func(l rtnl.Link) {
		others = others || l.Up && l.Index != index && l.Name != "lo"
	})
	return others, err
}

// tableRoutes are the routes of the interface's own table: those that it has in table main, and always a default route, since
// an answer to anybody must leave by the interface that was asked.
func tableRoutes(pod Pod, table int) (routes []Route) {
	gateways := map[int]netip.Addr{32: Gateway4, 128: Gateway6} // by address length in bits: the family
	whole := map[int]bool{}
	for _, r := range pod.Routes {
		bits := r.Dst.Addr().BitLen()
		if r.Gateway.IsValid() {
			gateways[bits] = r.Gateway
		}
		if r.Table == nil {
			whole[bits] = whole[bits] || r.Dst.Bits() == 0
			r.Table = &table
			routes = append(routes, r)
		}
	}
	for _, a := range pod.Addrs {
		any := netip.IPv4Unspecified()
		if a.Is6() {
			any = netip.IPv6Unspecified()
		}
		if bits := a.BitLen(); !whole[bits] {
			whole[bits] = true
			routes = append(routes, Route{Dst: netip.PrefixFrom(any, 0), Gateway: gateways[bits], Table: &table})
		}
	}
	return routes
}

// ruleLen is the size of struct fib_rule_hdr of linux/fib_rules.h: eight bytes from the family on, and the flags.
const ruleLen = 12

// sourceRule: ip rule add from ADDR lookup TABLE pref 5190
func sourceRule(a netip.Addr, table int) rtnl.Request {
	r := ruleRequest(rtnl.Family(a), table, byte(a.BitLen()))
	r.What, r.Type, r.Flags = fmt.Sprintf("add pod rule from %s", a), unix.RTM_NEWRULE, rtnl.Create
	r.Attr(unix.FRA_SRC, a.AsSlice())
	return r
}

// deleteRule: ip rule del lookup TABLE pref 5190, of which the kernel deletes one.
func deleteRule(family byte, table int) rtnl.Request {
	r := ruleRequest(family, table, 0)
	r.What, r.Type = "delete pod rule", unix.RTM_DELRULE
	return r
}

func ruleRequest(family byte, table int, srcLen byte) (r rtnl.Request) {
	r.Bytes(family, 0, srcLen, 0, unix.RT_TABLE_UNSPEC, 0, 0, ruleToTbl)
	r.Uint32(0)
	r.AttrUint32(unix.FRA_PRIORITY, rulePref)
	r.AttrUint32(unix.FRA_TABLE, uint32(table))
	return r
}

// deleteRules takes the rules of a pod's interface away, which do not go with it, where it can: a rule whose table is empty does
// nothing, and must not keep a pod from being deleted. What a runtime names as the namespace may be another pod's by now, whose
// rules have the same numbers: it counts only if the interface there is the other end of the host's.
func deleteRules(netns, ifName string, host rtnl.Link) {
	ns, err := openNetns(netns)
	if err != nil {
		return // mostly the namespace is gone, and its rules with it
	}
	defer ns.Close()
	if l, err := ns.conn.LinkByName(ifName); err != nil || l.Index != host.Peer || l.Peer != host.Index {
		return
	}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		for err = nil; err == nil; { // ENOENT: no more
			_, err = ns.conn.Do(deleteRule(family, metricBase+host.Peer))
		}
	}
}

// podRules checks the rules and the table of an interface that got them: one of both is there, or its routes have its metric.
func (c *check) podRules() {
	table := metricBase + c.podLink.Index
	have := map[netip.Addr]bool{}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		r := rtnl.Request{What: "list rules", Type: unix.RTM_GETRULE}
		r.Bytes(family, 0, 0, 0, 0, 0, 0, 0)
		r.Uint32(0)
		err := c.inside.Dump(r, func(b []byte) {
			if len(b) < ruleLen {
				return
			}
			attrs := rtnl.Attrs(b[ruleLen:])
			a, ok := netip.AddrFromSlice(attrs[unix.FRA_SRC])
			if t := attrs[unix.FRA_TABLE]; ok && len(t) == 4 && binary.NativeEndian.Uint32(t) == uint32(table) {
				have[a] = true
			}
		})
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
			c.faults = append(c.faults, err)
		}
	}
	behind := func(r Route) bool { return r.Priority == table }
	if len(have)+len(c.ownDefaults) == 0 && !slices.ContainsFunc(c.want.Routes, behind) {
		return
	}
	for _, a := range c.want.Addrs {
		if !c.ownDefaults[rtnl.Family(a)] {
			c.fault("pod default route of %s in table %d is missing: its answers would leave by another interface", a, table)
		}
		if !have[a] {
			c.fault("pod rule from %s is missing: its answers would leave by another interface", a)
		}
	}
}
