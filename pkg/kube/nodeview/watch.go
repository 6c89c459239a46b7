// Package nodeview is what one node sees of Kubernetes, and what it says there of itself: its own Node, the pod CIDRs of all
// others, the service ranges, and Events.
package nodeview

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

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/kube"
)

const (
	// apiTimeout bounds each request to the API server but the watch.
	apiTimeout = 5 * time.Second
	// serviceInterval is how often the cluster's service ranges are asked for. They are added to, if ever, by hand.
	serviceInterval = 10 * time.Minute
	// denialPatience is how long the API server may deny what it has granted: one that has just started denies everything until
	// it has read its RBAC rules.
	denialPatience = 30 * time.Second
)

// Watch follows the Nodes of a cluster and nothing else. Make it with New.
type Watch struct {
	client    kube.Client
	node      string // our Node's name
	namespace string // of our own objects
	server    string // the API server's URL, "" where unknown
	log       *slog.Logger
	changed   func() // is called when something changes that concerns this node
	onAddrs   func() // is called when a Node comes, goes, or changes its addresses or pod CIDRs

	// These belong to the one goroutine that calls Sync and JoinKey.
	keyDenied, writeDenied denial
	events                 events
	wrote                  string // what was last written to our Node
	wroteAt                time.Time

	mu       sync.Mutex
	synced   bool
	err      error // why the API server cannot be asked, nil while it can
	denied   denial
	own      *corev1.Node
	cidrs    map[string][]netip.Prefix // by name of each Node, ours included
	addrs    map[string][]netip.Addr   // likewise
	list     []Node                    // of both, nil after a change
	services []netip.Prefix
}

// New makes the watch of the node that c describes. It does not connect.
func New(c config.Kubernetes, log *slog.Logger, getenv func(string) string, version string) (*Watch, error) {
	node, err := c.Node(getenv)
	if err != nil {
		return nil, err
	}
	rc, err := kube.Config(c.Kubeconfig, "headcni-daemon/"+version)
	if err != nil {
		return nil, fmt.Errorf("%w; set kubernetes.kubeconfig, or kubernetes.enable: false", err)
	}
	client, err := kube.NewClient(rc)
	if err != nil {
		return nil, err
	}
	w := Of(client, node, log)
	w.server, w.namespace = rc.Host, kube.Namespace(getenv)
	return w, nil
}

// Of makes the watch of a node with the given client.
func Of(client kube.Client, node string, log *slog.Logger) *Watch {
	return &Watch{client: client, node: node, namespace: kube.DefaultNamespace, log: log, changed: func() {}, onAddrs: func() {},
		cidrs: map[string][]netip.Prefix{}, addrs: map[string][]netip.Addr{}}
}

// Client is how the API server is asked.
func (w *Watch) Client() kube.Client { return w.client }

// Node is our Node's name.
func (w *Watch) Node() string { return w.node }

// Namespace is that of our own objects.
func (w *Watch) Namespace() string { return w.namespace }

// Server is the API server's URL, or what may stand in its place in a kubeconfig; "" where it is not known.
func (w *Watch) Server() string { return w.server }

// Run watches until ctx ends. It calls changed for everything that concerns this node.
func (w *Watch) Run(ctx context.Context, changed func()) {
	w.changed = changed
	var wg sync.WaitGroup
	wg.Go(func() { w.watchServices(ctx) })
	kube.WatchNodes(ctx, w.client, (*nodeStore)(w))
	wg.Wait()
}

// answered records whether the API server answered.
func (w *Watch) answered(err error) {
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
	w.mu.Lock()
	// Each try fails in words of its own, with its own port: the first ones stand for all of a kind.
	news := (err == nil) != (w.err == nil) || apierrors.ReasonForError(err) != apierrors.ReasonForError(w.err)
	if news {
		w.err = err
	}
	w.mu.Unlock()
	if news {
		w.changed()
	}
}

// OnAddrs has f called whenever what Nodes returns may have changed. It is set before Run.
func (w *Watch) OnAddrs(f func()) { w.onAddrs = f }

// trim keeps what this node needs of a Node: of others only the name, pod CIDRs and addresses.
func (w *Watch) trim(n *corev1.Node) *corev1.Node {
	out := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: n.Name, ResourceVersion: n.ResourceVersion},
		Spec:       corev1.NodeSpec{PodCIDR: n.Spec.PodCIDR, PodCIDRs: n.Spec.PodCIDRs},
		Status:     corev1.NodeStatus{Addresses: n.Status.Addresses},
	}
	out.Annotations = map[string]string{}
	if ips, ok := n.Annotations[kube.TailnetIPs]; ok {
		out.Annotations[kube.TailnetIPs] = ips
	}
	if n.Name != w.node {
		return out
	}
	out.UID = n.UID
	out.Status.NodeInfo.ContainerRuntimeVersion = n.Status.NodeInfo.ContainerRuntimeVersion
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
type nodeStore Watch

func (s *nodeStore) watch() *Watch                    { return (*Watch)(s) }
func (s *nodeStore) Trim(n *corev1.Node) *corev1.Node { return s.watch().trim(n) }
func (s *nodeStore) Answered(err error)               { s.watch().answered(err) }
func (s *nodeStore) SetNode(n *corev1.Node)           { s.change(n, (*Watch).upsert) }
func (s *nodeStore) RemoveNode(n *corev1.Node)        { s.change(n, (*Watch).remove) }

func (s *nodeStore) change(n *corev1.Node, do func(*Watch, *corev1.Node) bool) {
	w := s.watch()
	w.mu.Lock()
	cidrs := w.cidrs[n.Name]
	addrs, had := w.addrs[n.Name]
	news := do(w, n)
	_, has := w.addrs[n.Name]
	moved := !slices.Equal(cidrs, w.cidrs[n.Name]) || !slices.Equal(addrs, w.addrs[n.Name])
	if moved || had != has {
		w.list = nil
	}
	w.mu.Unlock()
	if news {
		w.changed()
	}
	if moved {
		w.onAddrs()
	}
}

func (s *nodeStore) ReplaceNodes(nodes []*corev1.Node) {
	w := s.watch()
	w.mu.Lock()
	seen := map[string]bool{}
	for _, n := range nodes {
		seen[n.Name] = true
		w.upsert(n)
	}
	for name := range w.addrs {
		if !seen[name] {
			delete(w.cidrs, name)
			delete(w.addrs, name)
		}
	}
	if !seen[w.node] {
		w.own = nil
	}
	w.synced, w.err, w.list = true, nil, nil
	w.mu.Unlock()
	w.changed()
	w.onAddrs()
}

// upsert stores n and reports whether this node has to react. The caller holds the lock.
func (w *Watch) upsert(n *corev1.Node) bool {
	cidrs, err := kube.PodCIDRs(n)
	if err != nil && n.Name != w.node {
		cidrs = nil // its own daemon says what is wrong with them
	}
	news := !slices.Equal(w.cidrs[n.Name], cidrs)
	if w.cidrs[n.Name] = cidrs; len(cidrs) == 0 {
		delete(w.cidrs, n.Name)
	}
	w.addrs[n.Name] = addrsOf(n)
	if n.Name != w.node {
		return news
	}
	before := w.own
	w.own = n
	return before == nil || !sameNode(before, n)
}

// remove deletes n and reports whether this node has to react. The caller holds the lock.
func (w *Watch) remove(n *corev1.Node) bool {
	_, had := w.cidrs[n.Name]
	delete(w.cidrs, n.Name)
	delete(w.addrs, n.Name)
	if n.Name == w.node {
		w.own = nil
		return true
	}
	return had
}
