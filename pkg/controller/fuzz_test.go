package controller

import (
	"testing"
	"unicode"

	corev1 "k8s.io/api/core/v1"

	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

// FuzzPolicy: whatever Headscale has for a policy is refused or judged.
func FuzzPolicy(f *testing.F) {
	for _, s := range []string{`{}`, `// x
{"acls":[{"action":"accept","src":["*"],"dst":["*:*"]}],}`, `{"acls":null,"grants":[{"src":["a"],"dst":["b"],"ip":["*"]}],"hosts":{"a":"10.244.0.0/16"}}`,
		`{"autoApprovers":{"routes":{"10.0.0.0/8":["tag:headcni"],"x":null}}}`, `{"nodeAttrs":[{"target":["*"],"attr":null}]}`, `[`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		found, err := checkPolicy(text, needs{ranges: prefixes("10.244.0.0/16", "fd00:244::/48"), tags: tags, sharing: []string{"n"}})
		if err == nil && len(found) > 0 && found[0].text == "" {
			t.Error("a finding without words")
		}
	})
}

// FuzzNode: what a node writes of itself on its Node, which it may have been broken into for, makes no plan that panics, and no
// text of ours that is not one to be shown.
func FuzzNode(f *testing.F) {
	f.Add("nodekey:a", "daemon", `{"state":"routed","routes":["10.244.1.0/24"]}`, "10.244.1.0/24")
	f.Add("", "", `{`, "0.0.0.0/0")
	f.Add("nodekey:b", "host", `{"nodeKey":7}`, "fd00::/8")
	f.Fuzz(func(t *testing.T, key, mode, view, cidr string) {
		n := &corev1.Node{}
		n.Name, n.Annotations = "a", map[string]string{kube.NodeKey: key, kube.Mode: mode, kube.Headscale: view}
		n.Spec.PodCIDRs = []string{cidr}
		o := observation{now: now, grace: grace, tags: tags, nodes: []node{nodeOf(n), kn("b", "b", "10.244.2.0/24")}, tailnet: []headscale.Node{
			ts(1, "a", []string{"10.244.1.0/24"}, "10.244.1.0/24"), ts(2, "b", []string{"10.244.2.0/24"}, "10.244.2.0/24")}}
		p := makePlan(o)
		for _, a := range p.approvals {
			if a.node.ID == 2 && len(a.stale) > 0 && key != "nodekey:b" {
				t.Errorf("b loses %v", a.stale)
			}
		}
		for _, m := range p.views {
			for _, r := range m.Message {
				if !unicode.IsPrint(r) {
					t.Errorf("%q", m.Message)
				}
			}
		}
	})
}
