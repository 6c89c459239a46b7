package explain

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/enforce"
	"github.com/headcni/headcni/pkg/policy/report"
)

// answerer answers one question.
type answerer struct {
	*State
	kernel Kernel
	denied enforce.Denied
	links  map[netip.Addr]podlink.Attachment
	beside func(link string, index int, pod, other netip.Addr, begins bool) (reason string, err error)
}

// directions are those of a connection, as its first packet meets them.
var directions = []policy.Direction{policy.Egress, policy.Ingress}

func directionName(d policy.Direction) string {
	if d == policy.Ingress {
		return "ingress"
	}
	return "egress"
}

// between judges connections from one end to another. The answers for addresses that are treated alike are one.
func (a *answerer) between(from, to *report.End, p *port) ([]report.Answer, error) {
	for i, e := range []*report.End{from, to} {
		if w := a.waiting(e.Name); w != nil && len(e.Addrs) == 0 {
			s := a.unknown(w, directions[i])
			return []report.Answer{{Verdict: s.Verdict, Sides: []report.Side{s}}}, nil
		}
		if len(e.Addrs) == 0 {
			return nil, fmt.Errorf("pod %s: %s", e.Name, e.Note)
		}
	}
	var out []report.Answer
	for _, src := range from.Addrs {
		for _, dst := range to.Addrs {
			if src.Is6() == dst.Is6() {
				one := a.answer(from, to, src, dst, p)
				if err := a.refused(&one, src, dst); err != nil {
					return nil, err
				}
				out = merge(out, one)
			}
		}
	}
	if len(out) == 0 {
		return nil, errors.New("one end has IPv4 addresses only, and the other IPv6 addresses only: there is no connection between them")
	}
	return out, nil
}

// refused says what this node's other rules refuse.
func (a *answerer) refused(out *report.Answer, src, dst netip.Addr) error {
	for i, pod := range []netip.Addr{src, dst} {
		link, ours := a.links[pod]
		if !ours || a.beside == nil {
			continue
		}
		begins, other := i == 0, []netip.Addr{dst, src}[i]
		reason, err := a.beside(link.Name, link.Index, pod, other, begins)
		if err != nil {
			return err
		}
		namespace, _, _ := strings.Cut(link.Label, "/")
		switch reason {
		case "":
			continue
		case nft.DropTailnetSubnet:
			out.Refused = fmt.Sprintf("%s is in a network behind a device of the tailnet; network.tailnetSubnets is deny, and the annotation %s of Namespace %s does not name it",
				other, kube.TailnetSubnets, namespace)
		case nft.DropTailnetEgress:
			out.Refused = fmt.Sprintf("network.tailnetEgress is deny: pods begin nothing towards %s, which is in the tailnet", other)
		case nft.DropLANIngress:
			out.Refused = fmt.Sprintf("network.lanIngress is deny: %s is beside the node, and reaches pods by a port of the node (NodePort, hostPort), for which the below holds, and not by their own addresses", other)
		default:
			out.Refused = "the node's rules refuse it: " + reason
		}
		out.Verdict = report.Denied
	}
	return nil
}

// merge adds an answer to those that are equal to it but for the addresses.
func merge(all []report.Answer, one report.Answer) []report.Answer {
	for i := range all {
		if reflect.DeepEqual(all[i].Sides, one.Sides) && all[i].Verdict == one.Verdict && all[i].Refused == one.Refused {
			all[i].Src, all[i].Dst = union(all[i].Src, one.Src), union(all[i].Dst, one.Dst)
			return all
		}
	}
	return append(all, one)
}

func union(a, b []netip.Addr) []netip.Addr {
	for _, x := range b {
		if !slices.Contains(a, x) {
			a = append(a, x)
		}
	}
	return a
}

// judged is a connection with what policies say of it.
type judged struct {
	policy.Flow
	policy.Verdict
}

func (j judged) side(d policy.Direction) policy.Judgement {
	if d == policy.Ingress {
		return j.Ingress
	}
	return j.Egress
}

// answer judges connections between two addresses.
func (a *answerer) answer(from, to *report.End, src, dst netip.Addr, p *port) report.Answer {
	s := narrow(a.Snapshot, src, dst)
	var flows []policy.Flow
	capped := false
	if p != nil {
		flows = []policy.Flow{p.flow(src, dst)}
	} else {
		flows, capped = probes(s, src, dst)
	}
	var all []judged
	for _, f := range flows {
		all = append(all, judged{f, policy.Evaluate(s, f)})
	}
	out := report.Answer{Src: []netip.Addr{src}, Dst: []netip.Addr{dst}}
	for i, end := range []*report.End{from, to} {
		side := a.side(s, end, directions[i], all, p)
		if capped && side.Kernel.Note == "" {
			side.Kernel.Note = fmt.Sprintf("policies name more ports: looked at were %d", len(flows))
		}
		out.Sides = append(out.Sides, side)
	}
	out.Verdict = verdict(all, p, func(j judged) bool { return j.Allowed() })
	for _, side := range out.Sides {
		if side.Verdict == report.Denied { // by the gate
			out.Verdict = report.Denied
		}
	}
	return out
}

// verdict sums up: what allows ICMP, the first of the probes where no port was asked about, allows everything.
func verdict(all []judged, p *port, allowed func(judged) bool) report.Verdict {
	switch {
	case allowed(all[0]):
		return report.Allowed
	case p == nil && slices.ContainsFunc(all, allowed):
		return report.Some
	}
	return report.Denied
}

// side is what the policies of one end say.
func (a *answerer) side(s *policy.Snapshot, end *report.End, dir policy.Direction, all []judged, p *port) report.Side {
	j := all[0].side(dir)
	if w := a.waiting(j.Pod); w != nil && j.Here && j.Reason != policy.OwnNode && j.Reason != policy.Itself {
		side := a.unknown(w, dir)
		for _, f := range all {
			if a.Strict {
				a.ask(&side.Kernel, dir, f, false)
			}
		}
		return side
	}
	side := report.Side{
		Direction: directionName(dir), Of: who(end), Reason: string(j.Reason), Isolating: j.Isolating,
		Verdict: verdict(all, p, func(j judged) bool { return j.side(dir).Allowed }),
	}
	if j.Pod == "" {
		side.Reason = "policies are for pods, and this end is none"
		return side
	}
	side.Of, side.Faults = j.Pod, a.faultsOf(j.Isolating, dir)
	side.Rules = rulesOf(s, dir, all)
	if j.Here {
		side.Denied = a.deniedOf(end, dir)
	}
	switch {
	case j.Reason == policy.OwnNode || j.Reason == policy.Itself:
		side.Kernel.Note = "no rule of the kernel sees it: a pod and its own node always reach each other, and so does a pod itself"
	case !j.Here:
		side.Kernel.Note = fmt.Sprintf("the kernel of node %s was not asked: run the same on that node", end.Node)
	default:
		for _, f := range all {
			a.ask(&side.Kernel, dir, f, f.side(dir).Allowed)
		}
	}
	return side
}

func who(e *report.End) string {
	if e.Name != "" {
		return e.Kind + " " + e.Name
	}
	return e.Addrs[0].String()
}

// unknown is a side of a pod whose policies are not known yet.
func (a *answerer) unknown(w *Waiting, dir policy.Direction) report.Side {
	side := report.Side{
		Direction: directionName(dir), Of: w.Pod, Verdict: report.Denied,
		Reason: "its policies are not known yet, and until then it reaches its own node alone: " + w.Why,
	}
	if !a.Strict {
		side.Verdict, side.Reason = report.Allowed, "its policies are not known yet, and until then it is open (network.policyStartup): "+w.Why
	}
	return side
}

func (a *answerer) deniedOf(end *report.End, dir policy.Direction) *uint64 {
	counts := a.denied.Out
	if dir == policy.Ingress {
		counts = a.denied.In
	}
	n := sum(counts, end.Addrs)
	return &n
}

// ask compares what policies say of a connection with what the own kernel does.
func (a *answerer) ask(k *report.Kernel, dir policy.Direction, f judged, want bool) {
	own := f.Src
	if dir == policy.Ingress {
		own = f.Dst
	}
	compiled, err := a.Rules.Judge(a.Rules, dir, f.Flow)
	var kernel bool
	if err == nil {
		kernel, err = a.Rules.Judge(a.kernel, dir, f.Flow)
	}
	if err != nil {
		k.Error = err.Error()
		return
	}
	// A link that is not ours has no gate.
	link, ours := a.links[own]
	gate := a.Strict && ours && link.Group != names.PolicyLinkGroup
	if gate {
		kernel = false
		compiled = compiled && want // a pod whose policies are not known has none compiled
	}
	k.Asked++
	if kernel != want || compiled != want {
		k.Differences = append(k.Differences, report.Difference{
			Src: f.Src, Dst: f.Dst, Port: portText(f.Flow), Policies: want, Compiled: compiled, Kernel: kernel, Gate: gate,
		})
	}
}

// about explains a pod's policies, whoever the other end is.
func (a *answerer) about(pod *report.End) []report.Answer {
	if len(pod.Addrs) == 0 {
		w := a.waiting(pod.Name)
		if w == nil {
			return nil
		}
		in := a.unknown(w, policy.Ingress)
		return []report.Answer{{Verdict: in.Verdict, Sides: []report.Side{in, a.unknown(w, policy.Egress)}}}
	}
	p := a.find(pod.Name)
	if p.HostNetwork {
		return nil
	}
	out := report.Answer{Dst: pod.Addrs, Verdict: report.Some}
	in, egress := a.isolating(pod.Addrs[0])
	out.Sides = []report.Side{a.aboutSide(pod, p, policy.Ingress, in), a.aboutSide(pod, p, policy.Egress, egress)}
	return []report.Answer{out}
}

func (a *answerer) aboutSide(end *report.End, pod *policy.Pod, dir policy.Direction, by []string) report.Side {
	if w := a.waiting(end.Name); w != nil {
		return a.unknown(w, dir)
	}
	here := pod.Node == a.Snapshot.Node
	side := report.Side{Direction: directionName(dir), Of: end.Name, Isolating: by, Faults: a.faultsOf(by, dir)}
	if here {
		side.Denied = a.deniedOf(end, dir)
	}
	s := narrow(a.Snapshot, end.Addrs...)
	side.Rules = allRules(s, dir, pod, by)
	switch {
	case len(by) == 0:
		side.Verdict, side.Reason = report.Allowed, "open: no policy selects the pod"
	case len(side.Rules) == 0:
		side.Verdict = report.Denied
	default:
		side.Verdict = report.Some
	}
	if !here {
		side.Kernel.Note = fmt.Sprintf("the kernel of node %s was not asked: run the same on that node", pod.Node)
		return side
	}
	for _, f := range a.sample(end.Addrs, dir) {
		if j := f.side(dir); j.Reason != policy.OwnNode && j.Reason != policy.Itself {
			a.ask(&side.Kernel, dir, f, j.Allowed)
		}
	}
	return side
}
