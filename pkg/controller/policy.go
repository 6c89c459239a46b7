package controller

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/tailscale/hujson"

	"github.com/headcni/headcni/internal/netset"
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

// policy is what we look at of Headscale's policy file.
type policy struct {
	Hosts map[string]string `json:"hosts"`
	ACLs  []struct {
		Action string   `json:"action"`
		Src    []string `json:"src"`
		Dst    []string `json:"dst"`
	} `json:"acls"`
	Grants []struct {
		Src []string `json:"src"`
		Dst []string `json:"dst"`
		IP  []string `json:"ip"`
	} `json:"grants"`
	AutoApprovers struct {
		Routes map[string][]string `json:"routes"`
	} `json:"autoApprovers"`
	NodeAttrs []struct {
		Target []string `json:"target"`
		Attr   []string `json:"attr"`
	} `json:"nodeAttrs"`
}

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
	std, err := hujson.Standardize([]byte(text))
	if err != nil {
		return nil, fmt.Errorf("read Headscale's policy: %w", err)
	}
	var p policy
	if err := json.Unmarshal(std, &p); err != nil {
		return nil, fmt.Errorf("read Headscale's policy: %w", err)
	}
	var found []finding
	if f := p.rules(n.ranges, n.tags, n.starCovers); f != "" {
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
				"network.advertiseServices chooses: remove the line \"%s\": %s from autoApprovers.routes", strings.Join(who, ", "), route, route, quoted(who))})
		}
		if err == nil && slices.ContainsFunc(n.ranges, r.Overlaps) {
			found = append(found, finding{checkAutoApprovers, fmt.Sprintf("autoApprovers lets every node of %s take any part of %s, so that one "+
				"node that was broken into can take other nodes' pods; headcni-controller approves routes by itself: remove the line "+
				"\"%s\": %s from autoApprovers.routes", strings.Join(who, ", "), route, route, quoted(who))})
		}
	}
	slices.SortFunc(found, func(a, b finding) int { return strings.Compare(a.text, b.text) })
	// Older servers know no nodeAttrs and refuse a policy that has any.
	if !n.starCovers && !p.hasAttr(checkMaps, n.tags) {
		found = append(found, finding{checkMaps, fmt.Sprintf("a node's tailscaled cannot restart while Headscale is down: add to the policy "+
			`"nodeAttrs": [{"target": %s, "attr": [%q]}]`, quoted(n.tags), checkMaps)})
	}
	if !n.starCovers && len(n.sharing) > 0 && !p.hasAttr(checkCGNAT, n.tags) {
		found = append(found, finding{checkCGNAT, fmt.Sprintf("%s: a network of the host's own is in the tailnet's range %s too, and tailscaled's firewall "+
			`drops what the host gets from there: add to the policy "nodeAttrs": [{"target": ["*"], "attr": [%q]}]`, abridge(n.sharing), netset.TailnetIPv4, checkCGNAT)})
	}
	return found, nil
}

// rules says which lines of acls are missing for pods to reach pods, "" where none is. A policy without any rule at all
// allows nothing; one without the key acls allows everything.
func (p policy) rules(ranges []netip.Prefix, tags []string, starCovers bool) string {
	if p.ACLs == nil && p.Grants == nil {
		return ""
	}
	var missing []string
	for _, r := range ranges {
		if !p.allowed(r, starCovers) {
			missing = append(missing, r.String())
		}
	}
	if len(missing) == 0 {
		return ""
	}
	src := slices.Concat(tags, missing)
	var dst []string
	for _, s := range src {
		dst = append(dst, s+":*")
	}
	return fmt.Sprintf("pods of %s do not reach each other: add to acls {\"action\": \"accept\", \"src\": %s, \"dst\": %s}",
		strings.Join(missing, ", "), quoted(src), quoted(dst))
}

// allowed reports whether one rule lets all of r reach all of r on all ports.
func (p policy) allowed(r netip.Prefix, starCovers bool) bool {
	for _, a := range p.ACLs {
		if a.Action == "accept" && p.covered(r, a.Src, starCovers) && p.covered(r, anyPort(a.Dst), starCovers) {
			return true
		}
	}
	for _, g := range p.Grants {
		if slices.Contains(g.IP, "*") && p.covered(r, g.Src, starCovers) && p.covered(r, g.Dst, starCovers) {
			return true
		}
	}
	return false
}

// unreached names the routes to services that no rule lets anybody use, "" where there is none.
func (p policy) unreached(services []netip.Prefix, starCovers bool) string {
	if p.ACLs == nil && p.Grants == nil {
		return ""
	}
	var dst []string
	for _, a := range p.ACLs {
		for _, d := range a.Dst {
			host := d[:max(strings.LastIndex(d, ":"), 0)] // without the ports
			dst = append(dst, strings.Trim(host, "[]"))
		}
	}
	for _, g := range p.Grants {
		dst = append(dst, g.Dst...)
	}
	var missing []string
	for _, r := range services {
		if !slices.ContainsFunc(dst, func(d string) bool { return p.overlaps(r, d, starCovers) }) {
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
		"\"src\": [\"*\"], \"dst\": %s}", abridge(missing), quoted(want[:min(len(want), maxListed)]))
}

// overlaps reports whether a rule's destination has an address of r.
func (p policy) overlaps(r netip.Prefix, dst string, starCovers bool) bool {
	if host, ok := p.Hosts[dst]; ok {
		dst = host
	}
	if a, err := netip.ParseAddr(dst); err == nil {
		return r.Contains(a)
	}
	q, err := netip.ParsePrefix(dst)
	return dst == "*" && starCovers || err == nil && q.Overlaps(r)
}

// anyPort keeps the destinations that allow every port, without the port.
func anyPort(dst []string) []string {
	var out []string
	for _, d := range dst {
		if host, ok := strings.CutSuffix(d, ":*"); ok {
			out = append(out, strings.Trim(host, "[]"))
		}
	}
	return out
}

func (p policy) covered(r netip.Prefix, by []string, starCovers bool) bool {
	for _, s := range by {
		if s == "*" && starCovers {
			return true
		}
		if host, ok := p.Hosts[s]; ok {
			s = host
		}
		if q, err := netip.ParsePrefix(s); err == nil && netset.Covers([]netip.Prefix{q}, r) {
			return true
		}
	}
	return false
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

func quoted(list []string) string {
	b, err := json.Marshal(list)
	if err != nil {
		return strings.Join(list, ", ") // a list of strings cannot fail
	}
	return strings.ReplaceAll(string(b), ",", ", ")
}
