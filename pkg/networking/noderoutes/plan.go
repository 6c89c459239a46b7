package noderoutes

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/internal/sysctl"
	"github.com/headcni/headcni/pkg/config/names"
)

// rule is an ip rule.
type rule struct {
	af       int
	pref     uint32
	not      bool         // it matches what the selectors together do not
	from, to netip.Prefix // zero: all
	iif      string       // the link that the packet came by; "": any, and the node itself
	mark     uint32
	mask     uint32
	action   uint8 // nl.FR_ACT_*
	table    uint32
	suppress int32 // noSuppress, or the longest prefix length that does not count
	proto    uint8
	extra    string // attributes that our rules do not have
}

// String is the rule as `ip rule add pref` takes it.
func (r rule) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d:", r.pref)
	if r.not {
		b.WriteString(" not")
	}
	if r.from.IsValid() {
		fmt.Fprintf(&b, " from %s", r.from)
	}
	if r.to.IsValid() {
		fmt.Fprintf(&b, " to %s", r.to)
	}
	if r.iif != "" {
		fmt.Fprintf(&b, " iif %s", r.iif)
	}
	if r.mark != 0 || r.mask != 0 {
		fmt.Fprintf(&b, " fwmark %#x/%#x", r.mark, r.mask)
	}
	switch r.action {
	case nl.FR_ACT_TO_TBL:
		fmt.Fprintf(&b, " lookup %s", tableName(r.table))
	case nl.FR_ACT_UNREACHABLE:
		b.WriteString(" unreachable")
	case nl.FR_ACT_BLACKHOLE:
		b.WriteString(" blackhole")
	default:
		fmt.Fprintf(&b, " action %d", r.action)
	}
	if r.suppress != noSuppress {
		fmt.Fprintf(&b, " suppress_prefixlength %d", r.suppress)
	}
	if r.proto != protocol {
		fmt.Fprintf(&b, " protocol %d", r.proto)
	}
	return b.String() + r.extra
}

func tableName(t uint32) string {
	switch t {
	case unix.RT_TABLE_MAIN:
		return "main"
	case unix.RT_TABLE_LOCAL:
		return "local"
	}
	return fmt.Sprint(t)
}

// looksUpLocal reports whether a rule leads whatever is for an address of the node to the node.
func (r rule) looksUpLocal() bool {
	return r == rule{af: r.af, pref: r.pref, action: nl.FR_ACT_TO_TBL, table: unix.RT_TABLE_LOCAL, suppress: noSuppress, proto: r.proto}
}

// localRule leads whatever is for an address of the node to the node.
func localRule(af int) rule {
	return rule{af: af, pref: prefLocal, action: nl.FR_ACT_TO_TBL, table: unix.RT_TABLE_LOCAL, suppress: noSuppress, proto: protocol}
}

// ours reports whether a rule is one of ours. All of our numbers are, but prefLocal: who asks for no number (wg-quick, systemd-networkd,
// `ip rule add`) gets the one before the first rule but the host's own.
func (r rule) ours() bool {
	return r == localRule(r.af) || r.pref > prefLocal && r.pref <= prefLast
}

// route is a route of our metric in main.
type route struct {
	to    netip.Prefix
	kind  int // unix.RTN_*
	proto int
}

// String is the route as `ip route` prints it.
func (r route) String() string {
	kind := ""
	if r.kind == unix.RTN_UNREACHABLE {
		kind = "unreachable "
	}
	return fmt.Sprintf("%s%s metric %d", kind, r.to, unreachableMetric)
}

// link is a link as far as router advertisements are concerned.
type link struct {
	name      string
	acceptRA  string // its sysctl
	forwards  bool   // its sysctl "forwarding"
	raDefault bool   // an RA gave the host a default route over it
	uplink    bool   // no veth, tunnel or bridge: an RA may be what it waits for
}

// state is what the kernel has of what the node network needs.
type state struct {
	rules   []rule
	routes  []route
	sysctls map[string]string // the switches for forwarding
	links   []link
	// self are the tailnet addresses of the tun.
	self []netip.Prefix
	// localLate are those families, by family.af, whose own rule for the node's addresses does not stand before ours.
	localLate map[int]bool
	// localOurs are those that have no such rule but ours.
	localOurs map[int]bool
	// families are those that the kernel has.
	families []family
}

// step is one change.
type step struct {
	delete bool
	// One of these.
	rule   *rule
	route  *route
	sysctl string
	value  string
}

func (s step) String() string {
	verb := "add"
	if s.delete {
		verb = "delete"
	}
	switch {
	case s.rule != nil:
		return fmt.Sprintf("%s rule %s", verb, s.rule)
	case s.route != nil:
		return fmt.Sprintf("%s route %s", verb, s.route)
	}
	return fmt.Sprintf("set %s=%s", strings.ReplaceAll(s.sysctl, "/", "."), s.value)
}

// wantedRules says which rules the node needs, whose tun has the tailnet addresses self.
func wantedRules(f family, cfg Config, self []netip.Prefix) []rule {
	base := rule{af: f.af, mask: bypassMark, action: nl.FR_ACT_TO_TBL, table: unix.RT_TABLE_MAIN,
		suppress: noSuppress, proto: protocol}
	var out []rule
	add := func(pref uint32, to netip.Prefix, change func(*rule)) {
		r := base
		r.pref, r.to = pref, to
		change(&r)
		out = append(out, r)
	}
	unreachable := func(r *rule) { r.action, r.table = nl.FR_ACT_UNREACHABLE, 0 }
	tunnel := func(r *rule) { r.table = tailscaleTable }
	for _, p := range f.of(netset.Union(cfg.Own)) {
		add(prefOwn, p, func(r *rule) { r.suppress = int32(p.Bits()) })
		add(prefOwnElse, p, unreachable)
	}
	for _, p := range f.of(netset.Union(cfg.Leaving)) {
		add(prefOwn, p, func(r *rule) { r.suppress = int32(p.Bits()) })
	}
	for _, p := range f.of(netset.Union(cfg.Cluster, cfg.Own)) {
		add(prefCluster, p, tunnel)
		add(prefClusterElse, p, unreachable)
	}
	pods := f.of(netset.Union(cfg.Own, cfg.Leaving))
	fromPods := func(pref uint32, to netip.Prefix, change func(*rule)) {
		for _, p := range pods {
			add(pref, to, func(r *rule) { change(r); r.from = p })
		}
	}
	for _, p := range f.of(netset.Union(cfg.Beside)) {
		fromPods(prefBeside, p, func(r *rule) { r.suppress = int32(p.Bits()) - 1 })
	}
	for _, p := range f.of(netset.Union(cfg.Subnets)) {
		fromPods(prefCluster, p, tunnel)
		fromPods(prefClusterElse, p, unreachable)
	}
	add(prefTailnet, f.tailnet, tunnel)
	// tailscaled itself, which its mark lets by prefTailnet, must not ask the LAN either when it begins.
	add(prefResolverElse, netip.PrefixFrom(f.resolver, f.resolver.BitLen()), func(r *rule) { unreachable(r); r.mask = 0 })
	if f.shared {
		add(prefTailnetHost, f.tailnet, func(r *rule) { r.suppress = int32(f.tailnet.Bits()) })
		for _, p := range f.of(netset.Union(cfg.Cluster, cfg.Own, cfg.Leaving, self)) {
			add(prefTailnetElse, f.tailnet, func(r *rule) { unreachable(r); r.from = p })
		}
		if cfg.TunName != "" {
			add(prefTunnelElse, f.tailnet, func(r *rule) { r.action, r.table, r.iif = nl.FR_ACT_BLACKHOLE, 0, cfg.TunName })
		}
	} else {
		add(prefTailnetElse, f.tailnet, unreachable)
	}
	// "not" turns the mark as well: tailscaled's own packets come by here, into the table to which its next rule would lead them.
	add(prefLAN, f.tailnet, func(r *rule) { r.not, r.suppress = true, 0 })
	if cfg.LANFirst {
		add(prefLANFirst, f.tailnet, func(r *rule) { r.not = true })
	}
	for _, p := range f.of(netset.Union(cfg.Services)) {
		add(prefServices, p, func(*rule) {})
	}
	slices.SortStableFunc(out, func(a, b rule) int { return cmp.Compare(a.pref, b.pref) })
	return out
}

func wantedRoutes(f family, cfg Config) []route {
	var out []route
	for _, p := range f.of(netset.Union(cfg.Cluster, cfg.Own)) {
		out = append(out, route{to: p, kind: unix.RTN_UNREACHABLE, proto: protocol})
	}
	return out
}

// plan says what to change so that the node has what cfg needs: first what closes holes, then what opens the way,
// each added before its predecessor is deleted, and the unreachable routes outliving the rules; forwarding last. It does
// no I/O.
func plan(have state, cfg Config) []step {
	var routes, rules, oldRules, oldRoutes, sysctls []step
	for _, f := range have.families {
		add, del := planRoutes(have.routes, wantedRoutes(f, cfg), f)
		routes, oldRoutes = append(routes, add...), append(oldRoutes, del...)
		want := wantedRules(f, cfg, have.self)
		if have.localLate[f.af] {
			want = slices.Insert(want, 0, localRule(f.af))
		}
		add, del = planRules(have.rules, want, f)
		rules, oldRules = append(rules, add...), append(oldRules, del...)
	}
	for _, f := range have.families {
		if f.af == unix.AF_INET6 {
			sysctls = append(sysctls, planRA(have.links, cfg.TunName)...)
		}
		if have.sysctls[f.forwarding] != "1" {
			sysctls = append(sysctls, step{sysctl: f.forwarding, value: "1"})
		}
	}
	return slices.Concat(routes, rules, oldRules, oldRoutes, sysctls)
}

// planRules compares as multisets: a second copy of a rule is one too many.
func planRules(have, want []rule, f family) (add, del []step) {
	spare := map[rule]int{}
	for _, r := range have {
		spare[r]++
	}
	for _, r := range want {
		if spare[r] > 0 {
			spare[r]--
			continue
		}
		add = append(add, step{rule: &r})
	}
	for _, r := range have {
		if r.af == f.af && spare[r] > 0 {
			spare[r]--
			del = append(del, step{delete: true, rule: &r})
		}
	}
	return add, del
}

func planRoutes(have, want []route, f family) (add, del []step) {
	kept := map[netip.Prefix]bool{}
	for _, r := range want {
		kept[r.to] = true
		if !slices.Contains(have, r) {
			add = append(add, step{route: &r}) // it replaces another route of the same prefix and metric
		}
	}
	for _, r := range have {
		if r.to.Addr().Is6() == (f.af == unix.AF_INET6) && !kept[r.to] {
			del = append(del, step{delete: true, route: &r})
		}
	}
	return add, del
}

// planRA keeps the host's own default route: the kernel drops what it learned from router advertisements, and takes no
// more, once it forwards, unless accept_ra is 2. Only links that do accept advertisements today are changed: one has
// given a default route, or may at any moment (the daemon can be up before the first one arrives).
func planRA(links []link, tun string) []step {
	var out []step
	for _, l := range links {
		if l.acceptRA != "1" || l.name == "lo" || l.name == tun || strings.HasPrefix(l.name, names.PodLinkPrefix) {
			continue
		}
		if l.raDefault || l.uplink && !l.forwards {
			out = append(out, step{sysctl: sysctl.IPv6Link(l.name, "accept_ra"), value: sysctl.AcceptRAWithForwarding})
		}
	}
	return out
}
