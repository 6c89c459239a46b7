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

	"github.com/headcni/headcni/pkg/config/names"
)

// PodState is what CHECK expects of a pod's link: the result of ADD, as plugins after us may have changed it.
type PodState struct {
	ContainerID, IfName, Netns string
	// HostListed tells whether the result names the host's end.
	HostListed      bool
	HostMAC, PodMAC string // empty: any
	HostMTU, PodMTU int    // bytes; 0: any
	Addrs           []netip.Addr
	Routes          []PodRoute // in the pod; a zero gateway means any
}

// Check compares the kernel with want. Each deviation has its own message; all are joined.
func (p *Pods) Check(want PodState) error {
	ns, err := openPodNetns(want.Netns)
	if err != nil {
		return err
	}
	defer unix.Close(ns)
	host, err := Open(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer host.Close()
	inside, err := openPodConnAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer inside.Close()
	hostLink, hostErr := host.LinkByName(PodLinkName(want.ContainerID, want.IfName))
	podLink, podErr := inside.LinkByName(want.IfName)
	if hostErr != nil || podErr != nil {
		return errors.Join(missing("host link", hostErr), missing("pod interface "+want.IfName, podErr))
	}
	c := podCheck{want: want, host: host, inside: inside, hostLink: hostLink, podLink: podLink}
	c.links()
	c.hostSide()
	c.podAddrs()
	c.podRoutes()
	return errors.Join(c.faults...)
}

func missing(what string, err error) error {
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("%s is missing", what)
	}
	return err
}

type podCheck struct {
	want              PodState
	host, inside      *Conn
	hostLink, podLink Link
	faults            []error
}

func (c *podCheck) fault(format string, args ...any) {
	c.faults = append(c.faults, fmt.Errorf(format, args...))
}

func (c *podCheck) links() {
	h, p, w := c.hostLink, c.podLink, c.want
	if h.Kind != "veth" || !podLinkIsOf(h.Alias, w.ContainerID, w.IfName) {
		c.fault("host link %s is not this pod's (%s, alias %q)", h.Name, h.Kind, h.Alias)
	}
	if h.Peer != p.Index {
		c.fault("host link %s does not lead to the pod's interface %s", h.Name, w.IfName)
	}
	for _, end := range []struct {
		what string
		l    Link
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

// hostSide looks at the ways to the pod.
func (c *podCheck) hostSide() {
	neighs, err := listPodNeighs(c.host, c.hostLink.Index)
	if err != nil {
		c.faults = append(c.faults, err)
		return
	}
	for _, a := range c.want.Addrs {
		if oif, err := c.host.routeTo(a); err != nil {
			c.fault("host route to %s is missing: %w", a, err)
		} else if oif != c.hostLink.Index {
			c.fault("host route to %s does not lead to %s", a, c.hostLink.Name)
		}
		c.neigh("host", neighs, a, c.podLink.MAC)
	}
}

// byOther: the kernel forgets a link's neighbours when somebody sets its hardware address.
const byOther = "if another plugin set the pod's hardware address, give the capability mac to headcni instead"

func (c *podCheck) neigh(side string, have map[netip.Addr]net.HardwareAddr, a netip.Addr, mac net.HardwareAddr) {
	got, ok := have[a]
	if !ok {
		c.fault("%s neighbour %s is missing; %s", side, a, byOther)
	} else if got.String() != mac.String() {
		c.fault("%s neighbour %s has hardware address %s, not %s; %s", side, a, got, mac, byOther)
	}
}

func (c *podCheck) podAddrs() {
	r := Request{What: "list addresses", Type: unix.RTM_GETADDR}
	r.Bytes(unix.AF_UNSPEC, 0, 0, 0)
	r.Uint32(0)
	have := map[netip.Addr]bool{}
	err := c.inside.Dump(r, func(b []byte) {
		if len(b) < unix.SizeofIfAddrmsg {
			return
		}
		m := (*unix.IfAddrmsg)(unsafe.Pointer(&b[0]))
		attrs := Attrs(b[unix.SizeofIfAddrmsg:])
		raw := attrs[unix.IFA_LOCAL]
		if raw == nil {
			raw = attrs[unix.IFA_ADDRESS]
		}
		if a, ok := netip.AddrFromSlice(raw); ok && int(m.Index) == c.podLink.Index {
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

// podRouteKey tells routes of the same table apart.
type podRouteKey struct {
	dst     netip.Prefix
	gateway netip.Addr // zero: any
}

// podRouteTables are the tables that have a route.
type podRouteTables map[podRouteKey]map[int]bool

func (h podRouteTables) note(key podRouteKey, table int) {
	if h[key] == nil {
		h[key] = map[int]bool{}
	}
	h[key][table] = true
}

func (c *podCheck) podRoutes() {
	have := podRouteTables{}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		r := Request{What: "list routes", Type: unix.RTM_GETROUTE}
		r.Bytes(family, 0, 0, 0, 0, 0, 0, 0)
		r.Uint32(0)
		if err := c.inside.Dump(r, func(b []byte) { noteRoute(have, b) }); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			c.faults = append(c.faults, err)
			return
		}
	}
	neighs, err := listPodNeighs(c.inside, c.podLink.Index)
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
		if ours := r.Gateway == PodGateway4 || r.Gateway == PodGateway6; ours && !checked[r.Gateway] {
			checked[r.Gateway] = true
			c.neigh("pod", neighs, r.Gateway, c.hostLink.MAC)
		}
	}
}

// missing returns the routes that are in no table. What is found stands for one of them only.
func (h podRouteTables) missing(want []PodRoute) (list []PodRoute) {
	var elsewhere []PodRoute // in another table than ours was, perhaps: a plugin after us (sbr) can have moved them
	for _, r := range want {
		table := unix.RT_TABLE_MAIN
		if r.Table != nil {
			table = *r.Table
		}
		tables := h[podRouteKey{r.Dst, r.Gateway}]
		if !tables[table] {
			elsewhere = append(elsewhere, r)
		}
		delete(tables, table)
	}
	for _, r := range elsewhere {
		tables := h[podRouteKey{r.Dst, r.Gateway}]
		if len(tables) == 0 {
			list = append(list, r)
		}
		for table := range tables {
			delete(tables, table)
			break
		}
	}
	return list
}

func noteRoute(have podRouteTables, b []byte) {
	if len(b) < unix.SizeofRtMsg {
		return
	}
	m := (*unix.RtMsg)(unsafe.Pointer(&b[0]))
	attrs := Attrs(b[unix.SizeofRtMsg:])
	dst := netip.IPv4Unspecified()
	if m.Family == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	if a, ok := netip.AddrFromSlice(attrs[unix.RTA_DST]); ok {
		dst = a
	}
	key, table := podRouteKey{dst: netip.PrefixFrom(dst, int(m.Dst_len))}, int(m.Table)
	if t := attrs[unix.RTA_TABLE]; len(t) == 4 {
		table = int(binary.NativeEndian.Uint32(t))
	}
	if table == unix.RT_TABLE_LOCAL {
		return // the kernel's own
	}
	have.note(key, table)
	if gw, ok := netip.AddrFromSlice(attrs[unix.RTA_GATEWAY]); ok {
		key.gateway = gw
		have.note(key, table)
	}
}

// routeTo returns the index of the link by which a packet of this node to a leaves.
func (c *Conn) routeTo(a netip.Addr) (oif int, err error) {
	replies, err := c.Do(GetRoute(a))
	if err != nil {
		return 0, err
	}
	if len(replies[0]) < unix.SizeofRtMsg {
		return 0, errors.New("look up route: short answer from the kernel")
	}
	if v := Attrs(replies[0][unix.SizeofRtMsg:])[unix.RTA_OIF]; len(v) == 4 {
		oif = int(binary.NativeEndian.Uint32(v))
	}
	return oif, nil
}

// isLocal reports whether a is an address of the namespace's own.
func (c *Conn) isLocal(a netip.Addr) bool {
	replies, err := c.Do(GetRoute(a))
	return err == nil && len(replies[0]) >= unix.SizeofRtMsg && (*unix.RtMsg)(unsafe.Pointer(&replies[0][0])).Type == unix.RTN_LOCAL
}

// GetRoute: ip route get ADDR
func GetRoute(a netip.Addr) Request {
	r := Request{What: "look up route to " + a.String(), Type: unix.RTM_GETROUTE}
	r.Bytes(Family(a), byte(a.BitLen()), 0, 0, 0, 0, 0, 0)
	r.Uint32(0)
	r.Attr(unix.RTA_DST, a.AsSlice())
	return r
}

// listPodNeighs lists the permanent neighbours on a link.
func listPodNeighs(c *Conn, index int) (map[netip.Addr]net.HardwareAddr, error) {
	r := Request{What: "list neighbours", Type: unix.RTM_GETNEIGH}
	r.Bytes(unix.AF_UNSPEC, 0, 0, 0)
	r.Uint32(uint32(index))
	r.Bytes(0, 0, 0, 0)
	r.AttrUint32(unix.NDA_IFINDEX, uint32(index))
	have := map[netip.Addr]net.HardwareAddr{}
	err := c.Dump(r, func(b []byte) {
		if len(b) < unix.SizeofNdMsg {
			return
		}
		m := (*unix.NdMsg)(unsafe.Pointer(&b[0]))
		attrs := Attrs(b[unix.SizeofNdMsg:])
		if a, ok := netip.AddrFromSlice(attrs[unix.NDA_DST]); ok && int(m.Ifindex) == index && m.State&unix.NUD_PERMANENT != 0 {
			have[a] = slices.Clone(attrs[unix.NDA_LLADDR]) // the buffer is used again
		}
	})
	return have, err
}

// dumpTries bounds how often a dump that changes under way is begun again.
const dumpTries = 20

var errDumpChanged = errors.New("the kernel's list kept changing while it was read; try again")

// dump gives every message of a list to take. A list that changed while it was read is read again from the start, so take
// may see an entry twice.
func (c *Conn) Dump(r Request, take func([]byte)) error {
	r.Flags |= unix.NLM_F_DUMP
	for range dumpTries {
		whole, err := c.dumpOnce(r, take)
		if err != nil {
			return fmt.Errorf("%s: %w", r.What, err)
		}
		if whole {
			return nil
		}
	}
	return fmt.Errorf("%s: %w", r.What, errDumpChanged)
}

func (c *Conn) dumpOnce(r Request, take func([]byte)) (whole bool, err error) {
	c.seq++
	out := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(r.Body)))
	out = binary.NativeEndian.AppendUint16(out, r.Type)
	out = binary.NativeEndian.AppendUint16(out, r.Flags|unix.NLM_F_REQUEST)
	out = binary.NativeEndian.AppendUint32(out, c.seq)
	out = append(binary.NativeEndian.AppendUint32(out, 0), r.Body...)
	err = ignoringEINTR(func() error { return unix.Sendto(c.fd, out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}) })
	if err != nil {
		return false, err
	}
	whole = true
	for {
		n, err := c.receive()
		if err != nil {
			return false, err
		}
		for b := c.buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
			h := (*unix.NlMsghdr)(unsafe.Pointer(&b[0]))
			if int(h.Len) < unix.NLMSG_HDRLEN || int(h.Len) > len(b) {
				return false, errors.New("malformed message")
			}
			payload := b[unix.NLMSG_HDRLEN:h.Len]
			whole = whole && h.Flags&unix.NLM_F_DUMP_INTR == 0
			switch {
			case h.Seq != c.seq: // of an earlier request
			case h.Type == unix.NLMSG_DONE:
				return whole, nil
			case h.Type == unix.NLMSG_ERROR:
				return false, parseError(r.What, h.Flags, payload)
			default:
				take(payload)
			}
			b = b[min(align(int(h.Len)), len(b)):]
		}
	}
}

// podLinks lists all links whose name is like that of a pod's. It is a dump: not for ADD or DEL.
func (c *Conn) podLinks() (map[string]Link, error) {
	r := Request{What: "list links", Type: unix.RTM_GETLINK}
	r.Ifinfo(0, 0, 0)
	r.AttrUint32(unix.IFLA_EXT_MASK, skipStats)
	links := map[string]Link{}
	err := c.Dump(r, func(b []byte) {
		if l, err := ParseLink(b); err == nil && l.Kind == "veth" && isPodLinkName(l.Name) {
			links[l.Name] = l
		}
	})
	return links, err
}

func isPodLinkName(name string) bool {
	hash, ok := strings.CutPrefix(name, names.PodLinkPrefix)
	return ok && len(hash) == 10 && strings.Trim(hash, "0123456789abcdef") == ""
}

// HasPods reports whether any pod's link is on the node.
func (p *Pods) HasPods() bool {
	c, err := Open(unix.NETLINK_ROUTE)
	if err != nil {
		return false
	}
	defer c.Close()
	links, err := c.podLinks()
	return err == nil && len(links) > 0
}

// Gate is the function of the same name.
func (p *Pods) Gate(podCIDRs []netip.Prefix) error { return Gate(podCIDRs) }

// Sweep removes the links of one network's pods for which keep is false. It goes on past errors, and returns the names of
// the links that it could not remove.
func (p *Pods) Sweep(network string, keep func(linkName string) bool) (left []string, err error) {
	c, err := Open(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	links, err := c.podLinks()
	if err != nil {
		return nil, err
	}
	var errs []error
	for name, l := range links {
		of, _, _ := strings.Cut(l.Alias, " ")
		if of != network || keep(name) {
			continue
		}
		if err := deletePodLink(c, l); err != nil {
			left = append(left, name)
			errs = append(errs, err)
		}
	}
	return left, errors.Join(errs...)
}
