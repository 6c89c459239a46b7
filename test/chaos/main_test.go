// Package chaos breaks a small world at random, as often as it is told to: one fault at a time and several at once, on nodes with
// pods that never stop talking. After each it waits until all is as before, and it holds that not one packet was in clear, that no
// address was given twice, and that all talk again.
//
// A few faults strike with the other tests. `make chaos FAULTS=2000` prints the table of docs/reliability.md. What strikes follows
// from the seed: `make chaos SEED=7 FROM=120 FAULTS=125` repeats the faults 120 to 125, and ONLY='ip rule' takes some of the kinds.
package chaos

import (
	"flag"
	"fmt"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/nstest"
)

var (
	faults = flag.Int("faults", 12, "how many faults")
	seed   = flag.Uint64("seed", 1, "what strikes follows from it; 0: any")
	from   = flag.Int("from", 1, "the number of the first fault, to repeat a run from there")
	only   = flag.String("only", "", "a regular expression: of the kinds, those whose names match it; all numbers are others then")
	table  = flag.Bool("table", false, "print the table")
)

// lookEach is after how many faults everything is looked at, and not only what they struck.
const lookEach = 25

// tooMany failed rounds end the run: the rest would tell nothing new.
const tooMany = 5

func TestMain(m *testing.M) {
	flag.Parse()
	nstest.Main(m)
}

func TestChaos(t *testing.T) {
	nstest.Require(t)
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	which, err := regexp.Compile(*only)
	if err != nil {
		t.Fatal("-only: ", err)
	}
	some := slices.DeleteFunc(kinds(), func(k *kind) bool { return !which.MatchString(k.name) })
	if len(some) == 0 {
		t.Fatalf("-only %q: no kind has such a name", *only)
	}
	plan := makePlan(*seed, *faults, nodes, some)
	t.Run(fmt.Sprintf("SEED=%d", *seed), func(t *testing.T) {
		w := newWorld(t)
		began := time.Now()
		failed, struck := 0, 0
		for _, r := range plan {
			if r[len(r)-1].number < *from {
				continue
			}
			if !t.Run(r.String(), func(t *testing.T) { w.strike(t, r) }) {
				if failed++; failed == tooMany || !w.recover(t) {
					t.Fatalf("ended after fault %d", r[len(r)-1].number)
				}
			}
			if struck += len(r); struck >= lookEach {
				struck = 0
				if last := r[len(r)-1].number; !t.Run(fmt.Sprintf("all after %d", last), w.look) {
					t.Fatalf("ended after fault %d", last)
				}
			}
		}
		t.Run("all at the end", w.look)
		w.tally.took = time.Since(began)
		fmt.Println(w.summary(t))
		if *table {
			fmt.Print(w.tally.table(kinds()))
		}
	})
}
