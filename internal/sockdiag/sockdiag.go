// Package sockdiag asks the kernel about TCP connections of this network namespace, whoever's they are, and ends them (sock_diag(7)).
package sockdiag

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Conn is an established connection.
type Conn struct {
	Local, Remote netip.AddrPort
	Info          unix.TCPInfo

	family byte
	id     [idLen]byte // inet_diag_sockid
}

// Parts of the kernel's ABI (linux/inet_diag.h) that no package has.
const (
	idLen  = 48
	msgLen = 4 + idLen + 5*4 // inet_diag_msg

	attrBytecode = 1     // INET_DIAG_REQ_BYTECODE
	attrInfo     = 2     // INET_DIAG_INFO
	opMark       = 10    // INET_DIAG_BC_MARK_COND
	opLen        = 4 + 8 // inet_diag_bc_op, inet_diag_markcond

	established = 1
	destroy     = 21 // SOCK_DESTROY
)

// Marked lists the connections of a family (unix.AF_INET, unix.AF_INET6) whose sockets have a mark (SO_MARK) in the bits of mask. It needs CAP_NET_ADMIN.
func Marked(family byte, mark, mask uint32) ([]Conn, error) {
	op := []byte{opMark, opLen} // match: to the end
	op = binary.NativeEndian.AppendUint16(op, opLen+4)
	op = binary.NativeEndian.AppendUint32(op, mark)
	op = binary.NativeEndian.AppendUint32(op, mask)
	r := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
	r.AddData(raw(request(family, [idLen]byte{})))
	r.AddData(nl.NewRtAttr(attrBytecode, op))
	answers, err := r.Execute(unix.NETLINK_SOCK_DIAG, 0)
	if err != nil {
		return nil, fmt.Errorf("list TCP connections: %w", err)
	}
	var out []Conn
	for _, a := range answers {
		c, ok, err := decode(a)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, c)
		}
	}
	return out, nil
}

// Destroy ends a connection at this end, as if it had been reset: its owner's calls fail with ECONNABORTED, and the other end is told, if it can be. It needs
// CAP_NET_ADMIN and a kernel with CONFIG_INET_DIAG_DESTROY, else it is EOPNOTSUPP; ENOENT is a connection that has ended.
func (c Conn) Destroy() error {
	r := nl.NewNetlinkRequest(destroy, unix.NLM_F_ACK)
	r.AddData(raw(request(c.family, c.id)))
	if _, err := r.Execute(unix.NETLINK_SOCK_DIAG, 0); err != nil {
		return fmt.Errorf("end the connection from %s to %s: %w", c.Local, c.Remote, err)
	}
	return nil
}

// request is an inet_diag_req_v2.
func request(family byte, id [idLen]byte) []byte {
	b := []byte{family, unix.IPPROTO_TCP, 1 << (attrInfo - 1), 0}
	b = binary.NativeEndian.AppendUint32(b, 1<<established)
	return append(b, id[:]...)
}

// raw is a part of a message as it is.
type raw []byte

func (r raw) Len() int          { return len(r) }
func (r raw) Serialize() []byte { return r }

// decode reads an inet_diag_msg. It is not ok where the kernel has no numbers of the connection.
func decode(b []byte) (c Conn, ok bool, err error) {
	if len(b) < msgLen {
		return c, false, fmt.Errorf("list TCP connections: an answer of %d bytes", len(b))
	}
	c.family, c.id = b[0], [idLen]byte(b[4:])
	addr := func(at, port int) netip.AddrPort {
		n := 4
		if c.family == unix.AF_INET6 {
			n = 16
		}
		a, _ := netip.AddrFromSlice(b[4+at : 4+at+n])
		return netip.AddrPortFrom(a.Unmap(), binary.BigEndian.Uint16(b[4+port:]))
	}
	c.Local, c.Remote = addr(4, 0), addr(20, 2)
	attrs, err := nl.ParseRouteAttr(b[msgLen:])
	if err != nil {
		return c, false, fmt.Errorf("list TCP connections: %w", err)
	}
	for _, a := range attrs {
		if a.Attr.Type == attrInfo {
			// Older kernels tell less.
			copy(unsafe.Slice((*byte)(unsafe.Pointer(&c.Info)), unsafe.Sizeof(c.Info)), a.Value)
			ok = true
		}
	}
	return c, ok, nil
}
