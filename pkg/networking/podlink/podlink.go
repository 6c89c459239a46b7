// Package podlink attaches pods to the node by netlink: it makes, checks, lists and removes their links, and tells whether the
// node is ready for them (Gate).
package podlink

import (
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/procfs"
	"github.com/headcni/headcni/internal/rtnl"
	"github.com/headcni/headcni/internal/sysctl"
	"github.com/headcni/headcni/pkg/config/names"
)

// What a pod sees as its next hop. No interface has these addresses except fe80::1 on the host's end: the pod finds the
// host's end by a permanent neighbour entry, so the node needs no address, no proxy ARP and no lookup.
var (
	Gateway4 = netip.MustParseAddr("169.254.1.1")
	Gateway6 = netip.MustParseAddr("fe80::1")
)

const (
	// metricBase is above the kernel's default for IPv4 (0) and IPv6 (1024); an interface's index makes it unique in the pod.
	metricBase = 1024

	aliasMax = 255 // bytes: IFALIASZ-1, linux/if.h
)

// tunNames are the tuns that a pod's packets may have to pass, in order: daemon mode's, tailscaled's default.
var tunNames = []string{names.DaemonTun, names.HostTun}

// Errors that callers distinguish.
var (
	// ErrNetns: the path is no network namespace, has gone, or is the caller's own.
	ErrNetns = errors.New("invalid network namespace")
	// ErrLinkExists: the pod already has an interface of that name.
	ErrLinkExists = errors.New("interface exists already")
	// ErrNoIPv6: an IPv6 address is wanted where IPv6 is switched off.
	ErrNoIPv6 = errors.New("IPv6 is disabled")
)

// Handle attaches pods to the node by one netlink socket, in the network namespace of whoever calls first: opening one costs
// twice what a question does. It stays open until Close. The zero value works; it is not for concurrent use.
type Handle struct {
	conn *rtnl.Conn // nil until it is needed

	// inject, where a test sets it, fails the step that is about to run.
	inject func(step string) error
}

// open returns the socket on the node.
func (h *Handle) open() (*rtnl.Conn, error) {
	if h.conn == nil {
		c, err := rtnl.Open(unix.NETLINK_ROUTE)
		if err != nil {
			return nil, err
		}
		h.conn = c
	}
	return h.conn, nil
}

// Close closes the socket. What is called next opens another.
func (h *Handle) Close() {
	if h.conn != nil {
		h.conn.Close()
		h.conn = nil
	}
}

// Pod describes the wanted interface of one pod.
type Pod struct {
	Network     string // CNI network name
	ContainerID string
	IfName      string
	Label       string // whose it is: namespace/name; may be empty
	UID         string // of the Pod, as the runtime has it; may be empty
	MTU         int    // bytes; 0: the tun's, or names.TunMTU where there is none
	MAC         net.HardwareAddr
	Addrs       []netip.Addr
	Routes      []Route // in the pod
	Forward     bool    // let the node forward too: it has no daemon that does
}

// Route is a route in the pod by way of the node.
type Route struct {
	Dst      netip.Prefix
	Gateway  netip.Addr
	MTU      int // bytes; 0: the link's
	AdvMSS   int // bytes; 0: the kernel's choice
	Priority int
	Table    *int // nil: main
	Scope    *int // nil: global
}

// table is the route's table by number.
func (r Route) table() int {
	if r.Table != nil {
		return *r.Table
	}
	return unix.RT_TABLE_MAIN
}

// Pair is what Attach has made.
type Pair struct {
	HostName        string
	HostMAC, PodMAC net.HardwareAddr
	HostMTU, PodMTU int // bytes
	// Metric is that of the pod's routes without a priority of their own; 0: the kernel's default.
	Metric          int
	hostIdx, podIdx int
}

// Name is the name of the host's end: a hash, since the container ID does not fit into 15 bytes.
func Name(containerID, ifName string) string {
	h := fnv.New64a()
	h.Write([]byte(containerID + "\x00" + ifName))
	sum := h.Sum64()
	return fmt.Sprintf("%s%010x", names.PodLinkPrefix, (sum^sum>>40)&(1<<40-1))
}

// aliasOf says whose a link is. The kernel takes at most 255 bytes.
func aliasOf(pod Pod) string {
	alias := pod.Network + " " + pod.ContainerID + "/" + pod.IfName
	if pod.Label != "" {
		alias += " " + pod.Label
		if pod.UID != "" {
			alias += " " + pod.UID
		}
	}
	return alias[:min(len(alias), aliasMax)]
}

// belongsTo reports whether a link of the right name belongs to the attachment. An ADD that was killed right after it
// had made the link leaves one without alias; then the name, which is a hash, must do.
func belongsTo(alias, containerID, ifName string) bool {
	if alias == "" {
		return true
	}
	_, rest, _ := strings.Cut(alias, " ")
	want := containerID + "/" + ifName
	return strings.HasPrefix(rest+" ", want+" ") || len(alias) == aliasMax && strings.HasPrefix(want, rest)
}

// step lets a test fail what comes next.
func (h *Handle) step(what string) error {
	if h.inject == nil {
		return nil
	}
	return h.inject(what)
}

// do is Conn.do with the test's seam before each request.
func (h *Handle) do(c *rtnl.Conn, requests ...rtnl.Request) ([][]byte, error) {
	for i, r := range requests {
		if err := h.step(r.What); err != nil {
			if i > 0 {
				_, _ = c.Do(requests[:i]...) // the injected fault is the one to report
			}
			return nil, err
		}
	}
	return c.Do(requests...)
}

// Attach makes the pod's link, into its namespace. On an error something may be left over, which Detach removes. What goes
// wrong without harm is logged.
func (h *Handle) Attach(log *slog.Logger, ns *Netns, pod Pod) (Pair, error) {
	host, err := h.open()
	if err != nil {
		return Pair{}, err
	}
	if pod.Forward {
		if err := enableForwarding(pod.Addrs); err != nil {
			return Pair{}, err
		}
	}
	links, err := h.create(host, pod, ns)
	if err != nil {
		return Pair{}, err
	}
	if err := h.setUpHost(log, host, pod, links); err != nil {
		return Pair{}, err
	}
	if err := h.podSysctls(log, ns, pod); err != nil {
		return Pair{}, err
	}
	if links.Metric, err = h.setUpPod(ns.conn, pod, links); err != nil {
		return Pair{}, err
	}
	if err := awaitCarrier(host, links.HostName); err != nil {
		return Pair{}, err
	}
	awaitAddrs(ns.conn, pod.Addrs)
	return links, ns.stillThere()
}

// create makes the veth pair, and creates the pod's end directly in its namespace.
func (h *Handle) create(host *rtnl.Conn, pod Pod, ns *Netns) (Pair, error) {
	l := Pair{HostName: Name(pod.ContainerID, pod.IfName), HostMAC: randomMAC(), PodMAC: pod.MAC}
	if l.PodMAC == nil {
		l.PodMAC = randomMAC()
	}
	mtu := pod.MTU
	if mtu == 0 {
		mtu = tunMTU(host)
	}
	l.HostMTU, l.PodMTU = mtu, mtu
	// The look-up rides in the same system call: it tells both indices.
	requests := []rtnl.Request{newVeth(l, pod.IfName, ns.fd), rtnl.GetLink(l.HostName)}
	replies, err := h.do(host, requests...)
	if errors.Is(err, unix.EEXIST) {
		removed, gone := h.removeLeftover(host, pod, l.HostName)
		if gone != nil {
			return l, gone
		}
		if !removed {
			return l, fmt.Errorf("%s in %s: %w; delete the attachment first", pod.IfName, ns.path, ErrLinkExists)
		}
		replies, err = h.do(host, requests...)
	}
	if err != nil {
		return l, err
	}
	made, err := rtnl.ParseLink(replies[1])
	if err != nil {
		return l, err
	}
	l.hostIdx, l.podIdx = made.Index, made.Peer
	return l, nil
}

// removeLeftover removes the host's end that an ADD of the same attachment left when it was killed.
func (h *Handle) removeLeftover(host *rtnl.Conn, pod Pod, name string) (removed bool, err error) {
	l, err := host.LinkByName(name)
	if errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if l.Kind != "veth" || !belongsTo(l.Alias, pod.ContainerID, pod.IfName) {
		return false, fmt.Errorf("make link %s: it exists and is another's (%s, alias %q); "+
			"remove it if nothing uses it, then start the pod again", name, l.Kind, l.Alias)
	}
	return true, deleteLink(host, l)
}

// deleteLink returns when the link is gone. One that is gone already is as good.
func deleteLink(host *rtnl.Conn, l rtnl.Link) error {
	r := rtnl.Request{What: "delete link " + l.Name, Type: unix.RTM_DELLINK}
	r.Ifinfo(l.Index, 0, 0)
	if _, err := host.Do(r); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}

func tunMTU(host *rtnl.Conn) int {
	for _, name := range tunNames {
		if l, err := host.LinkByName(name); err == nil && l.MTU > 0 {
			return l.MTU
		}
	}
	return names.TunMTU
}

// setUpHost programs the host's end. Everything hangs on the link and goes with it.
func (h *Handle) setUpHost(log *slog.Logger, host *rtnl.Conn, pod Pod, l Pair) error {
	ipv6, err := h.hostSysctls(log, l.HostName)
	if err != nil {
		return err
	}
	if ipv6 && wants6(pod) && !nodeWithoutIPv6() {
		if err := switchIPv6On(l.HostName); err != nil {
			return fmt.Errorf("%w on a new link of the node and could not be enabled: %w", ErrNoIPv6, err)
		}
	}
	steps := []rtnl.Request{
		setLink(l.hostIdx, aliasOf(pod), ipv6),
		linkUp("host", l.hostIdx),
	}
	if wants6(pod) {
		steps = append(steps, addAddr("host", l.hostIdx, netip.PrefixFrom(Gateway6, 64)))
	}
	for _, a := range pod.Addrs {
		// No src: the kernel deletes a route for good when its source address goes.
		steps = append(steps, addNeigh("host", l.hostIdx, a, l.PodMAC), addRoute("host", l.hostIdx, Route{Dst: netip.PrefixFrom(a, a.BitLen())}))
	}
	_, err = h.do(host, steps...)
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w: something else on this node has the address; `ip route get` tells what", err)
	}
	return explainIPv6(err, "on this node", pod)
}

// setUpPod programs the pod's end. It returns the metric of the routes, 0 for the kernel's default.
func (h *Handle) setUpPod(inside *rtnl.Conn, pod Pod, l Pair) (metric int, err error) {
	steps := []rtnl.Request{linkUp("pod", l.podIdx)}
	for _, a := range pod.Addrs {
		steps = append(steps, addAddr("pod", l.podIdx, netip.PrefixFrom(a, a.BitLen())))
	}
	beside, err := hasOthers(inside, l.podIdx)
	if err != nil {
		return 0, err
	}
	routes, table := pod.Routes, metricBase+l.podIdx
	if beside {
		routes = slices.Concat(routes, tableRoutes(pod, table))
	}
	known := map[netip.Addr]bool{}
	for _, r := range routes {
		if r.Gateway.IsValid() && !known[r.Gateway] {
			known[r.Gateway] = true
			steps = append(steps, addNeigh("pod", l.podIdx, r.Gateway, l.HostMAC))
			if r.Gateway.Is4() || !r.Gateway.IsLinkLocalUnicast() {
				steps = append(steps, routeToGateway(l.podIdx, r.Gateway))
			}
		}
	}
	for _, r := range routes {
		steps = append(steps, addRoute("pod", l.podIdx, r))
	}
	if beside {
		for _, a := range pod.Addrs {
			steps = append(steps, sourceRule(a, table))
		}
	}
	// The look-up makes the kernel carry through what the carrier brings (see awaitCarrier).
	steps = append(steps, rtnl.GetLink(pod.IfName))
	_, err = h.do(inside, steps...)
	if errors.Is(err, unix.EEXIST) {
		metric = table
		err = h.addRoutesBehind(inside, pod, l.podIdx, metric)
	}
	return metric, explainIPv6(err, "in the pod's network namespace", pod)
}

// addRoutesBehind adds the pod's routes anew, behind those of another interface to the same destinations: a container may be
// attached more than once (CNI specification section 2, ADD), and its first interface stays the way out, but for what comes from
// the new one's addresses (see tableRoutes).
func (h *Handle) addRoutesBehind(inside *rtnl.Conn, pod Pod, index, metric int) error {
	for _, r := range pod.Routes {
		// The kernel went on past the one that was refused. Only a route by our own interface matches.
		if _, err := h.do(inside, deleteRoute(index, r)); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	var steps []rtnl.Request
	for _, r := range pod.Routes {
		if r.Priority == 0 {
			r.Priority = metric
		}
		steps = append(steps, addRoute("pod", index, r))
	}
	_, err := h.do(inside, steps...)
	return err
}

const (
	carrierTries = 100
	carrierWait  = time.Millisecond
	// addrWait bounds what mostly takes less than addrFirst. The queue of a node with many busy processes takes 100 ms, and with 60 of
	// them on two processors it has been seen to take more than a second.
	addrWait  = 10 * time.Second
	addrFirst = 50 * time.Microsecond
)

// awaitCarrier waits until the host's end sends. It was set up before its peer, without carrier, and a link gets its queue only
// when the kernel's link watch has seen the carrier come: until then it drops what it is given. Looking the link up makes
// that happen at once (rtnl_getlink, since Linux 6.8); older kernels get to it within milliseconds.
func awaitCarrier(host *rtnl.Conn, name string) error {
	for range carrierTries {
		l, err := host.LinkByName(name)
		if err != nil || l.Operational {
			return err
		}
		time.Sleep(carrierWait)
	}
	return nil // it is up as far as we can bring it; a late work queue is no reason to fail a pod
}

// awaitAddrs waits until the pod takes packets for its IPv6 addresses. The kernel makes them its own in a work queue, also those
// without duplicate detection (net/ipv6/addrconf.c, addrconf_dad_work), and answers for none before.
func awaitAddrs(inside *rtnl.Conn, addrs []netip.Addr) {
	end := time.Now().Add(addrWait)
	for _, a := range addrs {
		for wait := addrFirst; a.Is6() && !isLocal(inside, a) && time.Now().Before(end); wait = min(2*wait, carrierWait) {
			time.Sleep(wait)
		}
	}
}

// isLocal reports whether a is an address of the namespace's own.
func isLocal(c *rtnl.Conn, a netip.Addr) bool {
	r, err := c.RouteTo(a)
	return err == nil && r.Type == unix.RTN_LOCAL
}

// explainIPv6 puts the kernel's EACCES for an address on a link without IPv6 into words.
func explainIPv6(err error, where string, pod Pod) error {
	refused := errors.Is(err, unix.EACCES) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
	if refused && wants6(pod) {
		return fmt.Errorf("%w %s: set the sysctls net.ipv6.conf.all.disable_ipv6 and net.ipv6.conf.default.disable_ipv6 to 0 "+
			"there, or take the IPv6 range out of ipam: %w", ErrNoIPv6, where, err)
	}
	return err
}

// randomMAC returns a locally administered unicast address. Both ends get one of their own: where the kernel chose it,
// systemd-udevd would replace it (MACAddressPolicy) after the neighbour entries were made.
func randomMAC() net.HardwareAddr {
	v := rand.Uint64()
	mac := net.HardwareAddr{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24), byte(v >> 32), byte(v >> 40)}
	mac[0] = mac[0]&^1 | 2
	return mac
}

// hostSysctls lets the host's end forward what the pod sends, if the node forwards, by the way that the node chooses, and ignore router
// advertisements and ARP requests: a pod must not give the node a default route, nor fill the node's table of neighbours with as many as it makes up. It
// asks for none, since its gateway is a permanent neighbour, and so is the pod for the node. It reports whether the kernel has IPv6 on the link.
func (h *Handle) hostSysctls(log *slog.Logger, link string) (ipv6 bool, err error) {
	if err := h.step("sysctl host accept_ra"); err != nil {
		return false, err
	}
	// A new link takes net.ipv4.conf.default.forwarding, which may be 0 although the host forwards.
	if key := sysctl.IPv4LinkForwarding(link); !sysctl.IsOn(key) && sysctl.IsOn(sysctl.IPv4Forwarding) {
		if err := sysctl.Write(key, "1"); err != nil {
			log.Warn("could not let the host's end of a pod's link forward; what the pod sends goes nowhere", "link", link, "err", err)
		}
	}
	if err := sysctl.Write(sysctl.IPv4LinkARPIgnore(link), sysctl.ARPIgnoreAll); err != nil {
		log.Warn("could not keep a pod from filling the node's table of neighbours by ARP", "link", link, "err", err)
	}
	if err := sysctl.Write(sysctl.IPv4LinkSourceRoute(link), "0"); err != nil {
		log.Warn("could not keep a pod from naming the way of its packets itself, which goes round policies where the host allows it", "link", link, "err", err)
	}
	err = writeSysctl(link, "accept_ra", "0")
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		// /proc/sys may be read-only. The daemon's nft rule against advertisements from pods stands all the same.
		log.Warn("could not switch router advertisements off on the host's end of a pod's link", "link", link, "err", err)
	}
	return true, nil
}

// podSysctls ignores router advertisements in the pod, and switches IPv6 on for this link where the runtime has switched it off
// by default and the pod gets an IPv6 address. The pod gets no link-local address: with one it has a network of 2^64 neighbours of
// which each process of its could ask for as many as it likes, and the kernel has one table of neighbours for all namespaces.
func (h *Handle) podSysctls(log *slog.Logger, ns *Netns, pod Pod) error {
	if err := h.step("sysctl pod accept_ra"); err != nil {
		return err
	}
	return inNetns(ns.fd, func() error {
		err := writeSysctl(pod.IfName, "accept_ra", "0")
		if errors.Is(err, os.ErrNotExist) {
			return nil // no IPv6 in this kernel: adding the address says so
		}
		if err != nil {
			log.Warn("could not switch router advertisements off in a pod", "interface", pod.IfName, "err", err)
		}
		if err := writeSysctl(pod.IfName, "addr_gen_mode", strconv.Itoa(addrGenModeNone)); err != nil {
			log.Warn("could not keep a pod from having a link-local address", "interface", pod.IfName, "err", err)
		}
		if !wants6(pod) {
			return nil
		}
		if err := switchIPv6On(pod.IfName); err != nil {
			return fmt.Errorf("%w in the pod's network namespace and could not be enabled: %w", ErrNoIPv6, err)
		}
		return nil
	})
}

func wants6(pod Pod) bool { return slices.ContainsFunc(pod.Addrs, netip.Addr.Is6) }

// nodeWithoutIPv6: somebody has switched it off as a whole, and pods should not start as if it were there. New links take
// net.ipv6.conf.default.disable_ipv6, which hardened hosts set alone, to keep IPv6 off links that nobody has asked for.
func nodeWithoutIPv6() bool {
	off, err := procfs.Read(sysctlPath("all", "disable_ipv6"))
	return err == nil && off != "0"
}

// switchIPv6On does nothing where it is on, or where that cannot be told: adding the address says what is wrong, if anything is.
func switchIPv6On(link string) error {
	if off, err := procfs.Read(sysctlPath(link, "disable_ipv6")); err != nil || off == "0" {
		return nil
	}
	return writeSysctl(link, "disable_ipv6", "0")
}

func sysctlPath(link, key string) string { return sysctl.Root + "/" + sysctl.IPv6Link(link, key) }

func writeSysctl(link, key, value string) error {
	if err := procfs.Write(sysctlPath(link, key), value); err != nil {
		return fmt.Errorf("set sysctl net.ipv6.conf.%s.%s=%s: %w", link, key, value, err)
	}
	return nil
}

// There tells whether the node has a link of that name, or cannot tell.
func (h *Handle) There(name string) bool {
	host, err := h.open()
	if err == nil {
		_, err = host.LinkByName(name)
	}
	return !errors.Is(err, unix.ENODEV)
}

// Detach removes the pod's link and returns when it is gone. It needs neither the pod's namespace nor an earlier result:
// the pod's end, and every route and neighbour, goes with the host's end. Rules go if the namespace is given and still there. A
// link that is not there is no error; removed says whether there was one.
func (h *Handle) Detach(containerID, ifName, netns string) (removed bool, err error) {
	if err := h.step("detach"); err != nil {
		return false, err
	}
	host, err := h.open()
	if err != nil {
		return false, err
	}
	l, err := host.LinkByName(Name(containerID, ifName))
	if errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if l.Kind != "veth" || !belongsTo(l.Alias, containerID, ifName) {
		return false, nil // another's: Attach refuses to work beside it, so nothing of ours is there
	}
	if netns != "" { // before the link, so that whoever is killed in between finds it again
		deleteRules(netns, ifName, l)
	}
	return true, deleteLink(host, l)
}
