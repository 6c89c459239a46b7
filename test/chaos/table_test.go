package chaos

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// tally is what a run came to.
type tally struct {
	faults, rounds, adds, dels, cut, refused int
	sent, lost                               int
	clear, bareClear, controls, twice        int
	took                                     time.Duration
	kinds                                    map[string]*kindTally
	together                                 []time.Duration // rounds of several
	bare                                     []time.Duration // from the end of a fault that took all lines of defence until they stood again
}

// kindTally is how often a kind struck, and how long repair took where it struck alone.
type kindTally struct {
	faults int
	alone  []time.Duration
}

func (y *tally) rowsOf(ks []*kind) {
	for _, k := range ks {
		y.kinds[k.name] = &kindTally{}
	}
}

// repaired notes how long the repair of a round took.
func (y *tally) repaired(r round, took time.Duration) {
	y.rounds++
	for _, s := range r {
		y.faults++
		y.kinds[s.kind.name].faults++
	}
	if len(r) == 1 {
		k := y.kinds[r[0].kind.name]
		k.alone = append(k.alone, took)
	} else {
		y.together = append(y.together, took)
	}
}

// table is that of docs/reliability.md.
func (y *tally) table(ks []*kind) string {
	var b strings.Builder
	b.WriteString("| fault | struck | of it alone | repaired after: median, 90 %, worst |\n|---|---|---|---|\n")
	for _, k := range ks {
		row := y.kinds[k.name]
		fmt.Fprintf(&b, "| %s | %d | %d | %s |\n", k.name, row.faults, len(row.alone), quantiles(row.alone))
	}
	fmt.Fprintf(&b, "| several at once, rounds | %d | - | %s |\n", len(y.together), quantiles(y.together))
	return b.String()
}

func quantiles(d []time.Duration) string {
	if len(d) == 0 {
		return "-"
	}
	d = slices.Sorted(slices.Values(d))
	at := func(q float64) float64 { return d[int(q*float64(len(d)-1)+0.5)].Seconds() }
	return fmt.Sprintf("%.2f s, %.2f s, %.2f s", at(0.5), at(0.9), at(1))
}

// summary is the run in words.
func (w *world) summary(t *testing.T) string {
	t.Helper()
	frames, err := w.Lab.Frames()
	if err != nil {
		t.Error(err)
	}
	y := &w.tally
	bare := ""
	if len(y.bare) > 0 {
		bare = fmt.Sprintf("; after the loss of all lines at once they stood again within %s, and %d frames to addresses of nobody were in clear", quantiles(y.bare), y.bareClear)
	}
	return fmt.Sprintf("chaos: SEED=%d: %d faults in %d rounds, %v; %d ADDs, %d DELs, %d of both cut short by kill -9, %d ADDs refused for the moment; "+
		"%d of %d datagrams lost; %d frames on the wires, %d control packets seen, %d others in clear; %d addresses twice",
		*seed, y.faults, y.rounds, y.took.Round(time.Second), y.adds, y.dels, y.cut, y.refused,
		y.lost, y.sent, frames-w.frames, y.controls, y.clear, y.twice) + bare
}
