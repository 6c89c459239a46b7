package policy_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/policy"
)

// BenchmarkCompile compiles a whole cluster, and reports what the own node holds of it.
func BenchmarkCompile(b *testing.B) {
	for _, size := range []struct{ pods, policies int }{{1000, 100}, {10000, 1000}, {30000, 10000}} {
		b.Run(fmt.Sprintf("pods=%d/policies=%d", size.pods, size.policies), func(b *testing.B) {
			s := policytest.Large(size.pods, size.policies)
			b.ReportAllocs()
			var r *policy.Ruleset
			for b.Loop() {
				r = policy.Compile(s)
			}
			elements := 0
			for _, set := range r.Sets {
				elements += len(set.Members)
			}
			b.ReportMetric(float64(len(r.Sets)), "sets")
			b.ReportMetric(float64(elements), "elements")
			b.ReportMetric(float64(len(r.Chains)), "chains")
		})
	}
}

// BenchmarkChange compiles after one change.
func BenchmarkChange(b *testing.B) {
	for _, size := range []struct{ pods, policies int }{{1000, 100}, {10000, 1000}, {30000, 10000}} {
		b.Run(fmt.Sprintf("pods=%d/policies=%d", size.pods, size.policies), func(b *testing.B) {
			r := rand.New(rand.NewPCG(1, 1))
			s := policytest.Large(size.pods, size.policies)
			c := policy.NewCompiler()
			c.Compile(s)
			for b.Loop() {
				s = policytest.LargeChange(r, s)
				c.Compile(s)
			}
		})
	}
}

// BenchmarkOneNamespace compiles after one change elsewhere, where a hundred pods of the own node are selected by all of many policies.
func BenchmarkOneNamespace(b *testing.B) {
	for _, n := range []int{100, 1000, 10000} {
		b.Run(fmt.Sprintf("policies=%d", n), func(b *testing.B) {
			r := rand.New(rand.NewPCG(1, 1))
			s := policytest.Large(1100, 0)
			for _, p := range s.Pods {
				p.Namespace = "ns-0"
			}
			for i := range n {
				p := policytest.LargePolicy(r, "ns-0", fmt.Sprint("policy-", i))
				p.Spec.PodSelector.MatchLabels = nil
				s.Policies = append(s.Policies, p)
			}
			c := policy.NewCompiler()
			c.Compile(s)
			for b.Loop() {
				next := *s
				next.Pods = slices.Clone(s.Pods)
				pod := *s.Pods[1000]
				pod.Labels = s.Pods[r.IntN(1000)].Labels
				next.Pods[1000] = &pod
				s = &next
				c.Compile(s)
			}
		})
	}
}
