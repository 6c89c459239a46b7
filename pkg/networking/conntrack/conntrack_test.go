package conntrack

import (
	"errors"
	"testing"
	"time"

	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/reconcile"
)

func TestWatch(t *testing.T) {
	const none, nearly, full = "", "nearly", "full"
	for name, steps := range map[string][]struct {
		usage Usage
		after time.Duration
		want  string
	}{
		"room":                      {{Usage{Entries: 10, Max: 100}, 0, none}, {Usage{Entries: 89, Max: 100}, 0, none}},
		"no conntrack":              {{Usage{}, 0, none}, {Usage{}, 0, none}},
		"nearly, until it is empty": {{Usage{Entries: 90, Max: 100}, 0, nearly}, {Usage{Entries: 85, Max: 100}, 0, nearly}, {Usage{Entries: 79, Max: 100}, 0, none}, {Usage{Entries: 85, Max: 100}, 0, none}},
		"counts of before":          {{Usage{Entries: 1, Max: 100, Dropped: 7, Evicted: 7}, 0, none}, {Usage{Entries: 1, Max: 100, Dropped: 7, Evicted: 7}, 0, none}},
		"full as seen":              {{Usage{Entries: 100, Max: 100}, 0, full}, {Usage{Entries: 1, Max: 100}, time.Minute, full}, {Usage{Entries: 1, Max: 100}, recently, none}},
		"full between two looks":    {{Usage{Entries: 1, Max: 100}, 0, none}, {Usage{Entries: 1, Max: 100, Evicted: 1}, 0, full}, {Usage{Entries: 1, Max: 100, Evicted: 1}, recently, none}},
		"drops of a full one":       {{Usage{Entries: 95, Max: 100}, 0, nearly}, {Usage{Entries: 95, Max: 100, Dropped: 1}, 0, full}},
		"drops for other reasons":   {{Usage{Entries: 1, Max: 100}, 0, none}, {Usage{Entries: 1, Max: 100, Dropped: 1}, 0, none}},
		"counters began anew":       {{Usage{Entries: 1, Max: 100, Evicted: 9}, 0, none}, {Usage{Entries: 1, Max: 100, Evicted: 1}, 0, none}},
		"somebody allowed more":     {{Usage{Entries: 95, Max: 100}, 0, nearly}, {Usage{Entries: 95, Max: 200}, 0, none}},
	} {
		now, u := time.Unix(0, 0), Usage{}
		w := Watch{look: func() (Usage, error) { return u, nil }, now: func() time.Time { return now }}
		for i, s := range steps {
			u, now = s.usage, now.Add(s.after)
			err, got := w.Err(), none
			if w := (reconcile.Warning{}); errors.As(err, &w) {
				got = nearly
			} else if err != nil {
				got = full
			}
			if got != s.want || err != nil && findings.IDOf(err) != findings.ConntrackFull {
				t.Errorf("%s, step %d: %q, %v, want %q", name, i, got, err, s.want)
			}
		}
	}
	broken := errors.New("broken")
	if w := (Watch{look: func() (Usage, error) { return Usage{}, broken }, now: time.Now}); !errors.Is(w.Err(), broken) {
		t.Error("an error is not told")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 8, 0, 10, 0, 0, 0, 0, 7, 8, 0, 11, 0, 0, 0, 0, 9})
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, _, err := decode(b); err == nil && len(b) < nfgenmsgSize {
			t.Errorf("%x is read", b)
		}
	})
}
