package lab

import (
	"errors"
	"net/netip"
	"syscall"
)

// Sleep closes the lid of a node behind a router: its programs stand still, and its link is down, without the addresses
// that the network gave it.
func (n *Node) Sleep() error {
	for _, p := range []*Process{n.Daemon, n.Tailscaled} {
		if err := p.Signal(syscall.SIGSTOP); err != nil {
			return err
		}
	}
	link, err := n.Net.LinkByName(wanLink)
	if err != nil {
		return err
	}
	return errors.Join(n.loseIPv4(wanLink), n.Net.LinkSetDown(link)) // which loses those of IPv6
}

// Wake opens the lid again, in another network: the routers have never seen the node, and have another outside address (see
// Renumber). The link has addresses and a default route before the programs go on.
func (n *Node) Wake(host int) error {
	for _, r := range n.Routers {
		if err := r.Forget(); err != nil {
			return err
		}
	}
	if err := n.Renumber(host); err != nil {
		return err
	}
	site := n.Routers[0].Site
	addrs, gateways := []netip.Prefix{site.LANAddr(siteHost)}, []netip.Prefix{site.LANAddr(routerHost)}
	if site.IPv6 {
		lan := siteIPv6(n.index + 11)
		addrs, gateways = append(addrs, hostIn(lan, siteHost)), append(gateways, hostIn(lan, routerHost))
	}
	if err := n.configure(wanLink, addrs, gateways); err != nil {
		return err
	}
	for _, p := range []*Process{n.Tailscaled, n.Daemon} {
		if err := p.Signal(syscall.SIGCONT); err != nil {
			return err
		}
	}
	return nil
}
