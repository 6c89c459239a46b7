package controller

import (
	"context"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/kube"
)

// watch keeps the Nodes, cut down to what counts, and asks for a pass where that changes, until ctx ends.
func (c *Controller) watch(ctx context.Context) { kube.WatchNodes(ctx, c.client, (*nodeStore)(c)) }

// nodeStore is where the watch puts Nodes.
type nodeStore Controller

func (s *nodeStore) Trim(n *corev1.Node) *corev1.Node {
	return trim(n, s.cfg.Network.AdvertiseServices.NodeSelector)
}
func (s *nodeStore) SetNode(n *corev1.Node)    { (*Controller)(s).setNode(nodeOf(n)) }
func (s *nodeStore) RemoveNode(n *corev1.Node) { (*Controller)(s).dropNode(n.Name) }

// Answered need not tell: until the Nodes are read, Ready says so.
func (s *nodeStore) Answered(error) {}

func (s *nodeStore) ReplaceNodes(nodes []*corev1.Node) {
	all := map[string]node{}
	for _, n := range nodes {
		all[n.Name] = nodeOf(n)
	}
	s.mu.Lock()
	s.nodes, s.synced = all, true
	s.mu.Unlock()
	s.loop.Wake()
}

// trim keeps only what the controller uses of a Node: a whole one is 10 kB. Of labels it keeps those of selector, if there are any, and
// only then whether the Node is ready.
func trim(n *corev1.Node, selector map[string]string) *corev1.Node {
	out := &corev1.Node{Spec: corev1.NodeSpec{PodCIDR: n.Spec.PodCIDR, PodCIDRs: n.Spec.PodCIDRs}}
	for key := range selector {
		if v, ok := n.Labels[key]; ok {
			if out.Labels == nil {
				out.Labels = map[string]string{}
			}
			out.Labels[key] = v
		}
	}
	if i := slices.IndexFunc(n.Status.Conditions, isReady); i >= 0 && len(selector) > 0 {
		out.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		out.Spec.Unschedulable = n.Spec.Unschedulable
	}
	for _, a := range n.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil && netset.TailnetIPv4.Contains(ip) {
			out.Status.Addresses = append(out.Status.Addresses, a)
		}
	}
	out.Name, out.UID, out.ResourceVersion, out.CreationTimestamp = n.Name, n.UID, n.ResourceVersion, n.CreationTimestamp
	for _, key := range []string{kube.NodeKey, kube.Mode, kube.TailnetDomain, kube.Headscale, kube.Allocated, kube.Uninstall} {
		if v, ok := n.Annotations[key]; ok {
			if out.Annotations == nil {
				out.Annotations = map[string]string{}
			}
			out.Annotations[key] = v
		}
	}
	return out
}

func (c *Controller) setNode(n node) {
	c.mu.Lock()
	old, had := c.nodes[n.name]
	c.nodes[n.name] = n
	c.mu.Unlock()
	same := had && old.key == n.key && old.mode == n.mode && old.domain == n.domain && old.viewText == n.viewText && old.leaving == n.leaving &&
		slices.Equal(old.cidrs, n.cidrs) && maps.Equal(old.labels, n.labels) && old.fit == n.fit
	if !same {
		c.loop.Wake()
	}
}

func (c *Controller) dropNode(name string) {
	c.mu.Lock()
	delete(c.nodes, name)
	c.mu.Unlock()
	c.loop.Wake()
}

// snapshot is the Nodes that are known, by name.
func (c *Controller) snapshot() (nodes []node, synced bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(c.nodes)) {
		nodes = append(nodes, c.nodes[name])
	}
	return nodes, c.synced
}
