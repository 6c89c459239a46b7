package hostfirewall

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// The hosts on which FORWARD drops, by the program that made it so.
var backends = map[string][]string{
	"iptables-nft":    {"iptables-nft", "ip6tables-nft"},
	"iptables-legacy": {"iptables-legacy", "ip6tables-legacy"},
}

const wantedHead = `-A FORWARD -i hc+ -m comment --comment headcni -j ACCEPT
-A FORWARD -o hc+ -m comment --comment headcni -j ACCEPT
-A FORWARD -i headcni01 -m comment --comment headcni -j ACCEPT
-A FORWARD -o headcni01 -m comment --comment headcni -j ACCEPT
`

func TestMain(m *testing.M) { nstest.Main(m) }

func typical() Config { return Config{TunName: "headcni01"} }

// mustSync syncs inside ns and returns the changes.
func mustSync(t *testing.T, ns *nstest.NS, firewall *Firewall, cfg Config) []string {
	t.Helper()
	var changes []string
	ns.Do(t, func() (err error) {
		changes, err = firewall.Sync(t.Context(), cfg)
		return err
	})
	return changes
}

func TestAcceptsStandAtTheHead(t *testing.T) {
	t.Parallel()
	for _, programs := range backends {
		for _, program := range programs {
			t.Run(program, func(t *testing.T) {
				ns := nstest.New(t)
				run := func(script string) string {
					t.Helper()
					return ns.Run(t, "sh", "-ec", strings.ReplaceAll(script, "IPT", program))
				}
				run("IPT -P FORWARD DROP; IPT -A FORWARD -i br0 -j ACCEPT")
				firewall := New()
				mustSync(t, ns, firewall, typical())
				want := "-P FORWARD DROP\n" + wantedHead + "-A FORWARD -i br0 -j ACCEPT\n"
				if d := cmp.Diff(want, run("IPT -S FORWARD")); d != "" {
					t.Fatalf("(-want +got)\n%s", d)
				}
				for name, damage := range map[string]string{
					"flushed":                 "IPT -F FORWARD; IPT -A FORWARD -i br0 -j ACCEPT",
					"one deleted":             "IPT -D FORWARD -o hc+ -m comment --comment headcni -j ACCEPT",
					"another at the head":     "IPT -D FORWARD -i br0 -j ACCEPT; IPT -I FORWARD -i br0 -j ACCEPT",
					"one of ours too many":    "IPT -A FORWARD -i tun9 -m comment --comment headcni -j ACCEPT",
					"ours made to drop":       "IPT -R FORWARD 1 -i hc+ -m comment --comment headcni -j DROP",
					"narrowed by a protocol":  "IPT -R FORWARD 2 -o hc+ -p tcp -m comment --comment headcni -j ACCEPT",
					"widened to every source": "IPT -R FORWARD 1 -m comment --comment headcni -j ACCEPT",
				} {
					run(damage)
					if got := mustSync(t, ns, firewall, typical()); len(got) == 0 {
						t.Errorf("%s: no change reported", name)
					}
					if d := cmp.Diff(want, run("IPT -S FORWARD")); d != "" {
						t.Errorf("%s: not repaired (-want +got)\n%s", name, d)
					}
					if got := mustSync(t, ns, firewall, typical()); len(got) != 0 {
						t.Errorf("%s: not steady: %q", name, got)
					}
				}
				saved := filepath.Join(t.TempDir(), "saved")
				// A save and restore, as of a firewall script, changes how nft sees the rules, and not what they do.
				run("IPT-save > " + saved + "; IPT-restore < " + saved)
				if got := mustSync(t, ns, firewall, typical()); len(got) != 0 {
					t.Errorf("after save and restore: %q", got)
				}
				other := typical()
				other.TunName = "tailscale0"
				mustSync(t, ns, firewall, other)
				if out := run("IPT -S FORWARD"); strings.Contains(out, "headcni01") || !strings.Contains(out, "-i tailscale0") {
					t.Errorf("after another tun:\n%s", out)
				}
				run("IPT -P FORWARD ACCEPT; IPT -D FORWARD -i br0 -j ACCEPT")
				mustSync(t, ns, firewall, typical())
				if out := run("IPT -S FORWARD"); out != "-P FORWARD ACCEPT\n" {
					t.Errorf("nothing drops any more:\n%s", out)
				}
			})
		}
	}
}

func TestForeignDrops(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "iptables-nft", "-P", "FORWARD", "DROP")
	mustSync(t, ns, New(), typical())
	ns.Run(t, "nft", `
		table ip headcni { chain ours { type filter hook forward priority 3; policy drop; }
		}
		table inet firewalld {
			chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept;
				ct state established accept; iifname "lo" accept; log prefix "x" reject with icmpx admin-prohibited; }
			chain filter_INPUT { type filter hook input priority filter; policy drop; }
			chain other { drop; }
		}
		table ip6 strict { chain pass { type filter hook forward priority 5; policy drop; }
		}
		table ip fine { chain pass { type filter hook forward priority 5; policy accept; ip saddr 192.0.2.9 drop; }
		}
		table inet allows {
			chain zones { iifname "hc*" counter accept; }
			chain pass { type filter hook forward priority 7; policy accept; jump zones; drop; }
		}
		table ip late { chain pass { type filter hook forward priority 6; policy accept; counter drop; }
		}`)
	firewall := New()
	look := func(want ...string) {
		t.Helper()
		for range 2 { // the second finds that nothing has changed
			ns.Do(t, func() error {
				got, err := firewall.ForeignDrops()
				if d := cmp.Diff(want, got); d != "" {
					t.Error(d)
				}
				return err
			})
		}
	}
	const firewalld, late = "chain inet firewalld filter_FORWARD ends with a rule that drops the rest", "chain ip late pass ends with a rule that drops the rest"
	look(firewalld, late, "chain ip6 strict pass has the policy drop")
	ns.Run(t, "nft", "delete table ip6 strict")
	look(firewalld, late)
	ns.Run(t, "nft", "delete table inet firewalld; delete table ip late")
	look()
}

func TestNoLegacyTableIsMade(t *testing.T) {
	ns := nstest.New(t)
	mustSync(t, ns, New(), typical())
	if out := ns.Run(t, "sh", "-c", "cat /proc/net/ip_tables_names /proc/net/ip6_tables_names"); out != "" {
		t.Errorf("legacy tables: %q", out)
	}
}

// state is all tables of the host, without making legacy ones.
func state(t *testing.T, ns *nstest.NS) string {
	t.Helper()
	out := ns.Run(t, "nft", "list", "ruleset")
	for _, f := range legacyFamilies {
		if strings.Contains(ns.Run(t, "cat", strings.Replace(f.tables, "thread-self", "self", 1)), filterTable) {
			out += ns.Run(t, f.program, "-S")
		}
	}
	return out
}

func TestRemoveLeavesTheHostAsItWas(t *testing.T) {
	for name, setUp := range map[string]string{
		"Docker with iptables-nft": "iptables-nft -P FORWARD DROP; iptables-nft -A FORWARD -i docker0 -j ACCEPT; " +
			"ip6tables-nft -A FORWARD -i docker0 -j ACCEPT",
		"Docker with iptables-legacy": "iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -i docker0 -j ACCEPT; " +
			"ip6tables-legacy -P FORWARD DROP",
	} {
		t.Run(name, func(t *testing.T) {
			ns := nstest.New(t)
			ns.Run(t, "sh", "-c", setUp)
			before := state(t, ns)
			firewall := New()
			mustSync(t, ns, firewall, typical())
			if state(t, ns) == before {
				t.Fatal("sync did nothing")
			}
			for range 2 {
				ns.Do(t, func() error { return firewall.Remove(t.Context()) })
				if d := cmp.Diff(before, state(t, ns)); d != "" {
					t.Errorf("not as before (-before +after):\n%s", d)
				}
			}
			if got := mustSync(t, ns, firewall, typical()); len(got) == 0 {
				t.Error("a sync after the removal did nothing")
			}
		})
	}
}

func TestChangesAreSeenWithinASecond(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "iptables-nft", "-P", "FORWARD", "DROP")
	firewall := New()
	mustSync(t, ns, firewall, typical())
	ctx, cancel := context.WithCancel(t.Context())
	var signals <-chan struct{}
	ns.Do(t, func() (err error) { signals, err = firewall.Changes(ctx); return })
	seen := func(wait time.Duration) bool {
		select {
		case _, ok := <-signals:
			return ok
		case <-time.After(wait):
			return false
		}
	}
	for _, c := range []string{
		"flush ruleset", "add rule ip filter FORWARD drop", "delete chain ip filter FORWARD",
		"add chain inet firewalld f { type filter hook forward priority 0 ; policy drop ; }",
	} {
		ns.Run(t, "nft", "add table ip filter; add chain ip filter FORWARD; add table inet firewalld")
		for seen(200 * time.Millisecond) {
		}
		ns.Run(t, "nft", c)
		if !seen(time.Second) {
			t.Errorf("%s: not seen", c)
		}
		for seen(200 * time.Millisecond) {
		}
	}
	ns.Run(t, "nft", "add table ip filter; add chain ip filter OTHER; add rule ip filter OTHER accept; add table ip kube-proxy; add table ip headcni; add chain ip headcni tunnel { type filter hook forward priority 0 ; }")
	if seen(300 * time.Millisecond) {
		t.Error("a change that is not ours woke us")
	}
	cancel()
	if _, ok := <-signals; ok {
		t.Error("a signal after the end")
	}
}

func TestMissingProgramsAreNamed(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "iptables-legacy", "-P", "FORWARD", "DROP")
	ns.Run(t, "iptables-nft", "-P", "FORWARD", "DROP")
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	t.Setenv("PATH", bin)
	sync := func(firewall *Firewall) (err error) {
		ns.Do(t, func() error { _, err = firewall.Sync(t.Context(), typical()); return nil })
		return err
	}
	firewall := New()
	err = sync(firewall)
	for _, want := range []string{"install the package nftables", "install the package iptables"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
	// Installed in the meantime: the next try finds it, and says only what is still missing.
	if err := os.Symlink(nft, filepath.Join(bin, "nft")); err != nil {
		t.Fatal(err)
	}
	err = sync(firewall)
	if err == nil || strings.Contains(err.Error(), "nftables") || !strings.Contains(err.Error(), "install the package iptables") {
		t.Errorf("error %v", err)
	}
	ns.Do(t, func() error {
		have, err := readForward(families[0])
		if len(have.rules) != len(acceptRules(typical().TunName)) {
			t.Errorf("for want of iptables-legacy that of nft has %v", have)
		}
		return err
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
