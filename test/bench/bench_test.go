// Package bench measures HeadCNI beside other parts of its field, on real parts, side by side and interleaved in one
// run. `make bench` runs it and prints a table of ratios of medians.
package bench

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

var heading = "| what | ours | beside | median, ours | median, beside | ratio | 95 % of the ratio | n |\n|---|---|---|---|---|---|---|---|\n"

// row prints one line of the table and reports the ratio as the benchmark's metric.
func row(b *testing.B, what, ours, beside string, a, c []float64) {
	b.Helper()
	ratio := median(a) / median(c)
	lo, hi := bootstrap(a, c)
	fmt.Fprintf(os.Stdout, "%s| %s | %s | %s | %.3g | %.3g | **%.2f** | %.2f-%.2f | %d |\n", heading, what, ours, beside, median(a), median(c), ratio, lo, hi, len(a))
	heading = "" // once
	verb, _, _ := strings.Cut(what, ",")
	b.ReportMetric(ratio, strings.ReplaceAll(verb+"/"+beside, " ", "-")) // a unit has no spaces
	b.ReportMetric(0, "ns/op")                                           // the rounds are fixed: Go's own figure means nothing here
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	n := len(s)
	if n%2 == 1 {
		return s[n/2]
	}
	return (s[n/2-1] + s[n/2]) / 2
}

// bootstrap returns the percentile interval that holds 95 % of the ratio of medians over resamples of both sides.
func bootstrap(a, c []float64) (lo, hi float64) {
	const resamples = 2000
	rnd := rand.New(rand.NewPCG(1, 2)) // the same data give the same interval
	pick := func(v []float64) []float64 {
		out := make([]float64, len(v))
		for i := range out {
			out[i] = v[rnd.IntN(len(v))]
		}
		return out
	}
	ratios := make([]float64, resamples)
	for i := range ratios {
		ratios[i] = median(pick(a)) / median(pick(c))
	}
	slices.Sort(ratios)
	return ratios[resamples*25/1000], ratios[resamples*975/1000]
}
