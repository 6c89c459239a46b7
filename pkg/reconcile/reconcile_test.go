package reconcile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/headcni/headcni/pkg/findings"
)

// outcomes is what each part of a test says next.
type outcomes map[string]error

// part has no change to make.
func part(name string, needs ...string) Part[outcomes] {
	return Part[outcomes]{Name: name, Needs: needs, Run: func(_ context.Context, o outcomes) ([]string, error) { return nil, o[name] }}
}

func TestOrderNeedsAndNews(t *testing.T) {
	var out bytes.Buffer
	var ran []string
	changed := []string{"x"}
	parts := []Part[outcomes]{part("a"), part("b", "a"), part("c")}
	for i, p := range parts {
		parts[i].Run = func(_ context.Context, o outcomes) ([]string, error) {
			ran = append(ran, p.Name)
			return changed, o[p.Name]
		}
	}
	recorded := map[string]int{}
	b := NewBoard(Options{
		Log: slog.New(slog.NewTextHandler(&out, nil)), Record: func(part string, _ bool, changes int) { recorded[part] += changes },
	}, parts)
	if ready, got := b.Ready(); ready || len(got) != 3 || got[0].Error != "not tried yet" {
		t.Error("ready before anything was tried:", got)
	}
	fault := outcomes{"a": errors.New("no nft: install nftables")}
	b.Run(t.Context(), fault)
	if diff := cmp.Diff([]string{"a", "c"}, ran); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]int{"a": 1, "b": 0, "c": 1}, recorded); diff != "" {
		t.Error(diff)
	}
	ready, got := b.Ready()
	want := []Status{{Name: "a", Error: "no nft: install nftables"}, {Name: "b", Error: "waits for a"}, {Name: "c", OK: true}}
	if diff := cmp.Diff(want, got, noTime); ready || diff != "" {
		t.Error(ready, diff)
	}
	changed = nil
	b.Run(t.Context(), fault)
	if n := strings.Count(out.String(), "install nftables"); n != 1 {
		t.Errorf("the same fault was logged %d times", n)
	}
	b.Run(t.Context(), nil)
	out.Reset()
	b.Run(t.Context(), nil)
	if out.Len() != 0 {
		t.Errorf("steady state logs: %s", out.String())
	}
	if ready, _ := b.Ready(); !ready {
		t.Error("not ready")
	}
}

func TestNeedsComeBefore(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a part may need one that comes after it")
		}
	}()
	NewBoard(Options{}, []Part[outcomes]{part("a", "b"), part("b")})
}

func TestStopped(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	stop := false
	b := NewBoard(Options{}, []Part[outcomes]{{Name: "a", Run: func(ctx context.Context, _ outcomes) ([]string, error) {
		if stop {
			cancel()
		}
		return nil, ctx.Err()
	}}})
	b.Run(ctx, nil)
	stop = true
	b.Run(ctx, nil)
	if ready, _ := b.Ready(); !ready {
		t.Error("a stop was taken for a fault")
	}
}

// What cannot be seen from here is shown, said once, and does not make the whole unready.
func TestUnseen(t *testing.T) {
	var out bytes.Buffer
	b := NewBoard(Options{Log: slog.New(slog.NewTextHandler(&out, nil))}, []Part[outcomes]{part("a")})
	b.Run(t.Context(), outcomes{"a": Unseen{Waiting("advertised")}})
	if out.Len() != 0 {
		t.Errorf("logs while it waits: %s", out.String())
	}
	for range 2 {
		b.Run(t.Context(), outcomes{"a": Unseen{errors.New("nobody has told")}})
	}
	ready, got := b.Ready()
	if diff := cmp.Diff([]Status{{Name: "a", Error: "nobody has told"}}, got, noTime); !ready || diff != "" {
		t.Error(ready, diff)
	}
	if n := strings.Count(out.String(), "nobody has told"); n != 1 || !strings.Contains(out.String(), "level=WARN") {
		t.Errorf("logged %d times: %s", n, out.String())
	}
	b.Run(t.Context(), outcomes{"a": errors.New("wrong")})
	if ready, _ := b.Ready(); ready {
		t.Error("ready with a fault")
	}
}

// A fault is one whatever it is joined with: it is logged and reported as such, the part is not ready, and it is tried again.
func TestFaultBesideAnother(t *testing.T) {
	fault := errors.New("wrong")
	for name, beside := range map[string]error{
		"waiting": Waiting("soon"), "soon": Soon{"soon", time.Hour}, "unseen": Unseen{errors.New("nobody told")}, "warning": Warning{errors.New("expires")},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			var reported []string
			b := NewBoard(Options{
				Log: slog.New(slog.NewTextHandler(&out, nil)), Report: func(_ string, _ bool, text string) { reported = append(reported, text) },
				FullCheck: time.Minute, RetryMin: time.Second, RetryMax: time.Second,
			}, []Part[outcomes]{part("a")})
			joined := fmt.Errorf("both: %w", errors.Join(beside, fault))
			if next := b.Run(t.Context(), outcomes{"a": joined}); next != time.Second {
				t.Errorf("tried again in %v", next)
			}
			if ready, _ := b.Ready(); ready {
				t.Error("ready with a fault")
			}
			if !strings.Contains(out.String(), "level=ERROR") || len(reported) != 1 {
				t.Errorf("reported %q, logged %s", reported, out.String())
			}
		})
	}
}

// What is known before a part's turn counts at once, and is no news by itself.
func TestDoubt(t *testing.T) {
	var out bytes.Buffer
	b := NewBoard(Options{Log: slog.New(slog.NewTextHandler(&out, nil))}, []Part[outcomes]{part("a")})
	b.Run(t.Context(), nil)
	out.Reset()
	b.Doubt("a", "logged out")
	if ready, got := b.Ready(); ready || got[0].Error != "logged out" {
		t.Error(ready, got)
	}
	b.Run(t.Context(), outcomes{"a": errors.New("wrong")})
	b.Doubt("a", "logged out")
	if _, got := b.Ready(); got[0].Error != "wrong" || !strings.Contains(out.String(), "wrong") {
		t.Error(got, out.String())
	}
}

func TestOptional(t *testing.T) {
	p := part("a")
	p.Optional = true
	b := NewBoard(Options{}, []Part[outcomes]{p})
	b.Run(t.Context(), outcomes{"a": errors.New("wrong")})
	if ready, got := b.Ready(); !ready || got[0].OK {
		t.Error(ready, got)
	}
}

// The end of a fault is reported where the fault was: a start is no news.
func TestReport(t *testing.T) {
	var reported []string
	b := NewBoard(Options{Report: func(_ string, _ bool, text string) { reported = append(reported, text) }}, []Part[outcomes]{part("a")})
	for _, err := range []error{
		Waiting("starts"), nil, Unseen{errors.New("unseen")}, nil, errors.New("wrong"), errors.New("wrong"), Waiting("soon"), nil, nil, Waiting("x"), nil,
	} {
		b.Run(t.Context(), outcomes{"a": err})
	}
	if diff := cmp.Diff([]string{"wrong", "works again"}, reported); diff != "" {
		t.Error(diff)
	}
}

// Passes that events start do not put a retry off, and neither does another part's fault.
func TestRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBoard(Options{FullCheck: time.Minute, RetryMin: time.Second, RetryMax: 8 * time.Second}, []Part[outcomes]{part("a"), part("b", "a"), part("c")})
		run := func(want time.Duration, o outcomes) {
			t.Helper()
			if got := b.Run(t.Context(), o); got != want {
				t.Errorf("next pass in %v, want %v", got, want)
			}
		}
		run(time.Minute, nil)
		run(time.Minute, outcomes{"a": Warning{errors.New("expires")}})
		dead := outcomes{"a": errors.New("dead")}
		for _, wait := range []time.Duration{1, 2, 4, 8, 8} {
			run(wait*time.Second, dead)
			time.Sleep(wait * time.Second)
		}
		for range 10 { // events
			run(8*time.Second, dead)
			time.Sleep(100 * time.Millisecond)
			run(7900*time.Millisecond, dead)
			time.Sleep(7900 * time.Millisecond)
		}
		both := outcomes{"a": errors.New("dead"), "c": Waiting("soon")}
		run(time.Second, both)
		time.Sleep(time.Second)
		run(2*time.Second, both)
		run(time.Minute, nil)
		run(time.Second, dead)
		// A part that says when has its look then, and another's retry is not put off.
		soon := outcomes{"a": dead["a"], "c": errors.Join(Soon{"soon", 300 * time.Millisecond}, errors.New("and this"))}
		for range 3 {
			run(300*time.Millisecond, soon)
			time.Sleep(300 * time.Millisecond)
		}
		run(100*time.Millisecond, soon)
	})
}

func TestLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		l := NewLoop()
		var woke []bool
		var at []time.Duration
		began := time.Now()
		l.Settle = func(took time.Duration) time.Duration { return max(time.Second, took) }
		l.Pass = func(_ context.Context, woken bool) time.Duration {
			woke, at = append(woke, woken), append(at, time.Since(began))
			return time.Minute
		}
		ended := make(chan struct{})
		go func() { l.Run(ctx); close(ended) }()
		time.Sleep(70 * time.Second) // 0 s, 60 s
		for range 5 {                // one burst: 71 s
			l.Wake()
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(100 * time.Second) // 131 s
		cancel()
		<-ended
		if diff := cmp.Diff([]time.Duration{0, 60 * time.Second, 71 * time.Second, 131 * time.Second}, at); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]bool{false, false, true, false}, woke); diff != "" {
			t.Error(diff)
		}
	})
}

var noTime = cmpopts.IgnoreFields(Status{}, "Since")

// Each fault is told by its own id or its part's, and since when; a part that waits for another tells nothing.
func TestFindings(t *testing.T) {
	var out bytes.Buffer
	var reported []string
	parts := []Part[outcomes]{
		{Name: "a", Finding: findings.Conflist}, {Name: "b", Finding: findings.Prefs, Needs: []string{"a"}}, {Name: "c", Finding: findings.HeadscaleOther, Optional: true},
	}
	for i, p := range parts {
		parts[i].Run = func(_ context.Context, o outcomes) ([]string, error) { return nil, o[p.Name] }
	}
	b := NewBoard(Options{
		Log: slog.New(slog.NewTextHandler(&out, nil)), Report: func(part string, _ bool, text string) { reported = append(reported, part+": "+text) },
	}, parts)
	other := findings.New(findings.OtherCNI, "flannel's file")
	ends := Warning{findings.New(findings.APIKeyEnds, "ends in a week")}
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		b.Run(t.Context(), outcomes{"a": errors.Join(other, errors.New("disk full")), "c": errors.Join(ends, Waiting("comes"))})
		time.Sleep(time.Minute)
		b.Run(t.Context(), outcomes{"a": errors.Join(other, errors.New("disk still full")), "c": ends})
		_, got := b.Ready()
		want := []Status{
			{Name: "a", Error: "flannel's file; disk still full", Since: began, Findings: []Found{
				{findings.OtherCNI, findings.Fail, "flannel's file"}, {findings.Conflist, findings.Fail, "disk still full"},
			}},
			{Name: "b", Error: "waits for a", Since: began},
			{Name: "c", Error: "ends in a week", Since: began, Findings: []Found{{findings.APIKeyEnds, findings.Warn, "ends in a week"}}},
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		if got[0].IDs() != "HC111 HC110" {
			t.Error(got[0].IDs())
		}
		b.Run(t.Context(), nil)
		if _, got := b.Ready(); !got[0].Since.IsZero() || got[0].Findings != nil {
			t.Error("right again, and still:", got[0])
		}
		b.Doubt("a", "gone")
		if _, got := b.Ready(); got[0].Findings[0] != (Found{findings.Conflist, findings.Wait, "gone"}) {
			t.Error(got[0])
		}
	})
	if !strings.Contains(out.String(), `id="HC111 HC110"`) || !slices.Contains(reported, "a: HC111 HC110 flannel's file; disk full") {
		t.Error("neither the log nor the report names the ids:", out.String(), reported)
	}
}
