package controller

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/tailscale"
)

// What is checked of Headscale, as the metric's labels.
const (
	checkKey           = "key"            // the API key or pre-auth key itself
	checkACL           = "acl"            // pod ranges in acls
	checkAutoApprovers = "auto-approvers" // that anybody with the tag may take a pod range
	checkMaps          = "cache-network-maps"
	checkCGNAT         = tailscale.AttrSharesCGNAT
	checkRanges        = "ranges"    // pod CIDRs are left to give to Nodes
	checkNodeKeys      = "node-keys" // of Nodes, that do not expire
	checkRemovals      = "removals"  // few enough nodes are stale to be removed at once
	checkClaims        = "claims"    // no node advertises pods of another
)

var checks = []string{checkKey, checkACL, checkAutoApprovers, checkMaps, checkCGNAT, checkRanges, checkNodeKeys, checkRemovals, checkClaims, checkServices}

// finding is something that somebody should change.
type finding struct {
	check, text string
}

// policy is what is checked.
type policy struct{ headscale.PolicyFile }

// needs are what the cluster needs of the policy.
type needs struct {
	ranges   []netip.Prefix // of pods
	services []netip.Prefix // that the tailnet is to reach
	tags     []string       // of nodes
	// sharing are Nodes with addresses of another network in the tailnet's range.
	sharing []string
	// starCovers tells whether * means every address, as up to 0.28; since 0.29 it means tailnet addresses only.
	starCovers bool
}

// checkPolicy compares Headscale's policy with what the cluster needs.
func checkPolicy(text string, n needs) ([]finding, error) {
	file, err := headscale.ReadPolicy(text)
	if err != nil {
		return nil, err
	}
	p := policy{file}
	var found []finding
	if f := p.MissingRules(n.ranges, n.tags, n.starCovers); f != "" {
		found = append(found, finding{checkACL, f})
	}
	if f := p.unreached(n.services, n.starCovers); f != "" {
		found = append(found, finding{checkServices, f})
	}
	for route, who := range p.AutoApprovers.Routes {
		r, err := netip.ParsePrefix(route)
		if err == nil && slices.ContainsFunc(n.services, r.Overlaps) {
			found = append(found, finding{checkAutoApprovers, fmt.Sprintf("autoApprovers lets every node of %s lead to services in %s, so that one node "+
				"that was broken into can take the tailnet's traffic to them; headcni-controller approves that for the Nodes that "+
				"network.advertiseServices chooses: remove the line \"%s\": %s from autoApprovers.routes", strings.Join(who, ", "), route, route, headscale.JSONList(who))})
		}
		if err == nil && slices.ContainsFunc(n.ranges, r.Overlaps) {
			found = append(found, finding{checkAutoApprovers, fmt.Sprintf("autoApprovers lets every node of %s take any part of %s, so that one "+
				"node that was broken into can take other nodes' pods; headcni-controller approves routes by itself: remove the line "+
				"\"%s\": %s from autoApprovers.routes", strings.Join(who, ", "), route, route, headscale.JSONList(who))})
		}
	}
	slices.SortFunc(found, func(a, b finding) int { return strings.Compare(a.text, b.text) })
	// Older servers know no nodeAttrs and refuse a policy that has any.
	if !n.starCovers && !p.hasAttr(checkMaps, n.tags) {
		found = append(found, finding{checkMaps, fmt.Sprintf("a node's tailscaled cannot restart while Headscale is down: add to the policy "+
			`"nodeAttrs": [{"target": %s, "attr": [%q]}]`, headscale.JSONList(n.tags), checkMaps)})
	}
	if !n.starCovers && len(n.sharing) > 0 && !p.hasAttr(checkCGNAT, n.tags) {
		found = append(found, finding{checkCGNAT, fmt.Sprintf("%s: a network of the host's own is in the tailnet's range %s too, and tailscaled's firewall "+
			`drops what the host gets from there: add to the policy "nodeAttrs": [{"target": ["*"], "attr": [%q]}]`, abridge(n.sharing), netset.TailnetIPv4, checkCGNAT)})
	}
	return found, nil
}

// unreached names the routes to services that no rule lets anybody use, "" where there is none.
func (p policy) unreached(services []netip.Prefix, starCovers bool) string {
	if p.ACLs == nil && p.Grants == nil {
		return ""
	}
	var dst []string
	for _, a := range p.ACLs {
		for _, d := range a.Dst {
			dst = append(dst, headscale.Destination(d))
		}
	}
	for _, g := range p.Grants {
		dst = append(dst, g.Dst...)
	}
	var missing []string
	for _, r := range services {
		if !slices.ContainsFunc(dst, func(d string) bool { return p.Overlaps(r, d, starCovers) }) {
			missing = append(missing, r.String())
		}
	}
	if len(missing) == 0 {
		return ""
	}
	var want []string
	for _, m := range missing {
		want = append(want, m+":*")
	}
	return fmt.Sprintf("no rule of Headscale's policy lets anybody reach the services of %s: add to acls, for whom you like, {\"action\": \"accept\", "+
		"\"src\": [\"*\"], \"dst\": %s}", abridge(missing), headscale.JSONList(want[:min(len(want), maxListed)]))
}

func (p policy) hasAttr(attr string, tags []string) bool {
	for _, n := range p.NodeAttrs {
		if !slices.Contains(n.Attr, attr) {
			continue
		}
		if slices.Contains(n.Target, "*") || slices.ContainsFunc(tags, func(t string) bool { return slices.Contains(n.Target, t) }) {
			return true
		}
	}
	return false
}
