package daemon

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/pkg/monitoring"
)

func TestBoardOrderNeedsAndNews(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	b := newBoard(log, monitoring.NewMetrics("test"), []string{"a", "b", "c"})
	if ready, _ := b.Ready(); ready {
		t.Error("ready before anything was tried")
	}
	var ran []string
	var fault error
	parts := []part{
		{name: "a", run: func(context.Context) ([]string, error) { ran = append(ran, "a"); return []string{"x"}, fault }},
		{name: "b", needs: []string{"a"}, run: func(context.Context) ([]string, error) { ran = append(ran, "b"); return nil, nil }},
		{name: "c", run: func(context.Context) ([]string, error) { ran = append(ran, "c"); return nil, nil }},
	}
	fault = errors.New("no nft: install nftables")
	if b.run(t.Context(), parts) {
		t.Error("all right despite a fault")
	}
	if diff := cmp.Diff([]string{"a", "c"}, ran); diff != "" {
		t.Error(diff)
	}
	ready, got := b.Ready()
	want := []monitoring.PartStatus{
		{Name: "a", Error: "no nft: install nftables"}, {Name: "b", Error: "waits for a"}, {Name: "c", OK: true},
	}
	if diff := cmp.Diff(want, got); ready || diff != "" {
		t.Error(ready, diff)
	}
	parts[0].run = func(context.Context) ([]string, error) { return nil, fault }
	b.run(t.Context(), parts)
	if n := strings.Count(out.String(), "install nftables"); n != 1 {
		t.Errorf("the same fault was logged %d times", n)
	}
	fault = nil
	if !b.run(t.Context(), parts) {
		t.Error("not right after the repair")
	}
	out.Reset()
	b.run(t.Context(), parts)
	if out.Len() != 0 {
		t.Errorf("steady state logs: %s", out.String())
	}
	if ready, _ := b.Ready(); !ready {
		t.Error("not ready")
	}
}

func TestBoardStopped(t *testing.T) {
	b := newBoard(slog.New(slog.DiscardHandler), monitoring.NewMetrics("test"), []string{"a"})
	ctx, cancel := context.WithCancel(t.Context())
	b.run(ctx, []part{{name: "a", run: func(context.Context) ([]string, error) { return nil, nil }}})
	b.run(ctx, []part{{name: "a", run: func(context.Context) ([]string, error) { cancel(); return nil, ctx.Err() }}})
	if ready, _ := b.Ready(); !ready {
		t.Error("a stop was taken for a fault")
	}
}

// What cannot be seen from here is shown, said once, and does not make the node unready.
func TestBoardUnseen(t *testing.T) {
	var out bytes.Buffer
	b := newBoard(slog.New(slog.NewTextHandler(&out, nil)), monitoring.NewMetrics("test"), []string{"a"})
	fault := error(unseen{waiting("advertised")})
	parts := []part{{name: "a", run: func(context.Context) ([]string, error) { return nil, fault }}}
	b.run(t.Context(), parts)
	if out.Len() != 0 {
		t.Errorf("logs while it waits: %s", out.String())
	}
	fault = unseen{errors.New("nobody has told")}
	for range 2 {
		if b.run(t.Context(), parts) {
			t.Error("all right although that cannot be seen")
		}
	}
	ready, got := b.Ready()
	if diff := cmp.Diff([]monitoring.PartStatus{{Name: "a", Error: "nobody has told"}}, got); !ready || diff != "" {
		t.Error(ready, diff)
	}
	if n := strings.Count(out.String(), "nobody has told"); n != 1 || !strings.Contains(out.String(), "level=WARN") {
		t.Errorf("logged %d times: %s", n, out.String())
	}
	fault = errors.New("wrong")
	b.run(t.Context(), parts)
	if ready, _ := b.Ready(); ready {
		t.Error("ready with a fault")
	}
}

// Only what was told to be wrong is told to be right again: a start is no news.
func TestBoardTells(t *testing.T) {
	b := newBoard(slog.New(slog.DiscardHandler), monitoring.NewMetrics("test"), []string{"a"})
	var told []string
	b.told = func(_ string, ok bool, text string) { told = append(told, text) }
	for _, err := range []error{
		waiting("starts"), nil, unseen{errors.New("unseen")}, nil, errors.New("wrong"), errors.New("wrong"), waiting("soon"), nil, nil, waiting("x"), nil,
	} {
		b.run(t.Context(), []part{{name: "a", run: func(context.Context) ([]string, error) { return nil, err }}})
	}
	if diff := cmp.Diff([]string{"wrong", "right again"}, told); diff != "" {
		t.Error(diff)
	}
}
