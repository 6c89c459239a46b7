// Package explain tells what NetworkPolicies mean on a node, and whether its kernel does what they say: for people who ask why.
package explain

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/enforce"
	"github.com/headcni/headcni/pkg/policy/report"
)

// State is how policies stand at one moment. Nobody changes it any more.
type State struct {
	// Snapshot is what was compiled last and Rules what came of it: the kernel holds them, or will soon.
	Snapshot *policy.Snapshot
	Rules    *policy.Ruleset
	// Strict: a pod whose policies are not known yet reaches its own node and nobody else.
	Strict bool
	// Waiting are the node's pods whose policies are not known yet.
	Waiting []Waiting
	// Problem is what keeps policies from being in force as they are, nil where nothing does.
	Problem error
}

// Waiting is a pod whose policies are not known yet.
type Waiting struct {
	Pod   string // NAMESPACE/NAME
	Why   string
	Since time.Time
}

// Kernel is the own node's: an enforce.Table.
type Kernel interface {
	policy.Elements
	Denied(context.Context) (enforce.Denied, error)
}

// Links are the node's pods': a podlink.Handle.
type Links interface {
	Attached() (map[string]podlink.Attachment, error)
}

// Explainer answers questions about the policies of a node.
type Explainer struct {
	// State is nil, and the error says why, while nothing was compiled.
	State  func() (*State, error)
	Kernel Kernel
	Links  Links
	// Beside says why the node's other rules refuse what a pod begins, or what is begun towards it: nft.Beside. With nil nobody is asked.
	Beside func(link string, index int, pod, other netip.Addr, begins bool) (reason string, err error)
}

// settle is how long a change has to reach the kernel before a difference counts, and tries how often it is looked again.
const (
	settle = 200 * time.Millisecond
	tries  = 5
)

// List says how policies stand.
func (x *Explainer) List(ctx context.Context) (*report.List, error) {
	st, err := x.State()
	if err != nil {
		return nil, err
	}
	denied, err := x.Kernel.Denied(ctx)
	if err != nil {
		return nil, err
	}
	l := &report.List{
		Node: st.Snapshot.Node, Policies: len(st.Snapshot.Policies), Problem: text(st.Problem),
		DeniedUnknown: denied.Unknown, DeniedStateless: denied.Stateless,
	}
	for _, f := range st.Rules.Faults {
		l.Faults = append(l.Faults, report.Fault(f))
	}
	known := map[string]bool{}
	for _, p := range st.Snapshot.Pods {
		if p.Node != l.Node || p.HostNetwork || p.Done || len(p.IPs) == 0 {
			continue
		}
		one := report.Pod{Name: nameOf(p), Addrs: p.IPs}
		known[one.Name] = true
		if w := st.waiting(one.Name); w != nil {
			one.Waiting, one.Since = w.Why, &w.Since
		}
		in, out := st.isolating(p.IPs[0])
		one.Ingress, one.Egress = report.Isolation{By: in, Denied: sum(denied.In, p.IPs)}, report.Isolation{By: out, Denied: sum(denied.Out, p.IPs)}
		l.Pods = append(l.Pods, one)
	}
	for _, w := range st.Waiting {
		if !known[w.Pod] {
			l.Pods = append(l.Pods, report.Pod{Name: w.Pod, Waiting: w.Why, Since: &w.Since})
		}
	}
	slices.SortFunc(l.Pods, func(a, b report.Pod) int { return strings.Compare(a.Name, b.Name) })
	return l, nil
}

// nobody is an address that is no pod's and no node's (RFC 6666).
var nobody = netip.MustParseAddr("100::1")

// isolating lists the policies that isolate the pod at an address.
func (st *State) isolating(a netip.Addr) (in, out []string) {
	s := narrow(st.Snapshot, a)
	in = policy.Evaluate(s, policy.Flow{Src: nobody, Dst: a}).Ingress.Isolating
	return in, policy.Evaluate(s, policy.Flow{Src: a, Dst: nobody}).Egress.Isolating
}

// narrow leaves out what cannot matter to connections between some addresses: the slow evaluator reads all that there is.
func narrow(s *policy.Snapshot, addrs ...netip.Addr) *policy.Snapshot {
	out, spaces := *s, map[string]bool{}
	out.Pods, out.Policies = nil, nil
	for _, p := range s.Pods {
		if slices.ContainsFunc(addrs, func(a netip.Addr) bool { return slices.Contains(p.IPs, a) }) {
			out.Pods = append(out.Pods, p)
			spaces[p.Namespace] = true
		}
	}
	for _, p := range s.Policies {
		if p != nil && spaces[p.Namespace] {
			out.Policies = append(out.Policies, p)
		}
	}
	return &out
}

func (st *State) waiting(pod string) *Waiting {
	for i := range st.Waiting {
		if st.Waiting[i].Pod == pod {
			return &st.Waiting[i]
		}
	}
	return nil
}

// faultsOf are those of policies that concern a direction.
func (st *State) faultsOf(policies []string, dir policy.Direction) (out []report.Fault) {
	for _, f := range st.Rules.Faults {
		if slices.Contains(policies, f.Policy) && !strings.HasPrefix(f.Problem, directionName(dir.Opposite())+" ") {
			out = append(out, report.Fault(f))
		}
	}
	return out
}

// Explain answers a question. The kernel is asked again where it differs while something is changing.
func (x *Explainer) Explain(ctx context.Context, q report.Question) (*report.Explanation, error) {
	if q.From != "" && q.To != "" {
		return nil, errors.New("--from and --to exclude each other: the pod is the other end")
	}
	if q.Port != "" && q.From == "" && q.To == "" {
		return nil, errors.New("--port needs the other end: add --from or --to")
	}
	for try := 1; ; try++ {
		st, err := x.State()
		if err != nil {
			return nil, err
		}
		e, err := x.explain(ctx, st, q)
		if err != nil || !e.Wrong() || try == tries {
			return e, err
		}
		select {
		case <-ctx.Done():
			return e, nil
		case <-time.After(settle):
		}
	}
}

func (x *Explainer) explain(ctx context.Context, st *State, q report.Question) (*report.Explanation, error) {
	pod, err := st.pod(q.Pod, q.Namespace)
	if err != nil {
		return nil, err
	}
	denied, err := x.Kernel.Denied(ctx)
	if err != nil {
		return nil, err
	}
	a := &answerer{State: st, kernel: x.Kernel, denied: denied, beside: x.Beside}
	if a.links, err = x.links(); err != nil {
		return nil, err
	}
	e := &report.Explanation{Node: st.Snapshot.Node, Problem: text(st.Problem)}
	if q.From == "" && q.To == "" {
		e.Pod = pod
		e.Answers = a.about(pod)
		return e, nil
	}
	other, err := st.end(q.From+q.To, q.Namespace)
	if err != nil {
		return nil, err
	}
	e.From, e.To = other, pod
	if q.To != "" {
		e.From, e.To = pod, other
	}
	port, err := parsePort(q.Port)
	if err == nil && port != nil {
		err = port.resolve(st.Snapshot, e.To)
	}
	if err != nil {
		return nil, err
	}
	if port != nil {
		e.Port = port.String()
	}
	e.Answers, err = a.between(e.From, e.To, port)
	return e, err
}

// links are the own pods', by address.
func (x *Explainer) links() (map[netip.Addr]podlink.Attachment, error) {
	links, err := x.Links.Attached()
	if err != nil {
		return nil, fmt.Errorf("list pods' links: %w", err)
	}
	out := map[netip.Addr]podlink.Attachment{}
	for _, l := range links {
		for _, a := range l.Addrs {
			out[a] = l
		}
	}
	return out, nil
}

func nameOf(p *policy.Pod) string { return p.Namespace + "/" + p.Name }

func sum(counts map[netip.Addr]uint64, addrs []netip.Addr) (n uint64) {
	for _, a := range addrs {
		n += counts[a]
	}
	return n
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
