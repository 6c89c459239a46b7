package policy_test

import (
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/policy"
)

var same = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

// check holds the ruleset's verdict on a flow against the evaluator's.
func check(t testing.TB, s *policy.Snapshot, r *policy.Ruleset, f policy.Flow) bool {
	t.Helper()
	want := policy.Evaluate(s, f)
	for dir, j := range map[policy.Direction]policy.Judgement{policy.Ingress: want.Ingress, policy.Egress: want.Egress} {
		if !j.Here || j.Reason == policy.OwnNode {
			continue
		}
		if got, _ := r.Judge(r, dir, f); got != j.Allowed {
			t.Errorf("%s of %+v: compiled says %t, the API %+v", dir, f, got, j)
			return false
		}
	}
	return true
}

// TestCompileRandom: what is compiled of random clusters, most of them changes of the one before, says of each connection what the API says.
func TestCompileRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 15))
	var s *policy.Snapshot
	compiler := policy.NewCompiler()
	flows := 0
	for i := range 1000 {
		if i%8 == 0 {
			s = policytest.Cluster(r)
		} else {
			s = policytest.Change(r, s)
		}
		rules := policy.Compile(s)
		if again := compiler.Compile(s); !reflect.DeepEqual(rules, again) {
			t.Fatalf("cluster %d: what is kept of the last compilation changes this one (-afresh +kept):\n%s", i, cmp.Diff(rules, again, same))
		}
		for _, f := range policytest.Probes(r, s, 60) {
			flows++
			if !check(t, s, rules, f) {
				t.Fatalf("cluster %d: %+v", i, s)
			}
		}
	}
	t.Logf("%d flows", flows)
}

// TestCompileIsPure: the order of a snapshot's lists changes nothing, and every name stands for one content.
func TestCompileIsPure(t *testing.T) {
	r := rand.New(rand.NewPCG(2, 15))
	for range 200 {
		s := policytest.Cluster(r)
		shuffled := *s
		shuffled.Pods, shuffled.Policies = slices.Clone(s.Pods), slices.Clone(s.Policies)
		shuffled.Namespaces, shuffled.Nodes = slices.Clone(s.Namespaces), slices.Clone(s.Nodes)
		r.Shuffle(len(s.Pods), func(i, j int) { shuffled.Pods[i], shuffled.Pods[j] = shuffled.Pods[j], shuffled.Pods[i] })
		r.Shuffle(len(s.Policies), func(i, j int) {
			shuffled.Policies[i], shuffled.Policies[j] = shuffled.Policies[j], shuffled.Policies[i]
		})
		slices.Reverse(shuffled.Namespaces)
		slices.Reverse(shuffled.Nodes)
		one, other := policy.Compile(s), policy.Compile(&shuffled)
		if diff := cmp.Diff(one, other, same); diff != "" {
			t.Fatal(diff)
		}
	}
}
