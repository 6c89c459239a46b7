package labtest

import (
	"flag"
	"strconv"
	"sync"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
)

// slots say how much may be at work at once: stages whose tests run one after the other, which take the longest and so come
// first, and tests that run side by side.
type slots struct {
	mu       sync.Mutex
	changed  *sync.Cond
	free     int
	reserved int // for those that come first and have not begun
}

// atWork is set once by Main, before any test runs.
var atWork *slots

// Main runs the tests of a package that has stages. No more than atOnce of them are at work at once, unless -parallel says
// otherwise; 0 is Go's own default. Tests that wait for their turn do not count.
func Main(m *testing.M, atOnce int) {
	flag.Parse()
	parallel := flag.Lookup("test.parallel")
	asked := false
	flag.Visit(func(f *flag.Flag) { asked = asked || f == parallel })
	if atOnce == 0 || asked {
		atOnce, _ = strconv.Atoi(parallel.Value.String()) // it is a number
	}
	atWork = &slots{free: max(1, atOnce)}
	atWork.changed = sync.NewCond(&atWork.mu)
	// Go counts those that wait, too: with fewer than there are tests, all could wait for one that may not begin.
	if err := parallel.Value.Set("10000"); err != nil {
		panic(err)
	}
	nstest.Main(m)
}

// reserve keeps a slot, as soon as there is one, from those that have reserved none.
func (s *slots) reserve() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reserved++
}

// take waits for a slot, which may be one that was reserved.
func (s *slots) take(reserved bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.free == 0 || !reserved && s.free <= s.reserved {
		s.changed.Wait()
	}
	s.free--
	if reserved {
		s.reserved--
	}
}

// give gives a slot back.
func (s *slots) give() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free++
	s.changed.Broadcast()
}
