// Package policy tests pkg/policy and its enforcement together: real packets, and faults made on purpose.
package policy

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// mutants are faults that a compiler of policies can have. Each replaces the one place in a file of pkg/policy that reads old.
var mutants = []struct{ name, file, old, new string }{
	{"excepts are forgotten", "peers.go", "set.RemovePrefix(except)", "_ = except"},
	{"a node is known by the address in the block only", "peers.go", "set.Add(a)", "_ = a"},
	{"an excepted node keeps its other addresses", "peers.go", "set.Remove(a)", "_ = a"},
	{"named ports behind blocks only", "peers.go", "for _, peer := range p.pods {\n\t\tif peer.matches(c, pod) {\n\t\t\treturn true", "for _, peer := range p.pods {\n\t\tif peer.matches(c, pod) {\n\t\t\treturn false"},
	{"a selector alone is of all namespaces", "peers.go", "one := newPodPeer(namespace, nil, pods)", "one := newPodPeer(\"\", &selector{}, pods)"},
	{"every namespace is every pod", "peers.go", "if namespaces.empty() && pods.empty() {", "if namespaces.empty() {"},
	{"a peer that nobody understands is everybody", "peers.go", "fault(\"peer %d: %v: it stands for nobody\", i+1, err)\n\t\t\tcontinue", "return &peers{any: true}"},
	{"ranges end before their last port", "class.go", "edges[int(p.first)], edges[int(p.last)+1] = true, true", "edges[int(p.first)], edges[int(p.last)] = true, true"},
	{"of overlapping ranges the first counts", "class.go", "piece.in = slices.Clone(active)", "piece.in = slices.Clone(active[:1])"},
	{"every port is TCP's", "class.go", "e := PortElement{Protocol: p.protocol,", "e := PortElement{Protocol: TCP,"},
	{"a name is every protocol's", "understand.go", "p.Name == want.Name && p.Protocol == want.Protocol", "p.Name == want.Name"},
	{"rules of one port replace each other", "class.go", "to[p] == nil {", "true {"},
	{"a pod's ports are those of the first of its class", "compile.go", "ports := numbers(pod, p)", "ports := numbers(&Pod{}, p)"},
	{"a policy isolates both ways", "compile.go", "if !u.isolates[dir] {", "if false {"},
	{"egress rules without types do not isolate", "understand.go", "len(p.Spec.PolicyTypes) == 0 && len(p.Spec.Egress) > 0", "false"},
	{"a subject that nobody understands is not isolated", "compile.go", "if u.subject.mayMatch(pod.Labels) {", "if u.subject.matches(pod.Labels) {"},
	{"a union has the pods of some of its peers", "peers.go", "out = append(out, p.members(c, ipv6)...)", "if out == nil {\n\t\t\tout = p.members(c, ipv6)\n\t\t}"},
	{"a class stays although its policies changed", "compile.go", "s != nil && s.version == version", "s != nil"},
	{"a class of some policies is that of others", "compile.go", "key = binary.BigEndian.AppendUint64(key, u.serial)", "key = binary.BigEndian.AppendUint64(key, 0)"},
	{"a class' sets are forgotten with another's", "compile.go", "l.used = true", "l.used = l.set != nil && len(c.out.Sets) > 1"},
	{"of ranges kept apart only one is asked", "class.go", "for _, elements := range k.cut(r, protocol, o) {", "for _, elements := range k.cut(r, protocol, o)[:1] {"},
	{"ranges kept apart end with the first", "class.go", "max(g.ranges[n-1].last, p.last)", "g.ranges[n-1].last"},
	{"a set that changed stays", "compile.go", "if !some {", "if some || !some {"},
	{"another's claim counts", "cluster.go", "if c.rank(p) == c.rank(best) {", "if c.rank(p) <= c.rank(best) {"},
	{"completed pods keep their addresses", "snapshot.go", "return !p.HostNetwork && !p.Done", "return !p.HostNetwork"},
	{"host-network pods have an address", "snapshot.go", "return !p.HostNetwork && !p.Done", "return !p.Done"},
	{"who lacks a label is not NotIn", "selector.go", "yes := has && (r.values == nil || r.values[value]); yes == r.negate", "yes := has && (r.values == nil || r.values[value]); yes == r.negate || !has && r.values != nil"},
	{"labels of namespaces are not asked", "cluster.go", "return labels != nil && p.namespaces.matches(labels)", "return labels != nil"},
	{"a namespace that is not known has no labels", "cluster.go", "return labels != nil && p.namespaces.matches(labels)", "return p.namespaces.matches(labels)"},
	{"a relabelled namespace is not noticed", "cluster.go", "now == nil || !maps.Equal(before, now)", "now == nil || !maps.Equal(before, before)"},
	{"who began it is isolated", "table.go", `both("ct reply %[2]s saddr vmap @"+MapIn`, `both("ct original %[2]s saddr vmap @"+MapIn`},
	{"answers pass by the port that they come from", "table.go", `"ct direction reply meta l4proto . th sport vmap @%s"`, `"ct direction reply meta l4proto . th dport vmap @%s"`},
	{"flows that stand go on", "table.go", `verdicts[Established], verdicts[Related] = "jump "+chainDoubt, "jump "+chainDoubt`, ""},
	{"flows that nobody answers go on", "table.go", `delete(verdicts, New)`, ""},
	{"what nobody answers is not judged", "table.go", `"ct status confirmed accept"`, `"ct state new accept"`},
	{"a pod is not itself", "table.go", `fmt.Sprintf("ct original ip saddr . ct reply ip saddr @%s4 accept", SetSelf),`, ""},
	{"errors are denied", "table.go", `"ct state related meta l4proto { icmp, ipv6-icmp } accept",`, ""},
	{"what is unknown passes", "table.go", `unknown+"counter name "+CounterUnknown+" drop"`, `unknown+"counter name "+CounterUnknown+" accept"`},
	{"no connection, no policy", "table.go", `Invalid: "goto " + chainStateless,`, `Invalid: "accept",`},
	{"who went stays in the sets", "cluster.go", "change(gone, without, c.claims.remove)", "change(gone[:0], without, c.claims.remove)"},
}

// TestMutants breaks the compiler, or the fixed chains, in each of these ways: the tests notice every one.
func TestMutants(t *testing.T) {
	dir, err := filepath.Abs("../../pkg/policy")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mutants {
		t.Run(m.name, func(t *testing.T) {
			path := filepath.Join(dir, m.file)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(string(b), m.old); n != 1 {
				t.Fatalf("%s: %d places read %q, want 1", m.file, n, m.old)
			}
			mutant, overlay := filepath.Join(t.TempDir(), m.file), filepath.Join(t.TempDir(), "overlay.json")
			replace, err := json.Marshal(map[string]any{"Replace": map[string]string{path: mutant}})
			if err != nil {
				t.Fatal(err)
			}
			for file, content := range map[string][]byte{mutant: []byte(strings.Replace(string(b), m.old, m.new, 1)), overlay: replace} {
				if err := os.WriteFile(file, content, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			tests, in := "^(TestCases|TestCompileRandom)$", dir
			if m.file == "table.go" {
				tests, in = "^(TestCut|TestOneWay|TestOwnNodeAndItself|TestNodePort|TestErrors|TestUnknownPod|TestNoConnection)$", "."
			}
			out, err := exec.CommandContext(t.Context(), "go", "test", "-vet=off", "-overlay", overlay, "-failfast", "-run", tests, in).CombinedOutput()
			switch {
			case err == nil:
				t.Error("no test noticed")
			case !strings.Contains(string(out), "--- FAIL: Test"):
				t.Errorf("no test ran: %s", out)
			}
		})
	}
}
