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

// Ahead is an error that names rules of others which stand before ours and lead packets between pods elsewhere.
func Ahead(own, cluster []netip.Prefix) error {
	var found []string
	for _, f := range families {
		if !hasFamily(f) {
			continue
		}
		all, err := dumpRules(f)
		if err != nil {
			return err
		}
		own, cluster := f.of(own), f.of(cluster)
		for _, m := range all {
			r, err := decodeRule(m)
			if err != nil {
				return err
			}
			if !r.ahead(own, cluster) {
				continue
			}
			leads, err := r.leads(f, cluster)
			if err != nil {
				return err
			}
			if leads {
				found = append(found, fmt.Sprintf("%s %q", f.name, strings.TrimSpace(r.String())))
			}
		}
	}
	if found == nil {
		return nil
	}
	return findings.Errorf(findings.RuleAhead, "rules of another program stand before HeadCNI's and lead pods' packets elsewhere: %s; `ip rule del pref NUMBER` takes one away, "+
		"or give it a number above %d", strings.Join(found, ", "), prefLast)
}

// ahead reports whether a rule can meet a packet from an own pod to another node's before ours do. Of one with a mark, or with what is not
// understood, nothing is said.
func (r rule) ahead(own, cluster []netip.Prefix) bool {
	if r.pref == 0 || r.pref >= prefFirst || r.not || r.mask != 0 || r.extra != "" || r.table == unix.RT_TABLE_LOCAL {
		return false
	}
	meets := func(selector netip.Prefix, ranges []netip.Prefix) bool {
		return len(ranges) > 0 && (!selector.IsValid() || slices.ContainsFunc(ranges, selector.Overlaps))
	}
	return meets(r.from, own) && meets(r.to, cluster) && (r.iif == "" || strings.HasPrefix(r.iif, names.PodLinkPrefix))
}

// leads reports whether a rule has an answer for such a packet: else the kernel goes on to the next.
func (r rule) leads(f family, cluster []netip.Prefix) (bool, error) {
	switch r.action {
	case nl.FR_ACT_TO_TBL:
	case nl.FR_ACT_UNREACHABLE, nl.FR_ACT_BLACKHOLE, nl.FR_ACT_PROHIBIT:
		return true, nil
	default:
		return false, nil
	}
	var leads bool
	err := eachRoute(f, r.table, func(m routeMsg) {
		if leads || r.table == tailscaleTable || r.suppress != noSuppress && m.to.Bits() <= int(r.suppress) || m.number(unix.RTA_PRIORITY) == unreachableMetric {
			return
		}
		_, overlaps := netset.Overlapping(cluster, m.to)
		// A route to an own pod leads where ours would.
		leads = overlaps && !strings.HasPrefix(linkName(m.number(unix.RTA_OIF)), names.PodLinkPrefix)
	})
	return leads, err
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
