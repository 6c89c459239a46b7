package agent

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/watch"
)

func addrs(texts ...string) (out []netip.Addr) {
	for _, s := range texts {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

var compareAddrs = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

// link is a pod's as an ADD leaves it.
func link(index int, label, uid string, ips ...string) podlink.Attachment {
	l := podlink.Attachment{Index: index, Label: label, UID: uid, Ready: true}
	l.ContainerID, l.IfName, l.Network, l.Addrs = label+uid, "eth0", "net", addrs(ips...)
	l.Name = podlink.Name(l.ContainerID, l.IfName)
	return l
}

func prefixes(texts ...string) (out []netip.Prefix) {
	for _, s := range texts {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func byName(links ...podlink.Attachment) map[string]podlink.Attachment {
	all := map[string]podlink.Attachment{}
	for _, l := range links {
		all[l.Name] = l
	}
	return all
}

func web(uid types.UID, ips ...string) *policy.Pod {
	return &policy.Pod{Namespace: "ns", Name: "web-0", UID: uid, Node: "a", Labels: map[string]string{"uid": string(uid)}, IPs: addrs(ips...)}
}

func clusterOf(pods ...*policy.Pod) *watch.Cluster {
	return &watch.Cluster{Snapshot: &policy.Snapshot{Node: "a", Pods: pods}, Static: map[types.UID]types.UID{"mirror": "hash"}}
}

// known are the labels of the links whose pods are known.
func known(owners []owner) (out []string) {
	for _, o := range owners {
		if o.known {
			out = append(out, o.link.Label+" "+o.link.UID)
		}
	}
	slices.Sort(out)
	return out
}

// TestPlace: what a link's pod is, and which addresses the own node's pods have.
func TestPlace(t *testing.T) {
	remote := &policy.Pod{Namespace: "ns", Name: "db", UID: "db", Node: "b", IPs: addrs("10.244.2.2")}
	static := &policy.Pod{Namespace: "ns", Name: "static", UID: "mirror", Node: "a"}
	stale := &policy.Pod{Namespace: "ns", Name: "stale", UID: "stale", Node: "a", IPs: addrs("10.244.1.10", "10.244.1.99")}
	pods := []*policy.Pod{web("u1", "10.244.1.77"), remote, static, stale}
	long := link(5, "ns/sta", "", "10.244.1.14")
	long.Cut = true
	s, owners, changed := newLocals().place(clusterOf(pods...), byName(
		link(1, "ns/web-0", "u1", "10.244.1.10", "fd00::10"), // status.podIPs is that of the last boot
		link(2, "ns/static", "hash", "10.244.1.11"),          // the runtime knows a static pod by kubelet's UID
		link(3, "ns/stale", "another", "10.244.1.12"),        // an earlier pod's object
		link(4, "", "", "10.244.1.13"),                       // no Pod
		long,                                                 // could be two
		link(6, "ns/db", "", "10.244.1.15"),                  // a pod of another node
	))
	if diff := cmp.Diff([]string{" ", "ns/static hash", "ns/web-0 u1"}, known(owners)); diff != "" || !changed {
		t.Error(diff, changed)
	}
	want := []*policy.Pod{
		{Namespace: "ns", Name: "web-0", UID: "u1", Node: "a", Labels: map[string]string{"uid": "u1"}, IPs: addrs("10.244.1.10", "fd00::10")},
		remote,
		{Namespace: "ns", Name: "static", UID: "mirror", Node: "a", IPs: addrs("10.244.1.11")},
		{Namespace: "ns", Name: "stale", UID: "stale", Node: "a", IPs: addrs("10.244.1.99")},
	}
	if diff := cmp.Diff(want, s.Pods, compareAddrs); diff != "" {
		t.Error(diff)
	}
	if s.Pods[1] != remote || pods[0].IPs[0].String() != "10.244.1.77" {
		t.Error("the watch's own pods were changed, or copied without need")
	}
}

// TestPlaceWhileItRuns: until its link is gone a pod stays what it was, whatever becomes of its object and its routes.
func TestPlaceWhileItRuns(t *testing.T) {
	l := newLocals()
	first := web("u1", "10.244.1.10")
	links := byName(link(1, "ns/web-0", "u1", "10.244.1.10", "fd00::10"))
	s, _, _ := l.place(clusterOf(first), links)
	again, _, changed := l.place(clusterOf(first), links)
	if changed || again.Pods[0] != s.Pods[0] {
		t.Error("nothing changed, and yet", again.Pods[0])
	}
	running := policy.Pod{Namespace: "ns", Name: "web-0", UID: "u1", Node: "a", Labels: map[string]string{"uid": "u1"}, IPs: addrs("10.244.1.10", "fd00::10")}
	leaving := running
	leaving.Terminating = true
	look := func(what string, c *watch.Cluster, links map[string]podlink.Attachment, want ...policy.Pod) {
		t.Helper()
		s, owners, _ := l.place(c, links)
		if len(known(owners)) != len(links) {
			t.Errorf("%s: known are %q of %d", what, known(owners), len(links))
		}
		var got []policy.Pod
		for _, p := range s.Pods {
			got = append(got, *p)
		}
		if diff := cmp.Diff(want, got, compareAddrs); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
	}
	flushed := byName(link(1, "ns/web-0", "u1", "fd00::10"))
	look("somebody deletes a route", clusterOf(first), flushed, running)
	done := *first
	done.Done, done.IPs = true, nil
	look("its containers have ended", clusterOf(&done), links, leaving)
	look("its object is deleted", clusterOf(), links, leaving)
	second := web("u2")
	look("it comes again under its name", clusterOf(second), links,
		policy.Pod{Namespace: "ns", Name: "web-0", UID: "u2", Node: "a", Labels: second.Labels}, leaving)
	next := running
	next.UID, next.Labels, next.IPs = "u2", second.Labels, addrs("10.244.1.10")
	look("with a link, and the same address", clusterOf(second), byName(link(2, "ns/web-0", "u2", "10.244.1.10")), next)
	look("its link is gone", clusterOf(web("u2")), nil, *web("u2"))
	if len(l.seen) != 0 || len(l.made) != 0 {
		t.Errorf("kept of what is gone: %v, %v", l.seen, l.made)
	}
	// A link's name and address are as before, but it is another link.
	if _, owners, _ := l.place(clusterOf(), byName(link(9, "ns/web-0", "u1", "10.244.1.10"))); len(known(owners)) != 0 {
		t.Error("a new link is taken for one that has gone")
	}
}
