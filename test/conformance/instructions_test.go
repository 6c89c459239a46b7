package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
)

// TestInstructions bounds the instructions of user space that the plugin takes for one attachment: they are steady where times are not.
// What they grow by is paid at every start of a pod. The figures are valgrind's, of the least of several runs, which Go's runtime has
// disturbed least; it must be told to get along with valgrind, by a build tag.
func TestInstructions(t *testing.T) {
	needs(t, "valgrind")
	n, pod := newNode(t), nstest.New(t)
	dir := t.TempDir()
	if err := build(dir, "-tags=valgrind", "./cmd/headcni"); err != nil {
		t.Fatal(err)
	}
	n.path = []string{dir}
	log := filepath.Join(dir, "log")
	n.wrap = []string{"valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=" + filepath.Join(dir, "out"), "--log-file=" + log}
	conf := n.conf("")
	counts := map[string][]int{}
	count := func(c call) string {
		out := n.must(c)
		counts[c.verb] = append(counts[c.verb], instructions(t, log))
		return out
	}
	for range 4 {
		out := count(attach("ADD", "c1", pod, conf))
		count(attach("CHECK", "c1", pod, n.previous(conf, out)))
		count(attach("DEL", "c1", pod, n.previous(conf, out)))
		count(call{program: "headcni", verb: "VERSION", conf: conf}) // most of it is Go's runtime
	}
	n.empty()
	// What they take today, in thousands, and a quarter more: another version of Go may take that without our doing.
	for verb, today := range map[string]int{"ADD": 1700, "CHECK": 2100, "DEL": 1450, "VERSION": 680} {
		least := slices.Min(counts[verb]) / 1000
		t.Logf("%s: %d thousand instructions; all runs: %d", verb, least, counts[verb])
		if least > today*5/4 {
			t.Errorf("%s takes %d thousand instructions, and took %d thousand: find what is new, and raise the number where it is worth that", verb, least, today)
		}
	}
}

var collected = regexp.MustCompile(`I\s+refs:\s+([\d,]+)`)

// instructions reads a count from valgrind's log.
func instructions(t *testing.T, log string) int {
	t.Helper()
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	m := collected.FindSubmatch(b)
	if m == nil {
		t.Fatal(fmt.Errorf("valgrind has counted nothing:\n%s", b))
	}
	count, err := strconv.Atoi(strings.ReplaceAll(string(m[1]), ",", ""))
	if err != nil {
		t.Fatal(err)
	}
	return count
}
