package hostport

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/rtnl"
)

// Parts of the kernel's ABI (linux/netfilter/nfnetlink_conntrack.h) that no package without a library behind it has.
const (
	ctGet    = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1 // IPCTNL_MSG_CT_GET
	ctDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2 // IPCTNL_MSG_CT_DELETE

	attrOrig  = 1  // CTA_TUPLE_ORIG
	attrReply = 2  // CTA_TUPLE_REPLY
	attrID    = 12 // CTA_ID
	attrZone  = 18 // CTA_ZONE

	tupleIP    = 1 // CTA_TUPLE_IP
	tupleProto = 2 // CTA_TUPLE_PROTO
	ipSrc4     = 1 // CTA_IP_V4_SRC
	ipSrc6     = 3 // CTA_IP_V6_SRC
	protoNum   = 1 // CTA_PROTO_NUM
	protoSrc   = 2 // CTA_PROTO_SRC_PORT
	protoDst   = 3 // CTA_PROTO_DST_PORT
)

// atOnce bounds the deletions of one system call, whose refusals have to fit the socket's buffer.
const atOnce = 64

// EndFlows ends what the kernel remembers of UDP that the record's ports led to its pod, whose link must be gone: nothing makes such a
// flow again then, since what goes nowhere is never remembered. Otherwise each goes on to that address for as long as its client sends,
// whoever has the port or the address next. A kernel without ctnetlink has nothing to ask.
func (r Record) EndFlows() error {
	if !slices.ContainsFunc(r.Ports, func(m Mapping) bool { return strings.EqualFold(m.Protocol, "udp") }) {
		return nil
	}
	c, err := rtnl.Open(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer c.Close()
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		var ends []rtnl.Request
		list := rtnl.Request{What: "list what conntrack remembers", Type: ctGet, Body: []byte{family, unix.NFNETLINK_V0, 0, 0}}
		err := c.Dump(list, func(b []byte) {
			if flow, ok := parseFlow(b); ok && r.led(flow) {
				ends = append(ends, flow.end(family))
			}
		})
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
			return nil
		}
		if err != nil {
			return err
		}
		for some := range slices.Chunk(ends, atOnce) {
			if _, err := c.Do(some...); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
	}
	return nil
}

// led: it was begun towards one of the ports, and goes to the pod.
func (r Record) led(f flow) bool {
	return f.protocol == unix.IPPROTO_UDP && slices.Contains(r.Addrs, f.to.Addr()) && slices.ContainsFunc(r.Ports, func(m Mapping) bool {
		return strings.EqualFold(m.Protocol, "udp") && m.HostPort == f.asked && m.ContainerPort == f.to.Port()
	})
}

// flow is one entry of conntrack's table.
type flow struct {
	protocol byte
	asked    uint16         // the port that its first packet was for
	to       netip.AddrPort // who answers it
	attrs    map[uint16][]byte
}

// end is the request that deletes it, and none that has come in its place.
func (f flow) end(family byte) rtnl.Request {
	r := rtnl.Request{What: fmt.Sprintf("end a flow to %s", f.to), Type: ctDelete, Body: []byte{family, unix.NFNETLINK_V0, 0, 0}}
	r.Attr(attrOrig|unix.NLA_F_NESTED, f.attrs[attrOrig])
	for _, typ := range []uint16{attrID, attrZone} {
		if b, ok := f.attrs[typ]; ok {
			r.Attr(typ, b)
		}
	}
	return r
}

func parseFlow(b []byte) (f flow, ok bool) {
	if len(b) < 4 {
		return f, false
	}
	f.attrs = rtnl.Attrs(b[4:])
	orig, reply := rtnl.Attrs(f.attrs[attrOrig]), rtnl.Attrs(f.attrs[attrReply])
	asked, answers, ip := rtnl.Attrs(orig[tupleProto]), rtnl.Attrs(reply[tupleProto]), rtnl.Attrs(reply[tupleIP])
	src, is4 := ip[ipSrc4]
	if !is4 {
		src = ip[ipSrc6]
	}
	addr, ok := netip.AddrFromSlice(src)
	if !ok || len(asked[protoNum]) != 1 || len(asked[protoDst]) != 2 || len(answers[protoSrc]) != 2 {
		return f, false
	}
	f.protocol, f.asked = asked[protoNum][0], binary.BigEndian.Uint16(asked[protoDst])
	f.to = netip.AddrPortFrom(addr, binary.BigEndian.Uint16(answers[protoSrc]))
	return f, true
}
