package controller

import (
	"context"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/kube"
)

// watch keeps the Nodes, cut down to what counts, and asks for a pass where that changes, until ctx ends.
func (c *Controller) watch(ctx context.Context) {
	factory := informers.NewSharedInformerFactoryWithOptions(c.client, 0, informers.WithTransform(func(obj any) (any, error) {
		if n, ok := obj.(*corev1.Node); ok {
			return trim(n), nil
		}
		return obj, nil
	}))
	informer := factory.Core().V1().Nodes().Informer()
	set := func(obj any) {
		if n, ok := obj.(*corev1.Node); ok {
			c.setNode(nodeOf(n))
		}
	}
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: set, UpdateFunc: func(_, obj any) { set(obj) },
		DeleteFunc: func(obj any) {
			if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = gone.Obj
			}
			if n, ok := obj.(*corev1.Node); ok {
				c.dropNode(n.Name)
			}
		},
	})
	if err != nil {
		c.log.Error("watch Nodes", "err", err) // only of an informer that was stopped
		return
	}
	factory.StartWithContext(klog.NewContext(ctx, klog.New(nil)))
	defer factory.Shutdown() // waits for what it has started
	if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		c.mu.Lock()
		c.synced = true
		c.mu.Unlock()
		c.loop.Wake()
	}
	<-ctx.Done()
}

// trim keeps only what the controller uses of a Node: a whole one is 10 kB.
func trim(n *corev1.Node) *corev1.Node {
	out := &corev1.Node{Spec: corev1.NodeSpec{PodCIDR: n.Spec.PodCIDR, PodCIDRs: n.Spec.PodCIDRs}}
	for _, a := range n.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil && netset.TailnetIPv4.Contains(ip) {
			out.Status.Addresses = append(out.Status.Addresses, a)
		}
	}
	out.Name, out.UID, out.ResourceVersion, out.CreationTimestamp = n.Name, n.UID, n.ResourceVersion, n.CreationTimestamp
	for _, key := range []string{kube.NodeKey, kube.Mode, kube.Headscale, kube.Allocated, kube.Uninstall} {
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
	same := had && old.key == n.key && old.mode == n.mode && old.viewText == n.viewText && old.leaving == n.leaving &&
		slices.Equal(old.cidrs, n.cidrs)
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

// Nodes that the informer knows, by name.
func (c *Controller) snapshot() (nodes []node, synced bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(c.nodes)) {
		nodes = append(nodes, c.nodes[name])
	}
	return nodes, c.synced
}
