package why

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/policy/report"
	"github.com/headcni/headcni/pkg/why/live"
)

// Live is what came of a packet that was sent.
type Live struct {
	Near live.Side `json:"near"`
	// Far is nil where FarError says why, or where Near is the far side too.
	Far      *live.Side `json:"far,omitempty"`
	FarError string     `json:"farError,omitempty"`
}

// Probe is where a node sends, or looks on. Src and Dst of the question are addresses. closed frees what it holds.
func (p Place) Probe(q Question, mark uint32) (_ live.Place, closed func(), err error) {
	out := live.Place{Socket: p.Socket, Namespace: -1, Probe: live.Probe{Protocol: q.Protocol, Port: q.Port, Mark: mark}}
	if out.Src, err = netip.ParseAddr(q.Src); err == nil {
		out.Dst, err = netip.ParseAddr(q.Dst)
	}
	if err != nil {
		return out, nil, err
	}
	if q.Far {
		return out, func() {}, nil
	}
	var pods podlink.Handle
	defer pods.Close()
	links, err := pods.Attached()
	if err != nil {
		return out, nil, fmt.Errorf("list pods' links: %w", err)
	}
	if l := linkOf(links, out.Src); l != nil {
		out.Link, out.Namespace = l.Name, namespaceOf(out.Src)
	}
	return out, func() {
		if out.Namespace >= 0 {
			unix.Close(out.Namespace)
		}
	}, nil
}

// nodes are how the two nodes are asked. far is nil where there is none to ask.
type nodes struct {
	near func(ctx context.Context, command []string) ([]byte, error)
	far  func(ctx context.Context, in io.Reader, out io.Writer, command []string) error
}

// try sends a marked packet, while the far side looks on.
func (c *Case) try(ctx context.Context, ask nodes) {
	c.Live = &Live{FarError: c.FarError}
	l := c.Near.Link
	switch {
	case c.From.Pod && l == nil:
		c.Live.Near.Error = "no pod's link here has the sender's address"
	case c.From.Pod && !(l.Up && l.Carrier):
		c.Live.Near.Error = "the pod's link " + l.Name + " is down"
	case !c.Near.Src.IsValid():
		c.Live.Near.Error = "the kernel finds no source to send from"
	}
	if c.Live.Near.Error != "" {
		return
	}
	mark := rand.Uint32()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var seen func() (*live.Side, error)
	if q, err := c.farQuestion(); ask.far != nil && c.Far != nil && err == nil {
		if seen, err = watch(ctx, ask.far, q.args("watch", mark)); err != nil {
			c.Live.FarError = err.Error()
		}
	}
	q := c.Question
	q.Src, q.Dst = c.Near.Src.String(), c.Near.Dst.String()
	out, err := ask.near(ctx, q.args("send", mark))
	if err == nil {
		err = json.Unmarshal(out, &c.Live.Near)
	}
	if err != nil {
		c.Live.Near.Error = err.Error()
	}
	if seen != nil && c.Live.FarError == "" {
		if c.Live.Far, err = seen(); err != nil {
			c.Live.FarError = err.Error()
		}
	}
}

// args are the command that sends, or looks on, on a node.
func (q Question) args(what string, mark uint32) []string {
	return []string{"headcnictl", "why", what, q.Src, q.Dst, "--proto", q.Protocol, "--port", fmt.Sprint(q.Port), "--mark", fmt.Sprint(mark)}
}

// maxAnswer bounds what a node says, in bytes.
const maxAnswer = 1 << 20

// watch begins to look on, and returns once that is so. seen ends it.
func watch(ctx context.Context, far func(context.Context, io.Reader, io.Writer, []string) error, command []string) (seen func() (*live.Side, error), err error) {
	in, end := io.Pipe()
	answer, out := io.Pipe()
	go func() {
		err := far(ctx, in, out, command)
		in.Close()
		out.CloseWithError(err)
	}()
	lines := json.NewDecoder(io.LimitReader(answer, maxAnswer))
	var ready live.Ready
	if err := lines.Decode(&ready); err != nil || !ready.Ready {
		end.Close()
		answer.Close()
		return nil, fmt.Errorf("the far node does not look on: %w", err)
	}
	return func() (*live.Side, error) {
		end.Close()
		defer answer.Close()
		var s live.Side
		if err := lines.Decode(&s); err != nil {
			return nil, fmt.Errorf("the far node does not say what it saw: %w", err)
		}
		return &s, nil
	}, nil
}

// stretch is a part of the way that a packet goes.
type stretch int

const (
	onNear stretch = iota + 1
	between
	onFar
	atReceiver
)

// hop is a link that a packet must pass, and the stretch that ends there. What there is to pass behind the last one is the receiver's.
type hop struct {
	side *live.Side
	node string
	link string // "" = any
	out  bool
	end  stretch
}

func (h hop) passed(back bool, kinds ...live.Kind) bool {
	return h.side.Passed(h.link, h.out != back, kinds...) > 0
}

func (h hop) text(back bool) string {
	link := h.link
	if link == "" {
		link = "any link"
	}
	if h.out != back {
		return "out by " + link
	}
	return "in by " + link
}

// hops are the way there.
func (c Case) hops(w way) (out []hop) {
	near, far := &c.Live.Near, c.Live.Far
	if c.From.Pod {
		out = append(out, hop{near, c.From.Node, c.Near.Link.Name, false, onNear})
	}
	last, link, end := far, (*Link)(nil), onFar
	switch {
	case w == local:
		last, link, end = near, c.Near.DstLink, onNear
		if !c.From.Pod && !c.To.Pod {
			out = append(out, hop{near, c.From.Node, "lo", true, onNear})
		}
	case w == tunnel: // wherever the kernel leads it
		out = append(out, hop{near, c.From.Node, cmp.Or(c.Near.Tailnet.Tun, c.Near.There.Dev), true, onNear})
		if far != nil {
			out, link = append(out, hop{far, c.To.Node, c.Far.Tailnet.Tun, false, between}), c.Far.Link
		}
	default:
		out = append(out, hop{near, c.From.Node, c.Near.There.Dev, true, onNear})
		if far != nil {
			out, link = append(out, hop{far, c.To.Node, "", false, between}), c.Far.Link
		}
	}
	if c.To.Pod && link != nil && last != nil {
		out = append(out, hop{last, c.To.Node, link.Name, true, end})
	}
	return out
}

// tried judges what came of the packet, beside what the steps before say. answered: it was, by who was sent to.
func (c Case) tried(model []Step, w way) (steps []Step, answered bool) {
	near := c.Live.Near
	if near.Error != "" || near.Sent == 0 {
		return []Step{{Name: "live", Where: c.From.Node, State: Unknown, Text: "not tried: " + cmp.Or(near.Error, "nothing was sent")}}, false
	}
	hops := c.hops(w)
	said := fmt.Sprintf("%d sent from %s", near.Sent, near.From)
	lost := -1
	for i, h := range hops {
		if !h.passed(false, live.Request) {
			lost = i
			break
		}
		said += ", " + h.text(false)
		if i+1 == len(hops) || hops[i+1].side != h.side {
			steps, said = append(steps, Step{Name: "live", Where: h.node, State: OK, Text: said}), "in the network"
		}
	}
	if lost >= 0 {
		h := hops[lost]
		s := &Step{Name: "live", Where: h.node, State: OK}
		explains := []stretch{h.end}
		if lost+1 == len(hops) {
			explains = append(explains, atReceiver) // whose link is down
		}
		c.lost(s, model, h, said+", and not "+h.text(false), explains...)
		return append(c.passed(steps, model, hops[:lost]), *s), false
	}
	steps = c.passed(steps, model, hops)
	s, answered := c.answer(model, hops)
	return append(steps, s), answered
}

// wrong is the number of the first step of a stretch that is in one of the states, 0 for none.
func wrong(model []Step, at stretch, states ...State) int {
	return 1 + slices.IndexFunc(model, func(s Step) bool { return s.at == at && slices.Contains(states, s.State) })
}

// passed contradicts steps that say no to what the packet did pass.
func (c Case) passed(steps, model []Step, hops []hop) []Step {
	for i, h := range hops {
		if i+1 < len(hops) && hops[i+1].end == h.end {
			continue // it has not passed it all
		}
		if n := wrong(model, h.end, No); n > 0 && len(steps) > 0 {
			s := &steps[len(steps)-1]
			s.add(findings.Contradiction, "", "a packet went %s on %s, although step %d says that it cannot", h.text(false), h.node, n)
		}
	}
	return steps
}

// lost says where, and what is known of why.
func (c Case) lost(s *Step, model []Step, h hop, text string, explains ...stretch) {
	var evidence []string
	if len(h.side.Denied) > 0 {
		evidence = append(evidence, "NetworkPolicies denied it ("+denial(h.side.Denied[0])+")")
	}
	counted := false
	for _, reason := range slices.Sorted(maps.Keys(h.side.Drops)) {
		counted = counted || h.side.Drops[reason] >= uint64(c.Live.Near.Sent)
		evidence = append(evidence, fmt.Sprintf("the guard's counter %s moved by %d", reason, h.side.Drops[reason]))
	}
	if c.Live.Near.Passed("", false, live.Unreachable) > 0 {
		evidence = append(evidence, "an ICMP error came back")
	}
	text = strings.Join(append([]string{text}, evidence...), "; ")
	if h.side.Missed > 0 {
		s.State, s.Text = Unknown, fmt.Sprintf("%s; but %d packets came too fast to be looked at", text, h.side.Missed)
		return
	}
	for _, at := range explains {
		if n := wrong(model, at, No, Follows); n > 0 {
			s.State, s.Text = Follows, fmt.Sprintf("%s, as step %d says", text, n)
			return
		}
	}
	if len(h.side.Denied) > 0 || counted {
		s.add(findings.Contradiction, "", "%s, and the steps above do not say so", text)
		return
	}
	s.add(findings.Lost, "", "%s, and no step above says why", text)
}

func denial(d report.Drop) string {
	if d.Why != "" {
		return d.Why
	}
	return "isolated by " + strings.Join(d.Isolating, ", ")
}

// answer judges what came back.
func (c Case) answer(model []Step, hops []hop) (Step, bool) {
	s := &Step{Name: "live", Where: c.To.Node, State: OK}
	if s.Where == "" {
		s.Where = c.To.Name
	}
	last := hops[len(hops)-1]
	asked := last.end != onNear || c.way() == local
	back := []live.Kind{live.Answer, live.Refused, live.Unreachable}
	switch {
	case !last.passed(true, back...) && c.Question.Protocol == udp:
		s.Text = "no answer and no refusal, which is all that can be known of UDP"
		return *s, false
	case !last.passed(true, back...) && !asked:
		s.State, s.Text = Unknown, "nothing came back; the other end could not be looked at"
		if c.Live.FarError != "" {
			s.Text += ": " + c.Live.FarError
		}
		return *s, false
	case !last.passed(true, back...):
		c.lost(s, model, last, "no answer came "+last.text(true), atReceiver)
		return *s, false
	}
	// Back the same way.
	for i := len(hops) - 2; i >= 0; i-- {
		if h := hops[i]; !h.passed(true, back...) {
			s.Where = h.node
			at := h.end
			if hops[i+1].side != h.side {
				at = between
			}
			c.lost(s, model, h, "the answer came "+hops[i+1].text(true)+" on "+hops[i+1].node+", and not "+h.text(true), at, onFar, onNear)
			return *s, false
		}
	}
	switch {
	case last.passed(true, live.Answer):
		s.Text = "answered, and the answer came back"
		if n := wrong(model, atReceiver, No); n > 0 {
			s.add(findings.Contradiction, "", "it answered, although step %d says that it cannot", n)
		}
		return *s, true
	case last.passed(true, live.Refused) && wrong(model, atReceiver, No) > 0:
		s.State, s.Text = Follows, fmt.Sprintf("refused, as step %d says", wrong(model, atReceiver, No))
	case last.passed(true, live.Refused):
		s.add(findings.NobodyListens, "", "%s refuses %s", c.Near.Dst, c.Question.port())
	default:
		c.lost(s, model, last, "an ICMP error came back in place of an answer", atReceiver)
	}
	return *s, false
}
