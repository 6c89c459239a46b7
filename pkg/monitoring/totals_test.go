package monitoring

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/pkg/cmdlog"
)

func openBook(t *testing.T, dir string) *spoolCounter {
	t.Helper()
	b := &spoolCounter{t: newTotals(), each: func(cmdlog.Record) {}, log: func(err error) { t.Error(err) }}
	if err := b.open(filepath.Join(dir, "metrics.json"), cmdlog.Spool(filepath.Join(dir, "daemon.sock"))); err != nil {
		t.Fatal(err)
	}
	return b
}

// A daemon may die between any two steps of fold. Each state that this can leave is made here from the files before and
// after, and the next daemon has to come to the same totals.
func TestFoldCountsOnceWhateverWasKilled(t *testing.T) {
	for _, died := range []string{"before", "totals half written", "totals written", "some records removed", "after"} {
		t.Run(died, func(t *testing.T) {
			dir := t.TempDir()
			spool := cmdlog.Spool(filepath.Join(dir, "daemon.sock"))
			first := openBook(t, dir)
			send(t, dir, 7)
			if err := first.countSpool(); err != nil {
				t.Fatal(err)
			}
			send(t, dir, 5)
			found, err := cmdlog.ReadSpool(spool, batch)
			if err != nil || len(found) != 5 {
				t.Fatalf("%d records, %v", len(found), err)
			}
			next := first.t.clone()
			next.Counted = nil
			for _, s := range found {
				next.add(s.Record)
				next.Counted = append(next.Counted, s.Name)
			}
			switch died {
			case "totals half written":
				if err := os.WriteFile(first.path+".new", []byte(`{"alloc`), 0o600); err != nil {
					t.Fatal(err)
				}
			case "totals written", "some records removed", "after":
				if err := first.save(next); err != nil {
					t.Fatal(err)
				}
				gone := map[string]int{"some records removed": 2, "after": 5}[died]
				if err := cmdlog.RemoveSpooled(spool, next.Counted[:gone]); err != nil {
					t.Fatal(err)
				}
			}
			send(t, dir, 1) // while nobody runs
			second := openBook(t, dir)
			for range 2 {
				if err := second.countSpool(); err != nil {
					t.Fatal(err)
				}
			}
			if second.t.Allocations != 13 || second.t.Setups[0] != 13 {
				t.Errorf("%d allocations, %v; want 13", second.t.Allocations, second.t.Setups)
			}
			if left, err := cmdlog.ReadSpool(spool, batch); err != nil || len(left) != 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
}

func send(t *testing.T, dir string, n int) {
	t.Helper()
	for i := range n {
		h := cmdlog.Record{Command: "ADD", ContainerID: fmt.Sprint(i), Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Duration: time.Microsecond}
		_ = cmdlog.Send(filepath.Join(dir, "daemon.sock"), h) // nobody listens
	}
}

func TestTotals(t *testing.T) {
	got := newTotals()
	one := []netip.Addr{netip.MustParseAddr("10.0.0.1")}
	for _, h := range []cmdlog.Record{
		{Command: "ADD", Addrs: one, Duration: time.Millisecond}, {Command: "ADD", Addrs: one, Duration: time.Hour},
		{Command: "ADD", ErrorCode: 7, Addrs: one}, {Command: "DEL", ErrorCode: 101, Stage: "detach"}, {Command: "DEL", Addrs: one}, {},
	} {
		got.add(h)
	}
	want := newTotals()
	want.Allocations, want.Releases, want.SetupSum = 2, 1, 3600.001
	want.Errors["other"], want.Errors["detach"] = 1, 1
	want.Setups[0], want.Setups[len(setupBuckets)] = 1, 1
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// What was kept and cannot be read must not keep the daemon from starting.
func TestKeptTotalsThatCannotBeRead(t *testing.T) {
	for _, text := range []string{"", "{", `{"setups":[1]}`, `null`} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "metrics.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		b := openBook(t, dir)
		send(t, dir, 1)
		if err := b.countSpool(); err != nil || b.t.Allocations != 1 {
			t.Errorf("%q: %d, %v", text, b.t.Allocations, err)
		}
	}
}
