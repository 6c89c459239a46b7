package controller

import (
	"strings"
	"testing"
)

func TestCheckPolicy(t *testing.T) {
	const maps = `"nodeAttrs": [{"target": ["tag:headcni"], "attr": ["cache-network-maps"]}]`
	tests := []struct {
		name, text string
		starCovers bool
		want       map[string]string // check -> a part of the text
	}{
		{"none", `{}`, false, map[string]string{checkMaps: "nodeAttrs"}},
		{"all there", `{// as in the README
			"hosts": {"pods": "10.244.0.0/16"},
			"acls": [{"action": "accept", "src": ["tag:headcni", "pods", "fd00:244::/32"], "dst": ["tag:headcni:*", "pods:*", "[fd00:244::/32]:*",]}], ` + maps + `}`, false, nil},
		{"a star means tailnet addresses since 0.29", `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}], ` + maps + `}`, false,
			map[string]string{checkACL: `add to acls {"action": "accept", "src": ["tag:headcni", "10.244.0.0/16", "fd00:244::/48"], "dst": ["tag:headcni:*", "10.244.0.0/16:*", "fd00:244::/48:*"]}`}},
		{"and everything before", `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}], ` + maps + `}`, true, nil},
		{"one family", `{"acls": [{"action": "accept", "src": ["10.0.0.0/8"], "dst": ["10.0.0.0/8:*"]}], ` + maps + `}`, false,
			map[string]string{checkACL: "pods of fd00:244::/48 do not"}},
		{"some ports", `{"acls": [{"action": "accept", "src": ["10.244.0.0/16", "fd00:244::/48"], "dst": ["10.244.0.0/16:80", "fd00:244::/48:80"]}], ` + maps + `}`, false,
			map[string]string{checkACL: "10.244.0.0/16"}},
		{"grants", `{"grants": [{"src": ["10.244.0.0/16", "fd00:244::/48"], "dst": ["10.244.0.0/16", "fd00:244::/48"], "ip": ["*"]}], ` + maps + `}`, false, nil},
		{"an empty list allows nothing", `{"acls": [], ` + maps + `}`, true, map[string]string{checkACL: "add to acls"}},
		{"auto-approvers", `{"autoApprovers": {"routes": {"10.0.0.0/8": ["tag:headcni"], "192.168.0.0/16": ["group:admin"]}}, ` + maps + `}`, false,
			map[string]string{checkAutoApprovers: `remove the line "10.0.0.0/8": ["tag:headcni"]`}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			found, err := checkPolicy(tt.text, prefixes("10.244.0.0/16", "fd00:244::/48"), []string{"tag:headcni"}, tt.starCovers)
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
	if _, err := checkPolicy(`{"acls": 3}`, nil, nil, false); err == nil {
		t.Error("a policy that is none passes")
	}
}
