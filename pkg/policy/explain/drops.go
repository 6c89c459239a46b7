package explain

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/nflog"
	"github.com/headcni/headcni/pkg/policy/report"
)

const (
	// remembered is how many denied packets are kept for who asks later.
	remembered = 200
	// backlog is how many packets a follower may be behind: more are counted as lost.
	backlog = 64
)

// Drops tells of denied packets. The kernel logs them while somebody follows.
type Drops struct {
	Explainer *Explainer
	// Log has the kernel log what it denies, or not.
	Log func(on bool)
	// Read reads what is logged: nflog.Read.
	Read func(ctx context.Context, group uint16, ready func(), do func(nflog.Packet), lost func()) error

	// turn is held while the reading begins or ends.
	turn sync.Mutex
	stop func()

	mu        sync.Mutex
	followers map[*follower]bool
	broken    bool // the reading has failed
	last      []report.Drop
}

// follower is somebody who follows.
type follower struct {
	pod    string // NAMESPACE/NAME, or "" for all
	events chan report.Event
	lost   int
}

// Follow calls send with what happens from now on until ctx ends or send returns an error. pod is as in Last.
func (d *Drops) Follow(ctx context.Context, namespace, pod string, send func(report.Event) error) error {
	st, err := d.Explainer.State()
	if err != nil {
		return err
	}
	name, note, err := st.named(namespace, pod)
	if err != nil {
		return err
	}
	f := &follower{pod: name, events: make(chan report.Event, backlog)}
	if err := d.join(f); err != nil {
		return err
	}
	defer d.leave(f)
	if err := send(report.Event{Started: &report.Started{Node: st.Snapshot.Node, Note: note}}); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, more := <-f.events:
			if !more {
				return nil // an error was the last
			}
			if err := send(e); err != nil {
				return err
			}
		}
	}
}

// join adds a follower. The first has the reading begin, and then the logging.
func (d *Drops) join(f *follower) error {
	d.turn.Lock()
	defer d.turn.Unlock()
	d.mu.Lock()
	if d.followers == nil {
		d.followers = map[*follower]bool{}
	}
	d.followers[f] = true
	broken := d.broken
	d.broken = false
	d.mu.Unlock()
	if broken && d.stop != nil {
		d.stop()
		d.stop = nil
	}
	if d.stop != nil {
		return nil
	}
	err := d.begin()
	if err != nil {
		d.mu.Lock()
		delete(d.followers, f)
		d.mu.Unlock()
	}
	return err
}

// leave takes a follower out. The last one ends the logging, and then the reading.
func (d *Drops) leave(f *follower) {
	d.turn.Lock()
	defer d.turn.Unlock()
	d.mu.Lock()
	delete(d.followers, f)
	none := len(d.followers) == 0
	d.mu.Unlock()
	if none && d.stop != nil {
		d.stop()
		d.stop = nil
	}
}

func (d *Drops) begin() error {
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan struct{}), make(chan struct{})
	var failed error
	go func() {
		defer close(ended)
		failed = d.Read(ctx, policy.LogGroup, func() { close(ready) }, d.packet, d.missed)
		if failed != nil {
			d.fail(failed)
		}
	}()
	select {
	case <-ready:
	case <-ended:
		cancel()
		return failed
	}
	d.Log(true)
	d.stop = func() {
		d.Log(false)
		cancel()
		<-ended
	}
	return nil
}

// fail ends what all follow.
func (d *Drops) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.broken = true
	for f := range d.followers {
		f.tell(report.Event{Error: err.Error()})
		close(f.events)
	}
	clear(d.followers)
}

// tell never waits.
func (f *follower) tell(e report.Event) {
	if f.lost > 0 {
		select {
		case f.events <- report.Event{Lost: f.lost}:
			f.lost = 0
		default:
			f.lost++
			return
		}
	}
	select {
	case f.events <- e:
	default:
		f.lost++
	}
}

func (d *Drops) missed() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for f := range d.followers {
		f.lost++
	}
}

// packet tells of a packet.
func (d *Drops) packet(p nflog.Packet) {
	st, err := d.Explainer.State()
	if err != nil {
		return // nothing is known any more: policies are being switched off
	}
	drop, ok := st.drop(p)
	if !ok {
		return // somebody else logs to our group
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.last) == remembered {
		d.last = slices.Delete(d.last, 0, 1)
	}
	d.last = append(d.last, drop)
	for f := range d.followers {
		if concerns(drop, f.pod) {
			f.tell(report.Event{Drop: &drop})
		}
	}
}

func concerns(d report.Drop, pod string) bool {
	return pod == "" || d.From.Kind == kindPod && d.From.Name == pod || d.To.Kind == kindPod && d.To.Name == pod
}

// drop says whose packet it was, and why it was denied.
func (st *State) drop(p nflog.Packet) (d report.Drop, ok bool) {
	word, unknown := strings.CutPrefix(p.Prefix, policy.LogUnknown)
	word, stateless := strings.CutPrefix(word, policy.LogStateless)
	word, answer := strings.CutSuffix(word, policy.LogAnswer)
	dir := policy.Ingress
	switch word {
	case policy.Ingress.String():
	case policy.Egress.String():
		dir = policy.Egress
	default:
		return d, false
	}
	f := policy.Flow{Src: p.Src, Dst: p.Dst, Protocol: policy.Protocol(p.Protocol), Port: p.DstPort}
	if answer {
		// On its way through this node an answer has the connection's own ends, the other way round.
		f.Src, f.Dst, f.Port = p.Dst, p.Src, p.SrcPort
	}
	d = report.Drop{
		Time: p.Time, Direction: directionName(dir), From: *st.addrEnd(f.Src), To: *st.addrEnd(f.Dst), Port: protocolText(f), Answer: answer,
	}
	d.From.Note, d.To.Note = "", ""
	if stateless {
		d.Why = "it belongs to no connection that the kernel knows"
		return d, true
	}
	if unknown {
		d.Why = "policies not known yet"
		own := d.From
		if dir == policy.Ingress {
			own = d.To
		}
		if w := st.waiting(own.Name); w != nil {
			d.Why += ": " + w.Why
		}
		return d, true
	}
	j := judged{f, policy.Evaluate(narrow(st.Snapshot, f.Src, f.Dst), f)}.side(dir)
	d.Isolating = j.Isolating
	switch {
	case j.Reason == policy.Contested:
		d.Why = string(j.Reason)
	case j.Allowed:
		d.Why = "policies that have changed since: they allow it now"
	}
	return d, true
}

func protocolText(f policy.Flow) string {
	switch f.Protocol {
	case policy.TCP, policy.UDP, policy.SCTP, icmpv4, icmpv6:
		return portText(f)
	}
	return fmt.Sprintf("protocol %d", uint8(f.Protocol))
}

// named finds the pod that drops are asked about; "" is all. note says where it is if that is not here.
func (st *State) named(namespace, pod string) (name, note string, err error) {
	if pod == "" {
		return "", "", nil
	}
	e, err := st.pod(pod, namespace)
	if err != nil {
		return "", "", err
	}
	if e.Node != st.Snapshot.Node {
		note = fmt.Sprintf("pod %s is on node %s, which tells what its policies deny: run the same there. Here is what policies of node %s's pods deny it.",
			e.Name, e.Node, st.Snapshot.Node)
	}
	return e.Name, note, nil
}

// Last says what was denied. pod is NAMESPACE/NAME, a name in namespace, or "" for all.
func (d *Drops) Last(ctx context.Context, namespace, pod string) (*report.Drops, error) {
	l, err := d.Explainer.List(ctx)
	if err != nil {
		return nil, err
	}
	st, err := d.Explainer.State()
	if err != nil {
		return nil, err
	}
	out := &report.Drops{Node: l.Node, DeniedUnknown: l.DeniedUnknown, DeniedStateless: l.DeniedStateless, Last: []report.Drop{}, Pods: []report.Pod{}}
	name, note, err := st.named(namespace, pod)
	if err != nil {
		return nil, err
	}
	out.Note = note
	for _, p := range l.Pods {
		if p.Ingress.Denied+p.Egress.Denied > 0 && (name == "" || name == p.Name) {
			out.Pods = append(out.Pods, p)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, drop := range d.last {
		if concerns(drop, name) {
			out.Last = append(out.Last, drop)
		}
	}
	return out, nil
}
