package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/config/names"
)

// Refuses says why our tables in the kernel refuse what a pod begins by the tunnel, outside the cluster: DropTailnetEgress, DropTailnetSubnet, or
// "" where they do not. link is the index of the pod's.
func Refuses(link int, to netip.Addr) (reason string, err error) {
	f := knftables.IPv4Family
	if to.Is6() {
		f = knftables.IPv6Family
	}
	if to == quad100[f] {
		return "", nil // names are for everybody
	}
	rules, err := nfnl.Request(nfproto[f], unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, nfnl.Name(unix.NFTA_RULE_TABLE, names.NFTTable))
	if err != nil {
		return "", err
	}
	if netset.TailnetIPv4.Contains(to) || netset.TailnetIPv6.Contains(to) {
		if slices.ContainsFunc(rules, func(r []byte) bool { return mentions(r, DropTailnetEgress) }) {
			return DropTailnetEgress, nil
		}
		return "", nil
	}
	if !slices.ContainsFunc(rules, func(r []byte) bool { return mentions(r, DropTailnetSubnet) }) {
		return "", nil // all may
	}
	abroad, err := nfnl.Elements(nfnl.Set{Family: nfproto[f], Table: names.NFTTable, Name: setAbroad})
	if err != nil {
		return "", err
	}
	if !nfnl.Within(abroad, to) && slices.ContainsFunc(rules, func(r []byte) bool { return mentions(r, setAbroad) && !mentions(r, DropTailnetEgress) }) {
		return "", nil // by the exit node that the host's user has chosen
	}
	ok, err := consents(f, link, to)
	if ok || err != nil {
		return "", err
	}
	return DropTailnetSubnet, nil
}

// mentions tells whether a rule, as the kernel lists it, has a counter or a set of a name.
func mentions(rule []byte, name string) bool { return strings.Contains(string(rule), name+"\x00") }

// consents reports whether a named subnet that has the address is for a pod's link.
func consents(f knftables.Family, link int, to netip.Addr) (bool, error) {
	sets, err := consentNames(f)
	if err != nil {
		return false, err
	}
	for _, name := range sets {
		named, err := namedBy(name)
		if err != nil || !named.Contains(to) {
			continue
		}
		links, err := nfnl.Elements(nfnl.Set{Family: nfproto[f], Table: names.NFTTable, Name: name})
		if err != nil {
			return false, err
		}
		if slices.ContainsFunc(links, func(e nfnl.Element) bool { return e.Key == string(indexKey(link)) }) {
			return true, nil
		}
	}
	return false, nil
}

// Beside says why our tables of this node refuse what a pod of it begins, or what is begun towards it, whatever policies say: as Refuses does,
// or DropLANIngress. pod and other are the addresses, and link is the pod's, with its index.
func Beside(link string, index int, pod, other netip.Addr, begins bool) (reason string, err error) {
	dev, err := leaves(link, pod, other)
	if dev == "" || err != nil {
		return "", err
	}
	f := knftables.IPv4Family
	if other.Is6() {
		f = knftables.IPv6Family
	}
	rules, err := nfnl.Request(nfproto[f], unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP,
		nfnl.Name(unix.NFTA_RULE_TABLE, names.NFTTable), nfnl.Name(unix.NFTA_RULE_CHAIN, chainForward))
	if errors.Is(err, unix.ENOENT) {
		return "", nil // there is no table that could refuse
	}
	if err != nil {
		return "", err
	}
	says := func(text string) bool {
		return slices.ContainsFunc(rules, func(r []byte) bool { return mentions(r, text) })
	}
	switch tun := says(dev); {
	case begins && tun:
		cluster, err := nfnl.Elements(nfnl.Set{Family: nfproto[f], Table: names.NFTTable, Name: SetCluster})
		if err != nil || nfnl.Within(cluster, other) {
			return "", err
		}
		return Refuses(index, other)
	case !begins && !tun && dev != "lo" && !strings.HasPrefix(dev, names.PodLinkPrefix) && says(DropLANIngress):
		return DropLANIngress, nil
	}
	return "", nil
}

// leaves is the link by which a pod's packets leave, "" where the kernel has no way, keeps them, or does not take the address for a source on the
// pod's link: then it is no rule of ours that refuses.
func leaves(link string, pod, other netip.Addr) (string, error) {
	routes, err := netlink.RouteGetWithOptions(other.AsSlice(), &netlink.RouteGetOptions{Iif: link, SrcAddr: pod.AsSlice()})
	if slices.ContainsFunc([]error{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EXDEV, unix.EINVAL}, func(no error) bool { return errors.Is(err, no) }) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("ask for the route from %s to %s: %w", pod, other, err)
	}
	if len(routes) == 0 || routes[0].Type == unix.RTN_LOCAL {
		return "", nil
	}
	l, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return "", fmt.Errorf("look up the link that leads to %s: %w", other, err)
	}
	return l.Attrs().Name, nil
}
