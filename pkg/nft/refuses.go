package nft

import (
	"net/netip"
	"slices"
	"strings"

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
