package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// nodesLeave is how long the nodes' daemons have to take everything off their nodes.
	nodesLeave = 2 * time.Minute
	// leaderLeaves is how long the controllers have to stop.
	leaderLeaves = time.Minute
	poll         = time.Second
	// testPod is what `helm test` leaves, so that its log can be read.
	testPod = "headcni-test"
)

// Uninstall has every node's daemon take HeadCNI off its node, and then removes what the controllers made: nodes in
// Headscale, annotations, the join key and their memory. A node whose daemon does not answer is named and left behind. It
// may be repeated.
func (c *Controller) Uninstall(ctx context.Context) error {
	if err := c.stopControllers(ctx); err != nil {
		return err
	}
	var errs []error
	errs = append(errs, c.forgetNames(ctx), c.askNodes(ctx), c.forgetNodes(ctx))
	for _, made := range []struct {
		kind, name string
		remove     func(context.Context, string, metav1.DeleteOptions) error
	}{
		{"Secret", kube.JoinSecret, c.client.Secrets(c.namespace).Delete},
		{"ConfigMap", kube.Memory, c.client.ConfigMaps(c.namespace).Delete},
		{"Pod", testPod, c.client.Pods(c.namespace).Delete},
		{"Lease", kube.Lease, c.client.Leases(c.namespace).Delete},
	} {
		if err := made.remove(ctx, made.name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("remove %s %s: %w", made.kind, made.name, err))
		}
	}
	return errors.Join(append(errs, c.cleanNodes(ctx))...)
}

// stopControllers scales them to none: a leader would write again what is removed here.
func (c *Controller) stopControllers(ctx context.Context) error {
	deployments := c.client.Deployments(c.namespace)
	_, err := deployments.Patch(ctx, kube.Controller, types.MergePatchType, []byte(`{"spec":{"replicas":0}}`), metav1.PatchOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stop the controllers: %w", err)
	}
	deadline := c.now().Add(leaderLeaves)
	for {
		d, err := deployments.Get(ctx, kube.Controller, metav1.GetOptions{})
		if apierrors.IsNotFound(err) || err == nil && d.Status.Replicas == 0 && d.Status.ObservedGeneration >= d.Generation {
			return nil
		}
		if err == nil && c.now().After(deadline) {
			err = errors.New("they are still running")
		}
		if err != nil {
			return fmt.Errorf("wait for the controllers to stop: %w", err)
		}
		if reconcile.Sleep(ctx, poll); ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// askNodes annotates the Nodes whose daemon has ever spoken, and waits for the answers.
func (c *Controller) askNodes(ctx context.Context) error {
	deadline := c.now().Add(nodesLeave)
	asked := map[string]bool{}
	for {
		list, err := c.client.Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return fmt.Errorf("list the Nodes: %w", err)
		}
		var waiting []string
		for _, n := range list.Items {
			if n.Annotations[kube.NodeKey] == "" && n.Annotations[kube.Uninstall] == "" || n.Annotations[kube.Uninstalled] != "" {
				continue
			}
			if !asked[n.Name] {
				if err := c.annotate(ctx, n.Name, map[string]any{kube.Uninstall: "true"}); err != nil {
					return err
				}
				asked[n.Name] = true
			}
			waiting = append(waiting, n.Name)
		}
		if len(waiting) == 0 {
			c.log.Info("the nodes are clean", "nodes", len(asked))
			return nil
		}
		if c.now().After(deadline) {
			// A node that is dead for good must not keep everything else from going.
			for _, name := range waiting {
				c.log.Warn("no answer from the daemon: run `headcni-daemon uninstall` there, or reboot it", "node", name)
			}
			return nil
		}
		if reconcile.Sleep(ctx, poll); ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// forgetNodes removes from Headscale the nodes that joined for us, and takes our routes back from the others. What stays is
// named in the log: a Headscale that is dead for good must not keep everything else from going.
func (c *Controller) forgetNodes(ctx context.Context) error {
	m, _, err := c.loadMemory(ctx)
	if err != nil || len(m.Members) == 0 {
		return err
	}
	api, _, err := c.headscale.Connect(ctx)
	if err == nil && api == nil {
		err = errors.New("a pre-auth key can remove nothing")
	}
	var tailnet []headscale.Node
	if err == nil {
		tailnet, err = api.Nodes(ctx)
	}
	if err != nil {
		var ids []string
		for _, e := range m.Members {
			ids = append(ids, e.ID.String())
		}
		c.log.Warn("nodes stay in Headscale: run `headscale nodes delete -i ID` for those that are not to be used further", "ids", ids, "err", err)
		return nil
	}
	known := m.index()
	for _, err := range each(tailnet, func(t headscale.Node) error { return c.forget(ctx, api, known, t) }) {
		if err != nil {
			c.log.Warn("a node stays in Headscale as it is", "err", err)
		}
	}
	return nil
}

func (c *Controller) forget(ctx context.Context, api *headscale.Client, known memberIndex, t headscale.Node) (err error) {
	e, ok := known.of(t)
	switch {
	case !ok:
		return nil
	case e.Daemon:
		err = api.DeleteNode(ctx, t)
	default:
		_, err = api.ApproveRoutes(ctx, t, nil, slices.Concat(e.Routes, e.Services))
	}
	return unlessGone(err)
}

// cleanNodes removes our annotations.
func (c *Controller) cleanNodes(ctx context.Context) error {
	list, err := c.client.Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list the Nodes: %w", err)
	}
	var errs []error
	for _, n := range list.Items {
		if change := ourAnnotations(&n); len(change) > 0 {
			errs = append(errs, c.annotate(ctx, n.Name, change))
		}
	}
	return errors.Join(errs...)
}

func ourAnnotations(n *corev1.Node) map[string]any {
	change := map[string]any{}
	for _, key := range []string{
		kube.NodeKey, kube.Mode, kube.TailnetIPs, kube.TailnetDomain, kube.Headscale, kube.Allocated, kube.Uninstall, kube.Uninstalled,
	} {
		if _, ok := n.Annotations[key]; ok {
			change[key] = nil
		}
	}
	return change
}

// annotate merges annotations into a Node; nil removes one.
func (c *Controller) annotate(ctx context.Context, node string, change map[string]any) error {
	return c.patch(ctx, node, types.MergePatchType, map[string]any{"metadata": map[string]any{"annotations": change}})
}
