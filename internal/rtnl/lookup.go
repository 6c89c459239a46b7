package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// skipStats (RTEXT_FILTER_SKIP_STATS, linux/rtnetlink.h) spares the kernel from adding up counters.
	skipStats = 1 << 3
	operUp    = 6 // IF_OPER_UP, linux/if.h
)

// Link is what the kernel says about a link.
type Link struct {
	Index, Peer int // Peer: the other end's index in its own namespace
	MTU         int // bytes
	Up          bool
	Operational bool // it can send
	MAC         net.HardwareAddr
	Name        string
	Kind, Alias string
	// Master is the index of the bridge, bond or VRF that has it, 0: none.
	Master int
	// Group is IFLA_GROUP, 0 for every new link.
	Group uint32
	// PeerNetns is this namespace's number for the other end's, -1 where that is the same.
	PeerNetns int
}

// LinkByName looks a link up by name: never by a dump, which is slow with thousands of links. The error matches ENODEV if there
// is none.
func (c *Conn) LinkByName(name string) (Link, error) {
	replies, err := c.Do(GetLink(name))
	if err != nil {
		return Link{}, err
	}
	return ParseLink(replies[0])
}

// GetLink is the request of LinkByName, for a batch: ip link show dev NAME
func GetLink(name string) Request {
	r := Request{What: "look up link " + name, Type: unix.RTM_GETLINK}
	r.Ifinfo(0, 0, 0)
	r.AttrUint32(unix.IFLA_EXT_MASK, skipStats)
	r.AttrString(unix.IFLA_IFNAME, name)
	return r
}

// LinkByIndex looks a link up: ip link show, by its number. The error matches ENODEV if there is none.
func (c *Conn) LinkByIndex(index int) (Link, error) {
	r := Request{What: fmt.Sprintf("look up link %d", index), Type: unix.RTM_GETLINK}
	r.Ifinfo(index, 0, 0)
	r.AttrUint32(unix.IFLA_EXT_MASK, skipStats)
	replies, err := c.Do(r)
	if err != nil {
		return Link{}, err
	}
	return ParseLink(replies[0])
}

// PeerOf looks the other end of a link up, in its own namespace.
func (c *Conn) PeerOf(l Link) (Link, error) {
	r := Request{What: "look up the peer of link " + l.Name, Type: unix.RTM_GETLINK}
	r.Ifinfo(l.Peer, 0, 0)
	r.AttrUint32(unix.IFLA_EXT_MASK, skipStats)
	if l.PeerNetns >= 0 {
		r.AttrUint32(unix.IFLA_TARGET_NETNSID, uint32(l.PeerNetns))
	}
	replies, err := c.Do(r)
	if err != nil {
		return Link{}, err
	}
	return ParseLink(replies[0])
}

// ParseLink reads the answer to GetLink.
func ParseLink(b []byte) (Link, error) {
	if len(b) < unix.SizeofIfInfomsg {
		return Link{}, errors.New("look up link: short answer from the kernel")
	}
	info := (*unix.IfInfomsg)(unsafe.Pointer(&b[0]))
	attrs := Attrs(b[unix.SizeofIfInfomsg:])
	l := Link{
		Index: int(info.Index),
		Up:    info.Flags&unix.IFF_UP != 0,
		MAC:   slices.Clone(attrs[unix.IFLA_ADDRESS]),
		Name:  unix.ByteSliceToString(attrs[unix.IFLA_IFNAME]),
		Alias: unix.ByteSliceToString(attrs[unix.IFLA_IFALIAS]),
		Kind:  unix.ByteSliceToString(Attrs(attrs[unix.IFLA_LINKINFO])[unix.IFLA_INFO_KIND]),
	}
	if v := attrs[unix.IFLA_LINK]; len(v) == 4 {
		l.Peer = int(binary.NativeEndian.Uint32(v))
	}
	l.PeerNetns = -1
	if v := attrs[unix.IFLA_LINK_NETNSID]; len(v) == 4 {
		l.PeerNetns = int(int32(binary.NativeEndian.Uint32(v)))
	}
	if v := attrs[unix.IFLA_OPERSTATE]; len(v) == 1 {
		l.Operational = v[0] == operUp
	}
	if v := attrs[unix.IFLA_MASTER]; len(v) == 4 {
		l.Master = int(binary.NativeEndian.Uint32(v))
	}
	if v := attrs[unix.IFLA_GROUP]; len(v) == 4 {
		l.Group = binary.NativeEndian.Uint32(v)
	}
	if v := attrs[unix.IFLA_MTU]; len(v) == 4 {
		l.MTU = int(binary.NativeEndian.Uint32(v))
	}
	return l, nil
}

// Links gives every link to take, perhaps twice: see Dump. It is for those who live long enough.
func (c *Conn) Links(take func(Link)) error {
	r := Request{What: "list links", Type: unix.RTM_GETLINK}
	r.Ifinfo(0, 0, 0)
	r.AttrUint32(unix.IFLA_EXT_MASK, skipStats)
	return c.Dump(r, func(b []byte) {
		if l, err := ParseLink(b); err == nil {
			take(l)
		}
	})
}

// Route is what the kernel answers about the way to an address.
type Route struct {
	DstBits int   // prefix length of the destination
	Type    uint8 // unix.RTN_*
	OIF     int   // index of the link by which packets leave; 0: none
}

// RouteTo asks what becomes of a packet of this namespace to a: ip route get ADDR. Unreachable rules answer ENETUNREACH,
// unreachable routes EHOSTUNREACH, prohibit EACCES, blackhole EINVAL, which is also the answer to a question that the kernel
// does not understand.
func (c *Conn) RouteTo(a netip.Addr) (Route, error) { return c.getRoute(a, 0) }

// MatchingRoute asks for the route itself: ip route get fibmatch ADDR
func (c *Conn) MatchingRoute(a netip.Addr) (Route, error) {
	return c.getRoute(a, unix.RTM_F_FIB_MATCH)
}

func (c *Conn) getRoute(a netip.Addr, flags uint32) (Route, error) {
	r := Request{What: "look up route to " + a.String(), Type: unix.RTM_GETROUTE}
	r.Bytes(Family(a), byte(a.BitLen()), 0, 0, 0, 0, 0, 0)
	r.Uint32(flags)
	r.Attr(unix.RTA_DST, a.AsSlice())
	replies, err := c.Do(r)
	if err != nil {
		return Route{}, err
	}
	b := replies[0]
	if len(b) < unix.SizeofRtMsg {
		return Route{}, errors.New("look up route: short answer from the kernel")
	}
	m := (*unix.RtMsg)(unsafe.Pointer(&b[0]))
	route := Route{DstBits: int(m.Dst_len), Type: m.Type}
	if v := Attrs(b[unix.SizeofRtMsg:])[unix.RTA_OIF]; len(v) == 4 {
		route.OIF = int(binary.NativeEndian.Uint32(v))
	}
	return route, nil
}

// Family is the address family of a.
func Family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
