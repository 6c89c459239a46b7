package explain_test

import (
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/enforce"
	"github.com/headcni/headcni/pkg/policy/explain"
	"github.com/headcni/headcni/pkg/policy/report"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// TestAsksTheKernel holds real tables against what policies say, and sees what somebody takes out of one.
func TestAsksTheKernel(t *testing.T) {
	nstest.Require(t)
	node := nstest.New(t)
	table := enforce.New(filepath.Join(t.TempDir(), "chains"))
	in := func(st *explain.State) *explain.Explainer {
		node.Do(t, func() error {
			_, err := table.Apply(t.Context(), st.Rules, policy.Options{Strict: true})
			return err
		})
		return &explain.Explainer{State: func() (*explain.State, error) { return st, nil }, Kernel: table, Links: links{s: st.Snapshot}}
	}
	r := rand.New(rand.NewPCG(3, 4))
	asked := 0
	for range 3 {
		s := policytest.Cluster(r)
		x := in(&explain.State{Snapshot: s, Rules: policy.Compile(s), Strict: true})
		node.Do(t, func() error {
			for _, p := range s.Pods[:policytest.LocalPods] {
				e, err := x.Explain(t.Context(), report.Question{Pod: p.Namespace + "/" + p.Name})
				if err != nil {
					return err
				}
				if e.Wrong() {
					t.Errorf("%s: the kernel holds what was compiled, and is said to differ: %+v", p.Name, e)
				}
				for _, a := range e.Answers {
					asked += a.Sides[0].Kernel.Asked + a.Sides[1].Kernel.Asked
				}
			}
			return nil
		})
	}
	if asked < 500 {
		t.Errorf("the kernel was asked about %d connections only", asked)
	}

	s := shop(t)
	x := in(&explain.State{Snapshot: s, Rules: policy.Compile(s), Strict: true})
	ask := func(want bool, text string, q report.Question) {
		t.Helper()
		q.Namespace = "shop"
		node.Do(t, func() error {
			e, err := x.Explain(t.Context(), q)
			if err != nil {
				return err
			}
			var b strings.Builder
			if err := e.Print(&b); err != nil {
				return err
			}
			if e.Wrong() != want || !strings.Contains(b.String(), text) {
				t.Errorf("%+v: differs %t, want %t, and %q in\n%s", q, e.Wrong(), want, text, b.String())
			}
			return nil
		})
	}
	fromGateway := report.Question{Pod: "web", From: "edge/gw", Port: "http"}
	ask(false, "ALLOWED\n", fromGateway)
	for name, set := range policy.Compile(s).Sets {
		if set.Kind == policy.Addresses {
			node.Run(t, "nft", "flush", "set", "inet", policy.Table, name)
		}
	}
	ask(true, "ALLOWED by policies, but THE KERNEL DOES OTHERWISE", fromGateway)
	node.Run(t, "nft", "flush", "map", "inet", policy.Table, "in4")
	ask(true, "DENIED by policies, but THE KERNEL DOES OTHERWISE", report.Question{Pod: "web", From: "open", Port: "80"})
	node.Run(t, "nft", "delete", "table", "inet", policy.Table)
	ask(true, "THE KERNEL COULD NOT BE ASKED", fromGateway)
}
