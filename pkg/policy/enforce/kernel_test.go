package enforce

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/policy"
)

// node is a network namespace with a Table in it.
type node struct {
	*testing.T
	ns    *nstest.NS
	table *Table
	file  string
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{T: t, ns: nstest.New(t), file: filepath.Join(t.TempDir(), "chains.json")}
	n.restart()
	return n
}

// restart is what another process begins with.
func (n *node) restart() { n.table = New(n.file) }

func (n *node) apply(want *policy.Ruleset, opt policy.Options) (c Change) {
	n.Helper()
	n.ns.Do(n, func() (err error) {
		c, err = n.table.Apply(n.Context(), want, opt)
		return err
	})
	return c
}

// holds fails the test unless the kernel holds want and nothing else.
func (n *node) holds(want *policy.Ruleset, opt policy.Options) {
	n.Helper()
	n.ns.Do(n, func() error {
		o, err := observe()
		if err != nil {
			return err
		}
		if p := o.plan(&held{rules: want, opt: opt, isolated: isolated(want), doubt: len(n.table.recheck) > 0}, n.table.digests); !p.empty() {
			return fmt.Errorf("the kernel does not hold what is wanted: %v", p.change.Repaired)
		}
		return nil
	})
}

func (n *node) generation() (gen uint32) {
	n.Helper()
	n.ns.Do(n, func() (err error) {
		gen, err = nfnl.Generation()
		return err
	})
	return gen
}

var strict = policy.Options{Strict: true}

// Random clusters and changes of them, and after each what the kernel holds.
func TestApply(t *testing.T) {
	for seed := range uint64(10) {
		n := newNode(t)
		r := rand.New(rand.NewPCG(seed, 1))
		s := policytest.Cluster(r)
		for step := range 8 {
			want := policy.Compile(s)
			c := n.apply(want, strict)
			if c.Cold != (step == 0) || len(c.Repaired) > 0 {
				t.Errorf("seed %d, step %d: %+v", seed, step, c)
			}
			n.holds(want, strict)
			s = policytest.Change(r, s)
		}
	}
}

// A process that begins anew finds the table as it is.
func TestRestart(t *testing.T) {
	n := newNode(t)
	want := policy.Compile(policytest.Cluster(rand.New(rand.NewPCG(1, 1))))
	n.apply(want, strict)
	gen := n.generation()
	n.restart()
	if c := n.apply(want, strict); n.generation() != gen {
		t.Errorf("a restart wrote: %+v", c)
	}
}
