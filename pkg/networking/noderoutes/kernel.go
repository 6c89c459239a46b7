package noderoutes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/internal/rtnl"
	"github.com/headcni/headcni/internal/sysctl"
	"github.com/headcni/headcni/pkg/config/names"
)

// dumpTries bounds the repeats of a dump that a concurrent change interrupted (NLM_F_DUMP_INTR).
const dumpTries = 10

// retryInterrupted repeats a dump until it was not interrupted.
func retryInterrupted[T any](dump func() (T, error)) (T, error) {
	for try := 1; ; try++ {
		v, err := dump()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == dumpTries {
			return v, err
		}
	}
}

// We encode and decode the rules ourselves, because netlink.Rule does not read a rule's action ("unreachable" looks like
// a lookup in no table) nor everything that a rule changed by hand may have.

const (
	ruleMsgLen = 12  // the size of struct fib_rule_hdr
	ruleInvert = 0x2 // FIB_RULE_INVERT, of its flags
)

// rawRule is a message body: struct fib_rule_hdr and attributes.
type rawRule []byte

func (m rawRule) Len() int          { return len(m) }
func (m rawRule) Serialize() []byte { return m }

// dumpRules returns the raw messages of all rules.
func dumpRules(f family) ([][]byte, error) {
	msgs, err := retryInterrupted(func() ([][]byte, error) {
		req := nl.NewNetlinkRequest(unix.RTM_GETRULE, unix.NLM_F_DUMP)
		hdr := make(rawRule, ruleMsgLen)
		hdr[0] = byte(f.af)
		req.AddData(hdr)
		return req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWRULE)
	})
	if err != nil {
		return nil, fmt.Errorf("list %s rules: %w", f.name, err)
	}
	return msgs, nil
}

// listRules returns the rules of our numbers, with the raw message of each, whether none before them looks up the node's addresses, and whether
// none behind them does either.
func listRules(f family) (rules []rule, raws []rawRule, localLate, localOurs bool, err error) {
	msgs, err := dumpRules(f)
	if err != nil {
		return nil, nil, false, false, err
	}
	localLate, localOurs = true, true
	for _, m := range msgs {
		r, err := decodeRule(m)
		if err != nil {
			return nil, nil, false, false, fmt.Errorf("list %s rules: %w", f.name, err)
		}
		if r.looksUpLocal() && !r.ours() {
			localLate, localOurs = localLate && r.pref > prefLocal, false
		}
		if r.ours() && r.af == f.af {
			rules, raws = append(rules, r), append(raws, rawRule(m))
		}
	}
	return rules, raws, localLate, localOurs, nil
}

// decodeRule reads struct fib_rule_hdr {family, dst_len, src_len, tos, table, res1, res2, action; u32 flags}.
func decodeRule(m []byte) (rule, error) {
	if len(m) < ruleMsgLen {
		return rule{}, errors.New("short rule message")
	}
	attrs, err := nl.ParseRouteAttr(m[ruleMsgLen:])
	if err != nil {
		return rule{}, err
	}
	r := rule{af: int(m[0]), table: uint32(m[4]), action: m[7], suppress: noSuppress}
	const unresolvedGoto, noSuchIIF = 0x4, 0x8 // what the kernel says of it
	flags := binary.NativeEndian.Uint32(m[8:]) &^ (unresolvedGoto | noSuchIIF)
	r.not = flags&ruleInvert != 0
	if flags &^= ruleInvert; flags != 0 || m[3] != 0 {
		r.extra = fmt.Sprintf(" flags %#x tos %#x", flags, m[3])
	}
	for _, a := range attrs {
		v := a.Value
		num := func() uint32 {
			if len(v) != 4 {
				return 0
			}
			return binary.NativeEndian.Uint32(v)
		}
		switch a.Attr.Type {
		case nl.FRA_PRIORITY:
			r.pref = num()
		case nl.FRA_TABLE:
			r.table = num()
		case nl.FRA_FWMARK:
			r.mark = num()
		case nl.FRA_FWMASK:
			r.mask = num()
		case nl.FRA_SUPPRESS_PREFIXLEN:
			r.suppress = int32(num())
		case nl.FRA_PROTOCOL:
			r.proto = v[0]
		case nl.FRA_IIFNAME:
			r.iif = unix.ByteSliceToString(v)
		case nl.FRA_DST, nl.FRA_SRC:
			addr, ok := netip.AddrFromSlice(v)
			if !ok {
				return r, errors.New("rule with an address of odd length")
			}
			if a.Attr.Type == nl.FRA_DST {
				r.to = netip.PrefixFrom(addr, int(m[1]))
			} else {
				r.from = netip.PrefixFrom(addr, int(m[2]))
			}
		default:
			r.extra += fmt.Sprintf(" attribute %d=%x", a.Attr.Type, v)
		}
	}
	return r, nil
}

func encodeRule(r rule) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	hdr := make(rawRule, ruleMsgLen)
	hdr[0], hdr[7] = byte(r.af), r.action
	if r.table < 256 {
		hdr[4] = byte(r.table)
	}
	if r.not {
		binary.NativeEndian.PutUint32(hdr[8:], ruleInvert)
	}
	req.AddData(hdr)
	u32 := func(typ int, v uint32) { req.AddData(nl.NewRtAttr(typ, binary.NativeEndian.AppendUint32(nil, v))) }
	if r.to.IsValid() {
		hdr[1] = byte(r.to.Bits())
		req.AddData(nl.NewRtAttr(nl.FRA_DST, r.to.Addr().AsSlice()))
	}
	if r.from.IsValid() {
		hdr[2] = byte(r.from.Bits())
		req.AddData(nl.NewRtAttr(nl.FRA_SRC, r.from.Addr().AsSlice()))
	}
	if r.iif != "" {
		req.AddData(nl.NewRtAttr(nl.FRA_IIFNAME, nl.ZeroTerminated(r.iif)))
	}
	u32(nl.FRA_PRIORITY, r.pref)
	u32(nl.FRA_FWMARK, r.mark)
	u32(nl.FRA_FWMASK, r.mask)
	if r.action == nl.FR_ACT_TO_TBL {
		u32(nl.FRA_TABLE, r.table)
		if r.suppress != noSuppress {
			u32(nl.FRA_SUPPRESS_PREFIXLEN, uint32(r.suppress))
		}
	}
	req.AddData(nl.NewRtAttr(nl.FRA_PROTOCOL, []byte{r.proto}))
	return req
}

func addRule(r rule) error {
	_, err := encodeRule(r).Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// deleteRule deletes the first rule that has all of raw, which is what the kernel listed.
func deleteRule(raw rawRule) error {
	req := nl.NewNetlinkRequest(unix.RTM_DELRULE, unix.NLM_F_ACK)
	req.AddData(raw)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// routeMsg is a route as the kernel lists it, valid until the next one.
type routeMsg struct {
	to    netip.Prefix
	kind  uint8 // unix.RTN_*
	proto uint8
	attrs []byte
}

// number is an attribute that is a number, 0 where it is missing.
func (m routeMsg) number(attr uint16) int {
	if v := rtnl.Attr(m.attrs, attr); len(v) == 4 {
		return int(binary.NativeEndian.Uint32(v))
	}
	return 0
}

// eachRoute gives the routes of a table to take, perhaps twice (rtnl.Conn.Dump). A router that speaks BGP has a million of them in main: they
// are never all in memory, and what nobody asks for is not read.
func eachRoute(f family, table uint32, take func(routeMsg)) error {
	c, err := rtnl.Open(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.Close()
	r := rtnl.Request{What: fmt.Sprintf("list %s routes of table %s", f.name, tableName(table)), Type: unix.RTM_GETROUTE}
	r.Bytes(byte(f.af), 0, 0, 0, 0, 0, 0, 0)
	r.Uint32(0)
	return c.Dump(r, func(b []byte) {
		if m, ok := parseRoute(f, table, b); ok {
			take(m)
		}
	})
}

// parseRoute reads struct rtmsg and the destination behind it. ok is false for what is of another table, or an entry of a cache.
func parseRoute(f family, table uint32, b []byte) (m routeMsg, ok bool) {
	const cloned = 0x200 // RTM_F_CLONED
	if len(b) < unix.SizeofRtMsg {
		return m, false
	}
	h := (*unix.RtMsg)(unsafe.Pointer(&b[0]))
	if h.Flags&cloned != 0 || int(h.Family) != f.af || table < 256 && uint32(h.Table) != table {
		return m, false
	}
	m = routeMsg{kind: h.Type, proto: h.Protocol, attrs: b[unix.SizeofRtMsg:]}
	if table >= 256 && uint32(m.number(unix.RTA_TABLE)) != table {
		return m, false
	}
	addr := netip.IPv4Unspecified()
	if f.af == unix.AF_INET6 {
		addr = netip.IPv6Unspecified()
	}
	if h.Dst_len > 0 {
		addr, ok = netip.AddrFromSlice(rtnl.Attr(m.attrs, unix.RTA_DST))
	} else {
		ok = true
	}
	m.to = netip.PrefixFrom(addr, int(h.Dst_len))
	return m, ok
}

// eachAddr gives the node's addresses of a family to take, perhaps twice.
func eachAddr(f family, take func(hostAddr)) error {
	c, err := rtnl.Open(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.Close()
	r := rtnl.Request{What: fmt.Sprintf("list %s addresses", f.name), Type: unix.RTM_GETADDR}
	r.Bytes(byte(f.af), 0, 0, 0)
	r.Uint32(0)
	return c.Dump(r, func(b []byte) {
		if a, ok := parseAddr(f, b); ok {
			take(a)
		}
	})
}

// parseAddr reads struct ifaddrmsg and what is behind it. With a peer, IFA_ADDRESS is the peer's.
func parseAddr(f family, b []byte) (a hostAddr, ok bool) {
	if len(b) < unix.SizeofIfAddrmsg {
		return a, false
	}
	h := (*unix.IfAddrmsg)(unsafe.Pointer(&b[0]))
	attrs := b[unix.SizeofIfAddrmsg:]
	addr := rtnl.Attr(attrs, unix.IFA_LOCAL)
	if addr == nil {
		addr = rtnl.Attr(attrs, unix.IFA_ADDRESS)
	}
	flags := uint32(h.Flags)
	if v := rtnl.Attr(attrs, unix.IFA_FLAGS); len(v) == 4 {
		flags = binary.NativeEndian.Uint32(v)
	}
	ip, ok := netip.AddrFromSlice(addr)
	const second = unix.IFA_F_SECONDARY | unix.IFA_F_DEPRECATED | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED
	a = hostAddr{link: int(h.Index), prefix: netip.PrefixFrom(ip, int(h.Prefixlen)), scope: h.Scope, notPreferred: flags&second != 0}
	return a, ok && int(h.Family) == f.af
}

// addrsOf are the addresses of one link.
func addrsOf(index int, f family) (out []netip.Addr, err error) {
	err = eachAddr(f, func(a hostAddr) {
		if a.link == index {
			out = append(out, a.prefix.Addr())
		}
	})
	return out, err
}

// listRoutes returns the routes of our metric in main.
func listRoutes(f family) ([]route, error) {
	var out []route
	err := eachRoute(f, unix.RT_TABLE_MAIN, func(m routeMsg) {
		if m.number(unix.RTA_PRIORITY) != unreachableMetric {
			return
		}
		if r := (route{to: m.to, kind: int(m.kind), proto: int(m.proto)}); !slices.Contains(out, r) {
			out = append(out, r)
		}
	})
	return out, err
}

// HostNetworks are what main has routes to but the default one: networks of the host's own, and its pods.
func HostNetworks() ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, f := range families {
		if !hasFamily(f) {
			continue
		}
		err := eachRoute(f, unix.RT_TABLE_MAIN, func(m routeMsg) {
			if to := m.to; m.kind == unix.RTN_UNICAST && to.Bits() > 0 && !to.Addr().IsLinkLocalUnicast() && !to.Addr().IsMulticast() {
				out = append(out, to)
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// SharedWithTailnet are the parts of the tailnet's IPv4 range that are among the host's networks, which pods may reach all the same
// (prefTailnetHost).
func SharedWithTailnet(host []netip.Prefix) []netip.Prefix {
	return netset.Union(slices.DeleteFunc(slices.Clone(host), func(p netip.Prefix) bool {
		return !netset.Covers([]netip.Prefix{netset.TailnetIPv4}, p) || p.Bits() == netset.TailnetIPv4.Bits()
	}))
}

// routeTo is a route's destination, which the library leaves out where it is everything.
func routeTo(r netlink.Route, f family) netip.Prefix {
	if r.Dst == nil {
		if f.af == unix.AF_INET6 {
			return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	addr, _ := netip.AddrFromSlice(r.Dst.IP)
	if f.af == unix.AF_INET {
		addr = addr.Unmap()
	}
	ones, _ := r.Dst.Mask.Size()
	return netip.PrefixFrom(addr, ones)
}

func (r route) netlink() *netlink.Route {
	return &netlink.Route{
		Dst:      &net.IPNet{IP: r.to.Addr().AsSlice(), Mask: net.CIDRMask(r.to.Bits(), r.to.Addr().BitLen())},
		Table:    unix.RT_TABLE_MAIN,
		Priority: unreachableMetric,
		Type:     r.kind,
		Protocol: netlink.RouteProtocol(r.proto),
	}
}

func addRoute(r route) error { return netlink.RouteReplace(r.netlink()) }

func deleteRoute(r route) error {
	err := netlink.RouteDel(r.netlink())
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// listLinks returns the links over which router advertisements may come.
func listLinks() ([]link, error) {
	c, err := rtnl.Open(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	links := map[int]rtnl.Link{} // by index: a name may be another's by the second reading
	if err := c.Links(func(l rtnl.Link) { links[l.Index] = l }); err != nil {
		return nil, err
	}
	defaults, err := listDefaults(ipv6)
	if err != nil {
		return nil, err
	}
	viaRA := map[int]bool{}
	for _, r := range defaults {
		for _, h := range r.hops {
			viaRA[h.link] = viaRA[h.link] || r.proto == unix.RTPROT_RA
		}
	}
	var out []link
	for _, l := range links {
		name := l.Name
		if strings.HasPrefix(name, names.PodLinkPrefix) {
			continue // there are hundreds, and no router advertises on them
		}
		ra, err := sysctl.Read(sysctl.IPv6Link(name, "accept_ra"))
		if err != nil {
			continue // the link is gone, or has no IPv6 (an MTU below 1280)
		}
		forwarding, err := sysctl.Read(sysctl.IPv6Link(name, "forwarding"))
		if err != nil {
			continue
		}
		out = append(out, link{name: name, acceptRA: ra, forwards: forwarding == "1",
			raDefault: viaRA[l.Index], uplink: isUplink(l)})
	}
	slices.SortFunc(out, func(a, b link) int { return strings.Compare(a.name, b.name) })
	return out, nil
}

// isUplink reports whether a link can connect the host to its network. Container engines make links of other types.
func isUplink(l rtnl.Link) bool {
	return slices.Contains([]string{"", "vlan", "bond", "team"}, l.Kind) && l.Name != "lo" // "": hardware
}

// defaultRoute is a default route of main. The hops have its source.
type defaultRoute struct {
	kind, proto uint8
	metric      int
	hops        []hop
}

// listDefaults returns main's default routes, best metric first.
func listDefaults(f family) ([]defaultRoute, error) {
	var out []defaultRoute
	err := eachRoute(f, unix.RT_TABLE_MAIN, func(m routeMsg) {
		if m.to.Bits() == 0 {
			out = append(out, defaultRoute{kind: m.kind, proto: m.proto, metric: m.number(unix.RTA_PRIORITY), hops: m.hops()})
		}
	})
	slices.SortStableFunc(out, func(a, b defaultRoute) int { return a.metric - b.metric })
	return out, err
}

// hops are where a route leads.
func (m routeMsg) hops() []hop {
	addr := func(attrs []byte, attr uint16) netip.Addr { return addrOf(rtnl.Attr(attrs, attr)) }
	source := addr(m.attrs, unix.RTA_PREFSRC)
	several := rtnl.Attr(m.attrs, unix.RTA_MULTIPATH)
	if several == nil {
		return []hop{{m.number(unix.RTA_OIF), addr(m.attrs, unix.RTA_GATEWAY), source}}
	}
	var out []hop
	for len(several) >= unix.SizeofRtNexthop {
		h := (*unix.RtNexthop)(unsafe.Pointer(&several[0]))
		if int(h.Len) < unix.SizeofRtNexthop || int(h.Len) > len(several) {
			break
		}
		out = append(out, hop{int(h.Ifindex), addr(several[unix.SizeofRtNexthop:h.Len], unix.RTA_GATEWAY), source})
		several = several[min((int(h.Len)+3)&^3, len(several)):]
	}
	return out
}

// hasFamily is false for IPv6 on a host that was started with ipv6.disable=1 or has none in its kernel.
func hasFamily(f family) bool {
	_, err := os.Stat(filepath.Join(sysctl.Root, f.conf))
	return err == nil
}
