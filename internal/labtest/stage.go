package labtest

import (
	"slices"
	"sync"
	"testing"
	"time"
)

// Stage is a world that tests of a package share, such as a lab with pods. It is made for the first of them and ends with
// the last of them that is to run: `go test -run` makes no more than what it needs. It may be used again, by -count.
//
// All tests of a stage run in parallel with those of other stages.
type Stage[W any] struct {
	make     func(testing.TB) W
	oneByOne bool

	mu      sync.Mutex
	waiting []*visit // in the order of the source
	present int

	opening sync.Mutex // is held while the world is made
	keeper  *keeper
	failed  bool
	world   W
}

// visit is a test's wait for the stage.
type visit struct {
	last bool
	turn chan struct{} // closed when it may begin
}

// OneByOne has a world whose tests break it and mend it: they run one after the other, in the order of the source.
func OneByOne[W any](make func(testing.TB) W) *Stage[W] {
	return &Stage[W]{make: make, oneByOne: true}
}

// SideBySide has a world whose tests leave each other alone: they run at the same time.
func SideBySide[W any](make func(testing.TB) W) *Stage[W] { return &Stage[W]{make: make} }

// Enter returns the world when it is the test's turn, which lasts until the test has ended. It is the first thing that the
// test does.
func (s *Stage[W]) Enter(t *testing.T) W {
	t.Helper()
	return s.enter(t, false)
}

// EnterLast is Enter for a test that leaves the world in no state for others.
func (s *Stage[W]) EnterLast(t *testing.T) W {
	t.Helper()
	return s.enter(t, true)
}

func (s *Stage[W]) enter(t *testing.T, last bool) W {
	t.Helper()
	if atWork == nil {
		t.Fatal("TestMain does not call labtest.Main")
	}
	// Tests get here one by one. Those that are to run are all known when the first returns from Parallel.
	v := &visit{last, make(chan struct{})}
	s.mu.Lock()
	if s.oneByOne && len(s.waiting) == 0 {
		atWork.reserve()
	}
	s.waiting = append(s.waiting, v)
	s.mu.Unlock()
	t.Cleanup(func() { s.leave(t) })
	t.Parallel()
	s.mu.Lock()
	s.next()
	s.mu.Unlock()
	<-v.turn
	if !s.oneByOne {
		atWork.take(false)
	}
	w := s.open(t)
	began := time.Now()
	t.Cleanup(func() { t.Logf("took %v since its turn came", time.Since(began).Round(10*time.Millisecond)) })
	return w
}

// next lets those begin whose turn it is.
func (s *Stage[W]) next() {
	for {
		i := slices.IndexFunc(s.waiting, func(v *visit) bool { return !v.last })
		switch {
		case len(s.waiting) == 0, s.present > 0 && (s.oneByOne || i < 0):
			return
		case i < 0:
			i = 0
		}
		close(s.waiting[i].turn)
		s.waiting = slices.Delete(s.waiting, i, i+1)
		s.present++
	}
}

// open returns the world, made where it is not there yet.
func (s *Stage[W]) open(t *testing.T) W {
	t.Helper()
	s.opening.Lock()
	defer s.opening.Unlock()
	switch {
	case s.keeper == nil:
		if s.oneByOne { // from the first test to the last: the others are not to wait once more
			atWork.take(true)
		}
		s.keeper, s.failed = newKeeper(t), true
		s.keeper.begin(t)
		began := time.Now()
		s.world = s.make(s.keeper) // does not return after a FailNow
		s.failed = false
		t.Logf("its world was made in %v", time.Since(began).Round(10*time.Millisecond))
	case s.failed:
		t.Fatal("its world could not be made: see the first test that failed")
	default:
		s.keeper.begin(t)
	}
	return s.world
}

// leave ends a test's turn, and the world with the last one's.
func (s *Stage[W]) leave(t *testing.T) {
	t.Helper()
	s.opening.Lock()
	defer s.opening.Unlock()
	s.keeper.end(t)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.present--
	if s.present == 0 && len(s.waiting) == 0 {
		s.keeper.close(t)
		s.keeper = nil
		if s.oneByOne {
			atWork.give()
		}
	}
	if !s.oneByOne {
		atWork.give()
	}
	s.next()
}
