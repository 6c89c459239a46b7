package connectivity

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/internal/printable"
	"github.com/headcni/headcni/pkg/doctor"
)

// PerfReport is what `connectivity perf -o json` prints, and what the text is made from.
type PerfReport struct {
	Version string `json:"version"`
	// OK: every measurement between pods has a result.
	OK       bool             `json:"ok"`
	Findings []doctor.Finding `json:"findings"`
	Nodes    int              `json:"nodes"`
	// Pairs that were measured, in one direction, of those that were asked for.
	Pairs  int    `json:"pairs"`
	Wanted int    `json:"pairsWanted"`
	Rows   []Rate `json:"rates"`
	// Note says what was not measured, and why.
	Note string `json:"note,omitempty"`
	// Congestion is how TCP sent, such as cubic.
	Congestion string `json:"tcpCongestionControl,omitempty"`
	// Started is how long it took until the pods ran, Seconds the whole with the removal of the namespace.
	Started float64 `json:"startedSeconds"`
	Seconds float64 `json:"seconds"`
}

// Rate is what was measured from one node to another, or on one node.
type Rate struct {
	From   string `json:"from"`
	To     string `json:"to"`
	Way    Way    `json:"way"`
	Family string `json:"family"`
	// Path is how the nodes reached each other by the tailnet, before and after where that differs. Pods of one node and the underlay have none.
	Path string `json:"path,omitempty"`
	// One and Eight are what arrived of one TCP stream and of eight at once, in bit/s; P50 and P99 are of requests and answers, in milliseconds.
	// All are medians where there was time for several.
	One   float64 `json:"oneStreamBitsPerSecond,omitempty"`
	Eight float64 `json:"eightStreamsBitsPerSecond,omitempty"`
	P50   float64 `json:"p50Millis,omitempty"`
	P99   float64 `json:"p99Millis,omitempty"`
	// SenderCPU and ReceiverCPU are what the nodes' tailscaleds took of their CPUs for a gigabyte (10^9 bytes) that pods or nodes sent, requests and all, in
	// seconds. What goes beside the tailnet has none.
	SenderCPU   float64 `json:"senderCPUSecondsPerGigabyte,omitempty"`
	ReceiverCPU float64 `json:"receiverCPUSecondsPerGigabyte,omitempty"`
	// Times it was measured with a result, 0 without an error: there was no time. Error is the last failure.
	Times int    `json:"times"`
	Error string `json:"error,omitempty"`

	from, dest *node
	to         netip.Addr
	got        []Measured
	cpu        [2][]float64
}

const (
	// leastTime and mostTimes are of one measurement: as long that TCP gets fast, and often enough for a median.
	leastTime, mostTimes = 2 * time.Second, 3
	// execShare is the part of a measurement's time that is left for measuring, beside the start of the program in the pod.
	execShare = 0.85
)

// Perf measures between pods, and between their nodes by the tailnet and beside it, one after another, and removes what it has made.
func Perf(ctx context.Context, o Options) (PerfReport, error) {
	t := newTest(o, asks, answers, inNode)
	t.perf = true
	r := PerfReport{}
	err := t.around(ctx, func() error {
		if err := t.start(ctx); err != nil {
			return err
		}
		r.Nodes = len(t.Nodes)
		if t.noInNode != "" {
			r.note("not from node to node: the cluster's rules allow no pod in the node's network here: " + t.noInNode)
		}
		before, err := t.Path(ctx)
		if err != nil {
			return err
		}
		if err := t.measure(ctx, &r); err != nil {
			return err
		}
		after, err := t.Path(ctx)
		if err != nil {
			return err
		}
		for i := range r.Rows {
			row := &r.Rows[i]
			if row.From == row.To || row.Way == ByUnderlay {
				continue
			}
			if row.Path = before(row.From, row.To); row.Path != after(row.From, row.To) {
				row.Path += ", then " + after(row.From, row.To)
			}
		}
		return nil
	})
	r.OK, r.Findings, r.Started, r.Seconds = t.report.OK, t.report.Findings, t.report.Started, t.report.Seconds
	return r, err
}

// measure goes through all rows, as often as there is time.
func (t *test) measure(ctx context.Context, r *PerfReport) error {
	pairs := t.pairs()
	r.Wanted = len(pairs)
	for _, p := range pairs {
		rows := t.rows(p[0], p[1])
		if len(rows) == 0 {
			r.Wanted--
			continue
		}
		// The first is measured however little time there is.
		if len(r.Rows) > 0 && time.Duration(len(r.Rows)+len(rows))*leastTime > t.Time {
			continue
		}
		r.Rows = append(r.Rows, rows...)
		r.Pairs++
	}
	if len(r.Rows) == 0 {
		return nil // no pod runs, which was said
	}
	times := max(min(int(t.Time/leastTime)/len(r.Rows), mostTimes), 1)
	each := t.Time / time.Duration(len(r.Rows)*times)
	cpu := t.meters(ctx)
	defer cpu.close()
	t.Say("measuring %d %s in %d ways, %d times, for %v", r.Pairs, doctor.Plural(r.Pairs, "pair"), len(r.Rows), times, t.Time)
	// In turns, so that what else the machines do meets all alike.
	end := time.Now().Add(t.Time)
	for round := range times {
		for i := range r.Rows {
			row := &r.Rows[i]
			if round > 0 && len(row.got) == 0 {
				continue // it failed, which may take longer than to measure
			}
			// Once each is measured where that takes less than twice the time: to run a program in a pod takes long on a busy node.
			now := time.Now()
			if round > 0 && now.After(end) || i > 0 && now.After(end.Add(t.Time)) {
				break
			}
			left := time.Duration(times-round)*time.Duration(len(r.Rows)) - time.Duration(i)
			if err := t.row(ctx, cpu, row, max(min(each, end.Sub(now)/left), each/2)); err != nil {
				return err
			}
		}
	}
	for i := range r.Rows {
		r.Rows[i].medians()
		for _, m := range r.Rows[i].got {
			r.Congestion = m.Congestion
		}
	}
	if cpu.lacks != "" {
		r.note("tailscaled's CPU is not known: " + cpu.lacks)
	}
	return nil
}

// pairs are each node with the next one, then with the one after that, and so on, so that of few each node has as many; at last each with itself.
func (t *test) pairs() (out [][2]*node) {
	far := min(1, len(t.Nodes)-1)
	if t.AllPairs {
		far = len(t.Nodes) - 1
	}
	for k := range far + 1 {
		for i, n := range t.Nodes {
			next := (i + (k+1)%(far+1)) % len(t.Nodes)
			out = append(out, [2]*node{t.byNode[n.Name], t.byNode[t.Nodes[next].Name]})
		}
	}
	return out
}

// rows are the ways from one node to another.
func (t *test) rows(from, to *node) (out []Rate) {
	if from.away || to.away {
		return nil
	}
	add := func(way Way, from *node, source, dest []netip.Addr) {
		for _, a := range dest {
			if len(sameFamily(source, a)) > 0 {
				out = append(out, Rate{From: from.Name, To: to.Name, Way: way, Family: netset.Family(a), from: from, dest: to, to: a})
			}
		}
	}
	add(ByPods, from, from.asks, to.answers)
	if from == to || t.noInNode != "" {
		return out
	}
	add(ByTailnet, from, from.Tailnet, to.Tailnet)
	add(ByUnderlay, from, from.beside(), to.beside())
	return out
}

// beside are the addresses that are not the tailnet's.
func (n *node) beside() []netip.Addr {
	return slices.DeleteFunc(slices.Clone(n.Addrs), func(a netip.Addr) bool { return slices.Contains(n.Tailnet, a) })
}

// row measures once.
func (t *test) row(ctx context.Context, cpu *meters, r *Rate, length time.Duration) error {
	who := asks
	if r.Way != ByPods {
		who = inNode
	}
	var m Measured
	in := Measure{netip.AddrPortFrom(r.to, PerfPort), time.Duration(float64(length) * execShare)}
	before, known := cpu.read(ctx, r)
	err := t.inPod(ctx, length+execSlack, who, r.from, in, &m, "measure")
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil && m.Error != "" {
		err = errors.New(m.Error)
	}
	if err == nil {
		r.got = append(r.got, m)
		if after, ok := cpu.read(ctx, r); known && ok && m.Sent > 0 {
			for i := range after {
				r.cpu[i] = append(r.cpu[i], (after[i]-before[i])/(float64(m.Sent)/1e9))
			}
		}
		return nil
	}
	r.Error = err.Error()
	if r.Way == ByPods {
		t.fail(podToPod, r.From+" -> "+r.To, "measured to %s: %v", r.to, err)
	}
	return nil
}

// medians fills in what came of all measurements.
func (r *Rate) medians() {
	of := func(value func(Measured) float64) float64 {
		var all []float64
		for _, m := range r.got {
			all = append(all, value(m))
		}
		return median(all)
	}
	r.Times = len(r.got)
	r.One, r.Eight = of(func(m Measured) float64 { return m.One }), of(func(m Measured) float64 { return m.Eight })
	r.SenderCPU, r.ReceiverCPU = median(r.cpu[0]), median(r.cpu[1])
	r.P50, r.P99 = of(func(m Measured) float64 { return m.P50.Seconds() * 1000 }), of(func(m Measured) float64 { return m.P99.Seconds() * 1000 })
}

// median of none is 0.
func median(all []float64) float64 {
	if len(all) == 0 {
		return 0
	}
	slices.Sort(all)
	return (all[(len(all)-1)/2] + all[len(all)/2]) / 2
}

func (r *PerfReport) note(text string) {
	if r.Note != "" {
		r.Note += "; "
	}
	r.Note += text
}

// share is what pods of different nodes have of what their nodes have, over one stream: the median of all pairs, and of how many.
func (r PerfReport) share(of Way) (float64, int) {
	var all []float64
	for _, a := range r.Rows {
		for _, b := range r.Rows {
			if a.Way == ByPods && b.Way == of && a.From == b.From && a.To == b.To && a.Family == b.Family && a.One > 0 && b.One > 0 {
				all = append(all, a.One/b.One)
			}
		}
	}
	return median(all), len(all)
}

// late is how many were not measured for want of time.
func (r PerfReport) late() (n int) {
	for _, row := range r.Rows {
		if row.Times == 0 && row.Error == "" {
			n++
		}
	}
	return n
}

// Text prints what was measured, pair by pair. width 0 = as wide as it is.
func (r PerfReport) Text(out io.Writer, width int) error {
	b := &strings.Builder{}
	line := func(cells ...any) {
		fmt.Fprintf(b, "  %-8s  %-6s  %12s  %12s  %8s  %8s", cells[:6]...)
		if cells[6] != "" {
			fmt.Fprintf(b, "  %11s", cells[6])
		}
		b.WriteByte('\n')
	}
	taken := slices.ContainsFunc(r.Rows, func(r Rate) bool { return r.SenderCPU > 0 })
	head := ""
	if taken {
		head = "CPU s/GB"
	}
	line("WAY", "FAMILY", "1 STREAM", "8 STREAMS", "P50", "P99", head)
	for i, row := range r.Rows {
		if i == 0 || row.From != r.Rows[i-1].From || row.To != r.Rows[i-1].To {
			where := row.From + " -> " + row.To + "   " + row.Path
			if row.From == row.To {
				where = "on " + row.From
			}
			fmt.Fprintln(b, strings.TrimRight(where, " "))
		}
		if row.Times == 0 {
			line(row.Way, row.Family, "-", "-", "-", "-", "")
			continue
		}
		line(row.Way, row.Family, bits(row.One), bits(row.Eight), millis(row.P50), millis(row.P99), row.cpuText())
	}
	for _, row := range r.Rows {
		if row.Error != "" && row.Way != ByPods {
			b.WriteString(printable.Fold("  ", 4, fmt.Sprintf("%s -> %s by %s, %s: %s", row.From, row.To, row.Way, row.Family, row.Error), width))
		}
	}
	if taken {
		fmt.Fprintln(b, "CPU s/GB: of tailscaled at the sender + at the receiver, for 10^9 bytes")
	}
	if r.Congestion != "" {
		fmt.Fprintf(b, "TCP: %s\n", r.Congestion)
	}
	for _, of := range []Way{ByTailnet, ByUnderlay} {
		if share, n := r.share(of); n > 0 {
			fmt.Fprintf(b, "pods have %.2f of what their nodes have by the %s (1 stream, median of %d)\n", share, of, n)
		}
	}
	if n := r.late(); n > 0 {
		fmt.Fprintf(b, "%d of %d ways were not measured: --time was over\n", n, len(r.Rows))
	}
	if r.Pairs < r.Wanted {
		fmt.Fprintf(b, "%d of %d pairs: --time, or --nodes, for the others\n", r.Pairs, r.Wanted)
	}
	if r.Note != "" {
		b.WriteString(printable.Fold("", 2, r.Note, width))
	}
	Report{Findings: r.Findings}.wrong(b)
	_, err := io.WriteString(out, b.String())
	return err
}

func (r Rate) cpuText() string {
	if r.SenderCPU == 0 && r.ReceiverCPU == 0 {
		return ""
	}
	return fmt.Sprintf("%.1f + %.1f", r.SenderCPU, r.ReceiverCPU)
}

func bits(rate float64) string {
	switch {
	case rate >= 1e8:
		return fmt.Sprintf("%.2f Gbit/s", rate/1e9)
	case rate >= 1e6:
		return fmt.Sprintf("%.1f Mbit/s", rate/1e6)
	}
	return fmt.Sprintf("%.0f kbit/s", rate/1e3)
}

func millis(ms float64) string {
	if ms < 10 {
		return fmt.Sprintf("%.2f ms", ms)
	}
	return fmt.Sprintf("%.0f ms", ms)
}
