package noderoutes

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nlwatch"
	"github.com/headcni/headcni/pkg/config/names"
)

// Changes signals soon after anything changed, by anybody, that Sync, DefaultSource, Links or Table52 looks at: our rules and
// routes, the default routes, a loss of tailscaled's routes, links and addresses other than pods', and the switches for
// forwarding, those of links too. The kernel tells nobody about other sysctls. The channel is closed when ctx ends or the
// kernel's events cannot be read any more.
func (n *Routes) Changes(ctx context.Context) (<-chan struct{}, error) {
	return watch(ctx, nlwatch.Debounce, relevant, unix.RTNLGRP_LINK,
		unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_NETCONF,
		unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_NETCONF)
}

// PodLinkLosses signals soon after something was taken from a pod's link, by itself or because the pod has ended: a route to a
// single address, an address, that it is up, or that it belongs to nobody else's bridge.
func PodLinkLosses(ctx context.Context) (<-chan struct{}, error) {
	// The kernel takes a link's routes away first, and then the link.
	return watch(ctx, 5*nlwatch.Debounce, podLinkLoss, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV6_IFADDR)
}

func podLinkLoss(typ uint16, msg []byte) bool {
	const dstLen, flags = 1, 8 // in struct rtmsg, in struct ifinfomsg
	switch typ {
	case unix.RTM_DELROUTE:
		return len(msg) > unix.SizeofRtMsg && (msg[dstLen] == 32 || msg[dstLen] == 128) && tableOf(msg) == unix.RT_TABLE_MAIN
	case unix.RTM_NEWLINK:
		name, ok := attribute(msg, unix.SizeofIfInfomsg, unix.IFLA_IFNAME)
		if !ok || !strings.HasPrefix(string(name), names.PodLinkPrefix) {
			return false
		}
		_, taken := attribute(msg, unix.SizeofIfInfomsg, unix.IFLA_MASTER)
		return taken || binary.NativeEndian.Uint32(msg[flags:])&unix.IFF_UP == 0
	case unix.RTM_DELADDR:
		a, ok := attribute(msg, unix.SizeofIfAddrmsg, unix.IFA_ADDRESS)
		addr, _ := netip.AddrFromSlice(a)
		return ok && addr.IsLinkLocalUnicast()
	}
	return false
}

// watch signals, wait after the first of some messages, that there were such as are relevant.
func watch(ctx context.Context, wait time.Duration, relevant func(typ uint16, msg []byte) bool, groups ...uint) (<-chan struct{}, error) {
	out, err := nlwatch.Watch(ctx, unix.NETLINK_ROUTE, wait, relevant, groups...)
	if err != nil {
		return nil, fmt.Errorf("subscribe to network events: %w", explain(err))
	}
	return out, nil
}

// relevant keeps the events of pods coming and going, and of other programs' routes, from waking us.
func relevant(typ uint16, msg []byte) bool {
	switch typ {
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		r, err := decodeRule(msg)
		return err != nil || r.pref <= prefLast || r.table == unix.RT_TABLE_LOCAL // others' before ours may lead pods' packets elsewhere
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return routeRelevant(msg) || typ == unix.RTM_DELROUTE && tableOf(msg) == tailscaleTable
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		name, ok := attribute(msg, unix.SizeofIfInfomsg, unix.IFLA_IFNAME)
		return !ok || !strings.HasPrefix(string(bytes.TrimRight(name, "\x00")), names.PodLinkPrefix)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		a, ok := attribute(msg, unix.SizeofIfAddrmsg, unix.IFA_ADDRESS)
		addr, _ := netip.AddrFromSlice(a)
		return !ok || !addr.IsLinkLocalUnicast() // every pod's link gets one of these
	case unix.RTM_NEWNETCONF, rtmDelNetconf:
		// A link of its own says so by its index. We want the host's switch, and links that do not forward.
		i, ok := attribute(msg, netconfLen, netconfIfindex)
		f, _ := attribute(msg, netconfLen, netconfForwarding)
		return !ok || len(i) != 4 || int32(binary.NativeEndian.Uint32(i)) == netconfAll ||
			len(f) == 4 && binary.NativeEndian.Uint32(f) == 0
	}
	return false
}

// include/uapi/linux/netconf.h and rtnetlink.h, as far as golang.org/x/sys lacks them.
const (
	netconfLen        = 4 // struct netconfmsg {u8 family}, padded
	netconfIfindex    = 1
	netconfForwarding = 2
	netconfAll        = -1
	rtmDelNetconf     = 81
)

func routeRelevant(msg []byte) bool {
	if len(msg) < unix.SizeofRtMsg {
		return true
	}
	const dstLen, cloned = 1, 0x200 // struct rtmsg; RTM_F_CLONED: a cache entry
	if msg[dstLen] == 0 && binary.NativeEndian.Uint32(msg[8:])&cloned == 0 {
		return true
	}
	p, ok := attribute(msg, unix.SizeofRtMsg, unix.RTA_PRIORITY)
	return ok && len(p) == 4 && binary.NativeEndian.Uint32(p) == unreachableMetric
}

// tableOf is a route's table. The kernel always says it in an attribute too, since the header holds small numbers only.
func tableOf(msg []byte) uint32 {
	t, ok := attribute(msg, unix.SizeofRtMsg, unix.RTA_TABLE)
	if ok && len(t) == 4 {
		return binary.NativeEndian.Uint32(t)
	}
	return 0
}

// attribute finds one attribute behind a header of n bytes.
func attribute(msg []byte, n int, typ uint16) ([]byte, bool) {
	if len(msg) < n {
		return nil, false
	}
	attrs, err := nl.ParseRouteAttr(msg[n:])
	if err != nil {
		return nil, false
	}
	for _, a := range attrs {
		if a.Attr.Type == typ {
			return a.Value, true
		}
	}
	return nil, false
}
