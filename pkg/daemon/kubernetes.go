package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// apiTimeout bounds each request to the API server but the watch.
	apiTimeout = 5 * time.Second
	// nodePage is how many Nodes are read at once where the server cannot stream them: one is 10 kB and more.
	nodePage = 100
	// serviceInterval is how often the cluster's service ranges are asked for. They are added to, if ever, by hand.
	serviceInterval = 10 * time.Minute
	// denialPatience is how long the API server may deny us what it has granted: one that has just started does so until it
	// has read its RBAC rules.
	denialPatience = 30 * time.Second
)

// denial is since when the API server has denied us something, the zero Time where it has not.
type denial time.Time

// judge makes a denial one to wait for while it is young.
func (d *denial) judge(err error, now time.Time) error {
	switch {
	case err == nil:
		*d = denial{}
	case !apierrors.IsForbidden(err) && !apierrors.IsUnauthorized(err):
	case time.Time(*d).IsZero():
		*d = denial(now)
		fallthrough
	case now.Sub(time.Time(*d)) < denialPatience:
		return reconcile.Waiting("an API server that has just started may deny what it will grant: " + err.Error())
	}
	return err
}

// cluster is what this node sees of Kubernetes: its own Node, and of all others their pod CIDRs. It watches Nodes and
// nothing else.
type cluster struct {
	client    kubernetes.Interface
	node      string // our Node's name
	namespace string // of our own objects
	address   string // the API server's host:port, "" where unknown
	log       *slog.Logger
	changed   func() // told when something changes that concerns us

	keyDenied denial // of the daemon's loop alone, as joinKey

	mu       sync.Mutex
	synced   bool
	err      error // why the API server cannot be asked, nil while it can
	denied   denial
	own      *corev1.Node
	cidrs    map[string][]netip.Prefix // by name of each Node, ours included
	services []netip.Prefix
}

// newCluster makes the view. It does not connect.
func newCluster(c config.Config, log *slog.Logger, getenv func(string) string, version string) (*cluster, error) {
	if !c.InKubernetes(getenv) {
		return nil, nil
	}
	if p := c.Network.PodCIDRs; len(p) > 0 {
		return nil, fmt.Errorf("network.podCIDRs: %v: in Kubernetes the Node object says which they are (Node.spec.podCIDRs): remove the "+
			"key, or set kubernetes.enable: false", []string(p))
	}
	node, err := c.Kubernetes.Node(getenv)
	if err != nil {
		return nil, err
	}
	rc, err := kube.Config(c.Kubernetes.Kubeconfig, "headcni-daemon/"+version)
	if err != nil {
		return nil, fmt.Errorf("%w; set kubernetes.kubeconfig, or kubernetes.enable: false", err)
	}
	client, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return nil, err
	}
	k := watched(client, node, log)
	k.address = hostPort(rc.Host)
	return k, nil
}

func watched(client kubernetes.Interface, node string, log *slog.Logger) *cluster {
	return &cluster{client: client, node: node, namespace: kube.Namespace(), log: log, cidrs: map[string][]netip.Prefix{}}
}

// run watches until ctx ends. changed is told of everything that concerns us.
func (k *cluster) run(ctx context.Context, changed func()) {
	k.changed = changed
	// The library logs each failed try; the part kubernetes says it once.
	ctx = klog.NewContext(ctx, klog.New(nil))
	nodes := k.client.CoreV1().Nodes()
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			// In pages also where the library would take everything at once from the server's cache.
			if o.Limit = nodePage; o.ResourceVersion == "0" {
				o.ResourceVersion = ""
			}
			ctx, cancel := context.WithTimeout(ctx, 6*apiTimeout)
			defer cancel()
			list, err := nodes.List(ctx, o)
			k.answered(err)
			if err != nil {
				return nil, err
			}
			for i := range list.Items {
				list.Items[i] = *k.few(&list.Items[i])
			}
			return list, nil
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := nodes.Watch(ctx, o)
			k.answered(err)
			return w, err
		},
	}
	r := cache.NewReflectorWithOptions(cache.ToListWatcherWithWatchListSemantics(lw, k.client), &corev1.Node{}, (*nodeStore)(k),
		cache.ReflectorOptions{Name: "nodes"})
	var wg sync.WaitGroup
	wg.Go(func() { k.watchServices(ctx) })
	r.RunWithContext(ctx)
	wg.Wait()
}

// answered keeps whether the API server could be asked.
func (k *cluster) answered(err error) {
	if errors.Is(err, context.Canceled) || apierrors.IsResourceExpired(err) || apierrors.IsInvalid(err) {
		return // we are being stopped; or the library asks in another way next
	}
	if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
		err = fmt.Errorf("%w; the service account %s must be allowed to get, list and watch nodes (see the chart's ClusterRole)", err, kube.DaemonAccount)
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // without the URL, which is long and says nothing
	}
	k.mu.Lock()
	// Each try fails in words of its own, with its own port: the first ones stand for all of a kind.
	news := (err == nil) != (k.err == nil) || apierrors.ReasonForError(err) != apierrors.ReasonForError(k.err)
	if news {
		k.err = err
	}
	k.mu.Unlock()
	if news {
		k.changed()
	}
}

// few is what is kept of a Node: of others a name and CIDRs.
func (k *cluster) few(n *corev1.Node) *corev1.Node {
	out := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: n.Name, ResourceVersion: n.ResourceVersion},
		Spec:       corev1.NodeSpec{PodCIDR: n.Spec.PodCIDR, PodCIDRs: n.Spec.PodCIDRs},
	}
	if n.Name != k.node {
		return out
	}
	out.UID = n.UID
	out.Annotations = map[string]string{}
	for key, v := range n.Annotations {
		if strings.HasPrefix(key, "headcni.io/") {
			out.Annotations[key] = v
		}
	}
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeNetworkUnavailable || pluginNotReady(c) {
			c.LastHeartbeatTime = metav1.Time{} // no news
			out.Status.Conditions = append(out.Status.Conditions, c)
		}
	}
	return out
}

// nodeStore is where the watch puts Nodes.
type nodeStore cluster

func (s *nodeStore) Add(obj any) error    { return s.Update(obj) }
func (s *nodeStore) Resync() error        { return nil }
func (s *nodeStore) cluster() *cluster    { return (*cluster)(s) }
func (s *nodeStore) Delete(obj any) error { return s.change(obj, (*cluster).forget) }
func (s *nodeStore) Update(obj any) error { return s.change(obj, (*cluster).put) }

// Transformer keeps what the library gathers on its way to Replace small.
func (s *nodeStore) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		if n, ok := obj.(*corev1.Node); ok {
			return s.cluster().few(n), nil
		}
		return obj, nil
	}
}

func (s *nodeStore) change(obj any, do func(*cluster, *corev1.Node) bool) error {
	n, ok := obj.(*corev1.Node)
	if !ok {
		return fmt.Errorf("a %T among Nodes", obj)
	}
	k := s.cluster()
	k.mu.Lock()
	news := do(k, n)
	k.mu.Unlock()
	if news {
		k.changed()
	}
	return nil
}

// Replace takes the whole list, at the start and whenever events may have been missed.
func (s *nodeStore) Replace(list []any, _ string) error {
	k := s.cluster()
	k.mu.Lock()
	seen := map[string]bool{}
	for _, obj := range list {
		if n, ok := obj.(*corev1.Node); ok {
			seen[n.Name] = true
			k.put(n)
		}
	}
	for name := range k.cidrs {
		if !seen[name] {
			delete(k.cidrs, name)
		}
	}
	if !seen[k.node] {
		k.own = nil
	}
	k.synced, k.err = true, nil
	k.mu.Unlock()
	k.changed()
	return nil
}

// put reports whether it changed anything for us. The caller holds the lock, as with forget.
func (k *cluster) put(n *corev1.Node) bool {
	n = k.few(n)
	cidrs, err := kube.PodCIDRs(n)
	if err != nil && n.Name != k.node {
		cidrs = nil // its own daemon says what is wrong with them
	}
	news := !slices.Equal(k.cidrs[n.Name], cidrs)
	if k.cidrs[n.Name] = cidrs; len(cidrs) == 0 {
		delete(k.cidrs, n.Name)
	}
	if n.Name != k.node {
		return news
	}
	before := k.own
	k.own = n
	return before == nil || !sameNode(before, n)
}

func (k *cluster) forget(n *corev1.Node) bool {
	_, had := k.cidrs[n.Name]
	delete(k.cidrs, n.Name)
	if n.Name == k.node {
		k.own = nil
		return true
	}
	return had
}

// clusterView is the cluster at one moment.
type clusterView struct {
	// synced: the API server has told everything at least once.
	synced bool
	err    error
	// node is ours, nil where Kubernetes has none of that name.
	node *corev1.Node
	// pods are all Nodes' CIDRs, in as few prefixes as there can be.
	pods     []netip.Prefix
	services []netip.Prefix
	cidrs    map[string][]netip.Prefix
}

// view is nil without Kubernetes.
func (k *cluster) view() *clusterView {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	v := &clusterView{synced: k.synced, err: k.denied.judge(k.err, time.Now()), node: k.own, services: k.services, cidrs: map[string][]netip.Prefix{}}
	var all []netip.Prefix
	for name, cidrs := range k.cidrs {
		v.cidrs[name] = cidrs
		all = append(all, cidrs...)
	}
	v.pods = netset.Aggregate(all)
	return v
}

// holder names another Node that has a pod CIDR overlapping p, "" where there is none.
func (v *clusterView) holder(p netip.Prefix, own string) string {
	if v == nil {
		return ""
	}
	for name, cidrs := range v.cidrs {
		if name != own && slices.ContainsFunc(cidrs, p.Overlaps) {
			return name
		}
	}
	return ""
}

// joinKey reads the key that the controller has made for nodes to join with.
func (k *cluster) joinKey(ctx context.Context) (secret.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	s, err := k.client.CoreV1().Secrets(k.namespace).Get(ctx, kube.JoinSecret, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && len(s.Data[kube.JoinSecretKey]) == 0 {
		return secret.Secret{}, fmt.Errorf("headcni-controller has not made a key to join with yet (Secret %s/%s): see `kubectl -n %[1]s logs "+
			"deploy/headcni-controller`", k.namespace, kube.JoinSecret)
	}
	if err = k.keyDenied.judge(err, time.Now()); err != nil {
		return secret.Secret{}, fmt.Errorf("read the key to join with (Secret %s/%s): %w", k.namespace, kube.JoinSecret, err)
	}
	return secret.New(strings.TrimSpace(string(s.Data[kube.JoinSecretKey]))), nil
}
