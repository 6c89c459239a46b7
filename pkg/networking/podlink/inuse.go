package podlink

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/rtnl"
)

// InUse reports whether a single address is known to the node's routes: to a pod of whatever network, or to the node itself.
// It asks the kernel once. Where the kernel gives no answer it is false: Attach finds out for itself.
func (p *Handle) InUse(a netip.Addr) bool {
	c, err := p.hostConn()
	if err != nil {
		return false
	}
	p.host = c // for the next question, or the Attach that follows
	r, err := c.MatchingRoute(a)
	return err == nil && r.DstBits == a.BitLen() && (r.Type == unix.RTN_UNICAST || r.Type == unix.RTN_LOCAL)
}

// hostConn opens a socket on the node, or takes over the one that InUse has opened: that costs twice what a question does.
func (p *Handle) hostConn() (*rtnl.Conn, error) {
	if c := p.host; c != nil {
		p.host = nil
		return c, nil
	}
	return rtnl.Open(unix.NETLINK_ROUTE)
}
