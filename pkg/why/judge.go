package why

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/policy/report"
	"github.com/headcni/headcni/pkg/tailscale"
)

// State of a step.
type State string

// The states. Follows is for what is wrong because of another step.
const (
	OK      State = "ok"
	Warn    State = "warn"
	No      State = "no"
	Follows State = "follows"
	Unknown State = "unknown" // could not look
)

// Step is one thing on the way.
type Step struct {
	Name  string `json:"name"`
	Where string `json:"where"`
	State State  `json:"state"`
	// Text is what was seen.
	Text     string           `json:"text"`
	Findings []doctor.Finding `json:"findings,omitempty"`

	at stretch
}

// add notes what is wrong, with what there is to do here and now, "" for what the table says.
func (s *Step) add(id findings.ID, remedy, format string, args ...any) {
	f := doctor.Found(id, s.Where, s.Name, fmt.Sprintf(format, args...))
	f.Remedy = cmp.Or(remedy, f.Remedy)
	s.Findings = append(s.Findings, f)
	if f.Wrong() {
		s.State = No
	} else if s.State == OK {
		s.State = Warn
	}
	s.Text = f.Cause
}

// Verdict is the answer.
type Verdict string

// The verdicts: a sender reaches the receiver, or does not, or nobody could look at all that decides.
const (
	Yes    Verdict = "yes"
	NoWay  Verdict = "no"
	Unsure Verdict = "unknown"
)

// End is one end of the connection.
type End struct {
	Name string     `json:"name"` // as people call it
	Addr netip.Addr `json:"addr,omitzero"`
	Node string     `json:"node,omitempty"`
	// Pod, or a node, else somebody outside.
	Pod bool `json:"pod"`
	// Outside: no node of ours, so that nobody can be asked there.
	Outside bool `json:"outside,omitempty"`
}

// Case is all that was seen.
type Case struct {
	From, To End
	Question Question
	Near     Side
	// Far is nil where FarError says why nobody was asked; both are empty where Near is the far side too, and for who is Outside.
	Far      *Side
	FarError string
	// Headscale is nil where HeadscaleError says why it could not be asked.
	Headscale      *Headscale
	HeadscaleError string
	// Live is nil where nothing was to be sent.
	Live *Live
	Now  time.Time
}

// Headscale is what the control server says.
type Headscale struct {
	Nodes []Approval `json:"nodes"`
}

// Approval is which routes of a node may be used.
type Approval struct {
	ID       string         `json:"id"`
	Name     string         `json:"name"`
	IPs      []netip.Addr   `json:"ips"`
	Online   bool           `json:"online"`
	Approved []netip.Prefix `json:"approved"`
	Offered  []netip.Prefix `json:"available"`
}

// Report is the answer, and how it came about.
type Report struct {
	Version  string           `json:"version"`
	OK       bool             `json:"ok"`
	Verdict  Verdict          `json:"verdict"`
	From     End              `json:"from"`
	To       End              `json:"to"`
	Port     string           `json:"port"`
	Steps    []Step           `json:"steps"`
	Findings []doctor.Finding `json:"findings"`
	// Step is the first that decides, counted from 1; 0 where all is well.
	Step int `json:"step,omitempty"`
	// Live is what became of a packet, nil where none was to be sent.
	Live *Live `json:"live,omitempty"`
}

// way is how packets leave the near node.
type way int

const (
	local   way = iota // they do not
	tunnel             // by the tailnet, or they should
	outside            // by another link
)

func (c Case) way() way {
	n := c.Near
	inTailnet := netset.TailnetIPv4.Contains(n.Dst) || netset.TailnetIPv6.Contains(n.Dst)
	switch {
	case n.DstLink != nil || n.Local:
		return local
	case n.There.Dev != "" && n.There.Dev == n.Tailnet.Tun, c.To.Pod, n.Guard.DstCluster, n.Tailnet.Holder != nil && inTailnet:
		return tunnel
	}
	return outside
}

// Judge says whether the sender reaches the receiver. It does no I/O.
func Judge(version string, c Case) Report {
	r := Report{Version: version, From: c.From, To: c.To, Port: c.Question.port(), Findings: []doctor.Finding{}}
	w := c.way()
	add := func(at stretch, s *Step) {
		if s != nil {
			s.at = at
			r.Steps = append(r.Steps, *s)
		}
	}
	add(onNear, c.sender())
	add(onNear, c.policy(c.Near, "policy egress", c.From))
	add(onNear, c.rules(w))
	add(onNear, c.guard())
	if w == tunnel {
		add(between, c.tailnet())
		add(between, c.headscale())
	}
	if w != local && !c.To.Outside {
		add(onFar, c.arrival(w))
	}
	far, at := c.Near, onFar
	if c.Far != nil {
		far = *c.Far
	}
	if w == local {
		at = onNear
	}
	switch {
	case c.To.Outside:
		add(atReceiver, &Step{Name: "receiver", Where: c.To.Name, State: Unknown, Text: "it is no node or pod of ours, so that nobody can be asked there"})
	case w != local && c.Far == nil:
		add(at, &Step{Name: "policy ingress", Where: c.To.Node, State: Unknown, Text: "could not look: " + c.FarError})
	default:
		add(at, c.policy(far, "policy ingress", c.To))
		add(atReceiver, c.receiver(far))
	}
	answered := false
	if r.Live = c.Live; c.Live != nil {
		var steps []Step
		steps, answered = c.tried(r.Steps, w)
		r.Steps = append(r.Steps, steps...)
	}
	r.decide(answered)
	return r
}

// decide finds what decides. Where a packet was answered, it does not count that nobody could look at something.
func (r *Report) decide(answered bool) {
	r.Verdict = Yes
	for i, s := range r.Steps {
		r.Findings = append(r.Findings, s.Findings...)
		switch {
		case s.State == No && r.Verdict != NoWay:
			r.Verdict, r.Step = NoWay, i+1
		case (s.State == Unknown || s.State == Follows) && r.Verdict == Yes && !answered:
			r.Verdict, r.Step = Unsure, i+1
		}
	}
	r.OK = r.Verdict == Yes
}

func (c Case) sender() *Step {
	n := c.Near
	s := &Step{Name: "pod", Where: c.From.Node, State: OK}
	if !c.From.Pod {
		s.Name, s.Text = "node", "sends from "+n.Src.String()
		if !n.Src.IsValid() {
			s.Text = "the kernel finds no source"
		}
		return s
	}
	s.link(n.Link, n.Src)
	return s
}

// link judges a pod's link.
func (s *Step) link(l *Link, a netip.Addr) {
	if l == nil {
		s.add(findings.PodNoLink, "", "no pod's link on %s has %s", s.Where, a)
		return
	}
	s.Text = fmt.Sprintf("%s on link %s, MTU %d", a, l.Name, l.MTU)
	switch {
	case !l.Up:
		s.add(findings.PodLinkDown, "on "+s.Where+": ip link set "+l.Name+" up", "the host's end %s of %s is down", l.Name, l.Pod)
	case !l.Carrier:
		s.add(findings.PodLinkDown, "in the pod's network namespace: ip link set eth0 up; or delete the pod", "the pod's own end of link %s is down", l.Name)
	case l.Lease != nil && !*l.Lease:
		s.add(findings.NoLease, "", "%s has %s, and no lease", l.Pod, a)
	}
}

// policy judges what NetworkPolicies of an end's pod say. It is nil where there is no pod.
func (c Case) policy(side Side, name string, end End) *Step {
	if !end.Pod {
		return nil
	}
	s := &Step{Name: name, Where: end.Node, State: OK}
	switch {
	case side.Daemon == nil && !side.PolicyTable:
		s.Text = "NetworkPolicies are not enforced here: the kernel has no table of them"
	case side.Daemon == nil:
		s.State, s.Text = Unknown, "could not look: "+side.DaemonError
	case side.Daemon.Policy == nil:
		s.Text = "NetworkPolicies are not enforced here"
	case side.Link == nil && side.DstLink == nil:
		s.State, s.Text = Follows, "no pod here has the address"
	case side.PolicyError != "":
		s.State, s.Text = Unknown, "could not look: "+side.PolicyError
	case side.Policy != nil:
		s.explained(*side.Policy, strings.TrimPrefix(name, "policy "))
	default:
		s.Text = "a pod and its own node always reach each other"
	}
	return s
}

func (s *Step) explained(e report.Explanation, direction string) {
	s.Text = "no policy selects the pod"
	for _, a := range e.Answers {
		for _, side := range a.Sides {
			if side.Direction != direction {
				continue
			}
			if len(side.Kernel.Differences) > 0 {
				d := side.Kernel.Differences[0]
				s.add(findings.Contradiction, "", "policies say %s, the kernel does otherwise, for %s -> %s %s", side.Verdict, d.Src, d.Dst, d.Port)
				continue
			}
			switch {
			case side.Verdict != report.Allowed && len(side.Isolating) == 0:
				s.add(findings.PolicyWaits, "", "%s", cmp.Or(side.Reason, "the pod's policies are not known yet"))
				s.State = No
			case side.Verdict != report.Allowed:
				s.add(findings.PolicyDenies, policyRemedy(side, direction), "%s %s %s, and no rule lets this through%s",
					strings.Join(side.Isolating, ", "), verb(len(side.Isolating), "isolates", "isolate"), side.Of, denied(side))
			case len(side.Rules) > 0:
				s.Text = fmt.Sprintf("let through by %s, rule %d", side.Rules[0].Policy, side.Rules[0].Rule)
			case side.Reason != "":
				s.Text = side.Reason
			}
			if side.Kernel.Error != "" && s.State == OK {
				s.State, s.Text = Unknown, "the kernel could not be asked: "+side.Kernel.Error
			}
		}
	}
}

func verb(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

func denied(s report.Side) string {
	if s.Denied == nil || *s.Denied == 0 {
		return ""
	}
	return fmt.Sprintf(" (%d packets of the pod were denied so far, whatever the other end)", *s.Denied)
}

func policyRemedy(s report.Side, direction string) string {
	namespace, name, _ := strings.Cut(s.Isolating[0], "/")
	return fmt.Sprintf("kubectl -n %s edit networkpolicy %s, and add to its %s rules one that has the other end and the port", namespace, name, direction)
}

// part is an error of one of the daemon's parts that has the id.
func part(st *nodestatus.Status, ids ...findings.ID) (id findings.ID, text string) {
	if st == nil {
		return "", ""
	}
	for _, p := range st.Parts {
		for _, f := range p.Findings {
			if slices.Contains(ids, f.ID) {
				return f.ID, f.Text
			}
		}
	}
	return "", ""
}

func (r Route) text() string {
	switch {
	case r.Error != "":
		return r.Error
	case r.Local:
		return "this node itself"
	case r.Via.IsValid():
		return fmt.Sprintf("dev %s via %s, table %d", r.Dev, r.Via, r.Table)
	}
	return fmt.Sprintf("dev %s, table %d", r.Dev, r.Table)
}

func isPodLink(name string) bool { return strings.HasPrefix(name, names.PodLinkPrefix) }

// rules judges where the near node's kernel leads the packets.
func (c Case) rules(w way) *Step {
	n := c.Near
	s := &Step{Name: "rules", Where: c.From.Node, State: OK, Text: fmt.Sprintf("%s %s", n.Dst, n.There.text())}
	toTun := n.There.Dev != "" && n.There.Dev == n.Tailnet.Tun
	id, text := part(n.Daemon, findings.RoutingRules, findings.TakenBack, findings.Links)
	if c.From.Pod && n.Link == nil {
		s.State, s.Text = Follows, "without a link nothing of the pod's is led anywhere"
		return s
	}
	switch {
	case w == tunnel && toTun, w == local && (isPodLink(n.There.Dev) || n.There.Local), w == outside && n.There.Error == "":
		return s
	case w == local && c.To.Pod && n.DstLink != nil && !n.DstLink.Up:
		s.State, s.Text = Follows, "the receiver's link is down"
	case w != tunnel:
		s.add(cmp.Or(id, findings.RoutingRules), "", "%s: %s%s", n.Dst, n.There.text(), behind(text))
	case id != "":
		s.add(id, "", "%s: %s; %s", n.Dst, n.There.text(), text)
	case n.There.Error == "":
		s.add(findings.RoutingRules, "", "packets to %s leave by %s, and not by the tunnel %s", n.Dst, n.There.Dev, n.Tailnet.Tun)
	case n.Tailnet.Error != "" || n.Tailnet.State != tailscale.Running:
		s.State, s.Text = Follows, fmt.Sprintf("%s: %s, since the tunnel is away", n.Dst, n.There.text())
	case n.Tailnet.Holder == nil:
		s.State, s.Text = Follows, fmt.Sprintf("%s: %s, since no peer has it", n.Dst, n.There.text())
	default:
		s.add(findings.TunnelRoutes, "", "%s: %s, although tailscaled has a peer for it, %s", n.Dst, n.There.text(), n.Tailnet.Holder.Name)
	}
	return s
}

func behind(text string) string {
	if text == "" {
		return ""
	}
	return "; " + text
}

// guard judges the near node's nftables.
func (c Case) guard() *Step {
	n := c.Near
	s := &Step{Name: "guard", Where: c.From.Node, State: OK, Text: "our tables are there"}
	s.tables(n)
	if s.State == OK && c.To.Pod && !n.Guard.DstCluster {
		s.add(findings.RangeOutside, "", "%s is in no range that this node takes for pods (network.clusterCIDRs)", n.Dst)
	}
	switch {
	case n.Guard.Refuses == nft.DropTailnetSubnet:
		namespace, _, _ := strings.Cut(n.Link.Pod, "/")
		s.add(findings.SubnetDenied, fmt.Sprintf("kubectl annotate --overwrite namespace %s %s=%s, with what the annotation names already, separated by commas", namespace, kube.TailnetSubnets, c.subnet()),
			"%s is behind a device of the tailnet, and Namespace %s does not name its network", n.Dst, namespace)
	case n.Guard.Refuses == nft.DropTailnetEgress:
		s.add(findings.EgressDenied, "", "network.tailnetEgress is deny on this node: its pods begin nothing towards %s", n.Dst)
	case s.State == OK && n.Guard.DstCluster:
		s.Text += ", the tunnel is for " + n.Dst.String()
	}
	return s
}

// subnet is the narrowest route of who has the receiver's address that has it.
func (c Case) subnet() string {
	best := netip.PrefixFrom(c.Near.Dst, c.Near.Dst.BitLen())
	if h := c.Near.Tailnet.Holder; h != nil {
		for _, p := range h.Routes {
			if p.Contains(c.Near.Dst) && (best.IsSingleIP() || p.Bits() > best.Bits()) {
				best = p
			}
		}
	}
	return best.String()
}

// tables judges what is the same for both directions.
func (s *Step) tables(side Side) {
	if side.Guard.Error != "" {
		s.add(findings.FirewallRules, "restart headcni-daemon there: it writes them; "+remedy(findings.FirewallRules), "our nftables cannot be read: %s", side.Guard.Error)
		s.State = Warn // packets pass; what would leave in clear is not stopped
		return
	}
	if id, text := part(side.Daemon, findings.FirewallRules, findings.ForeignFirewall); id != "" {
		s.add(id, "", "%s", text)
	}
}

func remedy(id findings.ID) string {
	f, _ := findings.Of(id)
	return f.Remedy
}

// running judges a node's tailscaled.
func (s *Step) running(side Side) bool {
	t := side.Tailnet
	switch {
	case t.Error != "":
		s.add(findings.TailscaledSilent, "", "%s: %s", s.Where, t.Error)
	case t.State == tailscale.Stopped:
		s.add(findings.TailscaledStopped, "", "tailscaled of %s is stopped", s.Where)
	case t.State != tailscale.Running:
		s.add(findings.NotInTailnet, "", "tailscaled of %s is in state %s", s.Where, t.State)
	default:
		return true
	}
	return false
}

// tailnet judges the path between the two tailscaleds.
func (c Case) tailnet() *Step {
	n := c.Near
	s := &Step{Name: "tailnet", Where: c.From.Node, State: OK}
	if !s.running(n) {
		return s
	}
	if c.Far != nil {
		s.Where = c.To.Node
		if !s.running(*c.Far) {
			return s
		}
		s.Where = c.From.Node
	}
	h := n.Tailnet.Holder
	if h == nil {
		s.Text = "tailscaled runs, and knows no peer that has " + n.Dst.String()
		return s
	}
	s.Text = fmt.Sprintf("%s %s %s, %s", h.Name, h.Path, h.Endpoint, millis(h.Millis))
	if !h.Handshake.IsZero() {
		s.Text += fmt.Sprintf(", handshake %s ago", c.Now.Sub(h.Handshake).Round(time.Second))
	}
	switch h.Path {
	case pathOffline:
		s.add(findings.PeerOffline, "", "%s is offline", h.Name)
		s.State = No
	case pathSilent:
		s.add(findings.PeerSilent, "", "%s is online and does not answer", h.Name)
	case pathRelayed:
		text := s.Text
		s.add(findings.PeerRelayed, "", "%s", text)
	}
	return s
}

// headscale judges what the control server has approved and lets through, as both tailscaleds know it.
func (c Case) headscale() *Step {
	n := c.Near
	s := &Step{Name: "Headscale", Where: cmp.Or(c.To.Node, c.To.Name), State: OK}
	if n.Tailnet.Error != "" || n.Tailnet.State != tailscale.Running {
		s.State, s.Text = Follows, "what is approved only tailscaled of "+c.From.Node+" could say"
		return s
	}
	if n.Tailnet.Holder == nil {
		c.unapproved(s, n.Dst, c.Far, c.To)
		return s
	}
	if c.To.Outside {
		s.Text = n.Tailnet.Holder.Name + " has the address; what it lets in only it could say"
		return s
	}
	if c.Far == nil {
		s.State, s.Text = Unknown, "could not look what it lets in: "+c.FarError
		return s
	}
	f := c.Far.Tailnet
	switch {
	case f.Error != "" || f.State != tailscale.Running:
		s.State, s.Text = Follows, "what is let in only tailscaled of "+c.To.Node+" could say"
		return s
	case !sharesAddr(n.Tailnet.Holder.IPs, f.IPs):
		s.add(findings.RoutedElsewhere, "", "the tailnet leads %s to %s, and not to %s", n.Dst, n.Tailnet.Holder.Name, c.To.Node)
		return s
	case f.Holder == nil:
		s.Where = c.From.Node
		c.unapproved(s, c.Far.Src, &n, c.From)
		return s
	case !sharesAddr(f.Holder.IPs, n.Tailnet.IPs):
		s.add(findings.RoutedElsewhere, "", "to %s %s belongs to %s, and not to %s", c.To.Node, c.Far.Src, f.Holder.Name, c.From.Node)
		return s
	case f.FilterError != "":
		s.State, s.Text = Unknown, "could not look what tailscaled lets in: "+f.FilterError
		return s
	case f.Accepts != nil && *f.Accepts:
		s.Text = fmt.Sprintf("the route is approved, and the policy accepts %s -> %s %s", c.Far.Src, n.Dst, c.Question.port())
		return s
	}
	c.refused(s)
	return s
}

// refused says which line Headscale's policy lacks, by what the far tailscaled lets in.
func (c Case) refused(s *Step) {
	n, f := c.Near, c.Far.Tailnet
	ranges := slices.Compact([]string{rangeText(c.Far.Src, n), rangeText(n.Dst, *c.Far)})
	line := headscale.AcceptRule(ranges)
	switch {
	case f.Pairs:
		s.add(findings.PolicyRefuses, "add the port to a line of acls that has both, such as "+line, "the policy lets %s reach %s on ports %s, and not on %s",
			c.Far.Src, n.Dst, f.Ports, c.Question.port())
	case !f.KnowsSrc || !f.KnowsDst:
		who := c.Far.Src
		if f.KnowsSrc {
			who = n.Dst
		}
		s.add(findings.PolicyLacksRanges, "add to acls in Headscale's policy: "+line, "no rule that %s got from Headscale names %s", c.To.Node, who)
	default:
		s.add(findings.PolicyRefuses, "add to acls in Headscale's policy: "+line, "no rule of Headscale's policy lets %s reach %s", c.Far.Src, n.Dst)
	}
}

// hidden reports whether the policy is why a node does not see an approved route: Headscale 0.29 tells nobody of a route that he may not use.
func (c Case) hidden() bool {
	return c.Far != nil && c.Far.Tailnet.Accepts != nil && !c.Far.Tailnet.Pairs
}

// rangeText is the range of a node's pods that has the address, else the address.
func rangeText(a netip.Addr, side Side) string {
	for _, p := range side.Tailnet.Advertised {
		if p.Contains(a) {
			return p.String()
		}
	}
	return a.String()
}

// unapproved says why no peer has an address: of the node that should, as far as it was asked.
func (c Case) unapproved(s *Step, a netip.Addr, owner *Side, end End) {
	for _, n := range c.approvals() {
		i := slices.IndexFunc(n.Offered, func(p netip.Prefix) bool { return p.Contains(a) })
		if i < 0 {
			continue
		}
		if approved := slices.Contains(n.Approved, n.Offered[i]); approved && c.hidden() {
			c.refused(s)
			return
		} else if approved {
			s.add(findings.RoutedElsewhere, "see that "+n.Name+" is connected to Headscale (headscale nodes list), and that the other node's tailscaled has its routes",
				"Headscale has approved %s of %s, and does not lead there (online: %t)", n.Offered[i], n.Name, n.Online)
			return
		}
		var routes []string
		for _, p := range append(slices.Clone(n.Approved), n.Offered...) {
			if !slices.Contains(routes, p.String()) {
				routes = append(routes, p.String())
			}
		}
		s.add(findings.NotApproved, fmt.Sprintf("headscale nodes approve-routes -i %s -r %s", n.ID, strings.Join(routes, ",")), "%s of %s is advertised and not approved", n.Offered[i], n.Name)
		return
	}
	switch {
	case !end.Pod:
		s.add(findings.NodeUnknown, "", "no peer of the tailnet has %s", a)
	case owner == nil:
		s.State, s.Text = Unknown, fmt.Sprintf("no peer has %s; why could not be looked at: %s", a, c.FarError)
	case owner.Tailnet.Error != "" || owner.Tailnet.State != tailscale.Running:
		s.State, s.Text = Follows, fmt.Sprintf("no peer has %s, since tailscaled of %s is away", a, end.Node)
	case netset.Contains(owner.Tailnet.Routes, a) && c.hidden():
		c.refused(s)
	default:
		for _, p := range owner.Tailnet.Advertised {
			if p.Contains(a) {
				s.add(findings.NotApproved, "", "%s is advertised by %s and no peer got it from Headscale: it is not approved%s", p, end.Node, c.unasked())
				return
			}
		}
		s.add(findings.Prefs, "restart headcni-daemon on "+end.Node+": it has tailscaled advertise the range", "tailscaled of %s does not advertise a route with %s", end.Node, a)
	}
}

func (c Case) approvals() []Approval {
	if c.Headscale == nil {
		return nil
	}
	return c.Headscale.Nodes
}

func (c Case) unasked() string {
	if c.Headscale != nil || c.HeadscaleError == "" {
		return ""
	}
	return " (Headscale itself was not asked: " + c.HeadscaleError + ")"
}

// arrival judges what the far node's kernel does with a packet out of the tunnel, and with an answer.
func (c Case) arrival(w way) *Step {
	s := &Step{Name: "guard", Where: c.To.Node, State: OK}
	if c.Far == nil {
		s.State, s.Text = Unknown, "could not look: "+c.FarError
		return s
	}
	f := *c.Far
	if s.tables(f); s.State != OK {
		return s
	}
	in := f.Tailnet.Tun
	s.Text = fmt.Sprintf("from %s, answers to %s by %s", cmp.Or(in, "another link"), f.Src, f.Back.Dev)
	id, text := part(f.Daemon, findings.RoutingRules, findings.TakenBack, findings.Links)
	switch {
	case w == outside:
		s.Text = fmt.Sprintf("arrives by another link, back %s", f.Back.text())
		if f.Back.Error != "" {
			s.add(cmp.Or(id, findings.RoutingRules), "", "no way back to %s: %s%s", f.Src, f.Back.text(), behind(text))
		}
	case f.Tailnet.Error != "" || f.Tailnet.State != tailscale.Running || f.Tailnet.Holder == nil:
		s.State, s.Text = Follows, fmt.Sprintf("%s back: %s", f.Src, f.Back.text())
	case c.To.Pod && f.Link == nil:
		s.State, s.Text = Follows, "no pod here has the address"
	case c.To.Pod && !f.Link.Up:
		s.State, s.Text = Follows, "the pod's link is down"
	case c.To.Pod && f.There.Dev != f.Link.Name:
		s.add(cmp.Or(id, findings.RoutingRules), "", "what comes out of the tunnel for %s goes to %s, and not to the pod's link %s%s", f.Dst, f.There.text(), f.Link.Name, behind(text))
	case !c.To.Pod && !f.There.Local:
		s.add(cmp.Or(id, findings.RoutingRules), "", "what comes out of the tunnel for %s goes to %s", f.Dst, f.There.text())
	case f.Back.Dev != in:
		s.add(cmp.Or(id, findings.RoutingRules), "", "answers to %s leave by %s, and not by the tunnel %s, so that the guard takes the sender for forged%s", f.Src, f.Back.text(), in, behind(text))
	}
	return s
}

// receiver judges the pod or node that is sent to, and its port.
func (c Case) receiver(f Side) *Step {
	s := &Step{Name: "pod", Where: c.To.Node, State: OK}
	l := f.Link
	if f.DstLink != nil {
		l = f.DstLink
	}
	if c.To.Pod {
		s.link(l, f.Dst)
	} else {
		s.Name, s.Text = "node", fmt.Sprintf("%s is its own", f.Dst)
		if !f.Local {
			s.add(findings.PodNoLink, "ip -br addr on "+c.To.Node, "%s does not have the address %s", c.To.Node, f.Dst)
		}
	}
	if s.State == No || c.Question.Protocol == icmp {
		return s
	}
	text, port := s.Text, c.Question.port()
	switch f.Port {
	case portOpen:
		s.Text = port + " answers; " + text
	case portTaken:
		s.Text = port + " does not refuse, which is all that can be known of UDP; " + text
	case portRefused:
		s.add(findings.NobodyListens, "", "%s refuses %s, asked from its own node", f.Dst, port)
	case portSilent:
		s.add(findings.NobodyListens, "see that the pod runs, and that no firewall inside it drops packets (a mesh's, the program's own)", "%s does not answer on %s, asked from its own node: %s", f.Dst, port, f.PortError)
	default:
		s.State, s.Text = Unknown, "the port was not tried"
	}
	return s
}
