package reliability

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config/paths"
)

// Directions of a flow, seen from the node that a fault strikes.
const (
	from = iota
	to
	both
)

// fault is something that breaks and is mended again.
type fault struct {
	name string
	// harmless faults cost not one datagram.
	harmless bool
	// oneWay has each direction measured by itself: two-way traffic hides sessions that are dark in one.
	oneWay bool
	// repeats is how often it strikes each node, in each direction where oneWay is set; 0 is once.
	repeats int
	// strike breaks the node and mends it.
	strike func(t *testing.T, w *world, n *lab.Node, f labtest.Flows)
	// after, if any, is what is measured next, in a row of its own: Headscale returns.
	after     func(t *testing.T, w *world)
	afterName string
}

// row is a line of the table.
type row struct {
	name       string
	sent, lost int
	gaps       [2][]time.Duration // the longest without an arrival, per direction and stroke
	clear      int
}

// measure strikes every node and returns a row for each.
func measure(t *testing.T, w *world, f fault) (rows []row) {
	t.Helper()
	for i, n := range w.Nodes {
		r := f.rows(", " + n.Mode + " mode")
		t.Run(r[0].name, func(t *testing.T) {
			for range max(1, f.repeats) {
				if !f.oneWay {
					w.strike(t, r, f, i, both)
					continue
				}
				w.strike(t, r, f, i, from)
				w.strike(t, r, f, i, to)
			}
		})
		rows = append(rows, r...)
	}
	return rows
}

// rows are what strike fills.
func (f fault) rows(where string) []row {
	rows := []row{{name: f.name + where}}
	if f.after != nil {
		rows = append(rows, row{name: f.afterName + where})
	}
	return rows
}

// strike measures one stroke on node number i.
func (w *world) strike(t *testing.T, rows []row, f fault, i, direction int) {
	t.Helper()
	w.calm(t)
	before := w.state(t)
	for k := range rows {
		inClear := w.capture(t)
		m := w.watch(t, i, direction)
		if k == 0 {
			f.strike(t, w, w.Nodes[i], m.streams())
		} else {
			f.after(t, w)
		}
		m.end(t, &rows[k], f.harmless && k == 0)
		rows[k].clear += inClear()
	}
	w.calm(t)
	w.unchanged(t, rows[0].name, before)
}

// measurement is of the flows during one stroke.
type measurement struct {
	began time.Time
	flows [2]labtest.Flows // per direction
}

// watch starts a measurement.
func (w *world) watch(t *testing.T, i, direction int) *measurement {
	t.Helper()
	m := &measurement{flows: w.flows(t, i, direction)}
	time.Sleep(settled)
	m.began = time.Now()
	return m
}

func (m *measurement) streams() labtest.Flows { return slices.Concat(m.flows[from], m.flows[to]) }

// end waits until everything flows and adds what happened to a row.
func (m *measurement) end(t *testing.T, r *row, harmless bool) {
	t.Helper()
	m.streams().WaitBack(t, time.Now())
	time.Sleep(settled)
	reports := m.streams().Stop()
	for d := range m.flows {
		var worst time.Duration
		for _, s := range m.flows[d] {
			got := reports[0]
			reports = reports[1:]
			r.sent, r.lost, worst = r.sent+got.Sent, r.lost+got.Lost, max(worst, got.Longest)
			t.Logf("%s: %s lost %d of %d, was dark for %v from %v on", r.name, s.Name, got.Lost, got.Sent,
				got.Longest.Round(time.Millisecond), got.Dark.Sub(m.began).Round(time.Millisecond))
			if harmless && got.Lost > 0 {
				t.Errorf("%s: %s lost %d of %d", r.name, s.Name, got.Lost, got.Sent)
			}
		}
		if len(m.flows[d]) > 0 {
			r.gaps[d] = append(r.gaps[d], worst)
		}
	}
}

// flows starts streams of both families between the pod of node number i and the other.
func (w *world) flows(t *testing.T, i, direction int) (flows [2]labtest.Flows) {
	t.Helper()
	struck, other := w.pods[i], w.pods[1-i]
	for d, ends := range [][2]*lab.Pod{from: {struck, other}, to: {other, struck}} {
		if direction == both || direction == d {
			flows[d] = labtest.StartFlows(t, ends[0], ends[1])
		}
	}
	for _, f := range flows {
		f.WaitBack(t, time.Time{})
	}
	return flows
}

// capture looks for packets in clear until the function that it returns is called, which fails where there is one.
func (w *world) capture(t *testing.T) (stop func() int) {
	t.Helper()
	captured := labtest.Capture(t, w.Lab)
	return func() int {
		t.Helper()
		got := captured()
		labtest.NoneInClear(t, got)
		return got.Clear
	}
}

// calm waits until nothing is left of the fault before: Headscale sees all nodes, their daemons have nothing to do, and
// their pods talk by a direct path.
func (w *world) calm(t *testing.T) {
	t.Helper()
	must(t, w.Control.WaitConnected(labtest.Within(t), len(w.Nodes)))
	for _, n := range w.Nodes {
		must(t, n.WaitReady(labtest.Within(t)))
	}
	flows := w.flows(t, 0, both)
	w.waitPath(t, true)
	slices.Concat(flows[from], flows[to]).Stop()
}

// waitPath waits until each node sends to the other by a direct path, or by the relay. Something has to be sent.
func (w *world) waitPath(t *testing.T, direct bool) {
	t.Helper()
	labtest.Eventually(t, fmt.Sprintf("direct path: %v", direct), func() error {
		for _, n := range w.Nodes {
			at, err := peerPaths(t, n)
			if err != nil {
				return err
			}
			for peer, addr := range at {
				if (addr != "") != direct {
					return fmt.Errorf("%s reaches %s at %q", n.Name, peer, addr)
				}
			}
		}
		return nil
	})
}

// peerPaths are the addresses at which a node reaches its peers directly; empty where it uses the relay.
func peerPaths(t *testing.T, n *lab.Node) (map[string]string, error) {
	out, err := n.Run(labtest.Within(t), "tailscale", "--socket="+n.Socket(), "status", "--json")
	if err != nil {
		return nil, err
	}
	var status struct {
		Peer map[string]struct{ HostName, CurAddr string }
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil {
		return nil, err
	}
	got := map[string]string{}
	for _, p := range status.Peer {
		got[p.HostName] = p.CurAddr
	}
	if len(got) == 0 {
		return nil, fmt.Errorf("%s has no peers", n.Name)
	}
	return got, nil
}

// state is what faults must leave alone on every node, or bring back: rules, guard, conflist, and tailscaled's
// preferences, the user's own among them.
func (w *world) state(t *testing.T) map[string]string {
	t.Helper()
	got := map[string]string{}
	for _, n := range w.Nodes {
		for _, cmd := range []string{
			"ip -4 rule", "ip -6 rule", "ip -4 route show type unreachable", "ip -6 route show type unreachable",
			"nft -s list table ip headcni", "nft -s list table ip6 headcni",
			"cat " + paths.CNIConfDir + "/" + paths.ConflistName, "tailscale --socket=" + n.Socket() + " debug prefs",
		} {
			args := strings.Fields(cmd)
			out, err := n.Run(labtest.Within(t), args[0], args[1:]...)
			must(t, err)
			got[n.Name+": "+cmd] = podsSources.ReplaceAllString(out, "")
		}
	}
	return got
}

// podsSources are elements of the cache of what pods send from: pods come and go.
var podsSources = regexp.MustCompile(`(?s)\tset sources \{.*?\n\t\}\n`)

func (w *world) unchanged(t *testing.T, what string, before map[string]string) {
	t.Helper()
	if diff := cmp.Diff(before, w.state(t)); diff != "" {
		t.Errorf("%s has changed the nodes (-before +after):\n%s", what, diff)
	}
}

// printTable writes the rows as in docs/reliability.md.
func printTable(rows []row) {
	fmt.Println("| fault | lost of sent | longest gap from the node | longest gap to the node | packets in clear |")
	fmt.Println("|---|---|---|---|---|")
	for _, r := range rows {
		lost := fmt.Sprintf("%d of %d", r.lost, r.sent)
		if r.sent == 0 {
			lost = "-"
		}
		fmt.Printf("| %s | %s | %s | %s | %d |\n", r.name, lost, seconds(r.gaps[from]), seconds(r.gaps[to]), r.clear)
	}
}

// seconds are those of each stroke.
func seconds(gaps []time.Duration) string {
	if len(gaps) == 0 {
		return "-"
	}
	var each []string
	for _, g := range gaps {
		each = append(each, fmt.Sprintf("%.2f", g.Seconds()))
	}
	return strings.Join(each, ", ") + " s"
}
