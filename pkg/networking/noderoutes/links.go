package noderoutes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/sysctl"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/reconcile"
)

// ipv6MinMTU in bytes: the kernel takes IPv6 away from a link with less (RFC 8200, section 5).
const ipv6MinMTU = 1280

// Tun is tailscaled's interface as its status says it is.
type Tun struct {
	Name string
	// Addrs are none while tailscaled does not run.
	Addrs []netip.Addr
	// IPv6: pods of this node have it.
	IPv6 bool
}

// Links keep the links that pods' packets pass as they have to be, as far as others can change them: the tun up and with its
// addresses, which tailscaled adds once (the kernel drops the IPv6 ones when a link goes down), and pods' links and the tun
// forwarding. The zero value works. It is of the network namespace of its callers.
type Links struct {
	lacking time.Time // since when the tun lacks something
}

// Sync puts back what it can, and names what it cannot.
func (l *Links) Sync(tun Tun) ([]string, error) {
	done, tunErr := l.syncTun(tun)
	more, err := syncForwarding(tun.Name)
	done = append(done, more...)
	more, routeErr := refuseSourceRoutes(tun.Name)
	return append(done, more...), errors.Join(tunErr, err, routeErr)
}

// refuseSourceRoutes keeps a device that may send to this node from reaching, by a way that its packets name, whom it may not: tailscaled's filter,
// and policies, see the node's address.
func refuseSourceRoutes(tun string) ([]string, error) {
	key := sysctl.IPv4LinkSourceRoute(tun)
	if tun == "" || !sysctl.IsOn(sysctl.IPv4LinkSourceRoute("all")) || !sysctl.IsOn(key) {
		return nil, nil
	}
	if err := sysctl.Write(key, "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("packets out of the tunnel may name their way themselves, past who may reach what: set %s=0: %w", key, explain(err))
	}
	return []string{fmt.Sprintf("set %s=0", key)}, nil
}

// syncTun gives tailscaled routeGrace first: it may be at work.
func (l *Links) syncTun(tun Tun) ([]string, error) {
	link, err := netlink.LinkByName(tun.Name)
	if errors.As(err, new(netlink.LinkNotFoundError)) || err == nil && (link.Type() != "tuntap" || len(tun.Addrs) == 0) {
		l.lacking = time.Time{}
		return nil, nil // tailscaled does not run here, which others say
	}
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", tun.Name, err)
	}
	lacks, off, err := lackingAddrs(link, tun)
	down := link.Attrs().Flags&net.FlagUp == 0
	if err != nil || !down && len(lacks) == 0 {
		l.lacking = time.Time{}
		return nil, errors.Join(err, off)
	}
	if l.lacking.IsZero() {
		l.lacking = time.Now()
	}
	if rest := routeGrace - time.Since(l.lacking); rest > 0 {
		return nil, errors.Join(reconcile.Soon{Waiting: reconcile.Waiting(lackText(tun.Name, down, lacks)), In: rest}, off)
	}
	var done []string
	if down {
		if err := netlink.LinkSetUp(link); err != nil {
			return nil, fmt.Errorf("%s: set it up: %w", lackText(tun.Name, down, lacks), explain(err))
		}
		done = append(done, "set "+tun.Name+" up")
	}
	for _, a := range lacks {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, addr); err != nil && !errors.Is(err, unix.EEXIST) {
			return done, fmt.Errorf("%s: add %s: %w; restart tailscaled", lackText(tun.Name, down, lacks), a, explain(err))
		}
		done = append(done, fmt.Sprintf("add address %s dev %s", a, tun.Name))
	}
	l.lacking = time.Time{}
	return done, off
}

// lackText says which families are dark, and why.
func lackText(tun string, down bool, lacks []netip.Addr) string {
	if down {
		return fmt.Sprintf("no pod reaches other nodes: %s is down", tun)
	}
	var parts []string
	for _, a := range lacks {
		family := families[0]
		if a.Is6() {
			family = families[1]
		}
		parts = append(parts, fmt.Sprintf("no pod reaches other nodes by %s: %s has lost its address %s", family.name, tun, a))
	}
	return strings.Join(parts, "; ")
}

// lackingAddrs returns the addresses that link lacks. off is an error where IPv6 is switched off. On a host without IPv6, which says so
// for new links, tailscaled uses none; that is fine where pods have none either.
func lackingAddrs(link netlink.Link, tun Tun) (lacks []netip.Addr, off, err error) {
	name, want := link.Attrs().Name, tun.Addrs
	for _, f := range families {
		if !hasFamily(f) {
			continue
		}
		if f.af == unix.AF_INET6 {
			all := sysctl.IPv6Link("all", "disable_ipv6")
			if !tun.IPv6 && (sysctl.IsOn(all) || sysctl.IsOn(sysctl.IPv6Link("default", "disable_ipv6"))) {
				continue
			}
			if sysctl.IsOn(all) && slices.ContainsFunc(want, netip.Addr.Is6) {
				off = fmt.Errorf("no pod starts, and none reaches other nodes by IPv6: it is switched off on this node, whose pods have it; run sysctl -w %s=0, "+
					"and look in /etc/sysctl.d for what set it to 1, or take the IPv6 range from the node", all)
				continue
			}
			if mtu := link.Attrs().MTU; mtu < ipv6MinMTU && slices.ContainsFunc(want, netip.Addr.Is6) {
				off = fmt.Errorf("no pod reaches other nodes by IPv6: the MTU of %s is %d, and IPv6 needs %d; run ip link set %[1]s mtu %[3]d",
					name, mtu, ipv6MinMTU)
				continue
			}
			if key := sysctl.IPv6Link(name, "disable_ipv6"); sysctl.IsOn(key) && slices.ContainsFunc(want, netip.Addr.Is6) {
				off = fmt.Errorf("no pod reaches other nodes by IPv6: it is switched off on %s; run sysctl -w %s=0", name, key)
				continue
			}
		}
		have, err := addrsOf(link.Attrs().Index, f)
		if err != nil {
			return nil, off, err
		}
		for _, a := range want {
			if a.Is6() == (f.af == unix.AF_INET6) && !slices.Contains(have, a) {
				lacks = append(lacks, a)
			}
		}
	}
	return lacks, off, nil
}

// syncForwarding lets pods' links and the tun forward IPv4, and names the links of the default route that do not: answers
// to pods come in by them, and they are others' to change.
func syncForwarding(tun string) (done []string, err error) {
	links, err := notForwarding()
	if err != nil || len(links) == 0 {
		return nil, err
	}
	uplinks, err := uplinkNames()
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, link := range links {
		key := sysctl.IPv4LinkForwarding(link)
		switch {
		case link == tun || strings.HasPrefix(link, names.PodLinkPrefix):
			err := sysctl.Write(key, "1")
			if errors.Is(err, fs.ErrNotExist) {
				continue // the link has just gone
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("packets that come in by %s go nowhere: set %s=1: %w", link, key, explain(err)))
				continue
			}
			done = append(done, fmt.Sprintf("set %s=1", key))
		case uplinks[link]:
			errs = append(errs, fmt.Errorf("pods get no IPv4 answers from outside: %s does not forward; run sysctl -w %s=1, and look in "+
				"/etc/sysctl.d and the link's network configuration for what set it to 0", link, key))
		}
	}
	return done, errors.Join(errs...)
}

// notForwarding are the links whose own switch for IPv4 is off: one question, where /proc/sys would be one for each pod.
func notForwarding() (links []string, err error) {
	r := nl.NewNetlinkRequest(unix.RTM_GETNETCONF, unix.NLM_F_DUMP)
	r.AddRawData([]byte{unix.AF_INET, 0, 0, 0})
	msgs, err := retryInterrupted(func() ([][]byte, error) { return r.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNETCONF) })
	if err != nil {
		return nil, fmt.Errorf("list the links that forward: %w", explain(err))
	}
	for _, m := range msgs {
		i, ok := attribute(m, netconfLen, netconfIfindex)
		f, told := attribute(m, netconfLen, netconfForwarding)
		if !ok || !told || len(i) != 4 || len(f) != 4 || binary.NativeEndian.Uint32(f) != 0 {
			continue
		}
		index := int32(binary.NativeEndian.Uint32(i)) // below 0: the host's switch, and that of links to come
		if l, err := net.InterfaceByIndex(int(index)); index > 0 && err == nil {
			links = append(links, l.Name)
		}
	}
	return links, nil
}

// uplinkNames are the links of the IPv4 default routes.
func uplinkNames() (map[string]bool, error) {
	routes, err := listDefaults(ipv4)
	if err != nil {
		return nil, err
	}
	out := map[string]bool{}
	for _, r := range routes {
		for _, h := range r.hops {
			if l, err := netlink.LinkByIndex(h.link); err == nil { // or it has just gone
				out[l.Attrs().Name] = true
			}
		}
	}
	return out, nil
}
