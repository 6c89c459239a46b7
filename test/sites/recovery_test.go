package sites

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/tailscale"
)

var (
	trials = flag.Int("trials", 0, "how often TestRecovery has each fault; 0: once, without a table")
	asleep = flag.Duration("asleep", 20*time.Second, "how long nodes sleep in TestRecovery")
	into   = flag.String("table", "", "file for the tables")
)

// patience is how long a flow may be dark after a fault: far more than it takes, and less than tailscaled alone does.
const patience = 100 * time.Second

// recovering are pairs of which each node is in one only: what one flow heals would hide what another one needs.
var recovering = [][2]string{{"home", "carrier"}, {"office", "branch"}, {"noudp", "linux"}, {"dual", "dual2"}, {"cloud", "opened"}}

// fault is something that happens to the routers or to the control host.
type fault struct {
	name string
	// do returns when it was done.
	do func(t testing.TB, w world) time.Time
	// asleep: what counts is the time since the receivers' nodes began to wake.
	asleep bool
}

var faults = []fault{
	{name: "all routers forget", do: func(t testing.TB, w world) time.Time { return forget(t, w.Nodes...) }},
	{name: "the receiver's router forgets", do: func(t testing.TB, w world) time.Time { return forget(t, w.side(1)...) }},
	{name: "the receiver's router has another address", do: func(t testing.TB, w world) time.Time { return renumber(t, w.side(1)) }},
	{name: "Headscale and its relay restart", do: func(t testing.TB, w world) time.Time {
		labtest.Kill(t, w.Control.Headscale)
		if err := w.Control.StartHeadscale(labtest.Within(t)); err != nil {
			t.Fatal(err)
		}
		return time.Now()
	}},
	{name: "the receiver sleeps and wakes elsewhere", do: func(t testing.TB, w world) time.Time { return sleep(t, w.side(1)) }, asleep: true},
}

func forget(t testing.TB, nodes ...*lab.Node) time.Time {
	t.Helper()
	for _, n := range nodes {
		for _, r := range n.Routers {
			if err := r.Forget(); err != nil {
				t.Fatal(err)
			}
		}
	}
	return time.Now()
}

// renumber gives the sites' routers addresses that none of them has had.
func renumber(t testing.TB, nodes []*lab.Node) time.Time {
	t.Helper()
	for _, n := range nodes {
		if len(n.Routers) == 0 {
			continue
		}
		if err := n.Renumber(another(n)); err != nil {
			t.Fatal(err)
		}
	}
	return time.Now()
}

// another is the host number of an outside address that no router has.
func another(n *lab.Node) int { return int(n.Underlay[0].As4()[3])%200 + 20 }

// sleep closes the lids of nodes, and opens them in other networks. It returns when it began to.
func sleep(t testing.TB, nodes []*lab.Node) time.Time {
	t.Helper()
	for _, n := range nodes {
		if err := n.Sleep(); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(*asleep)
	woke := time.Now()
	for _, n := range nodes {
		if err := n.Wake(another(n)); err != nil {
			t.Fatal(err)
		}
	}
	return woke
}

func (w world) node(name string) int {
	return slices.IndexFunc(w.Nodes, func(n *lab.Node) bool { return n.Name == name })
}

// side are the nodes of all pairs that send, 0, or receive, 1.
func (w world) side(i int) (nodes []*lab.Node) {
	for _, p := range recovering {
		nodes = append(nodes, w.Nodes[w.node(p[i])])
	}
	return nodes
}

// Pods reach each other again when routers have lost what they knew, where the receiver sends nothing at all: nothing but
// its node's own care makes its router let anything in.
func TestRecovery(t *testing.T) {
	w := sites.EnterLast(t)
	var all results
	for range max(1, *trials) {
		for _, f := range faults {
			all.add(f.name, w.recover(t, f, recovering))
		}
	}
	if *trials > 0 {
		all.write(t, "with the daemon")
	}
}

// BenchmarkRecoveryAlone is how it is where tailscaled gets no help: its LocalAPI refuses pings and rebinds.
func BenchmarkRecoveryAlone(b *testing.B) {
	w := newWorld(b, lab.Options{Modes: []string{config.ModeDaemon}, NoPings: true})
	var all results
	for range max(1, *trials) {
		for _, f := range faults {
			all.add(f.name, w.recover(b, f, recovering))
		}
	}
	all.write(b, "tailscaled alone")
}

// recover has one fault and returns how long each pair was dark, in their order.
func (w world) recover(t testing.TB, f fault, pairs [][2]string) []time.Duration {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 2*patience+*asleep+labtest.Soon, fmt.Errorf("not within %v", patience))
	defer cancel()
	flows := make([]*lab.Stream, len(pairs))
	began := time.Now()
	for i, p := range pairs {
		a, b := w.pods[w.node(p[0])], w.pods[w.node(p[1])]
		var err error
		if flows[i], err = lab.StartStream(ctx, p[0]+" to "+p[1], a, b, b.Addr(false)); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range flows {
		if _, err := s.WaitBack(ctx, began); err != nil {
			t.Fatalf("before %s: %v", f.name, err)
		}
	}
	if *trials > 0 {
		time.Sleep(15 * time.Second) // paths are found, and nothing of the beginning is left
	}
	since := f.do(t, w)
	dark := make([]time.Duration, len(flows))
	var wg sync.WaitGroup
	for i, s := range flows {
		wg.Go(func() {
			one, cancel := context.WithTimeout(ctx, 2*patience)
			defer cancel()
			back, err := s.WaitBack(one, since)
			if dark[i] = back; err == nil {
				_, err = s.WaitBack(one, since.Add(labtest.Moment))
			}
			if err != nil {
				t.Errorf("%s: %s: %v", f.name, s.Name, err)
			}
		})
	}
	wg.Wait()
	for i, s := range flows {
		if r := s.Stop(); !f.asleep {
			dark[i] = r.Longest
		}
		t.Logf("%s: %s was dark for %v", f.name, s.Name, dark[i].Round(10*time.Millisecond))
	}
	return dark
}

// results are how long pairs were dark, by fault.
type results struct {
	names []string
	dark  map[string][][]time.Duration
}

func (r *results) add(name string, dark []time.Duration) {
	if r.dark == nil {
		r.dark = map[string][][]time.Duration{}
	}
	if !slices.Contains(r.names, name) {
		r.names = append(r.names, name)
	}
	r.dark[name] = append(r.dark[name], dark)
}

// table is where tables are appended.
func table(t testing.TB) *os.File {
	t.Helper()
	if *into == "" {
		return os.Stdout
	}
	f, err := os.OpenFile(*into, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// write appends a table in Markdown.
func (r *results) write(t testing.TB, title string) {
	t.Helper()
	out := table(t)
	fmt.Fprintf(out, "\n| %s: dark, median and worst of %d |", title, *trials)
	for _, p := range recovering {
		fmt.Fprintf(out, " %s to %s |", p[0], p[1])
	}
	fmt.Fprint(out, "\n|---|---|---|---|---|---|\n")
	for _, name := range r.names {
		fmt.Fprintf(out, "| %s |", name)
		for i := range recovering {
			var all []time.Duration
			for _, one := range r.dark[name] {
				all = append(all, one[i])
			}
			slices.Sort(all)
			fmt.Fprintf(out, " %.1f s, %.1f s |", all[len(all)/2].Seconds(), all[len(all)-1].Seconds())
		}
		fmt.Fprintln(out)
	}
}

// With relays of their own nodes take the nearer one, and the other one when that dies. Then Headscale may be dead: nodes that need a relay go on,
// and find back to it.
func TestRelayApart(t *testing.T) {
	l := labtest.New(t, lab.Options{
		Nodes: 2, Names: []string{"office", "branch"}, Bin: labtest.Programs(t), Derpers: []time.Duration{100 * time.Millisecond, 0},
		Sites: []lab.Site{{NAT: lab.Hard, Strict: true}},
	})
	var pods []*lab.Pod
	for _, n := range l.Nodes {
		pods = append(pods, labtest.AddPod(t, n, "pod-"+n.Name, lab.PodOptions{}))
	}
	far, near := l.Derpers[0], l.Derpers[1]
	wantRelay(t, l, near.Name)
	stop := labtest.Capture(t, l)
	flows := labtest.StartFlows(t, pods[0], pods[1])
	flows.WaitBack(t, time.Now())
	if path := pathTo(t, l.Nodes[0], l.Nodes[1]); path != "relayed" {
		t.Errorf("the path is %s", path)
	}
	died := time.Now()
	labtest.Kill(t, near.Process)
	wantRelay(t, l, far.Name)
	flows.WaitBack(t, time.Now())
	t.Logf("pods reach each other by the other relay %v after theirs has died", time.Since(died).Round(time.Second))
	labtest.Kill(t, l.Control.Headscale)
	flows.WaitBack(t, time.Now().Add(labtest.Moment))
	forget(t, l.Nodes...)
	flows.WaitBack(t, time.Now().Add(labtest.Moment))
	flows.Stop()
	labtest.NoneInClear(t, stop())
}

// wantRelay waits until each node knows that the others are reached by a relay.
func wantRelay(t *testing.T, l *lab.Lab, name string) {
	t.Helper()
	for _, n := range l.Nodes {
		api := tailscale.New(n.Path(strings.TrimPrefix(n.Socket(), "/var")))
		labtest.EventuallyWithin(t, patience, n.Name+" is to reach others by "+name, func() error {
			st, err := api.Status(t.Context())
			if err != nil {
				return err
			}
			for _, p := range st.Peers {
				if p.Relay != name {
					return fmt.Errorf("%s is reached by %q", p.Name, p.Relay)
				}
			}
			return nil
		})
	}
}

// A router with another address leaves tailscaled's connection to Headscale hanging. Nobody misses it until Headscale restarts: who does not come
// back is offline then, and the others lose the way to his pods.
func TestHeadscaleRestartsUnseen(t *testing.T) {
	l := labtest.New(t, lab.Options{
		Nodes: 2, Names: []string{"cloud", "home"}, Bin: labtest.Programs(t), Sites: []lab.Site{{}, {NAT: lab.Easy, Strict: true}},
	})
	var pods []*lab.Pod
	for _, n := range l.Nodes {
		pods = append(pods, labtest.AddPod(t, n, "pod-"+n.Name, lab.PodOptions{}))
	}
	stop := labtest.Capture(t, l)
	flows := labtest.StartFlows(t, pods[0], pods[1])
	flows.WaitBack(t, time.Now())
	since := renumber(t, l.Nodes)
	labtest.Kill(t, l.Control.Headscale)
	if err := l.Control.StartHeadscale(labtest.Within(t)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), patience, fmt.Errorf("not within %v", patience))
	defer cancel()
	if err := l.Control.WaitConnected(ctx, len(l.Nodes)); err != nil {
		t.Error(err)
	}
	t.Logf("both nodes are connected to Headscale after %v", time.Since(since).Round(time.Second))
	flows.WaitBack(t, time.Now())
	flows.Stop()
	labtest.NoneInClear(t, stop())
}
