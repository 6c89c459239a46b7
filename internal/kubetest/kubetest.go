// Package kubetest imitates the API server for tests: client-go's fake, as a client of ours.
package kubetest

import (
	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/headcni/headcni/pkg/kube"
)

// Client is a client of an imitated API server. The fake's reactors see each request and may refuse it.
type Client struct{ *fake.Clientset }

// New imitates an API server that has these objects.
func New(objects ...runtime.Object) Client { return Client{fake.NewClientset(objects...)} }

// Nodes implements kube.Client, as do all others.
func (c Client) Nodes() kube.Objects[*corev1.Node, *corev1.NodeList] { return c.CoreV1().Nodes() }

func (c Client) Secrets(namespace string) kube.Objects[*corev1.Secret, *corev1.SecretList] {
	return c.CoreV1().Secrets(namespace)
}

func (c Client) ConfigMaps(namespace string) kube.Objects[*corev1.ConfigMap, *corev1.ConfigMapList] {
	return c.CoreV1().ConfigMaps(namespace)
}

func (c Client) Pods(namespace string) kube.Objects[*corev1.Pod, *corev1.PodList] {
	return c.CoreV1().Pods(namespace)
}

func (c Client) Services(namespace string) kube.Objects[*corev1.Service, *corev1.ServiceList] {
	return c.CoreV1().Services(namespace)
}

func (c Client) Deployments(namespace string) kube.Objects[*appsv1.Deployment, *appsv1.DeploymentList] {
	return c.AppsV1().Deployments(namespace)
}

func (c Client) DaemonSets(namespace string) kube.Objects[*appsv1.DaemonSet, *appsv1.DaemonSetList] {
	return c.AppsV1().DaemonSets(namespace)
}

func (c Client) Leases(namespace string) kube.Objects[*coordinationv1.Lease, *coordinationv1.LeaseList] {
	return c.CoordinationV1().Leases(namespace)
}

func (c Client) Events(namespace string) kube.Objects[*eventsv1.Event, *eventsv1.EventList] {
	return c.EventsV1().Events(namespace)
}

func (c Client) ServiceCIDRs() kube.Objects[*networkingv1.ServiceCIDR, *networkingv1.ServiceCIDRList] {
	return c.NetworkingV1().ServiceCIDRs()
}

func (c Client) Namespaces() kube.Objects[*corev1.Namespace, *corev1.NamespaceList] {
	return c.CoreV1().Namespaces()
}

func (c Client) NetworkPolicies(namespace string) kube.Objects[*networkingv1.NetworkPolicy, *networkingv1.NetworkPolicyList] {
	return c.NetworkingV1().NetworkPolicies(namespace)
}
