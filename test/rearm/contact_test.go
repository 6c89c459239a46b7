package rearm

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
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
	joining = flag.Int("joining", 3, "nodes that join together in each lab of TestContact")
	silence = flag.Duration("silence", 0, "how long the pairs are silent before they talk again; sessions end after 180 s; 0: they do not")
	// roundTrip chooses one.
	roundTrip = flag.Duration("rtt", -1, "the only round trip to measure with")
	before    = flag.Int("before", 0, "nodes of a lab beside each, whose tailscaleds refuse the daemon's pings: how it is without them")
)

// roundTrips are those between two nodes: all for a table, else the longest, where it is worst.
func roundTrips() []time.Duration {
	if *roundTrip >= 0 {
		return []time.Duration{*roundTrip}
	}
	if *trials < 10 {
		return []time.Duration{80 * time.Millisecond}
	}
	return []time.Duration{0, 20 * time.Millisecond, 80 * time.Millisecond}
}

// atOnce bounds the pairs that are measured at the same time: what the machine is busy for is not to be measured.
const atOnce = 4

// watched is how long a pair is watched where nothing heals it: most of those that are dark stay so.
const watched = 20 * time.Second

// TestContact has nodes join together and the pods of each pair of them begin to talk as soon as they can, both within about
// one way of the path, each sending and neither answering; and once more after a silence. Two sides that both begin a handshake
// refuse each other's answer, and do so again every 5 s.
func TestContact(t *testing.T) {
	bin := labtest.Programs(t)
	found := table{}
	pairs := *joining * (*joining - 1) / 2
	for done := 0; done < *trials; done += pairs {
		t.Run(fmt.Sprintf("lab %d", 1+done/pairs), func(t *testing.T) {
			var meetings []*meeting
			for _, rtt := range roundTrips() {
				meetings = append(meetings, newMeeting(t, bin, rtt, *joining, true))
				if *before > 0 {
					meetings = append(meetings, newMeeting(t, bin, rtt, *before, false))
				}
			}
			for _, m := range meetings {
				found.add(m.name("first contact"), m.contacts(t, "first contact", true))
			}
			if *silence == 0 {
				return
			}
			beQuiet(t, meetings)
			for _, m := range meetings {
				found.add(m.name("after silence"), m.contacts(t, "after silence", false))
			}
		})
	}
	found.report(t)
	if trapped := found.trapped(func(name string) bool { return strings.HasSuffix(name, uncuredName) }); *before > 0 && trapped == 0 {
		t.Error("no pair was dark where pings are refused: what was measured proves nothing")
	}
}

// beQuiet lets the silence pass, and prints what it cost to keep the sessions meanwhile: compare with a daemon that keeps none.
func beQuiet(t *testing.T, meetings []*meeting) {
	t.Helper()
	was := spent(t, meetings)
	time.Sleep(*silence)
	after := spent(t, meetings)
	for i, m := range meetings {
		d, n := after[i], len(m.Nodes)
		fmt.Printf("| %s | %d nodes | %d pings | %v of processor time and %d bytes on the wire for each tailscaled |\n", m.name(fmt.Sprintf("silence of %v", *silence)),
			n, d.pings-was[i].pings, ((d.cpu - was[i].cpu) / time.Duration(n)).Round(time.Millisecond), (d.bytes-was[i].bytes)/uint64(n))
	}
}

// cost is what the nodes of a lab have used together so far.
type cost struct {
	cpu   time.Duration // of their tailscaleds
	bytes uint64        // sent and received on the underlay
	pings int
}

func spent(t *testing.T, meetings []*meeting) (all []cost) {
	t.Helper()
	for _, m := range meetings {
		var c cost
		for _, n := range m.Nodes {
			link, err := n.Net.LinkByName("eth0")
			if err != nil {
				t.Fatal(err)
			}
			c.bytes += link.Attrs().Statistics.RxBytes + link.Attrs().Statistics.TxBytes
			c.cpu += processorTime(t, n.Tailscaled.PID())
		}
		for _, n := range pings(t, m.Lab) {
			c.pings += n
		}
		all = append(all, c)
	}
	return all
}

// processorTime is what a process has used, from Documentation/scheduler/sched-stats.rst.
func processorTime(t *testing.T, pid int) (d time.Duration) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(threads) == 0 {
		t.Fatalf("no threads of process %d: %v", pid, err)
	}
	for _, file := range threads {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a thread that has ended
		}
		var ns int64
		if _, scanErr := fmt.Sscan(string(b), &ns); err != nil || scanErr != nil {
			t.Fatal(errors.Join(err, scanErr))
		}
		d += time.Duration(ns)
	}
	return d
}

// meeting is a lab of nodes that have not joined yet.
type meeting struct {
	*lab.Lab
	rtt   time.Duration
	cured bool // the daemons' pings are answered
	pods  []*lab.Pod
	ready []chan struct{} // closed when the node's pod is there
}

func newMeeting(t *testing.T, bin string, rtt time.Duration, nodes int, cured bool) *meeting {
	t.Helper()
	m := &meeting{rtt: rtt, cured: cured}
	m.Lab = labtest.New(t, lab.Options{
		Nodes: nodes, Spare: nodes, Modes: []string{config.ModeDaemon}, Bin: bin, Batch: 500 * time.Millisecond,
		Delays: []time.Duration{rtt / 4}, NoPings: !cured,
	})
	m.pods = make([]*lab.Pod, len(m.Nodes))
	for range m.Nodes {
		m.ready = append(m.ready, make(chan struct{}))
	}
	return m
}

// uncuredName ends the names of what is measured without the daemons' pings.
const uncuredName = ", pings refused"

func (m *meeting) name(what string) string { return kind(what, m.rtt, m.cured) }

func kind(what string, rtt time.Duration, cured bool) string {
	name := fmt.Sprintf("%s, %v", what, rtt)
	if !cured {
		name += uncuredName
	}
	return name
}

func (m *meeting) patience() time.Duration {
	if m.cured {
		return patience
	}
	return watched
}

// contacts has each pair talk, where they are to join as soon as their nodes have.
func (m *meeting) contacts(t *testing.T, what string, join bool) []contact {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	if join {
		for i := range m.Nodes {
			wg.Go(func() {
				if err := m.join(ctx, i); err != nil {
					t.Error(err)
					cancel()
				}
			})
		}
	}
	slots := make(chan struct{}, atOnce)
	var mu sync.Mutex
	var all []contact
	for i := range m.Nodes {
		for j := range i {
			wg.Go(func() {
				if m.await(ctx, i) != nil || m.await(ctx, j) != nil {
					return // told by who joins
				}
				slots <- struct{}{}
				defer func() { <-slots }()
				c, err := m.contact(ctx, m.pods[i], m.pods[j], (i+j)%2 == 1)
				if err != nil {
					t.Error(err)
				}
				t.Logf("%s: %s dark for %v, the underlay for %v (%s)", m.name(what), c.pair, c.dark.Round(time.Millisecond),
					c.control.Round(time.Millisecond), c.state)
				mu.Lock()
				defer mu.Unlock()
				all = append(all, c)
			})
		}
	}
	wg.Wait()
	return all
}

// join starts a node and a pod on it as soon as it can have one.
func (m *meeting) join(ctx context.Context, i int) (err error) {
	n := m.Nodes[i]
	if err := errors.Join(n.ConfigureDaemon(nil), n.StartTailscaled()); err != nil {
		return err
	}
	if err := n.WaitSocket(ctx); err != nil {
		return err
	}
	if err := n.StartDaemon(); err != nil {
		return err
	}
	if err := n.WaitReady(ctx); err != nil {
		return err
	}
	if m.pods[i], err = n.AddPod(ctx, "probe", lab.PodOptions{Idle: true}); err != nil {
		return err
	}
	close(m.ready[i])
	return nil
}

func (m *meeting) await(ctx context.Context, i int) error {
	select {
	case <-m.ready[i]:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// contact is how two pods fared that began to talk at about the same moment.
type contact struct {
	pair string
	// dark is from the start of the later side to the first arrival of the worse direction.
	dark time.Duration
	// control is that of a stream between the nodes themselves, outside the tunnel: what the machine was busy for.
	control time.Duration
	// state is what the tailscaleds said of their sessions just before.
	state string
}

// sessionOf says what a node's tailscaled knows of the session with another node, for the log.
func sessionOf(ctx context.Context, n, with *lab.Node) string {
	st, err := tailscale.New(n.Path(n.Socket())).Status(ctx)
	if err != nil {
		return err.Error()
	}
	for _, p := range st.Peers {
		if p.Name == with.Name {
			return fmt.Sprintf("%s: %s, active %v, handshake %v ago", n.Name, p.Path(), p.Active, time.Since(p.Handshake).Round(time.Second))
		}
	}
	return n.Name + ": no such peer"
}

// contact measures one pair. The second side starts within one and a half ways of the path.
func (m *meeting) contact(ctx context.Context, a, b *lab.Pod, v6 bool) (contact, error) {
	c := contact{pair: a.Node.Name + " and " + b.Node.Name}
	if err := errors.Join(a.Node.WaitRoute(ctx, b.Addr(v6)), b.Node.WaitRoute(ctx, a.Addr(v6))); err != nil {
		return c, err
	}
	if rand.N(2) == 1 {
		a, b = b, a
	}
	c.state = sessionOf(ctx, a.Node, b.Node) + "; " + sessionOf(ctx, b.Node, a.Node)
	control, err := lab.StartStream(ctx, "underlay", a.Node, b.Node, b.Node.Underlay[0])
	if err != nil {
		return c, err
	}
	one, err := lab.StartStream(ctx, "there", a, b, b.Addr(v6))
	if err != nil {
		return c, err
	}
	time.Sleep(rand.N(m.rtt*3/4 + time.Millisecond))
	later := time.Now()
	two, err := lab.StartStream(ctx, "back", b, a, a.Addr(v6))
	if err != nil {
		return c, err
	}
	for _, s := range []*lab.Stream{one, two, control} {
		took := darkFor(ctx, s, later, m.patience())
		if s == control {
			c.control = took
		} else {
			c.dark = max(c.dark, took)
		}
	}
	for _, s := range []*lab.Stream{one, two, control} {
		s.Stop()
	}
	return c, nil
}

// darkFor waits for a stream and returns how long it was dark, most at most.
func darkFor(ctx context.Context, s *lab.Stream, since time.Time, most time.Duration) time.Duration {
	ctx, cancel := context.WithDeadline(ctx, since.Add(most))
	defer cancel()
	took, err := s.WaitBack(ctx, since)
	if err != nil {
		return most
	}
	return took
}

// table holds the contacts of each kind.
type table map[string][]contact

func (found table) add(kind string, c []contact) { found[kind] = append(found[kind], c...) }

// trapped counts the contacts, of the kinds that are chosen, that were dark for what only WireGuard's timers explain.
func (found table) trapped(chosen func(kind string) bool) (n int) {
	for kind, all := range found {
		for _, c := range all {
			if chosen(kind) && c.dark-c.control > uncured {
				n++
			}
		}
	}
	return n
}

// report prints one line for each kind, and fails where pairs were dark for what only WireGuard's timers explain although
// pings were answered.
func (found table) report(t *testing.T) {
	t.Helper()
	for _, kind := range slices.Sorted(maps.Keys(found)) {
		all := found[kind]
		if len(all) == 0 {
			t.Errorf("%s: no trial", kind)
			continue
		}
		var dark, excess []float64
		for _, c := range all {
			dark, excess = append(dark, c.dark.Seconds()), append(excess, (c.dark-c.control).Seconds())
		}
		trapped := found.trapped(func(k string) bool { return k == kind })
		fmt.Printf("| %s | %d | %.2f s, %.2f s, %.2f s | %d | %d |\n", kind, len(all), at(dark, .5), at(dark, .9), at(dark, 1), over(excess, 1), trapped)
		if trapped > 0 && !strings.HasSuffix(kind, uncuredName) {
			t.Errorf("%s: %d of %d pairs were dark for %v longer than the underlay", kind, trapped, len(all), uncured)
		}
	}
}
