package labtest

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestMain(m *testing.M) { Main(m, 4) }

// play is what happened on a stage, in order.
type play struct {
	mu    sync.Mutex
	lines []string
}

func (p *play) note(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lines = append(p.lines, fmt.Sprintf(format, args...))
}

// open is a world that notes its beginning and end.
func (p *play) open(t testing.TB) *play {
	dir := t.TempDir()
	p.note("made")
	t.Cleanup(func() {
		_, err := os.Stat(dir)
		p.note("ended, its folder there: %v, its context over: %v", err == nil, t.Context().Err() != nil)
	})
	return p
}

func TestOneByOne(t *testing.T) {
	p := &play{}
	s := OneByOne(p.open)
	var inside atomic.Int32
	act := func(t *testing.T, name string, enter func(*testing.T) *play) {
		t.Run(name, func(t *testing.T) {
			w := enter(t)
			if inside.Add(1) > 1 {
				t.Error("two are there")
			}
			w.note("%s", name)
			time.Sleep(5 * time.Millisecond)
			t.Cleanup(func() { w.note("%s cleans up", name); inside.Add(-1) })
		})
	}
	for range 2 { // as by -count
		t.Run("acts", func(t *testing.T) {
			act(t, "a", s.Enter)
			act(t, "z", s.EnterLast)
			act(t, "b", s.Enter)
			act(t, "c", s.Enter)
		})
	}
	want := []string{"made", "a", "a cleans up", "b", "b cleans up", "c", "c cleans up", "z", "z cleans up", "ended, its folder there: true, its context over: true"}
	if want = append(want, want...); !slices.Equal(p.lines, want) {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(p.lines, "\n"), strings.Join(want, "\n"))
	}
}

func TestSideBySide(t *testing.T) {
	p := &play{}
	s := SideBySide(p.open)
	met := make(chan struct{}, 2)
	t.Run("acts", func(t *testing.T) {
		for _, name := range []string{"a", "b"} {
			t.Run(name, func(t *testing.T) {
				s.Enter(t)
				met <- struct{}{}
				for end := time.Now().Add(Soon); len(met) < 2; time.Sleep(time.Millisecond) {
					if time.Now().After(end) {
						t.Fatal("the other one is not there")
					}
				}
			})
		}
		t.Run("last", func(t *testing.T) { s.EnterLast(t).note("last, %d before it", len(met)) })
	})
	if got := strings.Join(p.lines, "; "); got != "made; last, 2 before it; ended, its folder there: true, its context over: true" {
		t.Error(got)
	}
}

// again runs a test of this file as a process of its own, where it may fail.
func again(t *testing.T, name string, args ...string) (output string, ok bool) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], append([]string{"-test.v", "-test.run=^" + name + "$"}, args...)...)
	cmd.Env = append(os.Environ(), "STAGE_TEST="+name)
	out, err := cmd.CombinedOutput()
	return string(out), err == nil
}

func TestWorldThatCannotBeMade(t *testing.T) {
	if os.Getenv("STAGE_TEST") == "" {
		out, ok := again(t, "TestWorldThatCannotBeMade")
		if ok || strings.Count(out, "no machine") != 1 || strings.Count(out, "could not be made") != 1 || strings.Count(out, "swept") != 1 {
			t.Errorf("passed: %v\n%s", ok, out)
		}
		return
	}
	s := OneByOne(func(t testing.TB) int {
		t.Cleanup(func() { t.Log("swept") })
		t.Fatal("no machine")
		return 0
	})
	for _, name := range []string{"a", "b"} {
		t.Run(name, func(t *testing.T) { s.Enter(t) })
	}
}

// With -parallel 1, too, no test waits for one that is not let in.
func TestFewSlots(t *testing.T) {
	if os.Getenv("STAGE_TEST") == "" {
		if out, ok := again(t, "TestFewSlots", "-test.parallel=1"); !ok {
			t.Error(out)
		}
		return
	}
	var at atomic.Int32
	for _, s := range []*Stage[int]{OneByOne(func(testing.TB) int { return 1 }), SideBySide(func(testing.TB) int { return 2 }), OneByOne(func(testing.TB) int { return 3 })} {
		for i := range 3 {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				if i == 0 {
					s.EnterLast(t)
				} else {
					s.Enter(t)
				}
				if n := at.Add(1); n > 1 {
					t.Errorf("%d at once", n)
				}
				time.Sleep(time.Millisecond)
				at.Add(-1)
			})
		}
	}
}
