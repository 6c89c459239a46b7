package noderoutes

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/findings"
)

// Ahead is an error that names rules of others which stand before ours and lead elsewhere what pods send to each other, or what the node itself
// sends to its pods, such as a kubelet's probes and all answers.
func Ahead(own, cluster []netip.Prefix) error {
	var pods, node []string
	for _, f := range families {
		if !hasFamily(f) {
			continue
		}
		all, err := dumpRules(f)
		if err != nil {
			return err
		}
		var self []netip.Prefix
		err = eachAddr(f, func(a hostAddr) { self = append(self, netip.PrefixFrom(a.prefix.Addr(), a.prefix.Addr().BitLen())) })
		if err != nil {
			return err
		}
		own, cluster := f.of(own), f.of(cluster)
		toOwn := own
		for _, m := range all {
			r, err := decodeRule(m)
			if err != nil {
				return err
			}
			if !r.ahead() {
				continue
			}
			// Somebody leads there what ours would, before those of others.
			if plain := (rule{af: r.af, pref: r.pref, to: r.to, action: r.action, table: r.table, suppress: noSuppress, proto: r.proto}); r == plain && r.to.IsValid() {
				left := func(p netip.Prefix) bool { return netset.Covers([]netip.Prefix{r.to}, p) }
				switch {
				case r.table == tailscaleTable:
					cluster = slices.DeleteFunc(slices.Clone(cluster), left)
				case r.table == unix.RT_TABLE_MAIN && netset.Covers(own, r.to):
					toOwn = slices.DeleteFunc(slices.Clone(toOwn), left)
					continue
				}
			}
			text := fmt.Sprintf("%s %q", f.name, strings.TrimSpace(r.String()))
			if r.meets(own, cluster, names.PodLinkPrefix) {
				leads, err := r.leads(f, cluster)
				if err != nil {
					return err
				}
				if leads {
					pods = append(pods, text)
					continue
				}
			}
			// What leads to main finds pods there.
			if r.from.IsValid() && r.table != unix.RT_TABLE_MAIN && r.meets(self, toOwn, "lo") {
				leads, err := r.leads(f, toOwn)
				if err != nil {
					return err
				}
				if leads {
					node = append(node, text)
				}
			}
		}
	}
	var found []string
	if pods != nil {
		found = append(found, "what pods send to pods of other nodes: "+strings.Join(pods, ", "))
	}
	if node != nil {
		found = append(found, "what this node sends to its own pods: "+strings.Join(node, ", "))
	}
	if found == nil {
		return nil
	}
	return findings.Errorf(findings.RuleAhead, "rules of another program stand before HeadCNI's and lead elsewhere %s; `ip rule del pref NUMBER` takes one away, "+
		"or give it a number above %d", strings.Join(found, "; "), prefLast)
}

// ahead reports whether a rule of others stands before ours, and can meet a packet without a mark. Of what is not understood nothing is said.
func (r rule) ahead() bool {
	if r.pref == 0 || r.pref >= prefFirst && r.pref != prefLocal || r.ours() || r.extra != "" || r.table == unix.RT_TABLE_LOCAL {
		return false
	}
	marked := r.mark&r.mask != 0
	return marked == r.not // "not" with a mark meets whatever lacks it
}

// meets reports whether a rule can meet a packet from one of some ranges to one of others that came by a link of that name.
func (r rule) meets(from, to []netip.Prefix, link string) bool {
	within := func(selector netip.Prefix, ranges []netip.Prefix) bool {
		return len(ranges) > 0 && (r.not || !selector.IsValid() || slices.ContainsFunc(ranges, selector.Overlaps))
	}
	return within(r.from, from) && within(r.to, to) && (r.not || r.iif == "" || strings.HasPrefix(r.iif, link))
}

// leads reports whether a rule has an answer for what is for some ranges, which is none of ours: else the kernel goes on to the next.
func (r rule) leads(f family, ranges []netip.Prefix) (bool, error) {
	switch r.action {
	case nl.FR_ACT_TO_TBL:
	case nl.FR_ACT_UNREACHABLE, nl.FR_ACT_BLACKHOLE, nl.FR_ACT_PROHIBIT:
		return true, nil
	default:
		return false, nil
	}
	if r.table == tailscaleTable {
		return false, nil
	}
	// The longest routes around each range, of those that have an answer and of those that say that there is none (throw).
	answer, none := map[netip.Prefix]int{}, map[netip.Prefix]int{}
	err := eachRoute(f, r.table, func(m routeMsg) {
		throw := m.kind == unix.RTN_THROW
		around := func(p netip.Prefix) bool { return p.Overlaps(m.to) && (!throw || m.to.Bits() <= p.Bits()) }
		if r.suppress != noSuppress && m.to.Bits() <= int(r.suppress) || !slices.ContainsFunc(ranges, around) {
			return
		}
		longest := answer
		if throw {
			longest = none
		} else if strings.HasPrefix(linkName(m.number(unix.RTA_OIF)), names.PodLinkPrefix) { // it asks the kernel, and a router has a million routes elsewhere
			return // a route to an own pod leads where ours would
		}
		for _, p := range ranges {
			if around(p) {
				longest[p] = max(longest[p], m.to.Bits()+1)
			}
		}
	})
	for _, p := range ranges {
		if answer[p] > none[p] {
			return true, err
		}
	}
	return false, err
}

// linkName is "" where there is no such link.
func linkName(index int) string {
	link, err := netlink.LinkByIndex(index)
	if index == 0 || err != nil {
		return ""
	}
	return link.Attrs().Name
}

// NamedAsPods is an error that names the host's links which count as pods': the node's rules know these by their names alone.
func NamedAsPods() error {
	links, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("list the host's interfaces: %w", err)
	}
	var found []string
	for _, l := range links {
		if names.CountsAsPodLink(l.Name) {
			found = append(found, l.Name)
		}
	}
	if found == nil {
		return nil
	}
	return findings.Errorf(findings.NamedAsPods, "%s: a link whose name begins with %q counts as a pod's, and nothing keeps pods' packets from leaving there in clear; give it another name "+
		"(ip link set dev NAME name OTHER, while it is down)", strings.Join(found, ", "), names.PodLinkPrefix)
}
