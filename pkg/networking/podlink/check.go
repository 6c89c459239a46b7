package podlink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/rtnl"
)

// State is what CHECK expects of a pod's link: the result of ADD, as plugins after us may have changed it.
type State struct {
	ContainerID, IfName, Netns string
	// HostListed tells whether the result names the host's end.
	HostListed      bool
	HostMAC, PodMAC string // empty: any
	HostMTU, PodMTU int    // bytes; 0: any
	Addrs           []netip.Addr
	Routes          []Route // in the pod; a zero gateway means any
}

// Check compares the kernel with want. Each deviation has its own message; all are joined.
func (h *Handle) Check(want State) error {
	ns, err := openNetns(want.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	host, err := h.open()
	if err != nil {
		return err
	}
	hostLink, hostErr := host.LinkByName(Name(want.ContainerID, want.IfName))
	podLink, podErr := ns.conn.LinkByName(want.IfName)
	if hostErr != nil || podErr != nil {
		return errors.Join(missing("host link", hostErr), missing("pod interface "+want.IfName, podErr))
	}
	c := check{want: want, host: host, inside: ns.conn, hostLink: hostLink, podLink: podLink, ownDefaults: map[byte]bool{}}
	c.links()
	c.hostSide()
	c.podAddrs()
	c.podRoutes()
	c.podRules()
	return errors.Join(c.faults...)
}

func missing(what string, err error) error {
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("%s is missing", what)
	}
	return err
}

type check struct {
	want              State
	host, inside      *rtnl.Conn
	hostLink, podLink rtnl.Link
	faults            []error
	// ownDefaults are the families that have a default route in the interface's own table (rules.go).
	ownDefaults map[byte]bool
}

func (c *check) fault(format string, args ...any) {
	c.faults = append(c.faults, fmt.Errorf(format, args...))
}

func (c *check) links() {
	h, p, w := c.hostLink, c.podLink, c.want
	if h.Kind != "veth" || !belongsTo(h.Alias, w.ContainerID, w.IfName) {
		c.fault("host link %s is not this pod's (%s, alias %q)", h.Name, h.Kind, h.Alias)
	}
	if h.Peer != p.Index {
		c.fault("host link %s does not lead to the pod's interface %s", h.Name, w.IfName)
	}
	for _, end := range []struct {
		what string
		l    rtnl.Link
		mac  string
	}{{"host link " + h.Name, h, w.HostMAC}, {"pod interface " + w.IfName, p, w.PodMAC}} {
		if !end.l.Up {
			c.fault("%s is down", end.what)
		}
		if end.mac != "" && !strings.EqualFold(end.mac, end.l.MAC.String()) {
			c.fault("%s has hardware address %s, not %s", end.what, end.l.MAC, end.mac)
		}
	}
	if w.HostMTU != 0 && h.MTU != w.HostMTU {
		c.fault("host link %s has MTU %d, not %d", h.Name, h.MTU, w.HostMTU)
	}
	// A plugin after us may have made the pod's smaller (tuning, which leaves it out of the result). Larger packets than the
	// host's end takes are lost.
	if w.PodMTU != 0 && p.MTU > w.PodMTU {
		c.fault("pod interface %s has MTU %d, not %d; if another plugin raised it, set mtu for headcni instead", p.Name, p.MTU, w.PodMTU)
	}
}

// hostSide checks the node's routes and neighbours for the pod.
func (c *check) hostSide() {
	neighs, err := listNeighs(c.host, c.hostLink.Index)
	if err != nil {
		c.faults = append(c.faults, err)
		return
	}
	for _, a := range c.want.Addrs {
		if route, err := c.host.RouteTo(a); err != nil {
			c.fault("host route to %s is missing: %w", a, err)
		} else if route.OIF != c.hostLink.Index {
			c.fault("host route to %s does not lead to %s", a, c.hostLink.Name)
		}
		c.neigh("host", neighs, c.hostLink.Index, a, c.podLink.MAC)
	}
}

// macHint: the kernel forgets a link's neighbours when somebody sets its hardware address.
const macHint = "if another plugin set the pod's hardware address, give the capability mac to headcni instead"

func (c *check) neigh(side string, have map[neighbour]net.HardwareAddr, link int, a netip.Addr, mac net.HardwareAddr) {
	got, ok := have[neighbour{link, a}]
	if !ok {
		c.fault("%s neighbour %s is missing; %s", side, a, macHint)
	} else if got.String() != mac.String() {
		c.fault("%s neighbour %s has hardware address %s, not %s; %s", side, a, got, mac, macHint)
	}
}

func (c *check) podAddrs() {
	have := map[netip.Addr]bool{}
	err := listAddrs(c.inside, unix.AF_UNSPEC, func(link int, a netip.Addr) {
		if link == c.podLink.Index {
			have[a] = true
		}
	})
	if err != nil {
		c.faults = append(c.faults, err)
		return
	}
	for _, a := range c.want.Addrs {
		if !have[a] {
			c.fault("pod address %s is missing on %s", a, c.want.IfName)
		}
	}
}

// listAddrs gives the addresses of a family and their links to take, perhaps twice: see Conn.Dump.
func listAddrs(c *rtnl.Conn, family byte, take func(link int, a netip.Addr)) error {
	r := rtnl.Request{What: "list addresses", Type: unix.RTM_GETADDR}
	r.Bytes(family, 0, 0, 0)
	r.Uint32(0)
	return c.Dump(r, func(b []byte) {
		if len(b) < unix.SizeofIfAddrmsg {
			return
		}
		m := (*unix.IfAddrmsg)(unsafe.Pointer(&b[0]))
		attrs := rtnl.Attrs(b[unix.SizeofIfAddrmsg:])
		raw := attrs[unix.IFA_LOCAL]
		if raw == nil {
			raw = attrs[unix.IFA_ADDRESS]
		}
		if a, ok := netip.AddrFromSlice(raw); ok {
			take(int(m.Index), a)
		}
	})
}

// routeKey tells routes of the same table apart.
type routeKey struct {
	dst     netip.Prefix
	gateway netip.Addr // zero: any
}

// routePlace is where the kernel has a route: more than one with the same key may be in one table, by metric.
type routePlace struct{ table, metric int }

// routePlaces are the places that have a route.
type routePlaces map[routeKey]map[routePlace]bool

func (h routePlaces) note(key routeKey, place routePlace) {
	if h[key] == nil {
		h[key] = map[routePlace]bool{}
	}
	h[key][place] = true
}

func (c *check) podRoutes() {
	have := routePlaces{}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		r := rtnl.Request{What: "list routes", Type: unix.RTM_GETROUTE}
		r.Bytes(family, 0, 0, 0, 0, 0, 0, 0)
		r.Uint32(0)
		if err := c.inside.Dump(r, func(b []byte) { c.noteRoute(have, b) }); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			c.faults = append(c.faults, err)
			return
		}
	}
	neighs, err := listNeighs(c.inside, c.podLink.Index)
	if err != nil {
		c.faults = append(c.faults, err)
		return
	}
	for _, r := range have.missing(c.want.Routes) {
		c.fault("pod route %s is missing", strings.TrimSuffix(fmt.Sprintf("%s via %s", r.Dst, r.Gateway), " via invalid IP"))
	}
	checked := map[netip.Addr]bool{}
	for _, r := range c.want.Routes {
		// Routes of other plugins may have next hops elsewhere; ours lead to the host's end.
		if ours := r.Gateway == Gateway4 || r.Gateway == Gateway6; ours && !checked[r.Gateway] {
			checked[r.Gateway] = true
			c.neigh("pod", neighs, c.podLink.Index, r.Gateway, c.hostLink.MAC)
		}
	}
}

// missing returns the routes that are nowhere. What is found stands for one of them only, and first for the one that it is
// like: a plugin after us can have moved others to another table (sbr), or given them another metric.
func (h routePlaces) missing(want []Route) []Route {
	for _, alike := range []func(Route, routePlace) bool{
		func(r Route, p routePlace) bool { return p.table == r.table() && p.metric == r.Priority },
		func(r Route, p routePlace) bool { return p.table == r.table() },
		func(Route, routePlace) bool { return true },
	} {
		var left []Route
		for _, r := range want {
			places, found := h[routeKey{r.Dst, r.Gateway}], false
			for p := range places {
				if alike(r, p) {
					delete(places, p)
					found = true
					break
				}
			}
			if !found {
				left = append(left, r)
			}
		}
		want = left
	}
	return want
}

func (c *check) noteRoute(have routePlaces, b []byte) {
	if len(b) < unix.SizeofRtMsg {
		return
	}
	m := (*unix.RtMsg)(unsafe.Pointer(&b[0]))
	attrs := rtnl.Attrs(b[unix.SizeofRtMsg:])
	dst := netip.IPv4Unspecified()
	if m.Family == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	if a, ok := netip.AddrFromSlice(attrs[unix.RTA_DST]); ok {
		dst = a
	}
	key, table := routeKey{dst: netip.PrefixFrom(dst, int(m.Dst_len))}, int(m.Table)
	if t := attrs[unix.RTA_TABLE]; len(t) == 4 {
		table = int(binary.NativeEndian.Uint32(t))
	}
	if table == unix.RT_TABLE_LOCAL {
		return // the kernel's own
	}
	if oif := attrs[unix.RTA_OIF]; len(oif) == 4 && table == metricBase+int(binary.NativeEndian.Uint32(oif)) {
		if key.dst.Bits() == 0 && table == metricBase+c.podLink.Index {
			c.ownDefaults[m.Family] = true
		}
		return // an interface's own table (rules.go): it stands in for no route of another
	}
	place := routePlace{table: table}
	if metric := attrs[unix.RTA_PRIORITY]; len(metric) == 4 {
		place.metric = int(binary.NativeEndian.Uint32(metric))
	}
	have.note(key, place)
	if gw, ok := netip.AddrFromSlice(attrs[unix.RTA_GATEWAY]); ok {
		key.gateway = gw
		have.note(key, place)
	}
}

// neighbour is an address on a link.
type neighbour struct {
	link int
	addr netip.Addr
}

// listNeighs lists the permanent neighbours on a link, on all where index is 0.
func listNeighs(c *rtnl.Conn, index int) (map[neighbour]net.HardwareAddr, error) {
	r := rtnl.Request{What: "list neighbours", Type: unix.RTM_GETNEIGH}
	r.Bytes(unix.AF_UNSPEC, 0, 0, 0)
	r.Uint32(uint32(index))
	r.Bytes(0, 0, 0, 0)
	if index != 0 {
		r.AttrUint32(unix.NDA_IFINDEX, uint32(index))
	}
	have := map[neighbour]net.HardwareAddr{}
	err := c.Dump(r, func(b []byte) {
		if len(b) < unix.SizeofNdMsg {
			return
		}
		m := (*unix.NdMsg)(unsafe.Pointer(&b[0]))
		attrs := rtnl.Attrs(b[unix.SizeofNdMsg:])
		if a, ok := netip.AddrFromSlice(attrs[unix.NDA_DST]); ok && (index == 0 || int(m.Ifindex) == index) && m.State&unix.NUD_PERMANENT != 0 {
			have[neighbour{int(m.Ifindex), a}] = slices.Clone(attrs[unix.NDA_LLADDR]) // the buffer is used again
		}
	})
	return have, err
}
