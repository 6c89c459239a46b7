package kube

import (
	"context"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/flowcontrol"
)

// Client reads and writes the kinds of objects that we use. The clientset of client-go links every kind that Kubernetes has: that
// was nearly half of the time in which the daemon compiles, and a third of its size.
type Client interface {
	Nodes() Objects[*corev1.Node, *corev1.NodeList]
	Secrets(namespace string) Objects[*corev1.Secret, *corev1.SecretList]
	ConfigMaps(namespace string) Objects[*corev1.ConfigMap, *corev1.ConfigMapList]
	Pods(namespace string) Objects[*corev1.Pod, *corev1.PodList]
	Services(namespace string) Objects[*corev1.Service, *corev1.ServiceList]
	Namespaces() Objects[*corev1.Namespace, *corev1.NamespaceList]
	Deployments(namespace string) Objects[*appsv1.Deployment, *appsv1.DeploymentList]
	DaemonSets(namespace string) Objects[*appsv1.DaemonSet, *appsv1.DaemonSetList]
	Leases(namespace string) Objects[*coordinationv1.Lease, *coordinationv1.LeaseList]
	Events(namespace string) Objects[*eventsv1.Event, *eventsv1.EventList]
	ServiceCIDRs() Objects[*networkingv1.ServiceCIDR, *networkingv1.ServiceCIDRList]
	NetworkPolicies(namespace string) Objects[*networkingv1.NetworkPolicy, *networkingv1.NetworkPolicyList]
}

// Objects are those of one kind, T, in one namespace or in none; L is a list of them. The methods are the clientset's own, so
// that its fake can stand in for the API server (internal/kubetest).
type Objects[T, L runtime.Object] interface {
	Get(ctx context.Context, name string, o metav1.GetOptions) (T, error)
	List(ctx context.Context, o metav1.ListOptions) (L, error)
	Watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error)
	Create(ctx context.Context, object T, o metav1.CreateOptions) (T, error)
	Update(ctx context.Context, object T, o metav1.UpdateOptions) (T, error)
	Patch(ctx context.Context, name string, kind types.PatchType, patch []byte, o metav1.PatchOptions, subresources ...string) (T, error)
	Delete(ctx context.Context, name string, o metav1.DeleteOptions) error
}

// client holds a REST client for each API group.
type client struct {
	core, apps, coordination, events, networking rest.Interface
	params                                       runtime.ParameterCodec
}

// NewClient makes a client. It does not connect.
func NewClient(c *rest.Config) (Client, error) {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, appsv1.AddToScheme, coordinationv1.AddToScheme, eventsv1.AddToScheme, networkingv1.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	shared := *c
	shared.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	if shared.QPS > 0 {
		shared.RateLimiter = flowcontrol.NewTokenBucketRateLimiter(shared.QPS, shared.Burst)
	}
	transport, err := rest.HTTPClientFor(&shared)
	if err != nil {
		return nil, err
	}
	out := &client{params: runtime.NewParameterCodec(scheme)}
	for _, group := range []struct {
		to      *rest.Interface
		version schema.GroupVersion
	}{
		{&out.core, corev1.SchemeGroupVersion}, {&out.apps, appsv1.SchemeGroupVersion},
		{&out.coordination, coordinationv1.SchemeGroupVersion}, {&out.events, eventsv1.SchemeGroupVersion},
		{&out.networking, networkingv1.SchemeGroupVersion},
	} {
		own := shared
		if own.GroupVersion, own.APIPath = &group.version, "/apis"; group.version.Group == corev1.GroupName {
			own.APIPath = "/api"
		}
		if *group.to, err = rest.RESTClientForConfigAndClient(&own, transport); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (c *client) Nodes() Objects[*corev1.Node, *corev1.NodeList] {
	return &objects[*corev1.Node, *corev1.NodeList]{c.core, c.params, "nodes", "", &corev1.Node{}, &corev1.NodeList{}}
}

func (c *client) Secrets(namespace string) Objects[*corev1.Secret, *corev1.SecretList] {
	return &objects[*corev1.Secret, *corev1.SecretList]{c.core, c.params, "secrets", namespace, &corev1.Secret{}, &corev1.SecretList{}}
}

func (c *client) ConfigMaps(namespace string) Objects[*corev1.ConfigMap, *corev1.ConfigMapList] {
	return &objects[*corev1.ConfigMap, *corev1.ConfigMapList]{c.core, c.params, "configmaps", namespace, &corev1.ConfigMap{}, &corev1.ConfigMapList{}}
}

func (c *client) Pods(namespace string) Objects[*corev1.Pod, *corev1.PodList] {
	return &objects[*corev1.Pod, *corev1.PodList]{c.core, c.params, "pods", namespace, &corev1.Pod{}, &corev1.PodList{}}
}

func (c *client) Services(namespace string) Objects[*corev1.Service, *corev1.ServiceList] {
	return &objects[*corev1.Service, *corev1.ServiceList]{c.core, c.params, "services", namespace, &corev1.Service{}, &corev1.ServiceList{}}
}

func (c *client) Deployments(namespace string) Objects[*appsv1.Deployment, *appsv1.DeploymentList] {
	return &objects[*appsv1.Deployment, *appsv1.DeploymentList]{c.apps, c.params, "deployments", namespace, &appsv1.Deployment{}, &appsv1.DeploymentList{}}
}

func (c *client) DaemonSets(namespace string) Objects[*appsv1.DaemonSet, *appsv1.DaemonSetList] {
	return &objects[*appsv1.DaemonSet, *appsv1.DaemonSetList]{c.apps, c.params, "daemonsets", namespace, &appsv1.DaemonSet{}, &appsv1.DaemonSetList{}}
}

func (c *client) Leases(namespace string) Objects[*coordinationv1.Lease, *coordinationv1.LeaseList] {
	return &objects[*coordinationv1.Lease, *coordinationv1.LeaseList]{
		c.coordination, c.params, "leases", namespace, &coordinationv1.Lease{}, &coordinationv1.LeaseList{},
	}
}

func (c *client) Events(namespace string) Objects[*eventsv1.Event, *eventsv1.EventList] {
	return &objects[*eventsv1.Event, *eventsv1.EventList]{c.events, c.params, "events", namespace, &eventsv1.Event{}, &eventsv1.EventList{}}
}

func (c *client) ServiceCIDRs() Objects[*networkingv1.ServiceCIDR, *networkingv1.ServiceCIDRList] {
	return &objects[*networkingv1.ServiceCIDR, *networkingv1.ServiceCIDRList]{
		c.networking, c.params, "servicecidrs", "", &networkingv1.ServiceCIDR{}, &networkingv1.ServiceCIDRList{},
	}
}

func (c *client) Namespaces() Objects[*corev1.Namespace, *corev1.NamespaceList] {
	return &objects[*corev1.Namespace, *corev1.NamespaceList]{c.core, c.params, "namespaces", "", &corev1.Namespace{}, &corev1.NamespaceList{}}
}

func (c *client) NetworkPolicies(namespace string) Objects[*networkingv1.NetworkPolicy, *networkingv1.NetworkPolicyList] {
	return &objects[*networkingv1.NetworkPolicy, *networkingv1.NetworkPolicyList]{
		c.networking, c.params, "networkpolicies", namespace, &networkingv1.NetworkPolicy{}, &networkingv1.NetworkPolicyList{},
	}
}

// object is one that has a name.
type object interface {
	runtime.Object
	GetName() string
	GetNamespace() string
	GetResourceVersion() string
}

// objects implements Objects over REST.
type objects[T object, L runtime.Object] struct {
	rest      rest.Interface
	params    runtime.ParameterCodec
	resource  string
	namespace string // "" where the kind has none
	// What answers are read into copies of.
	empty     T
	emptyList L
}

// on directs a request to these objects.
func (o *objects[T, L]) on(r *rest.Request) *rest.Request {
	return r.NamespaceIfScoped(o.namespace, o.namespace != "").Resource(o.resource)
}

// one sends a request whose answer is an object.
func (o *objects[T, L]) one(ctx context.Context, r *rest.Request) (T, error) {
	out := o.empty.DeepCopyObject().(T)
	err := r.Do(ctx).Into(out)
	return out, err
}

func (o *objects[T, L]) Get(ctx context.Context, name string, opts metav1.GetOptions) (T, error) {
	return o.one(ctx, o.on(o.rest.Get()).Name(name).VersionedParams(&opts, o.params))
}

func (o *objects[T, L]) List(ctx context.Context, opts metav1.ListOptions) (L, error) {
	out := o.emptyList.DeepCopyObject().(L)
	err := o.on(o.rest.Get()).VersionedParams(&opts, o.params).Timeout(serverTimeout(opts)).Do(ctx).Into(out)
	return out, err
}

func (o *objects[T, L]) Watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
	opts.Watch = true
	return o.on(o.rest.Get()).VersionedParams(&opts, o.params).Timeout(serverTimeout(opts)).Watch(ctx)
}

// serverTimeout is after how long the server ends its answer, 0 = when it likes.
func serverTimeout(o metav1.ListOptions) time.Duration {
	if o.TimeoutSeconds == nil {
		return 0
	}
	return time.Duration(*o.TimeoutSeconds) * time.Second
}

func (o *objects[T, L]) Create(ctx context.Context, obj T, opts metav1.CreateOptions) (T, error) {
	return o.one(ctx, o.on(o.rest.Post()).VersionedParams(&opts, o.params).Body(obj))
}

func (o *objects[T, L]) Update(ctx context.Context, obj T, opts metav1.UpdateOptions) (T, error) {
	return o.one(ctx, o.on(o.rest.Put()).Name(obj.GetName()).VersionedParams(&opts, o.params).Body(obj))
}

func (o *objects[T, L]) Patch(
	ctx context.Context, name string, kind types.PatchType, patch []byte, opts metav1.PatchOptions, subresources ...string,
) (T, error) {
	return o.one(ctx, o.on(o.rest.Patch(kind)).Name(name).SubResource(subresources...).VersionedParams(&opts, o.params).Body(patch))
}

func (o *objects[T, L]) Delete(ctx context.Context, name string, opts metav1.DeleteOptions) error {
	return o.on(o.rest.Delete()).Name(name).Body(&opts).Do(ctx).Error()
}
