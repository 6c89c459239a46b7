package headscale

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/tailscale/hujson"

	"github.com/headcni/headcni/internal/netset"
)

// PolicyFile holds the parts of Headscale's policy file that we read.
type PolicyFile struct {
	Hosts map[string]string `json:"hosts"`
	ACLs  []struct {
		Action string   `json:"action"`
		Proto  string   `json:"proto"` // "" is TCP, UDP and ICMP
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

// ReadPolicy parses the text that Client.Policy returns.
func ReadPolicy(text string) (p PolicyFile, err error) {
	std, err := hujson.Standardize([]byte(text))
	if err == nil {
		err = json.Unmarshal(std, &p)
	}
	return p, wrap(err, "read Headscale's policy")
}

// podProtocols are what pods need of one another, as policies name it. ICMP tailscaled lets through by any rule that has the addresses;
// SCTP is for those who use it.
var podProtocols = []string{"tcp", "udp"}

// MissingRules says which lines of acls must be added for pods to reach pods, and nodes those of other nodes, "" where none is missing. A policy without any rule at all
// allows nothing; one without the key acls allows everything.
func (p PolicyFile) MissingRules(ranges []netip.Prefix, tags []string, starCovers bool) string {
	if p.ACLs == nil && p.Grants == nil {
		return ""
	}
	var missing, by, shut []string
	for _, r := range ranges {
		if lacks := p.lacks(r, starCovers); len(lacks) > 0 {
			missing, by = append(missing, r.String()), append(by, lacks...)
		}
		if !p.openToNodes(r, starCovers) {
			shut = append(shut, r.String())
		}
	}
	if len(missing) == 0 {
		if len(shut) == 0 {
			return ""
		}
		return fmt.Sprintf("nodes do not reach pods of %s on other nodes, as NodePorts and the API server's webhooks need: add to acls %s",
			strings.Join(shut, ", "), AcceptRule(slices.Concat(tags, shut)))
	}
	only := ""
	if by = slices.Compact(slices.Sorted(slices.Values(by))); len(by) < len(podProtocols) {
		only = " by " + strings.ToUpper(by[0])
	}
	return fmt.Sprintf("pods of %s do not reach each other%s: add to acls %s", strings.Join(missing, ", "), only, AcceptRule(slices.Concat(tags, missing)))
}

// NeededPolicy is a policy file with what HeadCNI needs: of it somebody adds what is missing to his own. With autoApprove it also approves the
// ranges for every node that has one of the tags, which only those need who have no API key.
func NeededPolicy(tags []string, ranges []netip.Prefix, autoApprove bool) string {
	var owners, routes []string
	all := slices.Clone(tags)
	for _, t := range tags {
		owners = append(owners, fmt.Sprintf("%q: []", t))
	}
	for _, r := range ranges {
		all = append(all, r.String())
		routes = append(routes, fmt.Sprintf("%q: %s", r, JSONList(tags)))
	}
	out := fmt.Sprintf("{\n  \"tagOwners\": { %s },\n  \"acls\": [%s],\n", strings.Join(owners, ", "), AcceptRule(all))
	if autoApprove {
		out += fmt.Sprintf("  \"autoApprovers\": { \"routes\": { %s } },\n", strings.Join(routes, ", "))
	}
	return out + fmt.Sprintf("  \"nodeAttrs\": [{ \"target\": %s, \"attr\": [\"cache-network-maps\"] }],\n}\n", JSONList(tags))
}

// AcceptRule is the line of acls that lets all these addresses and tags reach one another, on every port.
func AcceptRule(all []string) string {
	var dst []string
	for _, s := range all {
		dst = append(dst, s+":*")
	}
	return fmt.Sprintf(`{"action": "accept", "src": %s, "dst": %s}`, JSONList(all), JSONList(dst))
}

// lacks says by which protocols no rule lets all of r reach all of r on all ports.
func (p PolicyFile) lacks(r netip.Prefix, starCovers bool) []string {
	lacks := slices.Clone(podProtocols)
	allow := func(src, dst []string, protocols ...string) {
		if p.covered(r, src, starCovers) && p.covered(r, dst, starCovers) {
			lacks = slices.DeleteFunc(lacks, func(l string) bool { return slices.Contains(protocols, l) })
		}
	}
	for _, a := range p.ACLs {
		if a.Action == "accept" {
			allow(a.Src, anyPort(a.Dst), protocols(a.Proto)...)
		}
	}
	for _, g := range p.Grants {
		for _, ip := range g.IP {
			if ip == "*" {
				allow(g.Src, g.Dst, podProtocols...)
			} else if proto, ok := strings.CutSuffix(ip, ":*"); ok {
				allow(g.Src, g.Dst, protocols(proto)...)
			}
		}
	}
	return lacks
}

// openToNodes reports whether some rule may let nodes, whose source is their tailnet address, reach pods of r. Who users, groups and tags
// are is not known here: they may be nodes.
func (p PolicyFile) openToNodes(r netip.Prefix, starCovers bool) bool {
	nodes := func(src string) bool {
		if host, ok := p.Hosts[src]; ok {
			src = host
		}
		q, ok := prefix(src)
		return !ok || q.Overlaps(netset.TailnetIPv4) && r.Addr().Is4() || q.Overlaps(netset.TailnetIPv6) && r.Addr().Is6()
	}
	pods := func(dst string) bool { return p.Overlaps(r, dst, starCovers) }
	for _, a := range p.ACLs {
		if a.Action == "accept" && slices.ContainsFunc(a.Src, nodes) && slices.ContainsFunc(a.Dst, func(d string) bool { return pods(Destination(d)) }) {
			return true
		}
	}
	for _, g := range p.Grants {
		if slices.ContainsFunc(g.Src, nodes) && slices.ContainsFunc(g.Dst, pods) {
			return true
		}
	}
	return false
}

// Overlaps reports whether a rule's destination, without ports, has an address of r.
func (p PolicyFile) Overlaps(r netip.Prefix, dst string, starCovers bool) bool {
	if host, ok := p.Hosts[dst]; ok {
		dst = host
	}
	q, ok := prefix(dst)
	return ok && q.Overlaps(r) || dst == "*" && starCovers
}

// Destination is a rule's destination without its ports.
func Destination(dst string) string {
	return strings.Trim(dst[:max(strings.LastIndex(dst, ":"), 0)], "[]")
}

// prefix reads an address or a prefix.
func prefix(s string) (netip.Prefix, bool) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	p, err := netip.ParsePrefix(s)
	return p, err == nil
}

// protocols are those of podProtocols that a rule's proto is about: a name or a number.
func protocols(proto string) []string {
	switch strings.ToLower(proto) {
	case "":
		return podProtocols
	case "tcp", "6":
		return []string{"tcp"}
	case "udp", "17":
		return []string{"udp"}
	}
	return nil
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

func (p PolicyFile) covered(r netip.Prefix, by []string, starCovers bool) bool {
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

// JSONList is a list as it is written in a policy.
func JSONList(list []string) string {
	b, err := json.Marshal(list)
	if err != nil {
		return strings.Join(list, ", ") // a list of strings cannot fail
	}
	return strings.ReplaceAll(string(b), ",", ", ")
}
