package enforce

import (
	"net/netip"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/policy"
)

// large is a ruleset of 30,000 peers, some thousand endpoints, blocks and ports.
func large() *policy.Ruleset {
	r := rules{port: 7777, peers: aAddrs, out: true}.ruleset()
	many := &policy.Set{Name: "s4-many"}
	named := &policy.Set{Name: "n6-many", Kind: policy.Endpoints, IPv6: true}
	blocks := &policy.Set{Name: "b4-many", Kind: policy.Blocks}
	for i := range 30000 {
		hi, lo := byte(i>>8), byte(i)
		many.Members = append(many.Members, policy.Member{Addr: netip.AddrFrom4([4]byte{10, 99, hi, lo})})
		if i < 3000 {
			named.Members = append(named.Members, policy.Member{Addr: netip.AddrFrom16([16]byte{0xfd, 14: hi, 15: lo}), Protocol: policy.TCP, Port: 80})
			first := netip.AddrFrom4([4]byte{11, hi, lo, 0})
			blocks.Members = append(blocks.Members, policy.Member{Addr: first, Last: first.Next().Next()})
		}
	}
	ports := &policy.PortMap{Name: "pin-many"}
	ranges := &policy.PortMap{Name: "rin-many", Ranges: true}
	for i := range uint16(3000) {
		ports.Elements = append(ports.Elements, policy.PortElement{Protocol: policy.TCP, First: i, Last: i, Jump: "gin-peers"})
		ranges.Elements = append(ranges.Elements, policy.PortElement{Protocol: policy.TCP, First: 20 * i, Last: 20*i + 10})
	}
	r.Sets[many.Name], r.Sets[named.Name], r.Sets[blocks.Name] = many, named, blocks
	r.Maps[ports.Name], r.Maps[ranges.Name] = ports, ranges
	class := &policy.Chain{Name: "cin-many", Class: true, Rules: []policy.Rule{
		{Kind: policy.PeerIn, Ref: many.Name}, {Kind: policy.PeerIn, Ref: blocks.Name}, {Kind: policy.EndpointIn, Ref: named.Name, IPv6: true},
		{Kind: policy.PortsOf, Ref: ports.Name}, {Kind: policy.RangesOf, Ref: ranges.Name, Protocol: policy.TCP},
	}}
	r.Chains[class.Name] = class
	for _, a := range webAddrs {
		r.In[a] = class.Name
	}
	return r
}

// A large table comes in pieces, is found as it is, and changes by what changes.
func TestLarge(t *testing.T) {
	n := newNode(t)
	want := large()
	changes := n.watch()
	start := time.Now()
	c := n.apply(want, strict)
	t.Logf("cold: %v, %+v, %+v", time.Since(start), c, n.table.Stats())
	if c.Programs > 2 || n.table.Stats().Elements < 42000 {
		t.Errorf("%+v", c)
	}
	if signalled(changes, time.Second) {
		t.Error("our own load was told of")
	}
	gen := n.generation()
	n.restart()
	start = time.Now()
	n.apply(want, strict)
	t.Logf("compared: %v", time.Since(start))
	if n.generation() != gen {
		t.Error("a restart wrote")
	}
	more := large()
	last := netip.MustParseAddr("10.200.0.1")
	more.Sets["s4-many"].Members = append(more.Sets["s4-many"].Members[1:], policy.Member{Addr: last})
	start = time.Now()
	c = n.apply(more, strict)
	t.Logf("one came and one went: %v, %+v", time.Since(start), c)
	if c.Programs != 0 || c.Added != 1 || c.Removed != 1 || c.Rechecked != 2 {
		t.Errorf("one came and one went: %+v", c)
	}
	n.ns.Do(t, func() error {
		for a, want := range map[netip.Addr]bool{last: true, netip.MustParseAddr("10.99.0.0"): false, netip.MustParseAddr("10.99.0.1"): true} {
			if got, err := n.table.Has("s4-many", policy.Member{Addr: a}); err != nil || got != want {
				t.Errorf("%s: %v, %v", a, got, err)
			}
		}
		return nil
	})
}

// BenchmarkApply measures one address that comes and goes in a cluster as people have them, with another table as large as
// kube-proxy's beside ours or not.
func BenchmarkApply(b *testing.B) {
	for _, size := range []struct {
		name           string
		pods, policies int
	}{{"1k pods 100 policies", 1000, 100}, {"10k pods 1k policies", 10000, 1000}} {
		b.Run(size.name, func(b *testing.B) {
			s := policytest.Large(size.pods, size.policies)
			want := policy.Compile(s)
			other := policy.Compile(s)
			var name string
			for n, set := range other.Sets {
				if set.Kind == policy.Addresses && !set.IPv6 && (name == "" || n < name) {
					name = n
				}
			}
			changed := *other.Sets[name]
			changed.Members = append(append([]policy.Member{}, changed.Members...), policy.Member{Addr: netip.MustParseAddr("223.0.0.1")})
			without := *want
			with := *want
			with.Sets = map[string]*policy.Set{}
			for n, set := range want.Sets {
				with.Sets[n] = set
			}
			with.Sets[name] = &changed
			table := New("")
			if _, err := table.Apply(b.Context(), &without, strict); err != nil {
				b.Fatal(err)
			}
			for i := 0; b.Loop(); i++ {
				next := &with
				if i%2 == 1 {
					next = &without
				}
				if c, err := table.Apply(b.Context(), next, strict); err != nil || c.Programs > 0 {
					b.Fatal(c, err)
				}
			}
			if err := table.Remove(b.Context()); err != nil {
				b.Fatal(err)
			}
		})
	}
}
