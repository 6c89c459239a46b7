package podlink

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/rtnl"
	"github.com/headcni/headcni/internal/sysctl"
)

// Leased is a pod's attachment as its lease has it, which nobody but us can write, or as it was when nothing was lacking.
type Leased struct {
	Network, ContainerID, IfName string
	Addrs                        []netip.Addr
}

// Lack is what the host's end of one pod's link lacks of what Attach gave it: being up, the gateway's address, routes, neighbours,
// sysctls (that of forwarding is package noderoutes').
type Lack struct {
	link    rtnl.Link
	pod     Leased
	down    bool
	gateway bool // the IPv6 one's address
	routes  []netip.Addr
	neighs  []netip.Addr
	sysctls []setting
}

// setting is a sysctl and the value that it is to have.
type setting struct{ key, value string }

// hostSettings are those of a link's host's end: see hostSysctls.
func hostSettings(link string) []setting {
	return []setting{{sysctl.IPv4LinkARPIgnore(link), sysctl.ARPIgnoreAll}, {sysctl.IPv6Link(link, "accept_ra"), "0"}}
}

// changed are the settings that have another value. One that cannot be read, as without IPv6, has none.
func changed(want []setting) []setting {
	return slices.DeleteFunc(want, func(s setting) bool {
		have, err := sysctl.Read(s.key)
		return err != nil || have == s.value
	})
}

// String says what is lacking, for people.
func (l Lack) String() string {
	var what []string
	if l.down {
		what = append(what, "it is down")
	}
	if l.gateway {
		what = append(what, "no address "+Gateway6.String())
	}
	for _, a := range l.routes {
		what = append(what, "no route to "+a.String())
	}
	for _, a := range l.neighs {
		what = append(what, "no neighbour "+a.String())
	}
	for _, s := range l.sysctls {
		what = append(what, s.key+" is not "+s.value)
	}
	return fmt.Sprintf("link %s of container %s (%s): %s", l.link.Name, l.pod.ContainerID, l.pod.IfName, strings.Join(what, ", "))
}

// Lacks compares the links with the leases. A pod whose link is not there is not its matter. An ADD that is at work lacks something
// too, for a moment.
func (h *Handle) Lacks(pods []Leased) (found []Lack, err error) {
	c, links, routes, err := h.podLinks()
	if err != nil {
		return nil, err
	}
	gateways, err := linksWithGateway(c)
	if err != nil {
		return nil, err
	}
	neighs, err := listNeighs(c, 0)
	if err != nil {
		return nil, err
	}
	for _, p := range pods {
		link, ok := links[Name(p.ContainerID, p.IfName)]
		if !ok || link.Alias == "" || !belongsTo(link.Alias, p.ContainerID, p.IfName) || !strings.HasPrefix(link.Alias, p.Network+" ") {
			continue
		}
		l := Lack{link: link, pod: p, down: !link.Up, sysctls: changed(hostSettings(link.Name))}
		for _, a := range p.Addrs {
			if !slices.Contains(routes[link.Index], a) {
				l.routes = append(l.routes, a)
			}
			l.gateway = l.gateway || a.Is6() && !gateways[link.Index]
			if neighs[neighbour{link.Index, a}] == nil {
				l.neighs = append(l.neighs, a)
			}
		}
		if len(l.neighs) > 0 {
			if _, err := c.PeerOf(link); err != nil {
				l.neighs = nil // nobody can tell the pod's hardware address, for which the kernel asks by itself
			}
		}
		if l.down || l.gateway || len(l.routes)+len(l.neighs)+len(l.sysctls) > 0 {
			found = append(found, l)
		}
	}
	return found, nil
}

// Mend puts back what is lacking. It works by the link's index: where the pod has ended meanwhile, the index is nobody's, and there
// is nothing to do.
func (h *Handle) Mend(l Lack) error {
	c, err := h.open()
	if err != nil {
		return err
	}
	if slices.ContainsFunc(l.pod.Addrs, netip.Addr.Is6) {
		if err := switchIPv6On(l.link.Name); err != nil {
			return err
		}
	}
	for _, s := range l.sysctls {
		if err := sysctl.Write(s.key, s.value); err != nil && !errors.Is(err, fs.ErrNotExist) { // or the link has gone
			return err
		}
	}
	steps := []rtnl.Request{linkUp("host", l.link.Index)}
	if l.gateway {
		steps = append(steps, addAddr("host", l.link.Index, netip.PrefixFrom(Gateway6, 64)))
	}
	for _, a := range l.routes {
		steps = append(steps, addRoute("host", l.link.Index, Route{Dst: netip.PrefixFrom(a, a.BitLen())}))
	}
	// Without the pod's hardware address the kernel asks for it by itself.
	if peer, err := c.PeerOf(l.link); err == nil {
		for _, a := range l.pod.Addrs {
			steps = append(steps, addNeigh("host", l.link.Index, a, peer.MAC))
		}
	}
	_, err = h.do(c, steps...)
	switch {
	case errors.Is(err, unix.ENODEV):
		return nil
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w: something else on this node has the address; `ip route get` tells what", err)
	}
	return err
}

// podLinks are the links of all pods by name, and the routes to them by index.
func (h *Handle) podLinks() (c *rtnl.Conn, links map[string]rtnl.Link, routes map[int][]netip.Addr, err error) {
	if c, err = h.open(); err != nil {
		return nil, nil, nil, err
	}
	if links, err = listLinks(c); err != nil {
		return nil, nil, nil, err
	}
	routes, err = hostRoutes(c)
	return c, links, routes, err
}

// hostRoutes are the addresses that the main table has a route of their own for, by link.
func hostRoutes(c *rtnl.Conn) (map[int][]netip.Addr, error) {
	routes := map[int][]netip.Addr{}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		r := rtnl.Request{What: "list routes", Type: unix.RTM_GETROUTE}
		r.Bytes(family, 0, 0, 0, 0, 0, 0, 0)
		r.Uint32(0)
		seen := map[netip.Addr]bool{} // a dump that is begun again comes twice
		err := c.Dump(r, func(b []byte) {
			if link, a, ok := hostRoute(b); ok && !seen[a] {
				seen[a] = true
				routes[link] = append(routes[link], a)
			}
		})
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return nil, err
		}
	}
	return routes, nil
}

// linksWithGateway are the links that have the address to which pods send IPv6.
func linksWithGateway(c *rtnl.Conn) (map[int]bool, error) {
	have := map[int]bool{}
	err := listAddrs(c, unix.AF_INET6, func(link int, a netip.Addr) { have[link] = have[link] || a == Gateway6 })
	if errors.Is(err, unix.EAFNOSUPPORT) {
		err = nil
	}
	return have, err
}
