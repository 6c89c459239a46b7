package agent

import (
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/watch"
)

// owner says whose link it is.
type owner struct {
	link podlink.Attachment
	// known: what policies say of the pod is known, or it is no Pod, which no policy is for. Otherwise why says what is missing.
	known bool
	why   string
}

// locals remembers what was known of the node's links, for as long as they are there. Make it with newLocals.
type locals struct {
	seen map[string]seen // by the link's name
	// made are the pods of the last snapshot that differ from the API's, by these.
	made map[*policy.Pod]*policy.Pod
}

// seen is what is known of a link.
type seen struct {
	index int
	addrs []netip.Addr // all that it ever had: a route that somebody deletes comes back
	pod   *policy.Pod  // as the API had it last, nil where it never had
}

func newLocals() *locals {
	return &locals{seen: map[string]seen{}, made: map[*policy.Pod]*policy.Pod{}}
}

// place gives the own node's pods the addresses of their links, in a copy of the cluster's snapshot, and says whose each link is.
// changed is false where it is the last snapshot again, if the cluster did not change.
//
// A pod runs for as long as its link is there: until then it stays what it was, whatever the API says of it.
func (l *locals) place(c *watch.Cluster, links map[string]podlink.Attachment) (s *policy.Snapshot, owners []owner, changed bool) {
	byName := map[string]*policy.Pod{}
	for _, p := range c.Pods {
		if p.Node == c.Node {
			byName[p.Namespace+"/"+p.Name] = p
		}
	}
	now := map[string]seen{}
	have := map[*policy.Pod][]netip.Addr{}
	taken := map[netip.Addr]bool{}
	gone := map[*policy.Pod]bool{}
	for name, link := range links {
		was := l.seen[name]
		if was.index != link.Index {
			was = seen{index: link.Index}
		}
		for _, a := range link.Addrs {
			if !slices.Contains(was.addrs, a) {
				was.addrs = append(was.addrs, a)
			}
		}
		o := owner{link: link}
		pod, why := find(link, byName, c.Static)
		switch {
		case link.Label == "":
			o.known = true
		case pod != nil:
			o.known, was.pod = true, pod
		case was.pod != nil:
			o.known = true
			gone[was.pod] = true
		default:
			o.why = why
		}
		for _, a := range was.addrs {
			taken[a] = true
			if was.pod != nil {
				have[was.pod] = append(have[was.pod], a)
			}
		}
		now[name] = was
		owners = append(owners, o)
	}
	l.seen = now
	slices.SortFunc(owners, func(a, b owner) int { return strings.Compare(a.link.Name, b.link.Name) })
	s, changed = l.snapshot(c, have, taken, gone)
	return s, owners, changed
}

// snapshot is the cluster's with the own pods as they are here.
func (l *locals) snapshot(c *watch.Cluster, have map[*policy.Pod][]netip.Addr, taken map[netip.Addr]bool, gone map[*policy.Pod]bool) (*policy.Snapshot, bool) {
	s, made, changed := *c.Snapshot, map[*policy.Pod]*policy.Pod{}, false
	// here returns a pod as it is here, which is the pod of the last snapshot where that is the same.
	here := func(p *policy.Pod, as policy.Pod) *policy.Pod {
		before := l.made[p]
		if before == nil {
			before = p
		}
		if before.Done != as.Done || before.Terminating != as.Terminating || !slices.Equal(before.IPs, as.IPs) {
			changed = true
			before = &as
		}
		if before != p {
			made[p] = before
		}
		return before
	}
	copied := false
	set := func(i int, p *policy.Pod) {
		if !copied && s.Pods[i] != p { // nearly always the list is the cluster's
			s.Pods, copied = slices.Clone(s.Pods), true
		}
		if copied {
			s.Pods[i] = p
		}
	}
	for i, p := range c.Pods {
		if p.Node != c.Node {
			continue
		}
		as := *p
		if addrs, ok := have[p]; ok {
			slices.SortFunc(addrs, netip.Addr.Compare)
			as.IPs, as.Done, as.Terminating = addrs, false, p.Terminating || p.Done
		} else {
			// After a reboot the status still names an address that may be another's by now.
			as.IPs = slices.DeleteFunc(slices.Clone(p.IPs), func(a netip.Addr) bool { return taken[a] })
		}
		set(i, here(p, as))
	}
	s.Pods = slices.Clip(s.Pods) // what is added is not the cluster's
	for p := range gone {
		as := *p
		as.IPs, as.Done, as.Terminating = have[p], false, true
		slices.SortFunc(as.IPs, netip.Addr.Compare)
		s.Pods = append(s.Pods, here(p, as))
	}
	for p := range l.made {
		changed = changed || made[p] == nil
	}
	l.made = made
	return &s, changed
}

// find returns the Pod that a link was made for. A name is not enough: a StatefulSet's pod comes again under its name, with other
// labels perhaps.
func find(link podlink.Attachment, byName map[string]*policy.Pod, static map[types.UID]types.UID) (*policy.Pod, string) {
	p := byName[link.Label]
	if p == nil && link.Cut && link.UID == "" {
		p = onlyWithPrefix(byName, link.Label)
	}
	switch {
	case p == nil:
		return nil, "the API server shows no such pod on this node"
	case p.HostNetwork:
		return nil, "the API server shows a pod of that name in the host's network"
	case link.UID == "" || hasUID(link, string(p.UID)) || hasUID(link, string(static[p.UID])):
		return p, "" // a link that an older plugin made has none
	}
	return nil, "the API server still shows an earlier pod of that name"
}

func hasUID(link podlink.Attachment, uid string) bool {
	return link.UID == uid || link.Cut && strings.HasPrefix(uid, link.UID)
}

// onlyWithPrefix finds the pod whose name was too long for the link's alias, nil where it may be several.
func onlyWithPrefix(byName map[string]*policy.Pod, prefix string) (found *policy.Pod) {
	for name, p := range byName {
		if strings.HasPrefix(name, prefix) {
			if found != nil {
				return nil
			}
			found = p
		}
	}
	return found
}
