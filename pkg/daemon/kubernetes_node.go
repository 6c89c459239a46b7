package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// upReason is the reason of the condition NetworkUnavailable=False that we set.
	upReason = "HeadCNIIsUp"
	// cidrPatience is how long a Node may be without pod CIDRs before somebody has to look: Kubernetes gives them in 5 s.
	cidrPatience = 30 * time.Second
	// writeInterval is the least time between two writes of the same thing to our Node, should somebody undo them at once.
	writeInterval = 5 * time.Second
)

// learned is what Kubernetes has told, kept for a boot without its API server.
type learned struct {
	// Node is whose it is: under another name the node is another one to Kubernetes.
	Node     string         `json:"node"`
	PodCIDRs []netip.Prefix `json:"podCIDRs,omitempty"`
	// Leaving are former pod CIDRs whose pods still run here.
	Leaving      []netip.Prefix `json:"leaving,omitempty"`
	ClusterCIDRs []netip.Prefix `json:"clusterCIDRs,omitempty"`
	ServiceCIDRs []netip.Prefix `json:"serviceCIDRs,omitempty"`
}

// learn takes over what the view says. It does no I/O.
func (l learned) learn(v *clusterView, node string) (learned, error) {
	if l.Node != node {
		l = learned{Node: node, Leaving: netset.Union(l.PodCIDRs, l.Leaving)}
	}
	if v.services != nil {
		l.ServiceCIDRs = v.services
	}
	if !v.synced {
		return l, nil
	}
	l.ClusterCIDRs = v.pods
	if v.node == nil {
		return l, nil
	}
	now, err := kube.PodCIDRs(v.node)
	if err != nil || len(now) == 0 {
		return l, err
	}
	l.Leaving = netset.Without(netset.Union(l.Leaving, netset.Without(l.PodCIDRs, now)), now)
	l.PodCIDRs = now
	return l, nil
}

// stay drops the former CIDRs that no pod has an address of any more.
func (l learned) stay(live []netip.Addr) learned {
	l.Leaving = slices.DeleteFunc(slices.Clone(l.Leaving), func(p netip.Prefix) bool { return !slices.ContainsFunc(live, p.Contains) })
	return l
}

// inForce is the configuration with what Kubernetes says of the network.
func inForce(c config.Config, l learned) (config.Config, error) {
	n := &c.Network
	n.PodCIDRs = texts(l.PodCIDRs)
	n.ClusterCIDRs = append(slices.Clone(n.ClusterCIDRs), texts(netset.Union(l.ClusterCIDRs, l.Leaving))...)
	if len(n.ServiceCIDRs) == 0 {
		n.ServiceCIDRs = texts(l.ServiceCIDRs)
	}
	if err := c.Validate(); err != nil {
		return c, fmt.Errorf("with what Kubernetes says: %w", err)
	}
	return c, nil
}

func texts(prefixes []netip.Prefix) config.CIDRs {
	var out config.CIDRs
	for _, p := range prefixes {
		out = append(out, p.String())
	}
	return out
}

// noCIDR says why there is no pod CIDR to work with. While somebody may still give one it is a thing to wait for.
func (v *clusterView) noCIDR(node string, waited time.Duration) error {
	var err error
	switch {
	case v.err != nil:
		return fmt.Errorf("no pod CIDR is known yet and the API server cannot be asked: %w", v.err)
	case !v.synced:
		return reconcile.Waiting("asks the API server for this node's pod CIDR")
	case v.node == nil:
		err = fmt.Errorf("Kubernetes has no Node %s: kubelet makes it; set kubernetes.nodeName or NODE_NAME if it is called otherwise", node)
	default:
		err = fmt.Errorf("Kubernetes has given Node %s no pod CIDR yet; kube-controller-manager does so with --allocate-node-cidrs and "+
			"--cluster-cidr, headcni-controller where network.clusterCIDRs is set", node)
	}
	if waited < cidrPatience {
		return reconcile.Waiting(err.Error())
	}
	return err
}

// nodeWrite is what our Node lacks.
type nodeWrite struct {
	annotations map[string]string
	up          bool
}

// planNodeWrite compares our Node with what it should say. It does no I/O.
func planNodeWrite(n *corev1.Node, o observation, up bool) nodeWrite {
	w := nodeWrite{annotations: map[string]string{}}
	if running(o.tailnet) {
		var ips []string
		for _, ip := range o.tailnet.Self.IPs {
			ips = append(ips, ip.String())
		}
		for key, v := range map[string]string{
			kube.NodeKey: o.tailnet.Self.NodeKey, kube.Mode: o.mode, kube.TailnetIPs: strings.Join(ips, ","),
		} {
			if n.Annotations[key] != v {
				w.annotations[key] = v
			}
		}
	}
	// The condition is never set to True: while the node is not programmed the runtime has no conflist and kubelet says
	// NotReady, which keeps pods away just as well; and a True that outlives us would taint a node that has another CNI.
	w.up = up && !slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeNetworkUnavailable && c.Status == corev1.ConditionFalse
	})
	return w
}

// sameNode compares what the daemon acts on.
func sameNode(a, b *corev1.Node) bool {
	return a.UID == b.UID && a.Spec.PodCIDR == b.Spec.PodCIDR && slices.Equal(a.Spec.PodCIDRs, b.Spec.PodCIDRs) &&
		maps.Equal(a.Annotations, b.Annotations) && slices.Equal(a.Status.Conditions, b.Status.Conditions)
}

// annotate merges annotations into our Node; nil removes one.
func (k *cluster) annotate(ctx context.Context, annotations map[string]any) error {
	body, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": annotations}})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	_, err = k.client.CoreV1().Nodes().Patch(ctx, k.node, types.MergePatchType, body, metav1.PatchOptions{})
	if err != nil {
		return fmt.Errorf("annotate Node %s: %w", k.node, err)
	}
	return nil
}

// condition merges one condition into our Node's status by its type, as kubelet does with its own.
func (k *cluster) condition(ctx context.Context, c any) error {
	body, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []any{c}}})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	_, err = k.client.CoreV1().Nodes().Patch(ctx, k.node, types.StrategicMergePatchType, body, metav1.PatchOptions{}, "status")
	if err != nil {
		return fmt.Errorf("set the condition NetworkUnavailable of Node %s: %w", k.node, err)
	}
	return nil
}

// syncNode is the part kubernetes: it writes to our Node what is missing there, and the events that are due.
func (d *Daemon) syncNode(ctx context.Context, o observation, up bool) ([]string, error) {
	v, k := o.cluster, d.cluster
	switch {
	case v.err != nil:
		return nil, fmt.Errorf("the API server does not answer; what runs goes on and new pods start: %w", v.err)
	case !v.synced:
		return nil, reconcile.Waiting("asks the API server")
	}
	done, err := d.writeNode(ctx, o, up)
	// Last, and whatever became of the rest: an event must not hold back what the controller waits for.
	return done, d.denied.judge(errors.Join(err, d.events.send(ctx, k)), time.Now())
}

// writeNode writes to our Node what is missing there.
func (d *Daemon) writeNode(ctx context.Context, o observation, up bool) ([]string, error) {
	v, k := o.cluster, d.cluster
	if v.node == nil {
		return nil, v.noCIDR(k.node, cidrPatience)
	}
	w := planNodeWrite(v.node, o, up)
	if len(w.annotations) == 0 && !w.up {
		return nil, nil
	}
	if again := fmt.Sprint(w); again == d.wrote && time.Since(d.wroteAt) < writeInterval {
		return nil, reconcile.Waiting("what was just written to the Node is on its way back, or somebody undoes it")
	} else {
		d.wrote, d.wroteAt = again, time.Now()
	}
	var done []string
	var errs []error
	if len(w.annotations) > 0 {
		set := map[string]any{}
		for key, v := range w.annotations {
			set[key] = v
			done = append(done, "annotate "+key)
		}
		slices.Sort(done)
		errs = append(errs, k.annotate(ctx, set))
	}
	if w.up {
		done = append(done, "NetworkUnavailable=False")
		now := metav1.Now()
		errs = append(errs, k.condition(ctx, corev1.NodeCondition{
			Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse, Reason: upReason,
			Message: "HeadCNI has programmed this node", LastHeartbeatTime: now, LastTransitionTime: now,
		}))
	}
	return done, errors.Join(errs...)
}

// leave takes everything off the node where its Node object asks for it, and says so there. It reports whether there is nothing
// else to do, and when to look again. Once done it stays so until the process ends: the annotation goes before we are stopped.
func (d *Daemon) leave(ctx context.Context) (leaving bool, next time.Duration) {
	v := d.cluster.view()
	if v == nil || !d.gone && (v.node == nil || v.node.Annotations[kube.Uninstall] != "true") {
		return d.gone, fullCheck
	}
	if wait := time.Until(d.leaveAgain); wait > 0 {
		return true, wait // what a failed try changed in the kernel wakes us at once
	}
	if err := d.takeAway(ctx, v); err != nil {
		d.log.Error("uninstall from this node", "err", err)
		d.leaveAgain = time.Now().Add(writeInterval)
		return true, writeInterval
	}
	return true, fullCheck
}

func (d *Daemon) takeAway(ctx context.Context, v *clusterView) error {
	if !d.gone {
		if err := takeOff(ctx, d.cfg, d.saved, d.log); err != nil {
			return err
		}
		d.log.Info("everything of ours is off this node; idle from here on")
		d.gone = true
	}
	if v.err != nil || v.node == nil || v.node.Annotations[kube.Uninstall] != "true" || v.node.Annotations[kube.Uninstalled] != "" {
		return nil
	}
	if slices.ContainsFunc(v.node.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Reason == upReason }) {
		err := d.cluster.condition(ctx, map[string]string{"$patch": "delete", "type": string(corev1.NodeNetworkUnavailable)})
		if err != nil {
			return err
		}
	}
	return d.cluster.annotate(ctx, map[string]any{
		kube.Uninstalled: time.Now().UTC().Format(time.RFC3339), kube.NodeKey: nil, kube.Mode: nil, kube.TailnetIPs: nil,
	})
}
