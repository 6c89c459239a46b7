package enforce

import (
	"fmt"
	"slices"
	"testing"

	"github.com/headcni/headcni/pkg/policy"
)

// The class of a pod that has ended is there for the next one, by elements alone, with its sets as they are then. It goes in the end.
func TestSpare(t *testing.T) {
	n := newNode(t)
	one := rules{port: 7777, peers: aAddrs}
	n.apply(one.ruleset(), strict)
	before := n.words()
	n.apply(rulesetOfNobody(), strict)
	if _, isolated, err := n.dispatch(policy.Ingress); isolated || err != nil {
		t.Errorf("isolated %v, %v", isolated, err)
	}
	if c := n.apply(one.ruleset(), strict); c.Programs != 0 || c.Sets+c.Chains+c.Deleted != 0 {
		t.Errorf("back again: %+v", c)
	}
	n.holds(one.ruleset(), strict)
	if after := n.words(); !slices.Equal(before, after) {
		t.Errorf("nft lists\n%q, want\n%q", after, before)
	}

	n.apply(rulesetOfNobody(), strict)
	other := one
	other.peers = bAddrs
	if c := n.apply(other.ruleset(), strict); c.Programs != 0 || c.Removed < 2 {
		t.Errorf("back with other peers: %+v", c)
	}
	n.holds(other.ruleset(), strict)

	// Another process keeps them too, and does not know what they hold.
	n.apply(rulesetOfNobody(), strict)
	gen := n.generation()
	n.restart()
	n.apply(rulesetOfNobody(), strict)
	if n.generation() != gen {
		t.Error("a restart wrote")
	}
	if c := n.apply(one.ruleset(), strict); c.Programs != 0 || c.Repaired != nil {
		t.Errorf("back again after a restart: %+v", c)
	}
	n.holds(one.ruleset(), strict)

	for i := range maxSpare {
		r := one
		r.tag = fmt.Sprint(i)
		n.apply(r.ruleset(), strict)
	}
	if all := len(n.observed().chains) + len(n.observed().sets); all > maxSpare+30 {
		t.Errorf("%d objects are there", all)
	}
	n.table.keep = 0
	n.apply(one.ruleset(), strict)
	if after := n.words(); !slices.Equal(before, after) {
		t.Errorf("in the end nft lists\n%q, want\n%q", after, before)
	}
}

func (n *node) dispatch(dir policy.Direction) (chain string, isolated bool, err error) {
	n.Helper()
	n.ns.Do(n, func() error {
		chain, isolated, err = n.table.Dispatch(dir, webAddrs[0])
		return nil
	})
	return chain, isolated, err
}

func (n *node) observed() (o *observed) {
	n.Helper()
	n.ns.Do(n, func() (err error) {
		o, err = observe()
		return err
	})
	return o
}
