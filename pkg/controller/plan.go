package controller

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/internal/printable"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

// plan is what is to be changed. Everything that is right already is not in it.
type plan struct {
	// views by name of the Node.
	views map[string]kube.View
	// approvals change what is approved for a node of the tailnet.
	approvals     []approval
	remove        []headscale.Node // from Headscale
	held          int              // how many more would be removed, were it not so many within an hour
	disableExpiry []headscale.ID   // whose node key is to expire no more
	// allocate gives pod CIDRs to Nodes.
	allocate map[string][]netip.Prefix
	// full: there is no range left to give to a Node.
	full error
	// expiring says which Nodes are about to drop out of the tailnet, and what to do, "" where none is.
	expiring string
	// claimed says which nodes of the tailnet advertise ranges of pods that are not theirs, "" where none does.
	claimed string
	// pending: something is under way, look again soon.
	pending bool
	memory  memory
	// serving says which node of the tailnet gets a route's traffic now.
	serving map[netip.Prefix]headscale.Node
}

// approval makes own approved routes and takes stale ones back.
type approval struct {
	node       headscale.Node
	own, stale []netip.Prefix
}

// makePlan does no I/O.
func makePlan(o observation) plan {
	p := plan{views: map[string]kube.View{}, serving: map[netip.Prefix]headscale.Node{}}
	for _, t := range o.tailnet {
		for _, r := range t.Primary {
			p.serving[r] = t
		}
	}
	known := o.memory.index()
	claims, refused := o.claims(known)
	granted := o.grant(claims, known)
	leads := o.leads(claims, granted)
	ranges := netset.NewSet(o.ranges...)
	if len(o.ranges) == 0 {
		// Only what is granted: a Node with a range that is refused, 0.0.0.0/0 for instance, takes no route from anybody.
		for _, g := range granted {
			ranges.Add(g.cidrs...)
		}
	}
	for _, n := range o.nodes {
		if n.key == "" || n.leaving {
			continue
		}
		v := p.view(n, claims, refused, granted[n.name])
		if t, ok := claims[n.name]; ok {
			m, _ := known.of(t)
			p.approve(t, slices.Concat(granted[n.name].cidrs, leads[n.name]), func(r netip.Prefix) bool {
				_, pods := ranges.Covering(r)
				return pods || netset.Covers(o.serve.Ranges, r) || slices.Contains(m.Services, r)
			})
			if o.serve.chooses(n) {
				v.Services = o.serve.Routes
			}
		}
		if v.String() != n.viewText {
			p.views[n.name] = v
		}
	}
	p.remember(o, claims, granted, leads)
	p.expiring = o.expiring(claims)
	p.claimed = o.foreignClaims(claims, granted, known, ranges)
	p.allocate, p.full = o.allocate()
	return p
}

// podRanges are the ranges in which approved routes are ours to give and to take.
func (o observation) podRanges() []netip.Prefix {
	if len(o.ranges) > 0 {
		return o.ranges
	}
	var all []netip.Prefix
	for _, n := range o.nodes {
		all = append(all, n.cidrs...)
	}
	return all
}

// claims finds which node of the tailnet each Node is, by the node key that its daemon wrote. Where two Nodes have the
// same key, the one that had it first keeps it: a node that was broken into could write another's.
func (o observation) claims(known memberIndex) (byNode map[string]headscale.Node, refused map[string]string) {
	byNode, refused = map[string]headscale.Node{}, map[string]string{}
	byKey, byName := map[string][]node{}, map[string]string{}
	for _, n := range o.nodes {
		byName[plainName(n.name)] = n.name
		if n.key != "" && !n.leaving {
			byKey[n.key] = append(byKey[n.key], n)
		}
	}
	for _, t := range o.tailnet {
		nodes := byKey[t.NodeKey]
		if len(nodes) == 0 {
			continue
		}
		if owner, ok := byName[plainName(t.Hostname)]; ok {
			// A node that was broken into can write another's key, also before that one has, but cannot give the other its name.
			nodes = slices.DeleteFunc(slices.Clone(nodes), func(n node) bool {
				if !bears(t, n) {
					refused[n.name] = fmt.Sprintf("node %s of the tailnet, which it says it is, calls itself %s, as another Node is called: it is "+
						"not what it says it is, or that one is its former name (then `kubectl delete node` that)", t.ID, owner)
				}
				return !bears(t, n)
			})
		}
		holder := ""
		if m, ok := known.of(t); ok {
			holder = m.Node
		}
		why := fmt.Sprintf("Nodes %s have the same node key: one of them is not what it says it is, or is the other's former name (then `kubectl delete node` that)",
			strings.Join(nodeNames(nodes), " and "))
		for _, n := range nodes {
			if len(nodes) == 1 || n.name == holder {
				byNode[n.name] = t
			} else {
				refused[n.name] = why
			}
		}
	}
	return byNode, refused
}

// foreignClaims names the nodes of the tailnet that advertise a range of pods that is not theirs: they get no traffic, since nobody
// approves it, but somebody tries. What a node had until now, or is about to have under its Node's name, is its own.
func (o observation) foreignClaims(claims map[string]headscale.Node, granted map[string]grant, known memberIndex, ranges *netset.Set) string {
	own := map[headscale.ID][]netip.Prefix{}
	byName := map[string][]netip.Prefix{}
	for _, n := range o.nodes {
		if t, ok := claims[n.name]; ok {
			own[t.ID] = append(own[t.ID], granted[n.name].cidrs...)
		}
		byName[plainName(n.name)] = n.cidrs
	}
	var out []string
	for _, t := range o.tailnet {
		if _, is := own[t.ID]; !t.Online || !is && o.now.Sub(t.Created) < secondLook {
			continue // away, or just about to say which Node it is
		}
		m, _ := known.of(t)
		strange := netset.Without(t.Available, slices.Concat(own[t.ID], m.Routes, byName[plainName(t.Hostname)]))
		strange = slices.DeleteFunc(strange, func(r netip.Prefix) bool { _, within := ranges.Covering(r); return !within })
		if len(strange) > 0 {
			out = append(out, fmt.Sprintf("node %s (%s) advertises %v", t.ID, printable.Cut(t.Name, 60), strange))
		}
	}
	if len(out) == 0 {
		return ""
	}
	slices.Sort(out)
	return "ranges of pods are advertised by nodes of the tailnet whose they are not. The controller approves none of it; if such a node is none of the " +
		"cluster's, or was broken into, remove it (headscale nodes delete -i ID): " + abridge(out)
}

// plainName makes names comparable: Headscale's versions differ in what they make of dots and of long names.
func plainName(name string) string {
	name = strings.Map(func(r rune) rune {
		if r == '-' || r == '.' {
			return -1
		}
		return r
	}, strings.ToLower(name))
	return name[:min(len(name), 40)]
}

// bears reports whether a node of the tailnet calls itself as a Node is called, which our daemons have theirs do.
func bears(t headscale.Node, n node) bool {
	return t.Hostname != "" && plainName(t.Hostname) == plainName(n.name)
}

// expiring names the Nodes whose node key expires soon or has expired.
func (o observation) expiring(claims map[string]headscale.Node) string {
	var out []string
	for name, t := range claims {
		if !t.Expiry.IsZero() && t.Expiry.Sub(o.now) < headscale.NodeKeyWarning {
			out = append(out, fmt.Sprintf("%s at %s (node %s)", name, t.Expiry.UTC().Format(time.RFC3339), t.ID))
		}
	}
	if len(out) == 0 {
		return ""
	}
	slices.Sort(out)
	return "with its node key a Node loses its pods' network: run `headscale nodes expire --disable -i ID`, or log in again with a key that has " +
		"tags. Expiring: " + strings.Join(out, ", ")
}

// abridge lists the first of many.
func abridge(list []string) string {
	if more := len(list) - maxListed; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(list[:maxListed], ", "), more)
	}
	return strings.Join(list, ", ")
}

// nodeNames are sorted.
func nodeNames(nodes []node) []string {
	var out []string
	for _, n := range nodes {
		out = append(out, n.name)
	}
	slices.Sort(out)
	return out
}

// grant is what each claimed Node may have: its own pod CIDRs, or a reason why not.
type grant struct {
	cidrs []netip.Prefix
	why   string
}

// grant decides about ranges. Those approved already come first, then the older Node: a new one cannot take a range from
// another by overlapping it.
func (o observation) grant(claims map[string]headscale.Node, known memberIndex) map[string]grant {
	order := slices.Clone(o.nodes)
	rank := map[string]int{}
	for _, n := range o.nodes {
		t, joined := claims[n.name]
		if !joined || len(n.cidrs) == 0 {
			continue
		}
		// Where the memory was lost, Headscale says what was approved.
		had := t.Approved
		if m, ok := known.of(t); ok {
			if had = m.Routes; m.Node != n.name {
				continue
			}
		}
		if len(netset.Without(n.cidrs, had)) == 0 {
			rank[n.name] = -1
		}
	}
	slices.SortFunc(order, func(a, b node) int {
		if c := cmp.Compare(rank[a.name], rank[b.name]); c != 0 {
			return c
		}
		return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.name, b.name))
	})
	out := map[string]grant{}
	taken := netset.NewSet()
	for _, n := range order {
		g := grant{why: o.fault(n, taken)}
		if g.why == "" {
			g.cidrs = n.cidrs
			taken.Add(n.cidrs...)
		}
		out[n.name] = g
	}
	return out
}

// fault says why a Node's pod CIDRs cannot be approved, "" where they can. taken are other Nodes'.
func (o observation) fault(n node, taken *netset.Set) string {
	if n.cidrErr != nil {
		return n.cidrErr.Error()
	}
	for _, c := range n.cidrs {
		_, overlaps := taken.Overlapping(c)
		switch {
		case c.Overlaps(netset.TailnetIPv4), c.Overlaps(netset.TailnetIPv6):
			return fmt.Sprintf("%s is in the tailnet's own range", c)
		case overlaps:
			return fmt.Sprintf("%s overlaps another Node's pod CIDR", c)
		case slices.ContainsFunc(o.services, c.Overlaps):
			return fmt.Sprintf("%s overlaps the service range %v: no Service there could be reached", c, o.services)
		case len(o.ranges) > 0 && !netset.Covers(o.ranges, c):
			return fmt.Sprintf("%s is not within network.clusterCIDRs %v: set them to what kube-controller-manager has as --cluster-cidr", c, o.ranges)
		case len(o.nodes) > 1 && slices.Contains(o.ranges, c):
			return fmt.Sprintf("%s is a whole cluster range", c)
		}
	}
	return ""
}

// view is the Node as Headscale sees it.
func (p *plan) view(n node, claims map[string]headscale.Node, refused map[string]string, g grant) kube.View {
	v := kube.View{NodeKey: n.key}
	t, known := claims[n.name]
	switch {
	case refused[n.name] != "":
		v.State, v.Message = kube.StateRefused, refused[n.name]
		return v
	case !known:
		v.State, v.Message = kube.StateUnknown, "Headscale has no node with this key"
		// It may be joining; one that stays unknown is no reason to ask all the time.
		p.pending = p.pending || n.viewText != v.String()
		return v
	}
	if !t.Expiry.IsZero() {
		at := t.Expiry.UTC().Truncate(time.Second)
		v.Expiry = &at
	}
	missing := netset.Without(g.cidrs, t.Primary)
	switch {
	case g.why != "":
		v.State, v.Message = kube.StateRefused, g.why
	case len(g.cidrs) == 0:
		v.State, v.Message = kube.StatePending, "the Node has no pod CIDR yet"
	case len(missing) == 0:
		v.State, v.Routes = kube.StateRouted, g.cidrs
	case !t.Online && n.view.NodeKey == n.key && n.view.State == kube.StateRouted && slices.Equal(n.view.Routes, g.cidrs):
		// It is away, or Headscale has just started and holds everybody for away: that is no news.
		v.State, v.Routes = n.view.State, n.view.Routes
	default:
		v.State = kube.StatePending
		v.Message = p.why(t, missing)
		p.pending = p.pending || t.Online
	}
	return v
}

// why says what keeps granted routes from being in use.
func (p *plan) why(t headscale.Node, missing []netip.Prefix) string {
	switch other, taken := p.serving[missing[0]]; {
	case !t.Online:
		return fmt.Sprintf("node %s is not connected to Headscale", t.Name)
	case len(netset.Without(missing, t.Available)) > 0:
		return fmt.Sprintf("node %s does not advertise %v yet", t.Name, netset.Without(missing, t.Available))
	case len(netset.Without(missing, t.Approved)) > 0:
		return fmt.Sprintf("%v are about to be approved", missing)
	case taken:
		return fmt.Sprintf("%v is approved, but node %s (%s) advertises it too and gets its traffic: if that is another cluster's, one of the two needs "+
			"other pod CIDRs", missing[0], other.Name, other.ID)
	}
	return fmt.Sprintf("%v are approved", missing)
}

// approve plans what is to change among the approved routes of a node of the tailnet: of those that are ours to give it has
// exactly own, everything else stays as it is.
func (p *plan) approve(t headscale.Node, own []netip.Prefix, ours func(netip.Prefix) bool) {
	stale := slices.DeleteFunc(netset.Without(t.Approved, own), func(r netip.Prefix) bool { return !ours(r) })
	if len(stale) > 0 || len(netset.Without(own, t.Approved)) > 0 {
		p.approvals = append(p.approvals, approval{node: t, own: own, stale: stale})
		p.pending = true
	}
}

// remember plans the memory, and what becomes of nodes of the tailnet that no Node claims any more.
func (p *plan) remember(o observation, claims map[string]headscale.Node, granted map[string]grant, leads map[string][]netip.Prefix) {
	known := o.memory.index()
	p.memory.Serve = o.serve
	claimed := map[headscale.ID]bool{}
	inUse := netset.NewSet()
	for _, n := range o.nodes {
		t, ok := claims[n.name]
		if !ok {
			continue
		}
		claimed[t.ID] = true
		inUse.Add(granted[n.name].cidrs...)
		m, _ := known.of(t)
		p.memory.Members = append(p.memory.Members, member{
			ID: t.ID, Node: n.name, Daemon: n.mode == config.ModeDaemon && o.joined(t) && bears(t, n), Routes: granted[n.name].cidrs, Created: t.Created,
			Services: leftOf(m.Services, leads[n.name], t.Approved),
		})
		// Not one that has expired: `headscale nodes expire` is how an administrator shuts a node out.
		if n.mode == config.ModeDaemon && o.joined(t) && t.Expiry.After(o.now) && t.Expiry.Sub(o.now) < headscale.NodeKeyRescue {
			p.disableExpiry = append(p.disableExpiry, t.ID)
		}
	}
	p.memory.Removed = slices.DeleteFunc(slices.Clone(o.memory.Removed), func(r removal) bool { return o.now.Sub(r.At) >= time.Hour })
	listed := map[headscale.ID][]headscale.Node{}
	for _, t := range o.tailnet {
		listed[t.ID] = append(listed[t.ID], t)
	}
	for _, m := range o.memory.Members {
		switch i := slices.IndexFunc(listed[m.ID], m.is); {
		case claimed[m.ID]:
		case i < 0:
			p.miss(o, m)
		default:
			p.retire(o, m, listed[m.ID][i], inUse)
		}
	}
	sortMembers(p.memory.Members)
}

const (
	// secondLook is how far apart two looks at Headscale are of which both must agree before something is removed or forgotten:
	// one answer may be odd.
	secondLook = time.Minute
	// removals is how many nodes are removed from Headscale within an hour at most, or a tenth of all where that is more. What
	// makes more of them look stale is rather a fault of Kubernetes or Headscale than so many nodes that went.
	removals = 10
)

// miss forgets a node that Headscale does not list, once it has not done so for a while.
func (p *plan) miss(o observation, m member) {
	if m.Missing.IsZero() {
		m.Missing, p.pending = o.now, true
	}
	if o.now.Sub(m.Missing) < secondLook {
		p.memory.Members = append(p.memory.Members, m)
	}
}

// retire deals with a node of the tailnet whose Node is gone, or has joined anew under another key.
func (p *plan) retire(o observation, m member, t headscale.Node, inUse *netset.Set) {
	m.Missing = time.Time{}
	if m.Gone.IsZero() {
		m.Gone = o.now
	}
	over := o.now.Sub(m.Gone) >= o.grace
	if over && m.Daemon && !t.Online {
		p.discard(o, m, t)
		return
	}
	m.Due = time.Time{}
	var stale []netip.Prefix
	for _, r := range m.Routes {
		// At once where somebody else has the range now: two nodes with one route are a lottery.
		_, others := inUse.Overlapping(r)
		if slices.Contains(t.Approved, r) && (over || others) {
			stale = append(stale, r)
		}
	}
	// To services several lead, and nothing is lost where one ends.
	m.Services = leftOf(m.Services, nil, t.Approved)
	if stale = append(stale, m.Services...); len(stale) > 0 {
		p.approvals = append(p.approvals, approval{node: t, stale: stale})
	}
	if over && !m.Daemon && len(stale) == 0 {
		return // forgotten: it is somebody's machine without a route of ours
	}
	p.memory.Members = append(p.memory.Members, m)
}

// discard removes a node of the tailnet whose Node is gone for good: at the second look, and not too many at once. It is
// remembered until it is really gone.
func (p *plan) discard(o observation, m member, t headscale.Node) {
	again := slices.ContainsFunc(p.memory.Removed, func(r removal) bool { return r.ID == t.ID })
	switch {
	case m.Due.IsZero():
		m.Due, p.pending = o.now, true
	case o.now.Sub(m.Due) < secondLook:
		p.pending = true
	case again:
		p.remove = append(p.remove, t)
	case len(p.memory.Removed) >= o.maxRemovals():
		p.held++
	default:
		p.remove = append(p.remove, t)
		p.memory.Removed = append(p.memory.Removed, removal{t.ID, o.now})
	}
	p.memory.Members = append(p.memory.Members, m)
}

func (o observation) maxRemovals() int { return max(removals, len(o.memory.Members)/10) }

// heldText says that more nodes look stale than are removed at once.
func (p plan) heldText(o observation) string {
	return fmt.Sprintf("%d more nodes in Headscale have no Node any more and are left for later: at most %d are removed within an hour. If their "+
		"Nodes should be there, scale the Deployment headcni-controller to 0 and bring them back", p.held, o.maxRemovals())
}
