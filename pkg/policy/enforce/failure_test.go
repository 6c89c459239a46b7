package enforce

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfcmd"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/policy"
)

// loopEnv has the test's binary apply changes for ever, in the namespace that it is in. Its value is the seed and the file of a Table.
const loopEnv = "HEADCNI_ENFORCE_LOOP"

func TestMain(m *testing.M) {
	if loop := os.Getenv(loopEnv); loop != "" {
		if err := applyLoop(loop); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	nstest.Main(m)
}

func applyLoop(arg string) error {
	seed, file, _ := strings.Cut(arg, ":")
	t := New(file)
	fmt.Println("started")
	for i := 0; ; i++ {
		var n uint64
		_, _ = fmt.Sscan(seed, &n) // the test has written it
		if _, err := t.Apply(context.Background(), killRules(n, i), policy.Options{Strict: true, Log: i%4 == 0}); err != nil {
			return err
		}
	}
}

// killRules always isolate web, and change all else.
func killRules(seed uint64, i int) *policy.Ruleset {
	r := rand.New(rand.NewPCG(seed, uint64(i)))
	rules := rules{port: 7777, tag: fmt.Sprint(r.IntN(4)), out: r.IntN(2) == 0}
	for j := range r.IntN(3000) {
		rules.peers = append(rules.peers, netip.AddrFrom4([4]byte{10, 245, byte(j >> 8), byte(j)}))
	}
	return rules.ruleset()
}

// A process that is killed at any moment leaves a table in which web stays isolated, once it was, and that the next one puts right.
func TestKilled(t *testing.T) {
	nstest.Require(t)
	file := filepath.Join(t.TempDir(), "chains.json")
	table := New(file)
	t.Cleanup(func() { _ = table.Remove(context.Background()) }) // the namespace ends with the process
	r := rand.New(rand.NewPCG(5, 5))
	partial := 0
	for round := range uint64(40) {
		if round%5 == 0 {
			if err := table.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		cmd := nstest.StartSelf(t, fmt.Sprintf("%s=%d:%s", loopEnv, round, file))
		time.Sleep(time.Duration(r.IntN(80)) * time.Millisecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Fatalf("it ended by itself: %v", err)
		}
		// A nft that it ran may still write. It is ours now: the test is process 1 of its namespace.
		for err := error(nil); !errors.Is(err, unix.ECHILD); {
			_, err = unix.Wait4(-1, nil, 0, nil)
		}
		if _, hooked := mustObserve(t).chains["ingress"]; hooked {
			if _, isolated, err := table.Dispatch(policy.Ingress, webAddrs[0]); err != nil || !isolated {
				t.Errorf("round %d: base chains are there, and web is not isolated: %v", round, err)
			}
		}
		want := killRules(99, int(round))
		next := New(file)
		c, err := next.Apply(t.Context(), want, strict)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if !c.Cold && len(c.Repaired) > 0 {
			partial++
		}
		if p := mustObserve(t).plan(&held{rules: want, opt: strict, isolated: isolated(want), doubt: len(next.recheck) > 0}, next.digests); !p.empty() {
			t.Errorf("round %d: the kernel does not hold what is wanted: %+v, %+v; changed %+v", round, p.change, p.drop, c)
		}
	}
	if partial < 10 {
		t.Errorf("only %d of 40 were killed half-way: too few to tell", partial)
	}
}

func mustObserve(t *testing.T) *observed {
	t.Helper()
	o, err := observe()
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// Without nft elements still change; what needs it fails with words, and leaves in force what was.
func TestWithoutNft(t *testing.T) {
	n := newNode(t)
	base := rules{port: 7777, peers: aAddrs}
	path := os.Getenv("PATH")
	hide := func() { t.Setenv("PATH", t.TempDir()) }
	fails := func(want *policy.Ruleset) {
		t.Helper()
		n.ns.Do(t, func() error {
			_, err := n.table.Apply(t.Context(), want, strict)
			if err == nil || !strings.Contains(err.Error(), "install the package nftables") {
				t.Errorf("error %v", err)
			}
			return nil
		})
	}
	hide()
	fails(base.ruleset())
	t.Setenv("PATH", path)
	n.apply(base.ruleset(), strict)
	hide()
	wider := base
	wider.peers = append(append([]netip.Addr{}, aAddrs...), bAddrs...)
	n.table.nft = nfcmd.NFT{Modules: modules} // it is looked for again
	if c := n.apply(wider.ruleset(), strict); c.Programs != 0 || c.Added != 2 {
		t.Errorf("elements alone: %+v", c)
	}
	other := wider
	other.port = 7778
	fails(other.ruleset())
	n.holds(wider.ruleset(), strict)
	t.Setenv("PATH", path)
	n.apply(other.ruleset(), strict)
	n.holds(other.ruleset(), strict)
}

func TestWithoutPermission(t *testing.T) {
	n := newNode(t)
	want := rules{port: 7777, peers: aAddrs}.ruleset()
	n.apply(want, strict)
	n.ns.Do(t, func() error {
		// The thread ends with the test, and with it the loss.
		var none [2]unix.CapUserData
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
			return err
		}
		fresh := New("")
		for what, try := range map[string]func() error{
			"apply":          func() error { _, err := fresh.Apply(t.Context(), want, strict); return err },
			"apply elements": func() error { _, err := n.table.Apply(t.Context(), &policy.Ruleset{}, strict); return err },
			"remove":         func() error { return fresh.Remove(t.Context()) },
			"changes":        func() error { _, err := fresh.Changes(t.Context()); return err },
			"denied":         func() error { _, err := fresh.Denied(t.Context()); return err },
			"look-up":        func() error { _, _, err := fresh.Dispatch(policy.Ingress, webAddrs[0]); return err },
		} {
			if err := try(); err == nil || !strings.Contains(err.Error(), "run as root or with CAP_NET_ADMIN") {
				t.Errorf("%s: error %v", what, err)
			}
		}
		return nil
	})
	n.holds(want, strict)
}

// A kernel that lacks a part is named, once, by whoever says so first.
func TestExplain(t *testing.T) {
	table := New("")
	for _, err := range []error{unix.EOPNOTSUPP, errors.New("Error: Could not process rule: Operation not supported")} {
		got := table.explain(fmt.Errorf("write: %w", table.explain(err))).Error()
		if strings.Count(got, "nft_reject_inet") != 1 {
			t.Errorf("%v: %q does not name the kernel's parts once", err, got)
		}
	}
}

// Remove takes the table away and nothing else; twice is fine.
func TestRemove(t *testing.T) {
	n := newNode(t)
	n.ns.Run(t, "nft", "add table ip other")
	want := policy.Compile(policytest.Cluster(rand.New(rand.NewPCG(2, 2))))
	for range 2 {
		n.apply(want, strict)
		n.ns.Do(t, func() error { return errors.Join(n.table.Remove(t.Context()), n.table.Remove(t.Context())) })
		if got := strings.TrimSpace(n.ns.Run(t, "nft", "list", "tables")); got != "table ip other" {
			t.Errorf("left are %q", got)
		}
	}
	if c := n.apply(want, strict); !c.Cold {
		t.Errorf("after Remove: %+v", c)
	}
	n.holds(want, strict)
}
