package daemon

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"

	"github.com/headcni/headcni/pkg/monitoring"
)

// part is one thing that has to be right on the node. Parts run in order; one whose needs failed is not tried.
type part struct {
	name  string
	needs []string
	// optional parts are shown, but neither the node's readiness nor other parts depend on them.
	optional bool
	// run makes it right and says what it changed, also when it failed half-way.
	run func(context.Context) (changes []string, err error)
}

// waiting is an error that needs nobody's help: it passes by itself.
type waiting string

func (w waiting) Error() string { return string(w) }

// unseen is an error where nobody here can see whether anything is wrong: it is shown, and the node counts as ready.
type unseen struct{ error }

func (u unseen) Unwrap() error { return u.error }

// board holds the last outcome of each part: the node's state as /readyz shows it.
type board struct {
	log     *slog.Logger
	metrics *monitoring.Metrics

	mu    sync.Mutex
	order []string
	last  map[string]string // error text, "" = ok
	// optional parts do not count for readiness.
	optional map[string]bool
	// told is given what is news for people who do not read logs; nil = nobody.
	told func(part string, ok bool, text string)
	bad  map[string]bool // what told was told of
}

func newBoard(log *slog.Logger, m *monitoring.Metrics, names []string) *board {
	b := &board{log: log, metrics: m, order: names, last: map[string]string{}, optional: map[string]bool{}, bad: map[string]bool{}}
	for _, n := range names {
		b.last[n] = "not tried yet"
	}
	return b
}

// run tries all parts and reports whether all are right.
func (b *board) run(ctx context.Context, parts []part) bool {
	ok := map[string]bool{}
	all := true
	for _, p := range parts {
		var changes []string
		var err error
		for _, n := range p.needs {
			if !ok[n] {
				err = waiting("waits for " + n)
			}
		}
		if err == nil {
			changes, err = p.run(ctx)
		}
		if ctx.Err() != nil {
			return false // we are being stopped: an interrupted part is no news
		}
		ok[p.name] = err == nil
		var warn warning
		all = all && (err == nil || errors.As(err, &warn)) // looking more often would not help
		b.record(p, changes, err)
	}
	return all
}

// record keeps the outcome and logs it where it is news.
func (b *board) record(p part, changes []string, err error) {
	name, text := p.name, ""
	if err != nil {
		text = strings.ReplaceAll(err.Error(), "\n", "; ") // joined errors; one part, one line
	}
	b.mu.Lock()
	before := b.last[name]
	var u unseen
	b.last[name], b.optional[name] = text, p.optional || errors.As(err, &u)
	b.mu.Unlock()
	b.metrics.Part(name, err == nil, len(changes))
	if len(changes) > 0 {
		b.log.Info("corrected", "part", name, "changes", changes)
	}
	var w waiting
	switch {
	case text == before:
	case err == nil:
		b.log.Info("right", "part", name)
		b.tell(name, true, "right again")
	case errors.As(err, &w):
		b.log.Debug("waiting", "part", name, "err", text)
	case errors.As(err, &u):
		b.log.Warn("cannot be seen from here", "part", name, "err", text)
	default:
		b.log.Error("not right", "part", name, "err", text)
		b.tell(name, false, text)
	}
}

// tell tells of faults, and of their end.
func (b *board) tell(name string, ok bool, text string) {
	if b.told == nil || ok && !b.bad[name] {
		return
	}
	b.bad[name] = !ok
	b.told(name, ok, text)
}

// Ready implements monitoring.Readiness: every part is right that is not optional.
func (b *board) Ready() (bool, []monitoring.PartStatus) {
	b.mu.Lock()
	defer b.mu.Unlock()
	ready := true
	var out []monitoring.PartStatus
	for _, n := range b.order {
		out = append(out, monitoring.PartStatus{Name: n, OK: b.last[n] == "", Error: b.last[n]})
		ready = ready && (b.last[n] == "" || b.optional[n])
	}
	return ready, out
}
