package nodeview

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// upReason is the reason of the condition NetworkUnavailable=False that we set.
	upReason = "HeadCNIIsUp"
	// cidrPatience is how long a Node may lack pod CIDRs before that is an error: Kubernetes assigns them within 5 s.
	cidrPatience = 30 * time.Second
	// writeInterval is the least time between two identical writes to our Node, in case somebody else undoes them.
	writeInterval = 5 * time.Second
)

// Want is what our Node should say of the node.
type Want struct {
	// NodeKey of tailscaled, "" while it is not running: then the annotations stay as they are.
	NodeKey    string
	Mode       string
	TailnetIPs []netip.Addr
	// TailnetDomain is the domain of the tailnet's names; "" where it has none.
	TailnetDomain string
	// Up is true where pods can start.
	Up bool
}

// nodeWrite is what our Node lacks.
type nodeWrite struct {
	annotations map[string]string
	up          bool
}

// planNodeWrite compares our Node with what it should say. It does no I/O.
func planNodeWrite(n *corev1.Node, want Want) nodeWrite {
	w := nodeWrite{annotations: map[string]string{}}
	if want.NodeKey != "" {
		var ips []string
		for _, ip := range want.TailnetIPs {
			ips = append(ips, ip.String())
		}
		for key, v := range map[string]string{
			kube.NodeKey: want.NodeKey, kube.Mode: want.Mode, kube.TailnetIPs: strings.Join(ips, ","), kube.TailnetDomain: want.TailnetDomain,
		} {
			if n.Annotations[key] != v {
				w.annotations[key] = v
			}
		}
	}
	// The condition is never set to True: while the node is not programmed the runtime has no conflist and kubelet says
	// NotReady, which keeps pods away just as well; and a True that outlives us would taint a node that has another CNI.
	w.up = want.Up && !slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
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
func (w *Watch) annotate(ctx context.Context, annotations map[string]any) error {
	body, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": annotations}})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	_, err = w.client.Nodes().Patch(ctx, w.node, types.MergePatchType, body, metav1.PatchOptions{})
	if err != nil {
		return fmt.Errorf("annotate Node %s: %w", w.node, err)
	}
	return nil
}

// condition merges one condition into our Node's status by its type, as kubelet does with its own.
func (w *Watch) condition(ctx context.Context, c any) error {
	body, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []any{c}}})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	_, err = w.client.Nodes().Patch(ctx, w.node, types.StrategicMergePatchType, body, metav1.PatchOptions{}, "status")
	if err != nil {
		return fmt.Errorf("set the condition NetworkUnavailable of Node %s: %w", w.node, err)
	}
	return nil
}

// Sync writes to our Node what is missing there, and sends the waiting events.
func (w *Watch) Sync(ctx context.Context, v *View, want Want) ([]string, error) {
	switch {
	case v.Err != nil:
		return nil, fmt.Errorf("the API server does not answer; what runs goes on and new pods start: %w", v.Err)
	case !v.Synced:
		return nil, reconcile.Waiting("asks the API server")
	}
	done, err := w.writeNode(ctx, v, want)
	// Events come last, whether or not the write succeeded: they must not delay the annotations that the controller waits for.
	return done, w.writeDenied.judge(errors.Join(err, w.events.send(ctx, w)), time.Now())
}

// writeNode writes to our Node what is missing there.
func (w *Watch) writeNode(ctx context.Context, v *View, want Want) ([]string, error) {
	if v.Node == nil {
		return nil, v.ErrNoCIDR(cidrPatience)
	}
	lacks := planNodeWrite(v.Node, want)
	if len(lacks.annotations) == 0 && !lacks.up {
		return nil, nil
	}
	if again := fmt.Sprint(lacks); again == w.wrote && time.Since(w.wroteAt) < writeInterval {
		return nil, reconcile.Waiting("what was just written to the Node is on its way back, or somebody undoes it")
	} else {
		w.wrote, w.wroteAt = again, time.Now()
	}
	var done []string
	var errs []error
	if len(lacks.annotations) > 0 {
		set := map[string]any{}
		for key, v := range lacks.annotations {
			set[key] = v
			done = append(done, "annotate "+key)
		}
		slices.Sort(done)
		errs = append(errs, w.annotate(ctx, set))
	}
	if lacks.up {
		done = append(done, "NetworkUnavailable=False")
		now := metav1.Now()
		errs = append(errs, w.condition(ctx, corev1.NodeCondition{
			Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse, Reason: upReason,
			Message: "HeadCNI has programmed this node", LastHeartbeatTime: now, LastTransitionTime: now,
		}))
	}
	return done, errors.Join(errs...)
}

// Uninstalled records on our Node that HeadCNI is uninstalled from it, where the Node asks for that.
func (w *Watch) Uninstalled(ctx context.Context, v *View) error {
	if v.Err != nil || !v.UninstallAsked() || v.Node.Annotations[kube.Uninstalled] != "" {
		return nil
	}
	if slices.ContainsFunc(v.Node.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Reason == upReason }) {
		if err := w.condition(ctx, map[string]string{"$patch": "delete", "type": string(corev1.NodeNetworkUnavailable)}); err != nil {
			return err
		}
	}
	return w.annotate(ctx, map[string]any{
		kube.Uninstalled: time.Now().UTC().Format(time.RFC3339), kube.NodeKey: nil, kube.Mode: nil, kube.TailnetIPs: nil,
		kube.TailnetDomain: nil,
	})
}
