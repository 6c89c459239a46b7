package policy_test

import (
	"fmt"
	"math/rand/v2"
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
