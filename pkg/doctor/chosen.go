package doctor

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"

	"github.com/headcni/headcni/pkg/kube"
)

// daemons is what the pods of our DaemonSet ask for, the zero value where there is none, or nobody may read it.
func (c Cluster) daemons(ctx context.Context) (spec corev1.PodSpec, err error) {
	set, err := c.Client.DaemonSets(c.Namespace).Get(ctx, kube.Daemon, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || apierrors.IsForbidden(err) {
		return spec, nil
	}
	if err != nil {
		return spec, fmt.Errorf("look for the DaemonSet %s: %w", kube.Daemon, err)
	}
	return set.Spec.Template.Spec, nil
}

// chosen tells whether a Node is one for which whoever installed the chart wants a daemon: by nodeSelector and by the node affinity that is
// required, with which nodes without a kernel, as virtual kubelets have, are left out. A taint is no choice, but what may be amiss.
func chosen(spec corev1.PodSpec, n *corev1.Node) bool {
	match, err := nodeaffinity.GetRequiredNodeAffinity(&corev1.Pod{Spec: spec}).Match(n)
	return match && err == nil
}
