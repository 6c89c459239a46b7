package podlink

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/rtnl"
	"github.com/headcni/headcni/internal/sysctl"
)

// Leased is a pod's attachment as its lease has it, which nobody but us can write, or as it was when nothing was lacking.
type Leased struct {
	Network, ContainerID, IfName string
	Addrs                        []netip.Addr
	// Made is zero where nobody has seen the link.
	Made Made
}

// Made is what Attach gave a link and no lease says, as it was seen later.
type Made struct {
	Index, MTU int
	MAC        net.HardwareAddr
	Alias      string
}

func madeOf(l rtnl.Link) Made { return Made{l.Index, l.MTU, l.MAC, l.Alias} }

// Lack is what the host's end of one pod's link lacks of what Attach gave it, or has otherwise: its name, alias, hardware address and
// MTU, that it is up and in no bridge, the gateway's address, routes, neighbours, sysctls (that of forwarding is package noderoutes').
type Lack struct {
	link    rtnl.Link
	pod     Leased
	changed []change
	down    bool
	gateway bool // the IPv6 one's address
	routes  []netip.Addr
	beaten  []netip.Addr // those before whose route there is another's
	neighs  []netip.Addr
	sysctls []setting
}

// change is something of the link itself that has another value.
type change struct {
	what string // in words
	back rtnl.Request
}

// setting is a sysctl and the value that it is to have.
type setting struct{ key, value string }

// hostSettings are those of a link's host's end: see hostSysctls.
func hostSettings(link string) []setting {
	return []setting{
		{sysctl.IPv4LinkARPIgnore(link), sysctl.ARPIgnoreAll}, {sysctl.IPv4LinkSourceRoute(link), "0"}, {sysctl.IPv6Link(link, "accept_ra"), "0"},
	}
}

// changed are the settings that have another value. One that cannot be read, as without IPv6, has none.
func changed(want []setting) []setting {
	return slices.DeleteFunc(want, func(s setting) bool {
		have, err := sysctl.Read(s.key)
		return err != nil || have == s.value
	})
}

// name is the link's, as it should be.
func (l Lack) name() string { return Name(l.pod.ContainerID, l.pod.IfName) }

// String says what is lacking, for people.
func (l Lack) String() string {
	var what []string
	for _, c := range l.changed {
		what = append(what, c.what)
	}
	if l.down {
		what = append(what, "it is down")
	}
	if l.gateway {
		what = append(what, "no address "+Gateway6.String())
	}
	for _, a := range l.routes {
		what = append(what, "no route to "+a.String()+" as it was made")
	}
	for _, a := range l.beaten {
		what = append(what, "another's route to "+a.String()+" comes before its own")
	}
	for _, a := range l.neighs {
		what = append(what, "no neighbour "+a.String()+" with the pod's hardware address")
	}
	for _, s := range l.sysctls {
		what = append(what, s.key+" is not "+s.value)
	}
	return fmt.Sprintf("link %s of container %s (%s): %s", l.name(), l.pod.ContainerID, l.pod.IfName, strings.Join(what, ", "))
}

func (l Lack) nothing() bool {
	return !l.down && !l.gateway && len(l.changed)+len(l.routes)+len(l.beaten)+len(l.neighs)+len(l.sysctls) == 0
}

// Lacks compares the links with the leases. A pod whose link is not there is not its matter. An ADD that is at work lacks something
// too, for a moment.
func (h *Handle) Lacks(pods []Leased) (found []Lack, err error) {
	v, err := h.podLinks()
	if err != nil {
		return nil, err
	}
	gateways, err := linksWithGateway(v.conn)
	if err != nil {
		return nil, err
	}
	neighs, err := listNeighs(v.conn, 0)
	if err != nil {
		return nil, err
	}
	for _, p := range pods {
		link, ok := v.linkOf(p)
		if !ok {
			continue
		}
		l := Lack{link: link, pod: p, changed: changes(link, p), down: !link.Up, sysctls: changed(hostSettings(link.Name))}
		for _, a := range p.Addrs {
			l.gateway = l.gateway || a.Is6() && !gateways[link.Index]
			switch way, there := v.ways[a]; {
			case there && way.link == link.Index && way.asMade:
			case there && way.metric < ownMetric(a):
				l.beaten = append(l.beaten, a)
			default:
				l.routes = append(l.routes, a)
			}
		}
		// Where nobody can tell the pod's hardware address the kernel asks for it by itself.
		if peer, err := v.conn.PeerOf(link); err == nil {
			for _, a := range p.Addrs {
				if !bytes.Equal(neighs[neighbour{link.Index, a}], peer.MAC) {
					l.neighs = append(l.neighs, a)
				}
			}
		}
		if !l.nothing() {
			found = append(found, l)
		}
	}
	return found, nil
}

// linkOf is the pod's link: the one of its name or once of its name whose alias says so, or the very link that was seen to be.
func (v view) linkOf(p Leased) (rtnl.Link, bool) {
	l, ok := v.links[Name(p.ContainerID, p.IfName)]
	if !ok && p.Made.Index != 0 {
		var err error
		l, err = v.conn.LinkByIndex(p.Made.Index)
		ok = err == nil
	}
	says := l.Alias != "" && belongsTo(l.Alias, p.ContainerID, p.IfName) && strings.HasPrefix(l.Alias, p.Network+" ")
	return l, ok && (says || l.Index == p.Made.Index)
}

// changes are those of the link itself.
func changes(link rtnl.Link, p Leased) (out []change) {
	note := func(what string, back rtnl.Request) { out = append(out, change{what, back}) }
	if want := Name(p.ContainerID, p.IfName); link.Name != want {
		note("its name is "+link.Name, renameLink(link.Index, want))
	}
	if link.Master != 0 {
		note(fmt.Sprintf("it belongs to link %d, a bridge or the like", link.Master), freeLink(link.Index))
	}
	made := p.Made
	if made.Index != link.Index {
		return out
	}
	if link.Alias != made.Alias {
		note(fmt.Sprintf("its alias is %q", link.Alias), aliasLink(link.Index, made.Alias))
	}
	if !bytes.Equal(link.MAC, made.MAC) {
		note(fmt.Sprintf("its hardware address is %s, not %s", link.MAC, made.MAC), addressLink(link.Index, made.MAC))
	}
	if link.MTU != made.MTU {
		note(fmt.Sprintf("its MTU is %d, not %d", link.MTU, made.MTU), resizeLink(link.Index, made.MTU))
	}
	return out
}

// Mend puts back what is lacking. It works by the link's index: where the pod has ended meanwhile, the index is nobody's, and there
// is nothing to do.
func (h *Handle) Mend(l Lack) error {
	c, err := h.open()
	if err != nil {
		return err
	}
	if err := h.changeBack(c, l); err != nil {
		return goneIsFine(err)
	}
	if slices.ContainsFunc(l.pod.Addrs, netip.Addr.Is6) {
		if err := switchIPv6On(l.name()); err != nil {
			return err
		}
	}
	for _, s := range changed(hostSettings(l.name())) { // as they are now: a link whose IPv6 comes back has the defaults
		if err := sysctl.Write(s.key, s.value); err != nil && !errors.Is(err, fs.ErrNotExist) { // or the link has gone
			return err
		}
	}
	steps := []rtnl.Request{linkUp("host", l.link.Index)}
	if l.gateway {
		steps = append(steps, addAddr("host", l.link.Index, netip.PrefixFrom(Gateway6, 64)))
	}
	for _, a := range l.routes {
		steps = append(steps, replaceRoute(l.link.Index, a))
	}
	// Without the pod's hardware address the kernel asks for it by itself.
	if peer, err := c.PeerOf(l.link); err == nil {
		for _, a := range l.pod.Addrs {
			steps = append(steps, addNeigh("host", l.link.Index, a, peer.MAC))
		}
	}
	if _, err = h.do(c, steps...); errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w: something else on this node has the address; `ip route get` tells what", err)
	}
	if err == nil && len(l.beaten) > 0 {
		return fmt.Errorf("delete the other route to %s (`ip route show %[1]s`), which is not ours", l.beaten[0])
	}
	return goneIsFine(err)
}

// changeBack puts the link itself back. Kernels before 6.2 change the name only of a link that is down.
func (h *Handle) changeBack(c *rtnl.Conn, l Lack) error {
	for _, change := range l.changed {
		_, err := h.do(c, change.back)
		if errors.Is(err, unix.EBUSY) {
			_, err = h.do(c, linkDown(l.link.Index), change.back)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func goneIsFine(err error) error {
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// Exists tells whether there is a link of that index.
func (h *Handle) Exists(index int) bool {
	c, err := h.open()
	if err != nil {
		return false
	}
	_, err = c.LinkByIndex(index)
	return err == nil
}

// view is what a node has for pods.
type view struct {
	conn   *rtnl.Conn
	links  map[string]rtnl.Link // by name
	routes map[int][]netip.Addr // the addresses that are routed to a link, by its index
	ways   map[netip.Addr]way   // by which route an address is reached
}

// way is the best route to a single address in the main table.
type way struct {
	link, metric int
	asMade       bool // as addRoute makes it
}

func (h *Handle) podLinks() (v view, err error) {
	if v.conn, err = h.open(); err != nil {
		return v, err
	}
	if v.links, err = listLinks(v.conn); err != nil {
		return v, err
	}
	v.routes, v.ways, err = hostRoutes(v.conn)
	return v, err
}

// hostRoutes are the addresses that the main table has a route of their own for, by link, and the ways to them.
func hostRoutes(c *rtnl.Conn) (map[int][]netip.Addr, map[netip.Addr]way, error) {
	routes, ways := map[int][]netip.Addr{}, map[netip.Addr]way{}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		r := rtnl.Request{What: "list routes", Type: unix.RTM_GETROUTE}
		r.Bytes(family, 0, 0, 0, 0, 0, 0, 0)
		r.Uint32(0)
		seen := map[netip.Addr]bool{} // a dump that is begun again comes twice
		err := c.Dump(r, func(b []byte) {
			a, w, leads, ok := hostRoute(b)
			if !ok {
				return
			}
			if best, known := ways[a]; !known || w.metric < best.metric {
				ways[a] = w
			}
			if leads && !seen[a] {
				seen[a] = true
				routes[w.link] = append(routes[w.link], a)
			}
		})
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return nil, nil, err
		}
	}
	return routes, ways, nil
}

// hostRoute reads a route to a single address in the main table. leads tells that it is there for who has the address: the kernel makes
// none as addRoute does, and routes of other plugins are static, as ours once were.
func hostRoute(b []byte) (a netip.Addr, w way, leads, ok bool) {
	if len(b) < unix.SizeofRtMsg {
		return a, w, false, false
	}
	m := (*unix.RtMsg)(unsafe.Pointer(&b[0]))
	if m.Table != unix.RT_TABLE_MAIN || m.Dst_len != 32 && m.Dst_len != 128 { // a router has a million
		return a, w, false, false
	}
	attrs := rtnl.Attrs(b[unix.SizeofRtMsg:])
	a, ok = netip.AddrFromSlice(attrs[unix.RTA_DST])
	if !ok || int(m.Dst_len) != a.BitLen() {
		return a, w, false, false
	}
	number := func(attr uint16) int {
		if v := attrs[attr]; len(v) == 4 {
			return int(binary.NativeEndian.Uint32(v))
		}
		return 0
	}
	w = way{link: number(unix.RTA_OIF), metric: number(unix.RTA_PRIORITY)}
	static := m.Protocol == unix.RTPROT_STATIC
	w.asMade = (static || m.Protocol == protocols["host"]) && w.link != 0 && m.Type == unix.RTN_UNICAST && m.Tos == 0 && w.metric == ownMetric(a)
	for _, other := range []uint16{unix.RTA_GATEWAY, unix.RTA_VIA, unix.RTA_PREFSRC, unix.RTA_METRICS, unix.RTA_ENCAP} {
		w.asMade = w.asMade && len(attrs[other]) == 0
	}
	return a, w, w.asMade || static && w.link != 0, true
}

// ownMetric is that of a route that asks for none.
func ownMetric(a netip.Addr) int {
	if a.Is6() {
		return 1024 // IP6_RT_PRIO_USER
	}
	return 0
}

// linksWithGateway are the links that have the address to which pods send IPv6.
func linksWithGateway(c *rtnl.Conn) (map[int]bool, error) {
	have := map[int]bool{}
	err := listAddrs(c, unix.AF_INET6, func(link int, a netip.Addr) { have[link] = have[link] || a == Gateway6 })
	if errors.Is(err, unix.EAFNOSUPPORT) {
		err = nil
	}
	return have, err
}
