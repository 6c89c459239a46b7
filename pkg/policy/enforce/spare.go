package enforce

import (
	"time"

	"github.com/headcni/headcni/pkg/policy"
)

const (
	// keepSpare is how long what nothing refers to any more is kept: the class of a pod that ended often comes back with the next one, and
	// then needs no program.
	keepSpare = 2 * time.Minute
	// maxSpare bounds how many there are: nft reads all that there is each time.
	maxSpare = 250
)

// spares are the sets, maps and chains of the kernel that nothing refers to any more. What a chain refers to is not older among them than
// the chain is.
type spares struct {
	sets   map[string]spareSet
	chains map[string]time.Time
}

// spareSet is a set or a map. One that another process left is neither: nobody knows what it holds.
type spareSet struct {
	since time.Time
	set   *policy.Set
	ports *policy.PortMap
}

func noSpares() spares { return spares{map[string]spareSet{}, map[string]time.Time{}} }

// update adds what old has and want has not, and takes out what want has.
func (s spares) update(old, want *policy.Ruleset, now time.Time) {
	for name, set := range old.Sets {
		if want.Sets[name] == nil {
			s.sets[name] = spareSet{now, set, nil}
		}
	}
	for name, m := range old.Maps {
		if want.Maps[name] == nil {
			s.sets[name] = spareSet{now, nil, m}
		}
	}
	for name := range old.Chains {
		if want.Chains[name] == nil {
			s.chains[name] = now
		}
	}
	for name := range s.sets {
		if want.Sets[name] != nil || want.Maps[name] != nil {
			delete(s.sets, name)
		}
	}
	for name := range s.chains {
		if want.Chains[name] != nil {
			delete(s.chains, name)
		}
	}
}

// expire takes out what has been spare for so long, or all where that is too many.
func (s spares) expire(now time.Time, keep time.Duration) (d drop) {
	if len(s.sets)+len(s.chains) > maxSpare {
		keep = 0
	}
	for name, spare := range s.sets {
		if now.Sub(spare.since) >= keep {
			d.sets = append(d.sets, name)
			delete(s.sets, name)
		}
	}
	for name, since := range s.chains {
		if now.Sub(since) >= keep {
			d.chains = append(d.chains, name)
			delete(s.chains, name)
		}
	}
	return d
}
