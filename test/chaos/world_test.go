package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/ipam"
)

const (
	nodes = 3
	// pods of each node stay but for a power cut, and are the ends of streams.
	pods = 2
)

// world is a lab with pods whose streams never end.
type world struct {
	*lab.Lab
	nodes   []*node
	flows   []flow
	capture *lab.Capture
	frames  uint64 // on the wires before the first fault
	name    int    // of the last pod that was added
	tally   tally
}

// node is one of the lab's, with its pods.
type node struct {
	*lab.Node
	stay  []*lab.Pod
	guest []*lab.Pod // come and go
	noise *noise
	want  string // its state when nothing is broken
	lines string // our lines of defence then
}

// flow are the streams from one pod to another.
type flow struct {
	from, to *lab.Pod
	labtest.Flows
}

func newWorld(t *testing.T) *world {
	t.Helper()
	strategies := []ipam.Strategy{ipam.Sequential, ipam.DensePack, ipam.Random}
	w := &world{tally: tally{kinds: map[string]*kindTally{}}}
	w.Lab = labtest.New(t, lab.Options{
		Nodes: nodes, Modes: []string{config.ModeHost, config.ModeDaemon, config.ModeHost}, Bin: labtest.Programs(t), Relay: true,
		Configure: func(n *lab.Node, c map[string]any) {
			labtest.Section(c, "network")["serviceCIDRs"] = lab.ServiceCIDRs
			labtest.Section(c, "ipam")["strategy"] = strategies[int(n.Name[len(n.Name)-1]-'1')]
		},
		Policy: func(p map[string]any) {
			p["nodeAttrs"] = []map[string]any{{"target": []string{lab.Tag}, "attr": []string{"cache-network-maps"}}}
		},
	})
	for _, n := range w.Nodes {
		w.nodes = append(w.nodes, &node{Node: n})
	}
	t.Cleanup(func() { w.end(t) })
	for _, n := range w.nodes {
		w.settle(t, n)
	}
	w.startFlows(t)
	for i, n := range w.nodes {
		w.startNoise(n)
		labtest.Ready(t, n.Node)
		// Who else is in the tailnet a node hears in its own time.
		labtest.Eventually(t, n.Name+" knows the others", func() error {
			members, err := n.Run(t.Context(), "nft", "list", "set", "ip", "headcni", "members")
			for _, other := range w.nodes {
				if a := labtest.TailnetAddrs(t, other.Node)[0]; other != n && !strings.Contains(members, a.String()) {
					err = errors.Join(err, fmt.Errorf("not %s of %s", a, other.Name))
				}
			}
			return err
		})
		var err error
		if n.want, err = state(t.Context(), n.Node); err != nil {
			t.Fatal(err)
		}
		if n.lines, err = n.Run(t.Context(), "bash", "-c", defences); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(n.want, "5192:") || !strings.Contains(n.want, "chain guard") || !strings.Contains(n.want, "unreachable") {
			t.Fatalf("node %d has not what is to be looked at:\n%s", i+1, n.want)
		}
	}
	w.tally.rowsOf(kinds())
	w.next(t)
	var err error
	if w.frames, err = w.Lab.Frames(); err != nil {
		t.Fatal(err)
	}
	return w
}

// end ends what is not the lab's.
func (w *world) end(t *testing.T) {
	w.stopFlows()
	for _, n := range w.nodes {
		n.noise.end()
	}
	if w.capture != nil {
		if _, err := w.capture.Stop(); err != nil && !t.Failed() {
			t.Error(err)
		}
	}
}

// settle gives a node the pods that stay.
func (w *world) settle(t *testing.T, n *node) {
	t.Helper()
	n.stay, n.guest = nil, nil
	for i := range pods {
		p, err := n.AddPod(labtest.Within(t), fmt.Sprintf("stay-%d", i+1), lab.PodOptions{})
		if err != nil {
			t.Fatal(err)
		}
		w.tally.adds++
		n.stay = append(n.stay, p)
	}
}

// startFlows has a pod of each node send to one of each other node, and the second pod of each node to the first.
func (w *world) startFlows(t *testing.T) {
	t.Helper()
	for _, a := range w.nodes {
		for _, b := range w.nodes {
			from := a.stay[0]
			if a == b {
				from = a.stay[1]
			}
			w.flows = append(w.flows, flow{from, b.stay[0], labtest.StartFlows(t, from, b.stay[0])})
		}
	}
	for _, f := range w.flows {
		f.WaitBack(t, time.Time{})
	}
}

// stopFlows ends all streams, at once.
func (w *world) stopFlows() {
	var all labtest.Flows
	for _, f := range w.flows {
		all = append(all, f.Flows...)
	}
	w.flows = nil
	for _, r := range all.Stop() {
		w.tally.sent += r.Sent
		w.tally.lost += r.Lost
	}
}

// defences are our rules, last routes and tables. What is asked of a node is asked all the time while it is repaired, on the processors
// that are to repair it: two processes for each family. (nft 1.0.6 finds the last table only where one process is to list two.) Rules are
// sorted: of those with one number, whose order says nothing, the one that came back is the last.
const defences = `for f in -4 -6; do ip -force $f -batch - <<< $'rule\nroute show type unreachable' | LC_ALL=C sort || :; done
{ nft -s list table ip headcni; nft -s list table ip6 headcni; } | sed '/^\tset ask/,/^\t}$/d; /^\tset sources /,/^\t}$/d'`

// state is what faults must leave alone on a node, or what must come back: rules, guard, last routes, tailscaled's routes, the tun, the
// conflist and the sockets. Which addresses pods have gone through lately is none of it, nor what they send from.
func state(ctx context.Context, n *lab.Node) (string, error) {
	return n.Run(ctx, "bash", "-c", defences+fmt.Sprintf(`
for f in -4 -6; do
	ip -force $f -o -batch - <<< $'route show table 52\nroute show default\naddress show dev %[1]s scope global\nlink show dev %[1]s' || :
done | sed -E 's/^[0-9]+: //; s/.* mtu ([0-9]+) .*/mtu \1/; s/^[^ ]+ +inet6? ([^ ]+) .*/\1/' | LC_ALL=C sort
read -r a < /proc/sys/net/ipv4/ip_forward; read -r b < /proc/sys/net/ipv6/conf/all/forwarding; echo $a $b
echo "$(< %[2]s/%[3]s)"
cd %[4]s && for f in api.sock daemon.sock daemon.lock; do [[ -e $f ]] && echo $f; done`, n.Tun, paths.CNIConfDir, paths.ConflistName, paths.RunDir))
}

// repaired waits until all nodes are ready and as before, and after that something has arrived by each stream.
func (w *world) repaired(ctx context.Context) error {
	errs := make([]error, len(w.nodes))
	var wg sync.WaitGroup
	for i, n := range w.nodes {
		wg.Go(func() { errs[i] = n.repaired(ctx) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	since := time.Now()
	for _, f := range w.flows {
		for _, s := range f.Flows {
			if _, err := s.WaitBack(ctx, since); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

func (n *node) repaired(ctx context.Context) error {
	for {
		if err := n.WaitReady(ctx); err != nil {
			return err
		}
		now, err := state(context.WithoutCancel(ctx), n.Node)
		if err == nil && now == n.want {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s is not as before: %w, %v (-before +now):\n%s", n.Name, context.Cause(ctx), err, cmp.Diff(n.want, now))
		}
	}
}

// recover ends what may be in the way of the next fault after one that was not repaired, and tells whether that helped.
func (w *world) recover(t *testing.T) bool {
	for _, n := range w.nodes {
		if !n.Tailscaled.Alive() {
			labtest.StartTailscaled(t, n.Node)
		}
		if err := errors.Join(n.Daemon.Kill(), n.StartDaemon()); err != nil {
			t.Error(err)
			return false
		}
	}
	if err := w.repaired(labtest.Within(t)); err != nil {
		t.Errorf("not even a restart of the daemons helps: %v", err)
		return false
	}
	return true
}

// strike is one round.
func (w *world) strike(t *testing.T, r round) {
	for i, n := range w.nodes {
		n.noise.hush(hushed(r.of(i)))
	}
	over := w.breakAndMend(t, r)
	w.bared(t, r, over)
	ctx, cancel := context.WithTimeoutCause(t.Context(), bound(r), fmt.Errorf("not within %v", bound(r)))
	defer cancel()
	err := w.repaired(ctx)
	took := time.Since(over)
	if err != nil {
		t.Errorf("not repaired: %v", err)
	} else {
		t.Logf("repaired after %v", took.Round(time.Millisecond))
		w.tally.repaired(r, took)
		w.guestsTalk(t, r)
		for _, n := range w.nodes {
			n.noise.hush(0)
		}
	}
	w.sealed(t)
}

// bared judges a round that has taken all lines of defence from a node. No rule, table or route of ours is left to hold what tailscaled has
// no route for, so until they stand again, and not longer, what the node's pods send to addresses that nobody has is seen in clear, and
// what other nodes' pods send to such addresses of this node. What is for a pod or a tailnet address still has tailscaled's routes, and
// other nodes have their lines.
func (w *world) bared(t *testing.T, r round, over time.Time) {
	t.Helper()
	if !r.has(func(k *kind) bool { return k.bare }) {
		return
	}
	n := w.nodes[r[0].node]
	labtest.Eventually(t, "the lines of defence stand again", func() error {
		now, err := n.Run(labtest.Within(t), "bash", "-c", defences)
		if err == nil && now != n.lines {
			err = errors.New(cmp.Diff(n.lines, now))
		}
		return err
	})
	w.tally.bare = append(w.tally.bare, time.Since(over))
	somebody := w.somebody(t)
	ours := func(a netip.Addr) bool {
		return slices.ContainsFunc(n.PodCIDRs, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	for pair, k := range w.next(t).Between {
		from, to := pair[0], pair[1]
		if slices.Contains(somebody, from) && !slices.Contains(somebody, to) && (ours(from) || ours(to)) {
			w.tally.bareClear += k
			continue
		}
		w.tally.clear += k
		t.Errorf("%d packets in clear from %s to %s, for which a line was left", k, from, to)
	}
}

// somebody are the addresses of nodes and pods.
func (w *world) somebody(t *testing.T) (all []netip.Addr) {
	t.Helper()
	for _, n := range w.nodes {
		all = slices.Concat(all, n.Underlay, labtest.TailnetAddrs(t, n.Node))
		for _, p := range n.pods() {
			all = slices.Concat(all, p.Addrs)
		}
	}
	return all
}

// bound is how long repair may take: what the daemon looks at each minute takes more.
func bound(r round) time.Duration {
	if r.has(func(k *kind) bool { return k.slow }) {
		return 2 * labtest.Soon
	}
	return labtest.Soon
}

// breakAndMend strikes, and mends each fault when its time is over. It returns when the last one was over: what mends itself is over when
// it has struck.
func (w *world) breakAndMend(t *testing.T, r round) (over time.Time) {
	t.Helper()
	type due struct {
		at time.Time
		b  *blow
	}
	var later []due
	defer func() { // after a failure too, which ends this function anywhere
		for _, d := range later {
			d.b.s.kind.mend(t, d.b)
		}
	}()
	blows := make([]*blow, len(r))
	for i, s := range r {
		blows[i] = &blow{w: w, n: w.nodes[s.node], s: s, r: r}
		s.kind.strike(t, blows[i])
		over = time.Now()
		if s.kind.mend != nil {
			later = append(later, due{over.Add(s.stay), blows[i]})
		}
	}
	slices.SortFunc(later, func(a, b due) int { return a.at.Compare(b.at) })
	for len(later) > 0 {
		d := later[0]
		time.Sleep(time.Until(d.at))
		later = later[1:]
		d.b.s.kind.mend(t, d.b)
		over = time.Now()
	}
	for _, b := range blows {
		if b.s.kind.after != nil {
			b.s.kind.after(t, b)
		}
	}
	return over
}

// next begins another capture before it ends the last one, so that there is always one.
func (w *world) next(t *testing.T) (got lab.Captured) {
	t.Helper()
	c, err := w.CaptureUnderlay()
	if err != nil {
		t.Fatal(err)
	}
	if w.capture != nil {
		if got, err = w.capture.Stop(); err != nil {
			t.Error(err)
		}
	}
	w.capture = c
	return got
}

// control are the addresses of control packets, which no pod has.
var control = []netip.Addr{netip.MustParseAddr("10.244.250.1"), netip.MustParseAddr("fd00:244:fa::1")}

// sealed holds that the capture since the last round saw nothing in clear but the packets that are put on each wire now to prove that
// it sees them.
func (w *world) sealed(t *testing.T) {
	t.Helper()
	sent, before := 0, w.capture.Clear()
	for _, n := range w.nodes {
		for _, a := range control {
			if err := w.SendClear(n.Node, a, a); err != nil {
				t.Fatal(err)
			}
			sent++
		}
	}
	labtest.Eventually(t, "the capture sees what is in clear", func() error {
		if seen := w.capture.Clear() - before; seen < sent {
			return fmt.Errorf("%d of %d control packets", seen, sent)
		}
		return nil
	})
	got := w.next(t)
	w.tally.controls += sent
	if got.Clear -= sent; got.Clear > 0 {
		w.tally.clear += got.Clear
		which := slices.DeleteFunc(got.Examples, func(e string) bool {
			return strings.HasPrefix(e, control[0].String()) || strings.HasPrefix(e, control[1].String())
		})
		t.Errorf("%d packets in clear, such as %v", got.Clear, which)
	}
}

// look collects garbage and holds that leases, pods and what the plugins say of them agree, that no address is given twice, and that
// every pod talks to every other. New streams begin.
func (w *world) look(t *testing.T) {
	w.stopFlows()
	owner := map[netip.Addr]*lab.Pod{}
	for _, n := range w.nodes {
		if err := n.GC(labtest.Within(t), n.pods()); err != nil {
			t.Error(err)
		}
		w.leases(t, n)
		for _, p := range n.pods() {
			// Neighbours that are gone alone the daemon sees when it looks, each minute.
			labtest.EventuallyWithin(t, 2*labtest.Soon, fmt.Sprintf("CHECK of %s on %s", p.Name, n.Name), func() error { return p.Check(labtest.Within(t)) })
			for _, a := range p.Addrs {
				if o := owner[a]; o != nil {
					w.tally.twice++
					t.Errorf("%s of %s and %s of %s both have %s", o.Name, o.Node.Name, p.Name, n.Name, a)
				}
				owner[a] = p
			}
		}
	}
	for _, n := range w.nodes {
		for _, p := range n.pods() {
			w.talks(t, p)
		}
	}
	w.startFlows(t)
	w.sealed(t)
}

// pods are all of a node's.
func (n *node) pods() []*lab.Pod { return slices.Concat(n.stay, n.guest) }

// leases holds that each pod of a node has the lease that says so, and that there are no others.
func (w *world) leases(t *testing.T, n *node) {
	t.Helper()
	var leases []ipam.Lease
	if err := json.Unmarshal([]byte(labtest.Sh(t, n.Machine, "headcnictl ipam list --local -o json")), &leases); err != nil {
		t.Fatal(err)
	}
	got, want := map[string][]netip.Addr{}, map[string][]netip.Addr{}
	for _, l := range leases {
		if got[l.ContainerID] != nil {
			t.Errorf("%s: %s has two leases", n.Name, l.ContainerID)
		}
		for _, a := range l.Addrs {
			got[l.ContainerID] = append(got[l.ContainerID], a.Addr.Addr())
		}
	}
	for _, p := range n.pods() {
		want[p.ID] = p.Addrs
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("leases of %s (-pods +leases):\n%s", n.Name, diff)
	}
	if out, err := n.Run(labtest.Within(t), "headcnictl", "ipam", "check", "--local"); err != nil || !strings.Contains(out, "all well") {
		t.Errorf("ipam check on %s: %v\n%s", n.Name, err, out)
	}
}

// talks holds that a pod and the first ones of all nodes reach each other by TCP, as who they are.
func (w *world) talks(t *testing.T, p *lab.Pod) {
	t.Helper()
	for _, n := range w.nodes {
		o := n.stay[0]
		if o == p {
			continue
		}
		for _, v6 := range []bool{false, true} {
			name := fmt.Sprintf("%s of %s to %s of %s, %s", p.Name, p.Node.Name, o.Name, n.Name, labtest.Family(v6))
			labtest.WantTCP(t, name, p, labtest.Echo(o, v6), p.Addr(v6))
			labtest.WantTCP(t, "the other way: "+name, o, labtest.Echo(p, v6), o.Addr(v6))
		}
	}
}
