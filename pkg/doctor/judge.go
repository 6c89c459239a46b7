package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/reconcile"
)

// Finding is one thing that is not right.
type Finding struct {
	ID       findings.ID       `json:"id"`
	Severity findings.Severity `json:"severity"`
	// Where is a node, or "cluster" or "controller"; What the part of it.
	Where string `json:"where"`
	What  string `json:"what,omitempty"`
	Title string `json:"title"`
	// Cause is what was seen, Remedy what to do.
	Cause  string    `json:"cause"`
	Remedy string    `json:"remedy"`
	Since  time.Time `json:"since,omitzero"`
}

// Found is a finding with what the table says of its id: cause is what was seen.
func Found(id findings.ID, where, what, cause string) Finding {
	f, _ := findings.Of(id)
	return Finding{ID: id, Severity: f.Severity, Where: where, What: what, Title: f.Title, Cause: cause, Remedy: f.Remedy}
}

// Check is one question, and what was found. OK is the answer where nothing was.
type Check struct {
	Where, OK string
	// Count is how many questions it stands for.
	Count int
	// Thorough is for what is of use while somebody looks for a fault, and may stand for long where all is well.
	Thorough bool
	Found    []Finding
}

// Add notes a finding, whose cause is what was seen.
func (c *Check) Add(id findings.ID, format string, args ...any) {
	c.Found = append(c.Found, Found(id, c.Where, "", fmt.Sprintf(format, args...)))
}

// parts takes over what a program says of its parts.
func (c *Check) parts(parts []reconcile.Status) {
	for _, p := range parts {
		c.Count++
		for _, found := range p.Findings {
			if slices.ContainsFunc(c.Found, func(f Finding) bool { return f.ID == found.ID && f.Cause == found.Text }) {
				continue // another part met the same
			}
			f, known := findings.Of(found.ID)
			if !known { // of a newer program
				f.Title, f.Remedy = string(found.ID), "see docs/errors.md of the newer version"
			}
			c.Found = append(c.Found, Finding{
				ID: found.ID, Severity: found.Severity, Where: c.Where, What: p.Name, Title: f.Title, Cause: found.Text, Remedy: f.Remedy, Since: p.Since,
			})
		}
	}
}

// Judge answers every question, those about the whole first. It does no I/O.
func Judge(s Seen) []Check {
	var out []Check
	if s.Kubernetes {
		out = append(out, ranges(s.Nodes), versions(s.Nodes), clocks(s.Nodes), ofController(s.Controllers))
	}
	easy := easyNATs(s.Nodes)
	for _, n := range s.Nodes {
		out = append(out, ofNode(n))
		if n.Status != nil {
			out = append(out, paths(n, easy), guard(n))
			if n.Status.Policy != nil {
				out = append(out, policies(n))
			}
		}
	}
	return out
}

func ranges(nodes []Node) Check {
	c := Check{Where: "cluster", Count: 1}
	type held struct {
		of string
		p  netip.Prefix
	}
	var all []held
	for _, n := range nodes {
		for _, p := range n.PodCIDRs {
			for _, h := range all {
				if h.of != n.Name && h.p.Overlaps(p) {
					c.Add(findings.NodeRangesOverlap, "Node %s has %s and Node %s has %s", h.of, h.p, n.Name, p)
				}
			}
			all = append(all, held{n.Name, p})
		}
	}
	c.OK = fmt.Sprintf("%d %s, no pod range overlaps another", len(nodes), Plural(len(nodes), "node"))
	return c
}

func versions(nodes []Node) Check {
	c := Check{Where: "cluster", Count: 1}
	by := map[string][]string{}
	for _, n := range nodes {
		if n.Status != nil {
			by[n.Status.Version] = append(by[n.Status.Version], n.Name)
		}
	}
	var texts []string
	for _, v := range slices.Sorted(maps.Keys(by)) {
		texts = append(texts, fmt.Sprintf("%s on %s", v, abridge(by[v])))
	}
	c.OK = "version " + strings.Join(texts, ", ")
	if len(by) == 0 {
		c.OK, c.Count = "", 0
	}
	if len(by) > 1 {
		c.Add(findings.VersionsDiffer, "HeadCNI %s", strings.Join(texts, ", "))
	}
	return c
}

func clocks(nodes []Node) Check {
	c := Check{Where: "cluster", Count: 1}
	worst := time.Duration(0)
	for _, n := range nodes {
		worst = max(worst, n.Skew.Abs())
		if n.Skew.Abs() > headscale.MaxSkew {
			c.Add(findings.ClocksApart, "the clock of %s is %s from this machine's", n.Name, n.Skew.Round(time.Second))
		}
	}
	c.OK = fmt.Sprintf("the nodes' clocks are within %s of this machine's", max(worst.Round(time.Second), time.Second))
	return c
}

func ofController(controllers []Controller) Check {
	c := Check{Where: "controller", OK: "leads, and has nothing to say against Headscale, its policy and its keys", Count: 1}
	var why []string
	for _, one := range controllers {
		if one.leads() {
			c.parts(one.Parts)
			return c
		}
		if one.Err != nil {
			why = append(why, one.Err.Error())
		}
	}
	switch {
	case len(controllers) == 0:
		why = []string{"it has no pod"}
	case len(why) == 0:
		why = []string{"none of its pods leads"}
	}
	c.Add(findings.ControllerSilent, "%s", strings.Join(why, "; "))
	return c
}

func ofNode(n Node) Check {
	c := Check{Where: n.Name, Count: 1}
	switch {
	case errors.Is(n.Err, errNoDaemon):
		c.Add(findings.NoDaemonPod, "%v", n.Err)
		return c
	case n.Err != nil:
		c.Add(findings.DaemonSilent, "%v", n.Err)
		return c
	}
	s := n.Status
	c.parts(s.Parts)
	if !s.Ready && !slices.ContainsFunc(c.Found, func(f Finding) bool { return f.Severity != findings.Warn }) {
		var waits []string
		for _, p := range s.Parts {
			if !p.OK {
				waits = append(waits, p.Name+": "+p.Error)
			}
		}
		c.Add(findings.NotReady, "%s", strings.Join(waits, "; "))
	}
	if t := s.Tailnet; t != nil {
		for _, h := range t.Health {
			c.Add(findings.TailscaledUnwell, "%s", h)
		}
		c.Count++
	}
	// What is an error already is said once.
	if !slices.ContainsFunc(c.Found, func(f Finding) bool { return f.ID == findings.NamesCircle || f.ID == findings.NamesRisk }) {
		for _, text := range s.Names {
			c.Add(findings.NamesRisk, "%s", text)
		}
	}
	c.OK = fmt.Sprintf("%d parts right, %s mode, %s (MTU %d)", len(s.Parts), cmp.Or(s.Mode, "unknown"), cmp.Or(s.Tun, "no tunnel"), s.TunMTU)
	return c
}

// counts tells how many peers with pods are reached in which way.
func counts(s *nodestatus.Status) map[string]int {
	out := map[string]int{}
	if s != nil && s.Tailnet != nil {
		for _, p := range s.Tailnet.Peers {
			if len(p.PodCIDRs) > 0 {
				out[p.Path]++
			}
		}
	}
	return out
}

// easyNATs are the tailnet names of nodes whose router, if there is one, changes no ports.
func easyNATs(nodes []Node) map[string]bool {
	out := map[string]bool{}
	for _, n := range nodes {
		if n.Status != nil && n.Status.Tailnet != nil {
			out[n.Status.Tailnet.Name] = n.Status.Tailnet.NAT == "easy" || n.Status.Tailnet.NAT == "none"
		}
	}
	return out
}

// relayed says why peers are reached through a relay, as far as both sides tell.
func (c *Check) relayed(t *nodestatus.Tailnet, names []string, direct bool, easy map[string]bool) {
	meant := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return !easy[name] })
	switch {
	case t.NAT == "unknown" && !direct:
		c.Add(findings.UDPBlocked, "relayed: %s; no other node is reached directly, and tailscaled knows no address of its own but the host's", abridge(names))
	case t.NAT == "hard":
		c.Add(findings.HardNAT, "relayed: %s; others see this node at %s, a port that it does not send from", abridge(names), t.Outside)
	case easy[t.Name] && len(meant) > 0:
		c.Add(findings.RouterAnswers, "relayed: %s", abridge(meant))
		names = slices.DeleteFunc(names, func(name string) bool { return easy[name] })
		fallthrough
	default:
		if len(names) > 0 {
			c.Add(findings.PeerRelayed, "relayed: %s", abridge(names))
		}
	}
}

func paths(n Node, easy map[string]bool) Check {
	c := Check{Where: n.Name, OK: "paths to nodes with pods: " + countText(counts(n.Status)), Count: 1, Thorough: true}
	if n.Status.Tailnet == nil {
		return Check{Where: n.Name}
	}
	by := map[string][]string{}
	for _, p := range n.Status.Tailnet.Peers {
		if len(p.PodCIDRs) > 0 {
			by[p.Path] = append(by[p.Path], p.Name)
		}
	}
	if names := by["relayed"]; len(names) > 0 {
		c.relayed(n.Status.Tailnet, names, len(by["direct"]) > 0, easy)
	}
	if names := by["offline"]; len(names) > 0 {
		c.Add(findings.PeerOffline, "offline: %s", abridge(names))
	}
	return c
}

// neverDropped are reasons of the guard for which nothing is dropped while all is well: those of the alert HeadCNIGuardHolds, and service_in_clear, which
// a Service that was just deleted has too and is of use only to somebody who looks for a fault.
var neverDropped = []string{"cluster_in_clear", "tailnet_in_clear", "tunnel_in_tunnel", "service_in_clear"}

func guard(n Node) Check {
	c := Check{Where: n.Name, OK: "the guard has stopped nothing that was about to leave in clear", Count: 1, Thorough: true}
	var texts []string
	for _, reason := range neverDropped {
		if dropped := n.Status.Dropped[reason]; dropped > 0 {
			texts = append(texts, fmt.Sprintf("%d %s", dropped, reason))
		}
	}
	if len(texts) > 0 {
		c.Add(findings.GuardDropped, "packets stopped since the tables were made: %s", strings.Join(texts, ", "))
	}
	return c
}

func policies(n Node) Check {
	p := n.Status.Policy
	c := Check{Where: n.Name, OK: fmt.Sprintf("NetworkPolicies in force: %d in the cluster, %d addresses of its pods isolated", p.Policies, p.Isolated), Count: 1}
	if p.InForce && p.Stale {
		c.Add(findings.PolicyStale, "the API server has not answered since the daemon's start")
	}
	if len(p.Unknown) > 0 {
		u := p.Unknown[0]
		c.Add(findings.PolicyWaits, "%d %s; %s: %s", len(p.Unknown), Plural(len(p.Unknown), "pod"), u.Pod, u.Why)
		c.Found[len(c.Found)-1].Since = u.Since
	}
	return c
}

// Plural is the word, with an s where there is not one of it.
func Plural(n int, word string) string {
	if n == 1 {
		return word
	}
	return word + "s"
}

// abridge names a few of many.
func abridge(names []string) string {
	const few = 5
	if len(names) > few {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:few], ", "), len(names)-few)
	}
	return strings.Join(names, ", ")
}

func countText(by map[string]int) string {
	var texts []string
	for _, path := range []string{"direct", "idle", "relayed", "offline"} {
		if by[path] > 0 {
			texts = append(texts, fmt.Sprintf("%d %s", by[path], path))
		}
	}
	if texts == nil {
		return "none"
	}
	return strings.Join(texts, ", ")
}
