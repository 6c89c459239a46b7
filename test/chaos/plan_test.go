package chaos

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// line is a set of our lines of defence: what keeps pods' packets from the wire.
type line uint

const (
	tables line = 1 << iota // nftables
	rules                   // routing rules
	routes                  // the routes of last resort
)

// strike is one fault: what, where and for how long. Pick chooses among what there is only when it strikes, such as one rule of many.
type strike struct {
	number int // from 1
	kind   *kind
	node   int
	stay   time.Duration
	pick   uint32
}

func (s strike) String() string {
	return fmt.Sprintf("%d %s on node-%d", s.number, s.kind.name, s.node+1)
}

// round are faults that strike at once.
type round []strike

func (r round) String() string {
	var all []string
	for _, s := range r {
		all = append(all, s.String())
	}
	return strings.Join(all, " + ")
}

// of are the strikes on one node.
func (r round) of(node int) (out round) {
	for _, s := range r {
		if s.node == node {
			out = append(out, s)
		}
	}
	return out
}

// has tells whether one of the faults is so.
func (r round) has(is func(*kind) bool) bool {
	return slices.ContainsFunc(r, func(s strike) bool { return is(s.kind) })
}

// taken are the lines of defence that the faults take away.
func (r round) taken() (l line) {
	for _, s := range r {
		l |= s.kind.takes
	}
	return l
}

const (
	meanStay = 400 * time.Millisecond
	maxStay  = 2500 * time.Millisecond
)

// groups are how many strike at once, of a hundred rounds one for each entry.
var groups = slices.Concat(slices.Repeat([]int{1}, 50), slices.Repeat([]int{2}, 25), slices.Repeat([]int{3}, 15), slices.Repeat([]int{5}, 10))

// makePlan says what is to strike, in rounds. It is the same for the same seed.
func makePlan(seed uint64, faults, nodes int, kinds []*kind) (plan []round) {
	rng := rand.New(rand.NewPCG(seed, 0))
	var bag []*kind
	for _, k := range kinds {
		bag = append(bag, slices.Repeat([]*kind{k}, k.weight)...)
	}
	for number := 1; number <= faults; {
		var r round
		for range min(groups[rng.IntN(len(groups))], faults-number+1) {
			s := strike{
				number: number, kind: bag[rng.IntN(len(bag))], node: rng.IntN(nodes), pick: rng.Uint32(),
				stay: min(maxStay, time.Duration(rng.ExpFloat64()*float64(meanStay))),
			}
			if !fits(r, s) {
				continue
			}
			r = append(r, s)
			number++
			if s.kind.alone {
				break
			}
		}
		if len(r) > 0 {
			plan = append(plan, r)
		}
	}
	return plan
}

// fits tells whether a fault may strike together with others: each mends what it broke, and of our lines of defence one stays on each
// node, as nothing is promised without any.
func fits(r round, s strike) bool {
	if s.kind.alone {
		return len(r) == 0
	}
	for _, o := range r {
		if s.kind.claims != "" && o.kind.claims == s.kind.claims && (o.node == s.node || s.kind.everywhere) {
			return false
		}
	}
	return append(r.of(s.node), s).taken() != tables|rules|routes
}

// The plan follows from the seed alone, has as many faults as were asked for, and no kind is left out.
func TestPlan(t *testing.T) {
	const faults = 3000
	ks := kinds()
	plan := makePlan(7, faults, 3, ks)
	if again := makePlan(7, faults, 3, ks); !reflect.DeepEqual(plan, again) {
		t.Error("the same seed makes another plan")
	}
	if other := makePlan(8, faults, 3, ks); reflect.DeepEqual(plan, other) {
		t.Error("another seed makes the same plan")
	}
	if short := makePlan(7, 100, 3, ks); !reflect.DeepEqual(short[:len(short)-1], plan[:len(short)-1]) {
		t.Error("a shorter plan is not the beginning of a longer one")
	}
	number, seen := 0, map[string]int{}
	for _, r := range plan {
		for i, s := range r {
			if number++; s.number != number {
				t.Errorf("fault %d has the number %d", number, s.number)
			}
			seen[s.kind.name]++
			if !fits(r[:i], s) {
				t.Errorf("%v: they do not go together", r)
			}
		}
	}
	if number != faults {
		t.Errorf("%d faults", number)
	}
	for _, k := range ks {
		if seen[k.name] == 0 {
			t.Errorf("%s never strikes", k.name)
		}
	}
}
