// Package reconcile keeps a whole as it should be, part by part: what each part needs, what it waits for, when it is tried
// again, and what /readyz says of it.
package reconcile

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/headcni/headcni/pkg/findings"
)

// Part is one thing that has to be as it should be. S is what one pass observed and planned, which all its parts share.
type Part[S any] struct {
	Name string
	// Needs are parts before this one. It is not tried while one of them has an error.
	Needs []string
	// Optional parts are shown, but readiness does not depend on them.
	Optional bool
	// Finding is what an error is that does not say it itself, "" = nothing that people are told of.
	Finding findings.ID
	// Run makes the part as it should be and says what it changed, also when it failed half-way.
	Run func(ctx context.Context, s S) (changes []string, err error)
}

// Waiting is an error that passes without anybody's help.
type Waiting string

func (w Waiting) Error() string { return string(w) }

// Soon is Waiting where the part knows when its next look is due, which is sooner than the usual retry.
type Soon struct {
	Waiting
	In time.Duration
}

// Unwrap returns what is waited for.
func (s Soon) Unwrap() error { return s.Waiting }

// Unseen is an error of a part of which nobody here can see whether anything is wrong with it. It is shown, and the part
// counts as ready.
type Unseen struct{ Err error }

func (u Unseen) Error() string { return u.Err.Error() }

// Unwrap returns what is not seen.
func (u Unseen) Unwrap() error { return u.Err }

// Warning is an error that stands for long, such as a key that expires next week: to try again soon would change nothing.
type Warning struct{ Err error }

func (w Warning) Error() string { return w.Err.Error() }

// Unwrap returns what is warned of.
func (w Warning) Unwrap() error { return w.Err }

// every reports whether all that an error joins is a T: what passes by itself must not hide a fault beside it.
func every[T error](err error) bool {
	if _, ok := err.(T); ok {
		return true
	}
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		return every[T](e.Unwrap())
	case interface{ Unwrap() []error }:
		return !slices.ContainsFunc(e.Unwrap(), func(err error) bool { return !every[T](err) })
	}
	return false
}

// Status is one part as /readyz shows it.
type Status struct {
	Name  string `json:"name"`
	OK    bool   `json:"ok"`
	Error string `json:"error,omitempty"` // with the remedy
	// Findings are what Error joins, each with its id. A part that waits for another has none: the other one has.
	Findings []Found `json:"findings,omitempty"`
	// Since is when the part last ceased to be right.
	Since time.Time `json:"since,omitzero"`
}

// Found is a fault with its id.
type Found struct {
	ID       findings.ID       `json:"id"`
	Severity findings.Severity `json:"severity"`
	Text     string            `json:"text"` // of one line
}

// IDs are those of all that was found, for a line of text.
func (s Status) IDs() string { return idsOf(s.Findings) }

func idsOf(found []Found) string {
	var ids []string
	for _, f := range found {
		if !slices.Contains(ids, string(f.ID)) {
			ids = append(ids, string(f.ID))
		}
	}
	return strings.Join(ids, " ")
}

// oneLine is an error's text: one part, one line, also where errors are joined.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// FoundIn tells what an error's faults are. What says no id itself has the one of fallback. Faults of a part that must be right are
// failures, whatever they are elsewhere.
func FoundIn(err error, fallback findings.ID, optional bool) (found []Found) {
	for _, e := range findings.Split(err) {
		id := findings.IDOf(e)
		if id == "" {
			id = fallback
		}
		f, known := findings.Of(id)
		if !known {
			continue
		}
		severity := f.Severity
		unseen, waiting := every[Unseen](e), every[Waiting](e)
		switch {
		case waiting && (optional || unseen):
			continue // nobody has to wait for it
		case waiting:
			severity = findings.Wait
		case unseen:
			severity = findings.Warn
		case !optional:
			severity = findings.Fail
		}
		found = append(found, Found{ID: id, Severity: severity, Text: oneLine(e)})
	}
	return found
}

// Options of a Board. Every field may be left out.
type Options struct {
	Log *slog.Logger
	// Record is called with the outcome of each part and the number of its changes, for metrics.
	Record func(part string, ok bool, changes int)
	// Report is called with what is news for people who do not read logs: a fault, and the end of one that was reported.
	Report func(part string, ok bool, text string)
	// FullCheck is how long after a pass the next one is due where every part is as it should be.
	FullCheck time.Duration
	// RetryMin and RetryMax bound the wait before a part with an error is tried again.
	RetryMin, RetryMax time.Duration
}

// Board runs parts in order and holds the last outcome of each. Make it with NewBoard.
type Board[S any] struct {
	opt   Options
	parts []Part[S]
	retry map[string]*retry // of Run alone

	mu   sync.Mutex
	last map[string]outcome
}

// outcome is how a part stands.
type outcome struct {
	text     string // of its error, "" = none
	found    []Found
	since    time.Time // of the error
	optional bool
	reported bool
}

// NewBoard panics where a part needs one that does not come before it.
func NewBoard[S any](opt Options, parts []Part[S]) *Board[S] {
	b := &Board[S]{opt: opt, parts: parts, retry: map[string]*retry{}, last: map[string]outcome{}}
	if b.opt.Log == nil {
		b.opt.Log = slog.New(slog.DiscardHandler)
	}
	for _, p := range parts {
		for _, n := range p.Needs {
			if _, ok := b.last[n]; !ok {
				panic(fmt.Sprintf("part %s needs %s, which does not come before it", p.Name, n))
			}
		}
		b.last[p.Name] = outcome{text: "not tried yet", optional: p.Optional}
		b.retry[p.Name] = &retry{}
	}
	return b
}

// Run tries all parts and returns how long it is until the next pass is due.
func (b *Board[S]) Run(ctx context.Context, s S) time.Duration {
	ok := map[string]bool{}
	next := b.opt.FullCheck
	for _, p := range b.parts {
		if i := slices.IndexFunc(p.Needs, func(n string) bool { return !ok[n] }); i >= 0 {
			b.record(p, nil, needs{Waiting("waits for " + p.Needs[i])}) // which is tried again when it is due
			continue
		}
		changes, err := p.Run(ctx, s)
		if ctx.Err() != nil {
			return next // we are being stopped: an interrupted part is no news
		}
		ok[p.Name] = err == nil
		if due, again := b.retry[p.Name].after(err, b.opt, time.Now()); again {
			next = min(next, due)
		}
		b.record(p, changes, err)
	}
	return next
}

// needs is the Waiting of a part for another one, which has the fault.
type needs struct{ Waiting }

// Unwrap returns what is waited for.
func (n needs) Unwrap() error { return n.Waiting }

// record keeps the outcome, and logs and reports it where it is news.
func (b *Board[S]) record(p Part[S], changes []string, err error) {
	name := p.Name
	o := outcome{optional: p.Optional}
	isUnseen, isWaiting := every[Unseen](err), every[Waiting](err)
	if err != nil {
		o.text = oneLine(err)
		o.optional = o.optional || isUnseen
		if _, other := err.(needs); !other {
			o.found = FoundIn(err, p.Finding, p.Optional)
		}
	}
	b.mu.Lock()
	before := b.last[name]
	if o.since = before.since; err != nil && o.since.IsZero() {
		o.since = time.Now()
	} else if err == nil {
		o.since = time.Time{}
	}
	o.reported = before.reported
	fault := err != nil && !isWaiting && !isUnseen
	report := o.text != before.text && (fault || err == nil && before.reported)
	if report {
		o.reported = fault
	}
	b.last[name] = o
	b.mu.Unlock()
	if b.opt.Record != nil {
		b.opt.Record(name, err == nil, len(changes))
	}
	log := b.opt.Log
	if len(changes) > 0 {
		log.Info("corrected", "part", name, "changes", changes)
	}
	what := []any{"part", name}
	ids := idsOf(o.found)
	if ids != "" {
		what = append(what, "id", ids)
	}
	switch {
	case o.text == before.text:
	case err == nil:
		log.Info("ready", what...)
	case isWaiting:
		log.Debug("waiting", append(what, "err", o.text)...)
	case isUnseen:
		log.Warn("cannot be seen from here", append(what, "err", o.text)...)
	default:
		log.Error("failed", append(what, "err", o.text)...)
	}
	if report && b.opt.Report != nil {
		text := o.text
		switch {
		case err == nil:
			text = "works again"
		case ids != "":
			text = ids + " " + text // an Event's note is cut at its end
		}
		b.opt.Report(name, err == nil, text)
	}
}

// Doubt takes back that a part is as it should be, until the pass under way comes to it: that may take seconds, in which the
// part must not count as ready. It reports whether the part counted as right.
func (b *Board[S]) Doubt(part, why string) (was bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	o := b.last[part]
	if was = o.text == ""; was {
		o.text, o.since = why, time.Now()
		if i := slices.IndexFunc(b.parts, func(p Part[S]) bool { return p.Name == part }); i >= 0 {
			o.found = FoundIn(Waiting(why), b.parts[i].Finding, false)
		}
		b.last[part] = o
	}
	return was
}

// Ready reports whether every part that is not optional is as it should be, and how each stands.
func (b *Board[S]) Ready() (bool, []Status) {
	b.mu.Lock()
	defer b.mu.Unlock()
	ready := true
	var out []Status
	for _, p := range b.parts {
		o := b.last[p.Name]
		out = append(out, Status{Name: p.Name, OK: o.text == "", Error: o.text, Findings: o.found, Since: o.since})
		ready = ready && (o.text == "" || o.optional)
	}
	return ready, out
}
