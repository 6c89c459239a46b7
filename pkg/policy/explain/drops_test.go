package explain_test

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/headcni/headcni/internal/golden"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/explain"
	"github.com/headcni/headcni/pkg/policy/nflog"
	"github.com/headcni/headcni/pkg/policy/report"
)

// logger plays the kernel's log.
type logger struct {
	mu      sync.Mutex
	logs    bool
	reading func(nflog.Packet) // nil while nobody reads
	lost    func()
	broken  chan error
}

func (l *logger) log(on bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.logs = on
}

func (l *logger) read(ctx context.Context, group uint16, ready func(), do func(nflog.Packet), lost func()) error {
	if group != policy.LogGroup {
		return errors.New("another group")
	}
	l.set(do, lost)
	defer l.set(nil, nil)
	ready()
	select {
	case <-ctx.Done():
		return nil
	case err := <-l.broken:
		return err
	}
}

func (l *logger) set(do func(nflog.Packet), lost func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reading, l.lost = do, lost
}

// on reports whether anybody reads and the kernel logs.
func (l *logger) on() (reads, logs bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.reading != nil, l.logs
}

func newDrops(x *explain.Explainer) (*explain.Drops, *logger) {
	l := &logger{broken: make(chan error)}
	return &explain.Drops{Explainer: x, Log: l.log, Read: l.read}, l
}

func packet(prefix, src, dst string, protocol uint8, from, to uint16) nflog.Packet {
	return nflog.Packet{Time: began, Prefix: prefix, Src: addr(src), Dst: addr(dst), Protocol: protocol, SrcPort: from, DstPort: to}
}

func TestDropsText(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, l := newDrops(explainer(state(shop(t)), shop(t)))
		ctx, stop := context.WithCancel(t.Context())
		var followed []string
		var done sync.WaitGroup
		done.Go(func() {
			err := d.Follow(ctx, "shop", "", func(e report.Event) error {
				if e.Drop != nil {
					followed = append(followed, e.Drop.Text())
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		for _, p := range []nflog.Packet{
			packet("in", "10.244.2.30", "10.244.1.10", 6, 4000, 80),
			packet("in-answer", "10.244.1.10", "203.0.113.9", 6, 80, 4000),
			packet("out", "fd00:244:1::10", "fd7a:115c:a1e0::2", 17, 4000, 54),
			packet("out", "10.244.1.10", "10.244.1.11", 1, 0, 0),
			packet("out", "10.244.1.10", "10.244.9.9", 47, 0, 0),
			packet("out", "10.244.1.10", "10.244.2.20", 6, 4000, 5432),
			packet("unknown-out", "10.244.1.13", "10.244.2.20", 6, 4000, 5432),
			packet("unknown-in", "10.244.2.20", "10.244.1.99", 6, 4000, 5432),
			packet("stateless-in", "10.244.2.30", "10.244.1.10", 6, 4000, 80),
			packet("stateless-out", "fd00:244:1::10", "fd7a:115c:a1e0::2", 6, 80, 4000),
			packet("somebody", "10.244.2.20", "10.244.1.99", 6, 4000, 5432),
		} {
			l.reading(p)
		}
		synctest.Wait()
		stop()
		done.Wait()
		last, err := d.Last(t.Context(), "shop", "")
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		if err := last.Print(&b); err != nil {
			t.Fatal(err)
		}
		golden.Check(t, "testdata/drops.txt", b.String())
		if !strings.HasPrefix(b.String(), strings.Join(followed, "\n")+"\n\n") {
			t.Errorf("followed was something else:\n%s", strings.Join(followed, "\n"))
		}
		b.Reset()
		last, err = d.Last(t.Context(), "shop", "db")
		if err != nil {
			t.Fatal(err)
		}
		if err := last.Print(&b); err != nil {
			t.Fatal(err)
		}
		golden.Check(t, "testdata/drops-remote-pod.txt", b.String())
		if _, err := d.Last(t.Context(), "shop", "wbe"); err == nil || !strings.Contains(err.Error(), "is shop/web meant?") {
			t.Errorf("%v", err)
		}
	})
}

// TestKernelLogsWhileSomebodyFollows goes through followers that come and go, lag behind, and are cut off by a failure.
func TestKernelLogsWhileSomebodyFollows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, l := newDrops(explainer(state(shop(t)), shop(t)))
		want := func(when string, on bool) {
			t.Helper()
			if reads, logs := l.on(); reads != on || logs != on {
				t.Errorf("%s: somebody reads: %t, the kernel logs: %t; want %t", when, reads, logs, on)
			}
		}
		follow := func(pod string, do func(report.Event) error) (stop func() error) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- d.Follow(ctx, "shop", pod, do) }()
			synctest.Wait()
			return func() error { cancel(); return <-done }
		}
		want("before", false)
		first := follow("", func(report.Event) error { return nil })
		want("one follows", true)
		var ofDB []report.Event
		second := follow("db", func(e report.Event) error { ofDB = append(ofDB, e); return nil })
		l.reading(packet("in", "10.244.2.30", "10.244.1.10", 6, 4000, 80))
		l.reading(packet("out", "10.244.1.10", "10.244.2.20", 6, 4000, 80))
		synctest.Wait()
		if len(ofDB) != 2 || ofDB[0].Started == nil || !strings.Contains(ofDB[0].Started.Note, "on node two") || ofDB[1].Drop == nil || ofDB[1].Drop.To.Name != "shop/db" {
			t.Errorf("who follows one pod is told %+v", ofDB)
		}
		if err := first(); err != nil {
			t.Error(err)
		}
		want("one of two has gone", true)
		if err := second(); err != nil {
			t.Error(err)
		}
		want("both have gone", false)

		// Who does not read is told how many were lost, and holds nobody up.
		hold, told, lost := make(chan struct{}), 0, 0
		slow := follow("", func(e report.Event) error {
			if e.Started == nil {
				<-hold
			}
			if e.Drop != nil {
				told++
			}
			lost += e.Lost
			return nil
		})
		for range 500 {
			l.reading(packet("in", "10.244.2.30", "10.244.1.10", 6, 4000, 80))
		}
		close(hold)
		synctest.Wait()
		l.lost()
		l.reading(packet("in", "10.244.2.30", "10.244.1.10", 6, 4000, 80))
		synctest.Wait()
		if told+lost != 502 || lost < 400 {
			t.Errorf("of 501 packets and one that the kernel lost, %d were told, and %d told to be lost", told, lost)
		}

		var failed string
		gone := follow("", func(e report.Event) error { failed += e.Error; return nil })
		l.broken <- errors.New("no more")
		synctest.Wait()
		if err := errors.Join(gone(), slow()); err != nil || failed != "no more" {
			t.Errorf("%v; told of the failure is %q", err, failed)
		}
		again := follow("", func(report.Event) error { return nil })
		want("after a failure", true)
		if err := again(); err != nil {
			t.Error(err)
		}
		want("at the end", false)
		if last, err := d.Last(t.Context(), "shop", ""); err != nil || len(last.Last) != 200 {
			t.Errorf("remembered are %d, %v", len(last.Last), err)
		}
	})
}

// TestFollowerIsKilled: the daemon sees that a connection is gone.
func TestFollowerIsKilled(t *testing.T) {
	d, l := newDrops(explainer(state(shop(t)), shop(t)))
	socket := serve(t, d)
	ctx, kill := context.WithCancel(t.Context())
	events := make(chan report.Event)
	done := make(chan error)
	go func() {
		done <- report.Follow(ctx, socket, "shop", "", func(e report.Event) error { events <- e; return nil })
	}()
	if e := <-events; e.Started == nil || e.Started.Node != "one" {
		t.Errorf("told first is %+v", e)
	}
	l.reading(packet("in", "10.244.2.30", "10.244.1.10", 6, 4000, 80))
	if e := <-events; e.Drop == nil || e.Drop.To.Name != "shop/web" {
		t.Errorf("told is %+v", e)
	}
	kill()
	if err := <-done; err != nil {
		t.Error(err)
	}
	waitFor(t, "the kernel to log no more", func() bool { reads, logs := l.on(); return !reads && !logs })
	if err := report.Follow(t.Context(), socket, "shop", "wbe", nil); err == nil || err.Error() != "there is no pod shop/wbe: is shop/web meant?" {
		t.Errorf("%v", err)
	}
	if err := report.Follow(t.Context(), filepath.Join(t.TempDir(), "none"), "", "", nil); err == nil {
		t.Error("nobody listens, and somebody is followed")
	}
}
