package enforce

import (
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/policy"
)

// The kernel answers as the ruleset does.
func TestLookups(t *testing.T) {
	n := newNode(t)
	found, missed := 0, 0
	for seed := range uint64(5) {
		s := policytest.Cluster(rand.New(rand.NewPCG(seed, 7)))
		want := policy.Compile(s)
		n.apply(want, strict)
		var addrs []netip.Addr
		for _, p := range s.Pods {
			addrs = append(addrs, p.IPs...)
		}
		for _, node := range s.Nodes {
			addrs = append(addrs, node.Addrs...)
		}
		type answer struct {
			text string
			is   bool
		}
		check := func(what string, ask func(policy.Elements) (answer, error)) {
			w, err := ask(want)
			if err != nil {
				t.Fatal(err)
			}
			n.ns.Do(t, func() error {
				got, err := ask(n.table)
				if err == nil && got != w {
					t.Errorf("seed %d, %s: %v, want %v", seed, what, got, w)
				}
				return err
			})
			if w.is {
				found++
			} else {
				missed++
			}
		}
		for _, a := range addrs {
			for _, dir := range []policy.Direction{policy.Ingress, policy.Egress} {
				check("dispatch of "+a.String(), func(e policy.Elements) (answer, error) {
					chain, ok, err := e.Dispatch(dir, a)
					return answer{chain, ok}, err
				})
			}
			for name, set := range want.Sets {
				if set.IPv6 != a.Is6() {
					continue
				}
				m := policy.Member{Addr: a}
				if set.Kind == policy.Endpoints {
					m.Protocol, m.Port = policy.TCP, 8080
					if len(set.Members) > 0 {
						m = set.Members[0]
					}
				}
				check(a.String()+" in "+name, func(e policy.Elements) (answer, error) {
					ok, err := e.Has(name, m)
					return answer{is: ok}, err
				})
			}
		}
		for name, m := range want.Maps {
			for _, e := range m.Elements {
				for _, port := range []uint16{e.First - 1, e.First, e.Last, e.Last + 1} {
					check("port in "+name, func(have policy.Elements) (answer, error) {
						jump, ok, err := have.Port(name, e.Protocol, port)
						return answer{jump, ok}, err
					})
				}
			}
		}
	}
	if found < 100 || missed < 100 {
		t.Errorf("%d found and %d missed: too few to tell", found, missed)
	}
}

// What is not there is an error and no answer.
func TestLookupWithoutTable(t *testing.T) {
	n := newNode(t)
	a := netip.MustParseAddr("10.244.1.10")
	n.ns.Do(t, func() error {
		if _, _, err := n.table.Dispatch(policy.Ingress, a); err == nil {
			t.Error("an answer without a table")
		}
		if _, err := n.table.Has("s4-1", policy.Member{Addr: a}); err == nil {
			t.Error("an answer without a set")
		}
		if _, _, err := n.table.Port("pin-1", policy.TCP, 80); err == nil {
			t.Error("an answer without a map")
		}
		return nil
	})
}
