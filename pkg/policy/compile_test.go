package policy_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

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
	compiler, other := policy.NewCompiler(), policy.NewCompiler()
	other.SetOverlaps(0)
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
		apart := other.Compile(s)
		for _, f := range policytest.Probes(r, s, 60) {
			flows++
			if !check(t, s, rules, f) || !check(t, s, apart, f) {
				t.Fatalf("cluster %d: %+v", i, s)
			}
		}
	}
	t.Logf("%d flows", flows)
}

// TestManyRanges: ranges that all overlap each other, each of other peers, cost in proportion to their number.
func TestManyRanges(t *testing.T) {
	sizes := map[int]int{}
	for _, n := range []int{100, 1000, 4000} {
		s := &policy.Snapshot{Node: "one", Pods: []*policy.Pod{{Namespace: "shop", Name: "web", Node: "one", IPs: policytest.Local(0)}}}
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "many"}}
		for i := range n {
			first, last := intstr.FromInt(1+i), int32(60000-i)
			p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{
				From:  []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("10.%d.%d.0/24", i/256, i%256)}}},
				Ports: []networkingv1.NetworkPolicyPort{{Port: &first, EndPort: &last}},
			})
		}
		s.Policies = append(s.Policies, p)
		rules := policy.Compile(s)
		for _, set := range rules.Sets {
			sizes[n] += len(set.Members)
		}
		for _, m := range rules.Maps {
			sizes[n] += len(m.Elements)
		}
		for i, port := range map[int]uint16{0: 1, 7: 8, n - 1: uint16(60001 - n)} {
			src := netip.AddrFrom4([4]byte{10, byte(i / 256), byte(i % 256), 9})
			check(t, s, rules, policy.Flow{Src: src, Dst: policytest.Local(0)[0], Protocol: policy.TCP, Port: port})
			check(t, s, rules, policy.Flow{Src: src, Dst: policytest.Local(0)[0], Protocol: policy.TCP, Port: port - 1})
		}
	}
	if sizes[4000] > 5*sizes[1000] || sizes[1000] > 60000 {
		t.Errorf("elements by number of ranges: %v", sizes)
	}
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
