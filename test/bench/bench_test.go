// Package bench measures HeadCNI beside other parts of its field and beside the kernel alone: on real parts, as whole
// processes, side by side and interleaved in one run. `make bench` runs it and prints tables of ratios of medians.
package bench

import (
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

var (
	scale     = flag.Float64("scale", 1, "part of the rounds to run, for a quick look; at least 2 are run")
	tableFile = flag.String("table", "", "file to append the tables to")
)

// samples are measurements by the name of what was done, in milliseconds where nothing else is said.
type samples map[string][]float64

func (s samples) add(name string, took time.Duration) {
	s[name] = append(s[name], float64(took.Nanoseconds())/1e6)
}

// way is one of several ways to do the same. It does it once and adds what it took.
type way func(samples) error

// interleave goes all ways in each round, in an order that is drawn anew: what else the machine does, and what one way leaves
// to the next, meets all alike. A round that is not counted warms the caches.
func interleave(b *testing.B, rounds int, ways ...way) samples {
	b.Helper()
	var got samples
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range max(2, int(math.Round(float64(rounds)**scale))) + 1 {
		if i <= 1 {
			got = samples{}
		}
		for _, j := range rnd.Perm(len(ways)) {
			if err := ways[j](got); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(0, "ns/op") // the rounds are fixed: Go's own figure means nothing here
	return got
}

// report is a Markdown table. It is printed when the benchmark ends.
type report struct {
	b    *testing.B
	head string
	text strings.Builder
}

func newReport(b *testing.B, title, heading string) *report {
	r := &report{b: b, head: fmt.Sprintf("\n%s\n\n%s\n|%s\n", title, heading, strings.Repeat("---|", strings.Count(heading, "|")-1))}
	b.Cleanup(r.print)
	return r
}

// newComparison is the report that rows of compare go into.
func newComparison(b *testing.B, title string) *report {
	return newReport(b, title, "| what | ours | beside | median, ours | median, beside | ratio | 95 % | goal | n |")
}

func (r *report) print() {
	if r.text.Len() == 0 {
		return // nothing that was asked for
	}
	text := r.head + r.text.String()
	fmt.Print(text)
	if *tableFile == "" || r.b.Failed() {
		return
	}
	f, err := os.OpenFile(*tableFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err == nil {
		_, err = f.WriteString(text)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		r.b.Error(err)
	}
}

// A measure says how one side stands to the other.
type measure struct {
	of   func(a, c float64) float64
	text string // format of one value
}

var (
	ratio = measure{func(a, c float64) float64 { return a / c }, "%.3g"}
	// excess is what ours takes more, in the unit of the samples.
	excess = measure{func(a, c float64) float64 { return a - c }, "%+.3g"}
)

// A row compares what two sides took for the same.
type row struct {
	what, detail string // detail ends with the unit
	ours, beside string
	measure      measure
	goal         string // in words, may be empty
}

// compare adds a row for the samples "WHAT SIDE" of both sides.
func (r *report) compare(got samples, w row) {
	r.b.Helper()
	a, c := got[w.what+" "+w.ours], got[w.what+" "+w.beside]
	if len(a) == 0 || len(c) == 0 {
		r.b.Errorf("%+v: %d samples of ours, %d of the other", w, len(a), len(c))
		return
	}
	lo, hi := bootstrap(w.measure, a, c)
	value, t := w.measure.of(median(a), median(c)), w.measure.text
	fmt.Fprintf(&r.text, "| %s, %s | %s | %s | %s | %s | **"+t+"** | "+t+" to "+t+" | %s | %d |\n",
		w.what, w.detail, w.ours, w.beside, digits(median(a)), digits(median(c)), value, lo, hi, w.goal, len(a))
}

// digits writes three significant digits, or a whole number.
func digits(v float64) string {
	if v >= 1000 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	n := len(s)
	if n%2 == 1 {
		return s[n/2]
	}
	return (s[n/2-1] + s[n/2]) / 2
}

// bootstrap returns the percentile interval that holds 95 % of the measure of medians over resamples of both sides.
func bootstrap(m measure, a, c []float64) (lo, hi float64) {
	const resamples = 2000
	rnd := rand.New(rand.NewPCG(1, 2)) // the same data give the same interval
	pick := func(v []float64) []float64 {
		out := make([]float64, len(v))
		for i := range out {
			out[i] = v[rnd.IntN(len(v))]
		}
		return out
	}
	values := make([]float64, resamples)
	for i := range values {
		values[i] = m.of(median(pick(a)), median(pick(c)))
	}
	slices.Sort(values)
	return values[resamples*25/1000], values[resamples*975/1000]
}
