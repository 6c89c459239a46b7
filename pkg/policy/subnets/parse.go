// Package subnets says which pods may use networks behind devices of the tailnet that are not the cluster's: by an annotation of their
// Namespace, which a node's Agent follows and has the kernel hold, for the links of that Namespace's pods.
package subnets

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/internal/printable"
)

const (
	// maxPrefixes is how many one Namespace may name: each is a rule, which packets to such networks are compared with.
	maxPrefixes = 64
	// maxShown is how many characters of a faulty entry are repeated.
	maxShown = 60
	// minBits4 and minBits6 are the shortest prefixes. Two of /1 are an exit node under another name.
	minBits4, minBits6 = 8, 16
)

// special are ranges that no subnet router serves: this host, links, groups, and where the node answers for names.
var special = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("::/96"), netip.MustParsePrefix("::ffff:0:0/96"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
	netip.PrefixFrom(netset.AnswererIPv6, 128),
}

// Parse reads what a Namespace asks for: prefixes separated by commas. taken are the cluster's own ranges. What is wrong is left out, and
// faults say why, a sentence each.
func Parse(text string, taken []netip.Prefix) (named []netip.Prefix, faults []string) {
	for entry := range strings.SplitSeq(text, ",") {
		if entry = strings.TrimSpace(entry); entry == "" {
			continue
		}
		p, fault := parse(entry, taken)
		switch {
		case fault != "":
			if len(faults) < maxPrefixes {
				faults = append(faults, fmt.Sprintf("%q %s", printable.Cut(entry, maxShown), fault))
			}
		case slices.Contains(named, p):
		case len(named) == maxPrefixes:
			return named, append(faults, fmt.Sprintf("only the first %d prefixes count: name fewer, wider ones", maxPrefixes))
		default:
			named = append(named, p)
		}
	}
	return named, faults
}

func parse(entry string, taken []netip.Prefix) (p netip.Prefix, fault string) {
	p, err := netip.ParsePrefix(entry)
	if err != nil {
		if a, err := netip.ParseAddr(entry); err == nil && a.Zone() == "" {
			return p, fmt.Sprintf("is an address: write %s", netip.PrefixFrom(a, a.BitLen()))
		}
		return p, "is no prefix: write one such as 192.168.50.0/24"
	}
	if p.Bits() == 0 {
		return p, "is an exit node, and tailscaled has one for a whole node: put such pods on nodes that use one, by a nodeSelector"
	}
	if p != p.Masked() {
		return p, fmt.Sprintf("has an address beyond its prefix: write %s", p.Masked())
	}
	if least := minBits(p); p.Bits() < least {
		return p, fmt.Sprintf("is too wide: name networks of /%d or longer", least)
	}
	if s, ok := netset.Overlapping(special, p); ok {
		return p, fmt.Sprintf("overlaps %s, which no device leads to", s)
	}
	if isTailnet(p) {
		return p, "overlaps the tailnet's own addresses: network.tailnetEgress is for these"
	}
	if c, ok := netset.Overlapping(taken, p); ok {
		return p, fmt.Sprintf("overlaps the cluster's %s", c)
	}
	return p, ""
}

func minBits(p netip.Prefix) int {
	if p.Addr().Is4() {
		return minBits4
	}
	return minBits6
}

func isTailnet(p netip.Prefix) bool {
	return p.Overlaps(netset.TailnetIPv4) || p.Overlaps(netset.TailnetIPv6)
}
