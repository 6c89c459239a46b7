package podlink

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/rtnl"
)

// Constants of linux/veth.h and linux/if_link.h that x/sys/unix lacks.
const (
	vethInfoPeer     = 1 // VETH_INFO_PEER
	inet6AddrGenMode = 8 // IFLA_INET6_ADDR_GEN_MODE
	addrGenModeNone  = 1 // IN6_ADDR_GEN_MODE_NONE
)

// newVeth: ip link add HOST mtu MTU address MAC type veth peer name POD mtu MTU address MAC netns FD
func newVeth(l Pair, podName string, netns int) rtnl.Request {
	r := rtnl.Request{What: "make link " + l.HostName, Type: unix.RTM_NEWLINK, Flags: rtnl.Create}
	r.Ifinfo(0, 0, 0)
	r.AttrString(unix.IFLA_IFNAME, l.HostName)
	r.AttrUint32(unix.IFLA_MTU, uint32(l.HostMTU))
	r.Attr(unix.IFLA_ADDRESS, l.HostMAC)
	info := r.Nest(unix.IFLA_LINKINFO)
	r.Attr(unix.IFLA_INFO_KIND, []byte("veth"))
	data := r.Nest(unix.IFLA_INFO_DATA)
	peer := r.Nest(vethInfoPeer)
	r.Ifinfo(0, 0, 0)
	r.AttrString(unix.IFLA_IFNAME, podName)
	r.AttrUint32(unix.IFLA_MTU, uint32(l.PodMTU))
	r.Attr(unix.IFLA_ADDRESS, l.PodMAC)
	r.AttrUint32(unix.IFLA_NET_NS_FD, uint32(netns))
	peer()
	data()
	info()
	return r
}

// setLink: ip link set LINK alias ALIAS addrgenmode none
//
// The host's end needs no link-local address of the kernel's making, whose duplicate detection would run for a second.
func setLink(index int, alias string, ipv6 bool) rtnl.Request {
	r := rtnl.Request{What: "name owner of link", Type: unix.RTM_SETLINK}
	r.Ifinfo(index, 0, 0)
	r.Attr(unix.IFLA_IFALIAS, []byte(alias))
	if ipv6 {
		spec := r.Nest(unix.IFLA_AF_SPEC)
		family := r.Nest(unix.AF_INET6)
		r.Attr(inet6AddrGenMode, []byte{addrGenModeNone})
		family()
		spec()
	}
	return r
}

// linkUp: ip link set LINK up
func linkUp(side string, index int) rtnl.Request {
	r := rtnl.Request{What: "set " + side + " link up", Type: unix.RTM_NEWLINK}
	r.Ifinfo(index, unix.IFF_UP, unix.IFF_UP)
	return r
}

// What follows changes a link back that somebody has changed.

// linkDown: ip link set LINK down
func linkDown(index int) rtnl.Request {
	r := rtnl.Request{What: "set host link down", Type: unix.RTM_NEWLINK}
	r.Ifinfo(index, 0, unix.IFF_UP)
	return r
}

// renameLink: ip link set LINK name NAME
func renameLink(index int, name string) rtnl.Request {
	r := changeLink("name host link", index)
	r.AttrString(unix.IFLA_IFNAME, name)
	return r
}

// freeLink: ip link set LINK nomaster
func freeLink(index int) rtnl.Request {
	r := changeLink("take host link out of its bridge", index)
	r.AttrUint32(unix.IFLA_MASTER, 0)
	return r
}

// aliasLink: ip link set LINK alias ALIAS
func aliasLink(index int, alias string) rtnl.Request {
	r := changeLink("name owner of link", index)
	r.Attr(unix.IFLA_IFALIAS, []byte(alias))
	return r
}

// addressLink: ip link set LINK address MAC
func addressLink(index int, mac net.HardwareAddr) rtnl.Request {
	r := changeLink("set hardware address of host link", index)
	r.Attr(unix.IFLA_ADDRESS, mac)
	return r
}

// resizeLink: ip link set LINK mtu MTU
func resizeLink(index, mtu int) rtnl.Request {
	r := changeLink("set MTU of host link", index)
	r.AttrUint32(unix.IFLA_MTU, uint32(mtu))
	return r
}

func changeLink(what string, index int) rtnl.Request {
	r := rtnl.Request{What: what, Type: unix.RTM_SETLINK}
	r.Ifinfo(index, 0, 0)
	return r
}

// addAddr: ip addr add ADDR dev LINK nodad
func addAddr(side string, index int, p netip.Prefix) rtnl.Request {
	r := rtnl.Request{What: fmt.Sprintf("add %s address %s", side, p), Type: unix.RTM_NEWADDR, Flags: rtnl.Create}
	var flags, scope byte
	if p.Addr().Is6() {
		flags = unix.IFA_F_NODAD // nobody else is on the link; detection would keep the address unusable for a second
		if p.Addr().IsLinkLocalUnicast() {
			scope = unix.RT_SCOPE_LINK
		}
	}
	r.Bytes(rtnl.Family(p.Addr()), byte(p.Bits()), flags, scope)
	r.Uint32(uint32(index))
	r.Attr(unix.IFA_LOCAL, p.Addr().AsSlice())
	r.Attr(unix.IFA_ADDRESS, p.Addr().AsSlice())
	return r
}

// addNeigh: ip neigh replace ADDR lladdr MAC nud permanent dev LINK
func addNeigh(side string, index int, a netip.Addr, mac net.HardwareAddr) rtnl.Request {
	r := rtnl.Request{
		What: fmt.Sprintf("add %s neighbour %s", side, a), Type: unix.RTM_NEWNEIGH,
		Flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE,
	}
	r.Bytes(rtnl.Family(a), 0, 0, 0)
	r.Uint32(uint32(index))
	r.Body = binary.NativeEndian.AppendUint16(r.Body, unix.NUD_PERMANENT)
	r.Bytes(0, unix.RTN_UNICAST)
	r.Attr(unix.NDA_DST, a.AsSlice())
	r.Attr(unix.NDA_LLADDR, mac)
	return r
}

// deleteRoute: ip route del, of what addRoute has added.
func deleteRoute(index int, route Route) rtnl.Request {
	r := addRoute("pod", index, route)
	r.What, r.Type, r.Flags = fmt.Sprintf("delete pod route %s", route.Dst), unix.RTM_DELROUTE, 0
	return r
}

// replaceRoute: ip route replace ADDR dev LINK proto kernel
func replaceRoute(index int, a netip.Addr) rtnl.Request {
	r := addRoute("host", index, Route{Dst: netip.PrefixFrom(a, a.BitLen())})
	r.Flags = unix.NLM_F_CREATE | unix.NLM_F_REPLACE
	return r
}

// routeToGateway: ip route append GATEWAY dev LINK
//
// The pod's kernel does not need it, since routes by the gateway are onlink. A runtime that makes the pod's routes anew elsewhere, as
// Kata Containers does inside its virtual machine, does so without that flag.
func routeToGateway(index int, gateway netip.Addr) rtnl.Request {
	r := addRoute("pod", index, Route{Dst: netip.PrefixFrom(gateway, gateway.BitLen())})
	r.Flags = unix.NLM_F_CREATE | unix.NLM_F_APPEND // another interface of the pod's may have it too
	return r
}

// protocols say who has made a route. On the node that is the kernel: systemd-networkd deletes routes of any other from links that it
// manages, and on some hosts it manages all (`[Match] Name=*`). In the pod there is nobody but us.
var protocols = map[string]byte{"host": unix.RTPROT_KERNEL, "pod": unix.RTPROT_STATIC}

// addRoute: ip route add DST [via GATEWAY onlink] dev LINK proto PROTOCOL [mtu N] [advmss N] [metric N] [table N] [scope N]
func addRoute(side string, index int, route Route) rtnl.Request {
	r := rtnl.Request{What: fmt.Sprintf("add %s route %s", side, route.Dst), Type: unix.RTM_NEWROUTE, Flags: rtnl.Create}
	table, scope := route.table(), unix.RT_SCOPE_LINK
	var flags uint32
	if route.Gateway.IsValid() {
		scope = unix.RT_SCOPE_UNIVERSE
		flags = unix.RTNH_F_ONLINK // no route leads to the next hop; the neighbour entry does
	}
	if route.Dst.Addr().Is6() {
		scope = unix.RT_SCOPE_UNIVERSE // IPv6 routes have no other
	}
	if route.Scope != nil {
		scope = *route.Scope
	}
	short := table
	if table > 255 {
		short = unix.RT_TABLE_UNSPEC
	}
	r.Bytes(rtnl.Family(route.Dst.Addr()), byte(route.Dst.Bits()), 0, 0, byte(short), protocols[side], byte(scope), unix.RTN_UNICAST)
	r.Uint32(flags)
	r.Attr(unix.RTA_DST, route.Dst.Addr().AsSlice())
	r.AttrUint32(unix.RTA_OIF, uint32(index))
	r.AttrUint32(unix.RTA_TABLE, uint32(table))
	if route.Gateway.IsValid() {
		r.Attr(unix.RTA_GATEWAY, route.Gateway.AsSlice())
	}
	if route.Priority > 0 {
		r.AttrUint32(unix.RTA_PRIORITY, uint32(route.Priority))
	}
	if route.MTU > 0 || route.AdvMSS > 0 {
		end := r.Nest(unix.RTA_METRICS)
		if route.MTU > 0 {
			r.AttrUint32(unix.RTAX_MTU, uint32(route.MTU))
		}
		if route.AdvMSS > 0 {
			r.AttrUint32(unix.RTAX_ADVMSS, uint32(route.AdvMSS))
		}
		end()
	}
	return r
}
