package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/golden"
)

// text shows a ruleset as nft would write it, without the sets that the kernel fills.
func text(r *Ruleset, opt Options) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	elements := func(list []string) string {
		if len(list) == 0 {
			return ""
		}
		return " elements = { " + strings.Join(list, ", ") + " };"
	}
	line("table inet %s {", Table)
	for _, name := range slices.Sorted(maps.Keys(r.Sets)) {
		s := r.Sets[name]
		typ := map[bool]string{false: "ipv4_addr", true: "ipv6_addr"}[s.IPv6]
		var list []string
		for _, m := range s.Members {
			switch s.Kind {
			case Addresses:
				list = append(list, m.Addr.String())
			case Blocks:
				list = append(list, m.Addr.String()+"-"+m.Last.String())
			case Endpoints:
				list = append(list, fmt.Sprintf("%s . %s . %d", m.Addr, m.Protocol, m.Port))
			}
		}
		switch s.Kind {
		case Blocks:
			typ += "; flags interval"
		case Endpoints:
			typ += " . inet_proto . inet_service"
		}
		line("\tset %s { type %s;%s }", name, typ, elements(list))
	}
	for _, name := range slices.Sorted(maps.Keys(r.Maps)) {
		m := r.Maps[name]
		typ := "inet_proto . inet_service : verdict"
		if m.Ranges {
			typ = "inet_service : verdict; flags interval"
		}
		var list []string
		for _, e := range m.Elements {
			verdict := "accept"
			if e.Jump != "" {
				verdict = "jump " + e.Jump
			}
			if m.Ranges {
				list = append(list, fmt.Sprintf("%d-%d : %s", e.First, e.Last, verdict))
			} else {
				list = append(list, fmt.Sprintf("%s . %d : %s", e.Protocol, e.First, verdict))
			}
		}
		line("\tmap %s { type %s;%s }", name, typ, elements(list))
	}
	for _, d := range []struct {
		name   string
		chains map[netip.Addr]string
	}{{MapIn, r.In}, {MapOut, r.Out}} {
		var list []string
		for _, a := range slices.SortedFunc(maps.Keys(d.chains), netip.Addr.Compare) {
			list = append(list, fmt.Sprintf("%s : goto %s", a, d.chains[a]))
		}
		line("\tmap %s {%s }", d.name, elements(list))
	}
	var states []string
	for state, verdict := range StateVerdicts(false) {
		states = append(states, fmt.Sprintf("%s : %s", state, verdict))
	}
	slices.Sort(states)
	line("\tmap %s {%s }", MapState, elements(states))
	for _, c := range FixedChains(opt) {
		head := ""
		if c.Priority != nil {
			head = fmt.Sprintf("type filter hook forward priority %d; policy accept;", *c.Priority)
		}
		line("\tchain %s { %s\n\t\t%s\n\t}", c.Name, head, strings.Join(c.Rules, "\n\t\t"))
	}
	for _, name := range slices.Sorted(maps.Keys(r.Chains)) {
		line("\tchain %s {\n\t\t%s\n\t}", name, strings.Join(r.Chains[name].Text(), "\n\t\t"))
	}
	line("}")
	for _, f := range r.Faults {
		line("# %s: %s", f.Policy, f.Problem)
	}
	return b.String()
}

func TestGolden(t *testing.T) {
	for name, specs := range map[string][]string{
		"none": nil,
		"deny": {denyIt},
		"example": {webIs + `
policyTypes: [Ingress, Egress]
ingress:
- from: [{namespaceSelector: {matchLabels: {team: edge}}}, {ipBlock: {cidr: 192.168.50.0/24, except: [192.168.50.128/25]}}]
  ports: [{port: http}]
egress:
- {to: [{podSelector: {matchLabels: {app: db}}}], ports: [{port: 5432}]}
- ports: [{port: 53, protocol: UDP}, {port: 30000, endPort: 32000}]`},
		"names-and-unions": {webIs + `
policyTypes: [Ingress, Egress]
ingress:
- from: [{podSelector: {matchLabels: {app: a}}}, {podSelector: {matchLabels: {app: b}}}, {podSelector: {matchLabels: {app: db}}}, {podSelector: {matchLabels: {app: d}}}, {podSelector: {matchLabels: {app: e}}}, {namespaceSelector: {}}]
egress:
- {to: [{podSelector: {}}, {ipBlock: {cidr: 10.244.2.0/24}}], ports: [{port: http}]}
- {to: [{podSelector: {matchLabels: {app: db}}}], ports: [{port: 100, endPort: 200}, {protocol: UDP}]}
- {to: [{podSelector: {matchLabels: {app: b}}}], ports: [{port: 150, endPort: 250}]}`},
		"faults": {"podSelector: {matchLabels: {app: web}, matchExpressions: [{key: app, operator: Like, values: [w]}]}\ningress: [{}]",
			webIs + "policyTypes: [Sideways]\ningress: [{from: [{}, {ipBlock: {cidr: here}}], ports: [{port: 0}, {protocol: ICMP}, {port: http, endPort: 9}]}]"},
	} {
		t.Run(name, func(t *testing.T) {
			s := small()
			for i, spec := range specs {
				s.Policies = append(s.Policies, policy(t, fmt.Sprintf("p%d", i), spec))
			}
			golden.Check(t, "testdata/"+name+".nft", text(Compile(s), Options{Strict: true, Log: name == "deny"}))
		})
	}
}
