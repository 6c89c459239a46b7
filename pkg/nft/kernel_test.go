package nft

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/golden"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
)

// mustSync syncs inside ns and returns the changes.
func mustSync(t testing.TB, ns *nstest.NS, tables *Tables, cfg Config) []string {
	t.Helper()
	var changes []string
	ns.Do(t, func() (err error) {
		changes, err = tables.Sync(t.Context(), cfg)
		return err
	})
	return changes
}

func ruleset(t *testing.T, ns *nstest.NS) string {
	t.Helper()
	return ns.Run(t, "nft", "list", "ruleset")
}

func TestKernelHoldsTheGoldenRules(t *testing.T) {
	ns := nstest.New(t)
	mustSync(t, ns, New(), typical())
	// nft 1.1 (Debian 13) lists some of them in other words than 1.0 (Debian 12).
	words := strings.NewReplacer("icmp code 0 ", "icmp code net-unreachable ", "icmpv6 code 0 ", "icmpv6 code no-route ", "output priority dstnat + 1;", "output priority -99;")
	golden.Check(t, "testdata/ruleset.golden", words.Replace(ruleset(t, ns)))
}

func TestSteadyStateWritesNothing(t *testing.T) {
	ns := nstest.New(t)
	tables := New()
	if got := mustSync(t, ns, tables, typical()); len(got) == 0 {
		t.Fatal("the first sync reports no change")
	}
	gen := func() (g uint32) {
		ns.Do(t, func() (err error) { g, err = nfnl.Generation(); return })
		return g
	}
	before := gen()
	for range 3 {
		if got := mustSync(t, ns, tables, typical()); len(got) != 0 {
			t.Errorf("steady state changes %q", got)
		}
	}
	// Another's change makes it look closer, and still write nothing.
	ns.Run(t, "nft", "add table inet other")
	if got := mustSync(t, ns, tables, typical()); len(got) != 0 {
		t.Errorf("after another's change: %q", got)
	}
	if now := gen(); now != before+1 {
		t.Errorf("generation %d, want %d: somebody wrote", now, before+1)
	}
	// A new process writes once and finds that nothing is different.
	if got := mustSync(t, ns, New(), typical()); len(got) != 0 {
		t.Errorf("a restarted daemon reports %q", got)
	}
}

func TestConfigurationChange(t *testing.T) {
	ns, fresh := nstest.New(t), nstest.New(t)
	other := typical()
	other.Own = prefixes("10.244.7.0/24")
	other.Cluster = prefixes("10.244.0.0/16")
	other.TunName = "tailscale0"
	other.TailnetEgress = config.EgressDeny
	other.HostMode = false
	tables := New()
	mustSync(t, ns, tables, typical())
	if got := mustSync(t, ns, tables, other); len(got) == 0 {
		t.Error("no change reported")
	}
	mustSync(t, fresh, New(), other)
	if d := cmp.Diff(ruleset(t, fresh), ruleset(t, ns)); d != "" {
		t.Errorf("the earlier configuration left something (-fresh +changed):\n%s", d)
	}
}

// Each kind of damage that a person or a program can do to our tables is seen and repaired.
func TestDamage(t *testing.T) {
	t.Parallel()
	damages := map[string]string{
		"flush all":             "flush ruleset",
		"delete v4 table":       "delete table ip headcni",
		"delete v6 table":       "delete table ip6 headcni",
		"flush table":           "flush table ip headcni",
		"flush chain":           "flush chain ip6 headcni guard",
		"delete chain":          "flush chain ip headcni guard; delete chain ip headcni guard",
		"delete rule":           "delete rule ip headcni guard handle $guard",
		"replace rule":          `replace rule ip headcni guard handle $guard oifname "nothing" drop`,
		"add rule at end":       "add rule ip6 headcni postrouting accept",
		"insert rule":           "insert rule ip headcni guard accept",
		"swap rules":            `delete rule ip headcni guard handle $guard; add rule ip headcni guard oifname "headcni01" meta mark & 0x00ff0000 == 0x00080000 drop`,
		"delete element":        "delete element ip headcni cluster { 10.244.0.0/16 }",
		"add element":           "add element ip headcni keepsrc { 64.0.0.0/2 }",
		"change element":        "delete element ip6 headcni own { fd00:244:1::/64 }; add element ip6 headcni own { fd00:244:2::/64 }",
		"flush set":             "flush set ip6 headcni cluster",
		"chain policy":          "chain ip headcni guard { policy drop ; }",
		"dormant table":         "add table ip headcni { flags dormant ; }",
		"foreign chain":         "add chain ip headcni mine { type filter hook input priority 0 ; }",
		"foreign set":           "add set ip headcni mine { type ipv4_addr ; }",
		"foreign counter":       "add counter ip headcni mine",
		"chain on another hook": "flush chain ip headcni guard; delete chain ip headcni guard; add chain ip headcni guard { type filter hook output priority 0 ; }",
		"chain of other prio":   "flush chain ip headcni guard; delete chain ip headcni guard; add chain ip headcni guard { type filter hook postrouting priority 300 ; }",
		"chain without hook":    "flush chain ip headcni guard; delete chain ip headcni guard; add chain ip headcni guard",
		"set of another kind":   "delete table ip headcni; add table ip headcni; add set ip headcni own { type ipv4_addr ; }",
		"set of another type":   "delete table ip6 headcni; add table ip6 headcni; add set ip6 headcni own { type inet_service ; flags interval ; }",
	}
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			ns := nstest.New(t)
			tables := New()
			mustSync(t, ns, tables, typical())
			want := ordered(ruleset(t, ns))
			if strings.Contains(damage, "$guard") {
				damage = strings.ReplaceAll(damage, "$guard", firstHandle(t, ns, "guard"))
			}
			ns.Run(t, "nft", damage)
			if ordered(ruleset(t, ns)) == want {
				t.Fatal("the damage did nothing")
			}
			changes := mustSync(t, ns, tables, typical())
			t.Logf("changes: %q", changes)
			if len(changes) == 0 {
				t.Error("no change reported")
			}
			if d := cmp.Diff(want, ordered(ruleset(t, ns))); d != "" {
				t.Errorf("not repaired (-want +got):\n%s", d)
			}
			if again := mustSync(t, ns, tables, typical()); len(again) != 0 {
				t.Errorf("not steady: %q", again)
			}
		})
	}
}

// ordered sorts the chains and sets of a listing: a chain that was made again stands last, which means nothing.
func ordered(ruleset string) string {
	var tables []string
	for t := range strings.SplitSeq(ruleset, "\n}\n") {
		head, body, _ := strings.Cut(t, "{\n")
		objects := strings.Split(strings.TrimSuffix(body, "\n"), "\n\n")
		slices.Sort(objects)
		tables = append(tables, head+strings.Join(objects, "\n"))
	}
	slices.Sort(tables)
	return strings.Join(tables, "\n")
}

// firstHandle returns the handle of the first rule of a chain of ours.
func firstHandle(t *testing.T, ns *nstest.NS, chain string) string {
	t.Helper()
	for line := range strings.Lines(ns.Run(t, "nft", "-a", "list", "chain", "ip", "headcni", chain)) {
		_, handle, ok := strings.Cut(line, "# handle ")
		if ok && strings.Contains(line, "drop") {
			return strings.TrimSpace(handle)
		}
	}
	t.Fatal("no rule")
	return ""
}

// The chains of an earlier release go in the transaction that brings ours, and the table stays: its dynamic sets and counters are not lost.
func TestEarlierChainsGoAlone(t *testing.T) {
	ns := nstest.New(t)
	mustSync(t, ns, New(), typical())
	want := ordered(ruleset(t, ns))
	handle := func() string {
		t.Helper()
		head, _, _ := strings.Cut(ns.Run(t, "nft", "-a", "list", "table", "ip", "headcni"), "\n")
		return head
	}
	before := handle()
	ns.Run(t, "nft", `add chain ip headcni sizes; add rule ip headcni sizes accept
		add chain ip headcni clamp { type filter hook forward priority -150 ; }; add rule ip headcni clamp jump sizes
		add chain ip headcni a; add rule ip headcni a goto sizes; insert rule ip headcni guard jump a`)
	mustSync(t, ns, New(), typical())
	if d := cmp.Diff(want, ordered(ruleset(t, ns))); d != "" {
		t.Errorf("not as without (-want +got):\n%s", d)
	}
	if after := handle(); after != before || !strings.Contains(before, "# handle ") {
		t.Errorf("the table was made anew: %q, then %q", before, after)
	}
}

func TestWithIPv6Disabled(t *testing.T) {
	ns := nstest.New(t)
	ns.Do(t, func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0) })
	mustSync(t, ns, New(), typical())
	if out := ns.Run(t, "nft", "list", "tables"); out != "table ip headcni\ntable ip6 headcni\n" {
		t.Errorf("tables: %s", out)
	}
}

func TestRemoveLeavesTheHostAsItWas(t *testing.T) {
	for name, setUp := range map[string]string{
		"empty host":   "true",
		"other tables": `nft add table ip other; nft add table ip6 headcni2; nft 'add chain ip other c { type filter hook forward priority 0 ; policy drop ; }'`,
	} {
		t.Run(name, func(t *testing.T) {
			ns := nstest.New(t)
			ns.Run(t, "sh", "-c", setUp)
			before := ruleset(t, ns)
			tables := New()
			mustSync(t, ns, tables, typical())
			if ruleset(t, ns) == before {
				t.Fatal("sync did nothing")
			}
			for range 2 {
				ns.Do(t, func() error { return tables.Remove(t.Context()) })
				if d := cmp.Diff(before, ruleset(t, ns)); d != "" {
					t.Errorf("not as before (-before +after):\n%s", d)
				}
			}
			if got := mustSync(t, ns, tables, typical()); len(got) == 0 {
				t.Error("a sync after the removal did nothing")
			}
		})
	}
}

func TestChangesAreSeenWithinASecond(t *testing.T) {
	ns := nstest.New(t)
	tables := New()
	mustSync(t, ns, tables, typical())
	ctx, cancel := context.WithCancel(t.Context())
	var signals <-chan struct{}
	ns.Do(t, func() (err error) { signals, err = tables.Changes(ctx); return })
	seen := func(wait time.Duration) bool {
		select {
		case _, ok := <-signals:
			return ok
		case <-time.After(wait):
			return false
		}
	}
	for _, c := range []string{
		"flush ruleset", "add table ip headcni", "add set ip6 headcni own { type ipv6_addr ; flags interval ; }",
		"add element ip6 headcni own { fd00::/64 }", "delete table ip headcni",
	} {
		ns.Run(t, "nft", "add table ip6 headcni")
		for seen(200 * time.Millisecond) {
		}
		ns.Run(t, "nft", c)
		if !seen(time.Second) {
			t.Errorf("%s: not seen", c)
		}
		for seen(200 * time.Millisecond) {
		}
	}
	ns.Run(t, "nft", "add table ip filter; add chain ip filter FORWARD; add rule ip filter FORWARD accept; add table ip kube-proxy")
	if seen(300 * time.Millisecond) {
		t.Error("a change that is not ours woke us")
	}
	cancel()
	if _, ok := <-signals; ok {
		t.Error("a signal after the end")
	}
}

func TestMissingProgramIsNamed(t *testing.T) {
	ns := nstest.New(t)
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	t.Setenv("PATH", bin)
	tables := New()
	ns.Do(t, func() error { _, err = tables.Sync(t.Context(), typical()); return nil })
	if err == nil || !strings.Contains(err.Error(), "install the package nftables") {
		t.Errorf("error %v", err)
	}
	// Installed in the meantime: the next try finds it.
	if err := os.Symlink(nft, filepath.Join(bin, "nft")); err != nil {
		t.Fatal(err)
	}
	mustSync(t, ns, tables, typical())
	ns.Do(t, func() error {
		for _, f := range families {
			if l, err := list(f); err != nil || len(l) == 0 {
				t.Errorf("table %s was not made (%v)", f, err)
			}
		}
		return nil
	})
}

func TestWithoutPermission(t *testing.T) {
	ns := nstest.New(t)
	ns.Do(t, func() error {
		// The thread ends with the test, and with it the loss.
		var none [2]unix.CapUserData
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
			return err
		}
		for name, try := range map[string]func() error{
			"sync":    func() error { _, err := New().Sync(t.Context(), typical()); return err },
			"remove":  func() error { return New().Remove(t.Context()) },
			"changes": func() error { _, err := New().Changes(t.Context()); return err },
		} {
			if err := try(); err == nil || !strings.Contains(err.Error(), "run as root or with CAP_NET_ADMIN") {
				t.Errorf("%s: error %v", name, err)
			}
		}
		return nil
	})
}

// TestTableIsGone: somebody flushes the ruleset between two requests of a Sync. That is no error: the flush itself brings the next Sync.
func TestTableIsGone(t *testing.T) {
	ns := nstest.New(t)
	cfg := typical()
	cfg.Members = []netip.Addr{netip.MustParseAddr("100.64.0.9")}
	tables := New()
	ns.Do(t, func() error { return tables.writeMembers(cfg.Members) })
	if len(mustSync(t, ns, tables, cfg)) == 0 || !strings.Contains(ruleset(t, ns), "100.64.0.9") {
		t.Errorf("the next Sync leaves\n%s", ruleset(t, ns))
	}
}
