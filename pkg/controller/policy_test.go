package controller

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/headscaletest"
)

func TestCheckPolicy(t *testing.T) {
	const maps = `"nodeAttrs": [{"target": ["tag:headcni"], "attr": ["cache-network-maps"]}]`
	tests := []struct {
		name, text string
		starCovers bool
		want       map[string]string // check -> a part of the text
		sharing    []string
	}{
		{"none", `{}`, false, map[string]string{checkMaps: "nodeAttrs"}, nil},
		{"all there", `{// as in the README
			"hosts": {"pods": "10.244.0.0/16"},
			"acls": [{"action": "accept", "src": ["tag:headcni", "pods", "fd00:244::/32"], "dst": ["tag:headcni:*", "pods:*", "[fd00:244::/32]:*",]}], ` + maps + `}`, false, nil, nil},
		{"a star means tailnet addresses since 0.29", `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}], ` + maps + `}`, false,
			map[string]string{checkACL: `add to acls {"action": "accept", "src": ["tag:headcni", "10.244.0.0/16", "fd00:244::/48"], "dst": ["tag:headcni:*", "10.244.0.0/16:*", "fd00:244::/48:*"]}`}, nil},
		{"and everything before", `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}], ` + maps + `}`, true, nil, nil},
		{"one family", `{"acls": [{"action": "accept", "src": ["10.0.0.0/8"], "dst": ["10.0.0.0/8:*"]}], ` + maps + `}`, false,
			map[string]string{checkACL: "pods of fd00:244::/48 do not"}, nil},
		{"some ports", `{"acls": [{"action": "accept", "src": ["10.244.0.0/16", "fd00:244::/48"], "dst": ["10.244.0.0/16:80", "fd00:244::/48:80"]}], ` + maps + `}`, false,
			map[string]string{checkACL: "10.244.0.0/16"}, nil},
		{"grants", `{"grants": [{"src": ["tag:headcni", "10.244.0.0/16", "fd00:244::/48"], "dst": ["10.244.0.0/16", "fd00:244::/48"], "ip": ["*"]}], ` + maps + `}`, false, nil, nil},
		{"one protocol", `{"acls": [{"action": "accept", "proto": "tcp", "src": ["10.244.0.0/16", "fd00:244::/48"], "dst": ["10.244.0.0/16:*", "fd00:244::/48:*"]}], ` + maps + `}`, false,
			map[string]string{checkACL: `pods of 10.244.0.0/16, fd00:244::/48 do not reach each other by UDP: add to acls`}, nil},
		{"another protocol", `{"acls": [{"action": "accept", "proto": "132", "src": ["10.0.0.0/8", "fd00::/8"], "dst": ["10.0.0.0/8:*", "fd00::/8:*"]}], ` + maps + `}`, false,
			map[string]string{checkACL: `pods of 10.244.0.0/16, fd00:244::/48 do not reach each other: add to acls`}, nil},
		{"protocol by protocol", `{"hosts": {"p4": "10.244.0.0/16", "p6": "fd00:244::/48"}, "acls": [{"action": "accept", "proto": "6", "src": ["tag:headcni", "p4", "p6"], "dst": ["p4:*", "p6:*"]},
			{"action": "accept", "proto": "UDP", "src": ["p4", "p6"], "dst": ["p4:*", "p6:*"]}], ` + maps + `}`, false, nil, nil},
		{"grants, protocol by protocol", `{"grants": [{"src": ["group:nodes", "10.244.0.0/16", "fd00:244::/48"], "dst": ["10.244.0.0/16", "fd00:244::/48"], "ip": ["tcp:*", "17:*"]}], ` + maps + `}`, false, nil, nil},
		{"a grant of one", `{"grants": [{"src": ["10.244.0.0/16", "fd00:244::/48"], "dst": ["10.244.0.0/16", "fd00:244::/48"], "ip": ["tcp:*", "udp:53"]}], ` + maps + `}`, false,
			map[string]string{checkACL: `do not reach each other by UDP: add`}, nil},
		{"not for nodes", `{"hosts": {"pods": "10.244.0.0/16"}, "acls": [{"action": "accept", "src": ["pods", "fd00:244::/48", "192.168.0.0/16"], "dst": ["10.244.0.0/16:*", "fd00:244::/48:*"]}], ` + maps + `}`, false,
			map[string]string{checkACL: `nodes do not reach pods of 10.244.0.0/16, fd00:244::/48 on other nodes, as NodePorts and the API server's webhooks need: add to acls {"action": "accept", "src": ["tag:headcni", "10.244.0.0/16", "fd00:244::/48"]`}, nil},
		{"for nodes by one family", `{"acls": [{"action": "accept", "src": ["10.244.0.0/16", "fd00:244::/48"], "dst": ["10.244.0.0/16:*", "[fd00:244::/48]:*"]},
			{"action": "accept", "src": ["100.64.0.0/10"], "dst": ["10.0.0.0/8:*", "[fd00:244::/48]:*"]}], ` + maps + `}`, false, map[string]string{checkACL: "nodes do not reach pods of fd00:244::/48 on"}, nil},
		{"for nodes by a user", `{"acls": [{"action": "accept", "src": ["10.244.0.0/16", "fd00:244::/48"], "dst": ["10.244.0.0/16:*", "[fd00:244::/48]:*"]},
			{"action": "accept", "src": ["alice@"], "dst": ["10.244.0.0/16:80", "[fd00:244::/48]:80"]}], ` + maps + `}`, false, nil, nil},
		{"for nodes by a grant", `{"acls": [{"action": "accept", "src": ["10.244.0.0/16", "fd00:244::/48"], "dst": ["10.244.0.0/16:*", "[fd00:244::/48]:*"]}],
			"grants": [{"src": ["*"], "dst": ["10.244.0.0/16", "fd00:244::/48"], "ip": ["tcp:80"]}], ` + maps + `}`, false, nil, nil},
		{"an empty list allows nothing", `{"acls": [], ` + maps + `}`, true, map[string]string{checkACL: "add to acls"}, nil},
		{"auto-approvers", `{"autoApprovers": {"routes": {"10.0.0.0/8": ["tag:headcni"], "192.168.0.0/16": ["group:admin"]}}, ` + maps + `}`, false,
			map[string]string{checkAutoApprovers: `remove the line "10.0.0.0/8": ["tag:headcni"]`}, nil},
		{"another network in the tailnet's range", `{` + maps + `}`, false,
			map[string]string{checkCGNAT: `a, b, c, d, e and 1 more: a network of the host's own is in the tailnet's range 100.64.0.0/10 too`}, []string{"a", "b", "c", "d", "e", "f"}},
		{"which the policy knows", `{"nodeAttrs": [{"target": ["*"], "attr": ["cache-network-maps", "disable-linux-cgnat-drop-rule"]}]}`, false, nil, []string{"a"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			found, err := checkPolicy(tt.text, needs{ranges: prefixes("10.244.0.0/16", "fd00:244::/48"), tags: tags, sharing: tt.sharing, starCovers: tt.starCovers})
			if err != nil {
				t.Fatal(err)
			}
			if len(found) != len(tt.want) {
				t.Errorf("found: %v", found)
			}
			for _, f := range found {
				if want, ok := tt.want[f.check]; !ok || !strings.Contains(f.text, want) {
					t.Errorf("%s: %q, want %q", f.check, f.text, want)
				}
			}
		})
	}
	if _, err := checkPolicy(`{"acls": 3}`, needs{}); err == nil {
		t.Error("a policy that is none passes")
	}
}

func TestCheckPolicyForServices(t *testing.T) {
	services := prefixes("10.96.0.0/12", "fd00:96::/108")
	for name, c := range map[string]struct {
		text       string
		starCovers bool
		want       map[string]string
	}{
		"nobody may":    {`{"acls": [{"action": "accept", "src": ["*"], "dst": ["10.0.0.0/16:*"]}]}`, false, map[string]string{checkServices: `reach the services of 10.96.0.0/12, fd00:96::/108: add to acls`}},
		"somebody may":  {`{"hosts": {"s": "10.96.0.10"}, "acls": [{"action": "accept", "src": ["*"], "dst": ["s:53", "[fd00:96::/108]:443"]}]}`, false, nil},
		"by a grant":    {`{"grants": [{"src": ["*"], "dst": ["10.96.0.0/12", "fd00:96::1"], "ip": ["tcp:80"]}]}`, false, nil},
		"a star, 0.29":  {`{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`, false, map[string]string{checkServices: "10.96.0.0/12"}},
		"and before":    {`{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`, true, nil},
		"no policy":     {`{}`, false, nil},
		"auto-approved": {`{"autoApprovers": {"routes": {"10.96.0.0/16": ["tag:headcni"]}}}`, false, map[string]string{checkAutoApprovers: `the tailnet's traffic to them`}},
	} {
		found, err := checkPolicy(c.text, needs{services: services, starCovers: c.starCovers})
		if err != nil {
			t.Fatal(err)
		}
		found = slices.DeleteFunc(found, func(f finding) bool { return f.check == checkMaps })
		if len(found) != len(c.want) {
			t.Errorf("%s: %v", name, found)
		}
		for _, f := range found {
			if !strings.Contains(f.text, c.want[f.check]) || c.want[f.check] == "" {
				t.Errorf("%s: %v", name, f)
			}
		}
	}
}

// While the policy cannot be read, what was found in it stands.
func TestFindingsOutliveAFault(t *testing.T) {
	s := headscaletest.New(t)
	s.SetPolicy(`{"acls":[]}`)
	c, _, _ := world(t, s, s.APIKey())
	api, _, err := c.connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	o := observation{ranges: prefixes("10.244.0.0/16"), tags: tags}
	var before []finding
	locked := headscaletest.At("GET /api/v1/policy", headscaletest.Answer(500, `{"code":2,"message":"the database is locked","details":[]}`))
	for number, fault := range []headscaletest.Fault{nil, locked} {
		s.Break(fault)
		c.slowAt = time.Time{}
		c.slow(t.Context(), api, o)
		if len(c.findings) == 0 || before != nil && !slices.Equal(c.findings, before) {
			t.Errorf("reading %d: %v, before that %v", number, c.findings, before)
		}
		before = c.findings
	}
	s.Break(nil)
	s.SetPolicy("") // none: everything is allowed
	c.slowAt = time.Time{}
	c.slow(t.Context(), api, o)
	if slices.ContainsFunc(c.findings, func(f finding) bool { return f.check == checkACL }) {
		t.Errorf("without a policy: %v", c.findings)
	}
}
