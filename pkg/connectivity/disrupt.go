package connectivity

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/kube/podexec"
)

// Disrupt is what a test restarts at its end.
type Disrupt struct {
	Node string
	// Parts in their order.
	Parts []Part
}

// Part is a pod of HeadCNI's on the node, which its DaemonSet makes anew when it is deleted.
type Part struct {
	Name string
	Pod  podexec.Pod
	// Selector finds the pod that comes after it.
	Selector string
	// Carries: what pods send to other nodes, and get from there, goes through it.
	Carries bool
}

// Disruption is what was lost while a part was restarted.
type Disruption struct {
	Part string `json:"part"`
	Node string `json:"node"`
	// Restart is how long it took until the new pod was ready.
	Restart float64    `json:"restartSeconds"`
	Flows   []LostFlow `json:"flows"`
}

// LostFlow is one flow of datagrams from a pod to another and back.
type LostFlow struct {
	From   string `json:"from"`
	To     string `json:"to"`
	Family string `json:"family"`
	Sent   int    `json:"sent"`
	Lost   int    `json:"lost"`
	// Gap is the longest time without an answer, in milliseconds.
	Gap float64 `json:"longestGapMillis"`
	// Back is false where it was not answered any more.
	Back bool `json:"back"`
}

const (
	// steadyGap is how long a flow may be dark that a restart does not concern, carriedGap one that goes through what is restarted: the pod must be made anew.
	steadyGap, carriedGap = time.Second, 30 * time.Second
)

// DisruptRights are what --disrupt needs beside Rights, in words.
const DisruptRights = "--disrupt also needs the right to list and delete pods in namespace "

// mayDisrupt asks the API server before anything is made.
func (t *test) mayDisrupt(ctx context.Context) error {
	if t.Disrupt == nil {
		return nil
	}
	for _, p := range t.Disrupt.Parts {
		if err := t.Client.Pods(p.Pod.Namespace).Delete(ctx, p.Pod.Name, metav1.DeleteOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
			return p.refused(err)
		}
	}
	return nil
}

func (p Part) refused(err error) error {
	if apierrors.IsForbidden(err) {
		err = fmt.Errorf("%w; %s%s", err, DisruptRights, p.Pod.Namespace)
	}
	return fmt.Errorf("restart %s: %w", p.Name, err)
}

// disrupt restarts one part after the other, while pods send to each other.
func (t *test) disrupt(ctx context.Context) error {
	switch {
	case t.Disrupt == nil:
		return nil
	case !t.report.OK:
		t.note(restarts, "not done: first comes what is not right without them")
		return nil
	}
	for _, p := range t.Disrupt.Parts {
		if err := t.restart(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// sent is a flow from a node's pod.
type sent struct {
	to   *node
	addr netip.Addr
}

// flowsOf are those within each node, and between the node that is disrupted and the others; and one between two of the others. They go from pods that
// policies select to those that none does.
func (t *test) flowsOf(victim *node) map[*node][]sent {
	out := map[*node][]sent{}
	nodes := t.peers(victim)
	nodes = nodes[:min(len(nodes), few+1)]
	for i, from := range nodes {
		for k, to := range nodes {
			if from != to && from != victim && to != victim && (i != 1 || k != 2) {
				continue
			}
			for _, a := range to.asks {
				if len(sameFamily(from.answers, a)) > 0 {
					out[from] = append(out[from], sent{to, a})
				}
			}
		}
	}
	return out
}

// restart deletes the part's pod while all flows are under way, and waits for the next one and for the flows.
func (t *test) restart(ctx context.Context, p Part) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	flows := t.flowsOf(t.byNode[t.Disrupt.Node])
	began := map[*node]*running{}
	defer func() {
		for _, r := range began {
			r.close()
		}
	}()
	t.Say("sending from pod to pod, and restarting %s on %s", p.Name, t.Disrupt.Node)
	for n, list := range flows {
		in := Flows{Back: carriedGap}
		for _, s := range list {
			in.To = append(in.To, netip.AddrPortFrom(s.addr, Port))
		}
		began[n] = t.begin(ctx, podexec.Pod{Namespace: Namespace, Name: podName(answers, n.Name), Container: container}, program, "probe", "flows")
		began[n].ask(in)
	}
	for n, r := range began {
		var f Flowing
		if err := r.read(ctx, answerWithin+execSlack, &f); err != nil {
			return fmt.Errorf("send from pod %s: %w", podName(answers, n.Name), err)
		}
		if len(f.Silent) > 0 {
			t.note(restarts, "not done: on %s nothing comes back from %v", n.Name, f.Silent)
			return nil
		}
	}
	d := Disruption{Part: p.Name, Node: t.Disrupt.Node, Flows: []LostFlow{}}
	took, err := t.replace(ctx, p)
	if err != nil {
		return err
	}
	d.Restart = took.Seconds()
	for _, r := range began {
		r.end.Close()
	}
	for _, other := range t.Nodes { // in their order
		n := t.byNode[other.Name]
		if began[n] == nil {
			continue
		}
		var results []Flow
		err := began[n].read(ctx, carriedGap+execSlack, &results)
		if err == nil && len(results) != len(flows[n]) {
			err = fmt.Errorf("%d results of %d flows", len(results), len(flows[n]))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			t.fail(restarts, n.Name, "what its pod sent while %s was restarted is not known: %v", p.Name, err)
			continue
		}
		for i, f := range results {
			d.Flows = append(d.Flows, t.judge(p, n, flows[n][i], f))
		}
	}
	t.report.Disruptions = append(t.report.Disruptions, d)
	return nil
}

// judge counts a flow, and finds fault with one that was dark for too long.
func (t *test) judge(p Part, from *node, s sent, f Flow) LostFlow {
	limit := steadyGap
	if p.Carries && from != s.to && (from.Name == t.Disrupt.Node || s.to.Name == t.Disrupt.Node) {
		limit = carriedGap
	}
	out := LostFlow{From: from.Name, To: s.to.Name, Family: netset.Family(s.addr), Sent: f.Sent, Lost: f.Lost, Gap: f.Gap.Seconds() * 1000, Back: f.Back}
	where := from.Name + " -> " + s.to.Name
	switch {
	case !f.Back:
		t.fail(restarts, where, "%s: nothing comes back any more since %s was restarted, for %.1f s", out.Family, p.Name, f.Gap.Seconds())
	case f.Gap > limit:
		t.fail(restarts, where, "%s: %d of %d datagrams were lost while %s was restarted, for %.1f s at a stretch, where %.0f s are expected at most", out.Family,
			f.Lost, f.Sent, p.Name, f.Gap.Seconds(), limit.Seconds())
	default:
		t.right(restarts, 1)
	}
	return out
}

// replace deletes the part's pod, and returns how long it took until another was ready.
func (t *test) replace(ctx context.Context, p Part) (time.Duration, error) {
	began, client := time.Now(), t.Client.Pods(p.Pod.Namespace)
	before, err := client.List(ctx, metav1.ListOptions{LabelSelector: p.Selector})
	if err == nil {
		err = client.Delete(ctx, p.Pod.Name, metav1.DeleteOptions{})
	}
	if err != nil {
		return 0, p.refused(err)
	}
	known := func(uid types.UID) bool {
		return slices.ContainsFunc(before.Items, func(p corev1.Pod) bool { return p.UID == uid })
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startFor, errors.New("it is not ready"))
	defer cancel()
	state := "there is none"
	err = every(ctx, func() (bool, error) {
		list, err := client.List(ctx, metav1.ListOptions{LabelSelector: p.Selector})
		if err != nil {
			return false, nil // the API server may be what is reached through it
		}
		for _, now := range list.Items {
			if now.Spec.NodeName != t.Disrupt.Node || known(now.UID) {
				continue
			}
			if state = podState(now); podReady(now) {
				return true, nil
			}
		}
		return false, nil
	})
	if err != nil {
		return 0, fmt.Errorf("wait for the pod after %s on %s: %w; state: %s", p.Pod.Name, t.Disrupt.Node, err, state)
	}
	return time.Since(began), nil
}

func podReady(p corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil
		}
	}
	return false
}

// running is a command in a pod that is asked and answers by JSON, until its input ends.
type running struct {
	end    *io.PipeWriter
	answer *io.PipeReader
	lines  *json.Decoder
	cancel context.CancelFunc
	done   chan struct{}
}

// maxAnswer bounds what a pod says, in bytes.
const maxAnswer = 1 << 20

// begin starts a command in a pod.
func (t *test) begin(ctx context.Context, pod podexec.Pod, command ...string) *running {
	ctx, cancel := context.WithCancel(ctx)
	in, end := io.Pipe()
	answer, out := io.Pipe()
	r := &running{end, answer, json.NewDecoder(io.LimitReader(answer, maxAnswer)), cancel, make(chan struct{})}
	go func() {
		defer close(r.done)
		err := t.Stream(ctx, pod, in, out, command...)
		in.Close()
		out.CloseWithError(err)
	}()
	return r
}

// ask hands the command something to do. Where it has ended, read says why.
func (r *running) ask(what any) { _ = json.NewEncoder(r.end).Encode(what) }

// read reads the command's next answer.
func (r *running) read(ctx context.Context, limit time.Duration, into any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errors.New("no answer"))
	defer cancel()
	defer context.AfterFunc(ctx, func() { r.answer.CloseWithError(context.Cause(ctx)) })()
	err := r.lines.Decode(into)
	if exit := (podexec.Exit{}); errors.As(err, &exit) && strings.Contains(exit.Stderr, "there is no command") {
		err = fmt.Errorf("%w: is the image older than headcnictl?", err)
	}
	return err
}

// closeFor is how long a command may take to end when its input has: a stream that is cut leaves it to the kubelet to find out.
const closeFor = time.Second

// close ends the command.
func (r *running) close() {
	r.end.Close()
	r.answer.Close()
	select {
	case <-r.done:
	case <-time.After(closeFor):
	}
	r.cancel()
	<-r.done
}

// text prints a line for each flow.
func (d Disruption) text(b *strings.Builder) {
	fmt.Fprintf(b, "\nrestart of %s on %s (ready after %.1f s)\n", d.Part, d.Node, d.Restart)
	fmt.Fprintf(b, "  %-6s  %6s  %6s  %8s\n", "FAMILY", "SENT", "LOST", "GAP")
	for i, f := range d.Flows {
		if i == 0 || f.From != d.Flows[i-1].From || f.To != d.Flows[i-1].To {
			fmt.Fprintf(b, "%s -> %s\n", f.From, f.To)
		}
		gap := "-"
		if f.Lost > 0 {
			gap = fmt.Sprintf("%.0f ms", f.Gap)
		}
		fmt.Fprintf(b, "  %-6s  %6d  %6d  %8s\n", f.Family, f.Sent, f.Lost, gap)
	}
}
