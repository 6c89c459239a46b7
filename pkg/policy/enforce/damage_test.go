package enforce

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/policy"
)

// words are those of nft's listing, in no order: the kernel's is that of creation.
func (n *node) words() []string {
	n.Helper()
	list := strings.FieldsFunc(n.ns.Run(n, "nft", "list", "table", "inet", policy.Table), func(r rune) bool { return strings.ContainsRune(" \t\n,;", r) })
	slices.Sort(list)
	return list
}

// watch returns the channel of Changes, which ends with the test.
func (n *node) watch() <-chan struct{} {
	n.Helper()
	ctx, cancel := context.WithCancel(n.Context())
	n.Cleanup(cancel)
	var changes <-chan struct{}
	n.ns.Do(n, func() (err error) {
		changes, err = n.table.Changes(ctx)
		return err
	})
	return changes
}

func signalled(changes <-chan struct{}, within time.Duration) bool {
	select {
	case <-changes:
		return true
	case <-time.After(within):
		return false
	}
}

// Whatever somebody does to the table is told of and put right.
func TestDamage(t *testing.T) {
	base := rules{port: 7777, peers: aAddrs, out: true}
	want := base.ruleset()
	for _, damage := range []string{
		"nft delete table inet T",
		"nft flush ruleset",
		"nft delete element inet T in4 { 10.244.1.10 }",
		"nft add element inet T in4 { 10.9.9.9 : goto cin-7777 }",
		"nft delete element inet T in4 { 10.244.1.10 }; nft add element inet T in4 { 10.244.1.10 : accept }",
		"nft delete element inet T s4-peers { 10.244.1.11 }",
		"nft add element inet T s4-peers { 10.244.1.12 }",
		"nft add element inet T pin-7777 { tcp . 80 : accept }",
		"nft flush map inet T in6; nft flush set inet T isolated6",
		"nft add element inet T recheck4 { 10.9.9.9 }; nft flush map inet T out6",
		"nft flush chain inet T deny-in",
		"nft flush chain inet T cin-7777",
		"nft flush table inet T",
		"nft insert rule inet T egress accept",
		"nft add rule inet T gin-peers accept",
		"nft replace rule inet T ingress handle $(nft -a list chain inet T ingress | sed -n 's/.*elsewhere.*# handle//p; s/.*vmap @in4 # handle //p') accept",
		"nft delete rule inet T deny-out handle $(nft -a list chain inet T deny-out | sed -n 's/.*drop # handle //p')",
		"nft add chain inet T foreign; nft add rule inet T foreign accept; nft insert rule inet T ingress jump foreign",
		"nft add chain inet T foreign '{ type filter hook forward priority -300; policy drop; }'",
		"nft add set inet T foreign '{ type ipv4_addr; flags interval; elements = { 10.0.0.0/8 }; }'; nft insert rule inet T ingress ip saddr @foreign accept",
		"nft add map inet T foreign '{ type ipv4_addr : verdict; elements = { 10.0.0.1 : jump deny-in }; }'",
		"nft add counter inet T foreign; nft add quota inet T foreign2 over 1 mbytes",
		"nft add table inet T '{ flags dormant; }'",
		"nft chain inet T egress '{ policy drop; }'",
		"nft flush chain inet T ingress; nft delete chain inet T ingress",
		"nft flush chain inet T ingress; nft delete chain inet T ingress; nft add chain inet T ingress '{ type filter hook forward priority 9; }'",
		"nft flush table inet T; nft delete set inet T recheck4; nft add set inet T recheck4 '{ type inet_service; }'",
		"nft flush table inet T; nft delete counter inet T unknown; nft add quota inet T unknown over 1 mbytes",
	} {
		t.Run(damage, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.table.keep = 0 // what is foreign goes at once
			changes := n.watch()
			n.apply(want, strict)
			before := n.words()
			if signalled(changes, 300*time.Millisecond) {
				t.Error("our own write was told of")
			}
			n.ns.Run(t, "sh", "-ec", strings.ReplaceAll(damage, "inet T", "inet "+policy.Table))
			if !signalled(changes, 10*time.Second) {
				t.Error("it was not told of")
			}
			c := n.apply(want, strict)
			harmless := c.Deleted > 0 && c.Repaired == nil
			if !harmless && (len(c.Repaired) == 0 && !c.Cold || c.Rechecked != len(webAddrs)) {
				t.Errorf("repaired %+v", c)
			}
			n.holds(want, strict)
			if after := n.words(); !slices.Equal(before, after) {
				t.Errorf("nft lists\n%q, want\n%q", after, before)
			}
			gen := n.generation()
			n.restart()
			n.apply(want, strict)
			if n.generation() != gen {
				t.Error("a restart after the repair wrote")
			}
		})
	}
}

// Every set and map of random clusters, flushed or with an element of somebody else's.
func TestDamagedSets(t *testing.T) {
	n := newNode(t)
	kinds := map[string]bool{}
	for seed := range uint64(4) {
		want := policy.Compile(policytest.Cluster(rand.New(rand.NewPCG(seed, 3))))
		n.table.Doubt()
		n.apply(want, strict)
		before := n.words()
		all := kindsOf(want)
		for _, name := range sortedKeys(all) {
			k := all[name]
			if k.counts || isRecheck(name) {
				continue
			}
			what := "set"
			element := map[string]string{
				"ipv4_addr": "198.18.1.1", "ipv6_addr": "2001:db8:99::1", "ipv4_addr . ipv4_addr": "198.18.1.1 . 198.18.1.1",
				"ipv6_addr . ipv6_addr": "2001:db8:99::1 . 2001:db8:99::1", "ipv4_addr . inet_proto . inet_service": "198.18.1.1 . tcp . 1",
				"ipv6_addr . inet_proto . inet_service": "2001:db8:99::1 . tcp . 1", "ipv4_addr : verdict": "198.18.1.1 : goto deny-in",
				"ipv6_addr : verdict": "2001:db8:99::1 : goto deny-in", "inet_proto . inet_service : verdict": "udp . 1 : accept",
				"inet_service : verdict": "1-2 : accept", "ct_state : verdict": "new : accept",
			}[k.typeText()]
			if k.verdict {
				what = "map"
			}
			kinds[fmt.Sprint(k.typeText(), k.interval)] = true
			flush := fmt.Sprintf("nft flush %s inet %s %s", what, policy.Table, name)
			add := fmt.Sprintf("nft add element inet %s %s '{ %s }'", policy.Table, name, element)
			for i, damage := range []string{flush, flush + "; " + add} {
				n.ns.Run(t, "sh", "-ec", damage)
				n.table.Doubt()
				c := n.apply(want, strict)
				if len(c.Repaired) > 1 || i > 0 && len(c.Repaired) == 0 {
					t.Errorf("%s: %+v", damage, c)
				}
				if after := n.words(); !slices.Equal(before, after) {
					t.Fatalf("%s: %+v: nft lists\n%q, want\n%q", damage, c, after, before)
				}
			}
		}
	}
	if len(kinds) < 11 {
		t.Errorf("these kinds of sets alone were there: %v", sortedKeys(kinds))
	}
}

// Writes of ours and others' writes to other tables are told of by nobody, however they mix.
func TestOwnWritesWakeNobody(t *testing.T) {
	n := newNode(t)
	changes := n.watch()
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_ = n.ns.Command("nft", "add table ip other; delete table ip other").Run() // only to be in the way
			}
		}
	}()
	base := rules{port: 7777, peers: aAddrs, out: true}
	for i := range 30 {
		r := base
		r.tag = fmt.Sprint(i % 3)
		if i%2 == 0 {
			r.peers = append(r.peers, bAddrs...)
		}
		n.apply(r.ruleset(), strict)
	}
	close(stop)
	<-done
	if signalled(changes, 300*time.Millisecond) {
		t.Error("our own writes were told of")
	}
	n.ns.Run(t, "nft", "flush", "set", "inet", policy.Table, "isolated4")
	if !signalled(changes, 10*time.Second) {
		t.Error("a foreign write was not told of")
	}
}

// What happened before somebody watches is looked at too.
func TestWatchedLate(t *testing.T) {
	n := newNode(t)
	want := rules{port: 7777, peers: aAddrs, out: true}.ruleset()
	n.apply(want, strict)
	n.ns.Run(t, "nft", "flush", "set", "inet", policy.Table, "isolated4")
	if !signalled(n.watch(), time.Second) {
		t.Error("no signal")
	}
	if c := n.apply(want, strict); len(c.Repaired) != 1 {
		t.Errorf("repaired %+v", c)
	}
}

// Without what another process noted about its rules they are written anew, once.
func TestDigestsLost(t *testing.T) {
	n := newNode(t)
	want := rules{port: 7777, peers: aAddrs, out: true}.ruleset()
	n.apply(want, strict)
	before := n.words()
	for what, spoil := range map[string]func() error{
		"no file":     func() error { return os.Remove(n.file) },
		"a torn file": func() error { return os.WriteFile(n.file, []byte(`{"egress":{"Te`), 0o600) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		n.restart()
		if c := n.apply(want, strict); len(c.Repaired) == 0 {
			t.Errorf("%s: rules were taken for ours: %+v", what, c)
		}
		n.holds(want, strict)
		if after := n.words(); !slices.Equal(before, after) {
			t.Errorf("%s: nft lists\n%q, want\n%q", what, after, before)
		}
		gen := n.generation()
		n.restart()
		if n.apply(want, strict); n.generation() != gen {
			t.Errorf("%s: the second restart wrote", what)
		}
	}
}
