package podlink

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// InUse reports whether a single address is known to the node's routes: to a pod of whatever network, or to the node itself.
// It asks the kernel once. Where the kernel gives no answer it is false: Attach finds out for itself.
//
//	ip route get fibmatch ADDR
func (p *Pods) InUse(a netip.Addr) bool {
	c, err := p.hostConn()
	if err != nil {
		return false
	}
	p.host = c // for the next question, or the Attach that follows
	r := Request{What: "look up route to " + a.String(), Type: unix.RTM_GETROUTE}
	r.Bytes(Family(a), byte(a.BitLen()), 0, 0, 0, 0, 0, 0)
	r.Uint32(unix.RTM_F_FIB_MATCH) // the route itself, not what becomes of a packet
	r.Attr(unix.RTA_DST, a.AsSlice())
	replies, err := c.Do(r)
	if err != nil || len(replies[0]) < unix.SizeofRtMsg {
		return false
	}
	m := (*unix.RtMsg)(unsafe.Pointer(&replies[0][0]))
	return int(m.Dst_len) == a.BitLen() && (m.Type == unix.RTN_UNICAST || m.Type == unix.RTN_LOCAL)
}

// hostConn opens a socket on the node, or takes over the one that InUse has opened: that costs twice what a question does.
func (p *Pods) hostConn() (*Conn, error) {
	if c := p.host; c != nil {
		p.host = nil
		return c, nil
	}
	return Open(unix.NETLINK_ROUTE)
}
