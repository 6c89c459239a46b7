// Package scale measures what grows with a cluster: Headscale, with nodes that are simulated but for their control client, and our own programs,
// with an API server that is imitated. `make bench-scale` runs it and prints tables.
package scale

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

var (
	sizes     = flag.String("nodes", "100,250", "how many nodes, one tailnet for each")
	tagged    = flag.String("tagged", "100", "the same with a policy that names the nodes' tag; empty: none")
	idle      = flag.Duration("idle", time.Minute, "how long to look at what goes on while nothing happens")
	tableFile = flag.String("table", "", "file to append the tables to")
)

// table has a column for each size.
type table struct {
	title string
	heads []string
	rows  []string
	cells map[string][]string
}

func newTable(title string) *table { return &table{title: title, cells: map[string][]string{}} }

func (t *table) column(head string) { t.heads = append(t.heads, head) }

// add fills in the row of the last column.
func (t *table) add(row, format string, args ...any) {
	if !slices.Contains(t.rows, row) {
		t.rows = append(t.rows, row)
	}
	for len(t.cells[row]) < len(t.heads)-1 {
		t.cells[row] = append(t.cells[row], "")
	}
	t.cells[row] = append(t.cells[row], fmt.Sprintf(format, args...))
}

// print writes it as Markdown.
func (t *table) print(b *testing.B) {
	var s strings.Builder
	fmt.Fprintf(&s, "\n%s\n\n| | %s |\n|---|%s\n", t.title, strings.Join(t.heads, " | "), strings.Repeat("---|", len(t.heads)))
	for _, row := range t.rows {
		fmt.Fprintf(&s, "| %s | %s |\n", row, strings.Join(t.cells[row], " | "))
	}
	fmt.Print(s.String())
	if *tableFile == "" || b.Failed() {
		return
	}
	f, err := os.OpenFile(*tableFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err == nil {
		_, err = f.WriteString(s.String())
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		b.Error(err)
	}
}

// usage is what a process has used so far.
type usage struct {
	cpu float64 // seconds
	rss float64 // MB now, and peak since resetPeak
	top float64
}

// clockTicks is USER_HZ, in which Linux tells times of processes on every architecture that Go has.
const clockTicks = 100

func used(t testing.TB, pid int) (u usage) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d", pid)
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		t.Fatal(err)
	}
	// The second field, in parentheses, may hold anything. Fields 14 and 15 are proc_pid_stat(5)'s utime and stime.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	for _, f := range fields[11:13] {
		n, _ := strconv.ParseFloat(f, 64) // the kernel writes numbers
		u.cpu += n / clockTicks
	}
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		var kB float64
		if _, err := fmt.Sscanf(line, "VmRSS: %f kB", &kB); err == nil {
			u.rss = kB / 1024
		}
		if _, err := fmt.Sscanf(line, "VmHWM: %f kB", &kB); err == nil {
			u.top = kB / 1024
		}
	}
	return u
}

// resetPeak forgets the highest memory of a process, see proc_pid_clear_refs(5).
func resetPeak(t testing.TB, pid int) {
	t.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
}

// load is the machine's, over the last minute.
func load(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(b))[0]
}

// quantile is of a sorted list.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

func numbers(t testing.TB, list string) (out []int) {
	t.Helper()
	for f := range strings.FieldsFuncSeq(list, func(r rune) bool { return r == ',' }) {
		n, err := strconv.Atoi(f)
		if err != nil || n < 1 {
			t.Fatalf("-nodes %s: want numbers such as 100,250", list)
		}
		out = append(out, n)
	}
	return out
}
