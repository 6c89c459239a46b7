package rollout

import (
	"context"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/pkg/kube"
)

// Uninstall takes everything off: from each node, from Headscale, and from the cluster. Without yes it says what it would do. It may be run again.
func (r Rollout) Uninstall(ctx context.Context, yes, keepKey bool) error {
	x, end, err := r.begin(ctx, 3)
	if err != nil {
		return err
	}
	defer end()
	err = x.uninstall(ctx, yes, keepKey)
	if ctx.Err() != nil {
		x.say("Interrupted. Run this again to go on")
		return context.Cause(ctx)
	}
	return err
}

func (r *run) uninstall(ctx context.Context, yes, keepKey bool) error {
	asked, cancel := r.ask(ctx)
	defer cancel()
	if err := r.findRelease(asked); err != nil {
		return err
	}
	if r.failed {
		return ErrSaid
	}
	silent, err := r.silent(asked)
	if err != nil {
		return err
	}
	if silent != nil {
		r.warn("not Ready: "+strings.Join(silent, ", "), "what is on these nodes stays there: `headcni-daemon uninstall`, as root on each")
	}
	if !yes {
		return fmt.Errorf("nothing was changed: the release %s of namespace %s would go, and with it the network of every pod that runs: run it again with --yes", r.release, r.Namespace)
	}
	r.say("wait  helm uninstall %s: every node's daemon takes off what is ours", r.release)
	_, err = r.helm.run(ctx, "uninstall", r.release, "--timeout", fmt.Sprintf("%ds", int(r.Timeout.Seconds())))
	switch {
	case notThere(err) && r.there:
		return fmt.Errorf("Helm knows no release %s, but its ClusterRole headcni is there: was its Secret sh.helm.release.v1.%[1]s deleted? Install it anew, then uninstall: %w", r.release, err)
	case notThere(err):
		r.ok("Helm has no release %s", r.release)
	case err != nil:
		return fmt.Errorf("%w\nRun this again; what a node is left with, `headcni-daemon uninstall` takes off, as root on the node", err)
	default:
		r.ok("the chart is off")
	}
	if err := r.dropSecret(ctx, keepKey); err != nil {
		return err
	}
	r.say("done  HeadCNI is off")
	return nil
}

// dropSecret deletes the key where an installation of ours has put it. Helm does not know of it.
func (r *run) dropSecret(ctx context.Context, keep bool) error {
	ctx, cancel := r.ask(ctx)
	defer cancel()
	secrets := r.Cluster.Client.Secrets(r.Namespace)
	s, err := secrets.Get(ctx, kube.AuthSecret, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return err
	case keep || s.Labels[secretLabel] == "":
		r.say("the Secret %s/%s with the key stays: kubectl -n %[1]s delete secret %[2]s", r.Namespace, s.Name)
		return nil
	}
	if err := secrets.Delete(ctx, s.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	r.ok("the Secret %s/%s with the key is deleted", r.Namespace, s.Name)
	return nil
}

// silent are Nodes of ours whose daemons cannot take off what is theirs.
func (r *run) silent(ctx context.Context) (names []string, err error) {
	list, err := r.Cluster.Client.Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list the Nodes: %w", err)
	}
	for _, n := range list.Items {
		for _, c := range n.Status.Conditions {
			if n.Annotations[kube.NodeKey] != "" && c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
				names = append(names, n.Name)
			}
		}
	}
	return names, nil
}
