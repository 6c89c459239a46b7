package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/monitoring"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// fullCheck is how often Headscale is asked although nothing changed in Kubernetes.
	fullCheck = 30 * time.Second
	// soon is how often while something is under way; where nothing comes of it, ever less often.
	soon = 2 * time.Second
	// settle is how long a burst of events is gathered before a pass.
	settle = 200 * time.Millisecond
	// retryMin and retryMax bound the wait after a pass that failed.
	retryMin = time.Second
	retryMax = time.Minute
	// slowCheck is how often the policy and our own API key are looked at.
	slowCheck = 5 * time.Minute

	// The Lease. Another leader takes over at the latest after leaseDuration; one that cannot renew stops before that.
	leaseDuration = 15 * time.Second
	renewDeadline = 10 * time.Second
	retryPeriod   = 2 * time.Second
)

// Controller is one of the cluster's controllers. Make it with New.
type Controller struct {
	cfg       config.Config
	log       *slog.Logger
	headscale *headscale.Connector
	client    kubernetes.Interface
	namespace string
	identity  string
	metrics   *metrics
	now       func() time.Time
	wake      chan struct{}
	news      news

	// leading is held by the leader's loop.
	leading sync.Mutex
	// Of the leader's loop: api is the client that slowAt and findings are of.
	api      *headscale.Client
	slowAt   time.Time
	findings []finding // of the slow check

	mu     sync.Mutex
	nodes  map[string]node
	synced bool
	last   error // of the leader's last pass
	leads  bool
}

// New checks what the controller cannot do without. It does not connect.
func New(c config.Config, log *slog.Logger, getenv func(string) string, version string) (*Controller, error) {
	if c.Headscale.URL == "" {
		return nil, errors.New("headscale.url is empty: the controller has nobody to ask")
	}
	rc, err := kube.Config(c.Kubernetes.Kubeconfig, "headcni-controller/"+version)
	if err != nil {
		return nil, fmt.Errorf("%w; set kubernetes.kubeconfig", err)
	}
	// A thousand Nodes have their views written within seconds, not at the library's five a second.
	rc.QPS, rc.Burst = 200, 400
	client, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return nil, err
	}
	return newController(c, log, getenv, client, version), nil
}

func newController(c config.Config, log *slog.Logger, getenv func(string) string, client kubernetes.Interface, version string) *Controller {
	identity := getenv("POD_NAME")
	if identity == "" {
		identity, _ = os.Hostname() // only to tell leaders apart, with the number behind it
	}
	return &Controller{
		cfg: c, log: log, headscale: headscale.NewConnector(c.Headscale, getenv), client: client, namespace: kube.Namespace(),
		identity: fmt.Sprintf("%s_%08x", identity, rand.Uint32()), metrics: newMetrics(version), now: time.Now,
		wake: make(chan struct{}, 1), news: news{said: map[string]string{}}, nodes: map[string]node{},
	}
}

// Run waits to lead and then leads, until ctx ends. It ends with an error when the lead is lost: a fresh start is the
// surest way to know nothing that is no longer true.
func (c *Controller) Run(ctx context.Context, listen string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var served func() error
	if listen != "" {
		wait, err := monitoring.Serve(ctx, listen, c.metrics.registry, c)
		if err != nil {
			return err
		}
		served = wait
	}
	c.watch(ctx)
	lost := make(chan struct{})
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta: metav1.ObjectMeta{Name: kube.Lease, Namespace: c.namespace}, Client: c.client.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: c.identity},
		},
		LeaseDuration: leaseDuration, RenewDeadline: renewDeadline, RetryPeriod: retryPeriod, ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{OnStartedLeading: func(held context.Context) { c.lead(ctx, held) }, OnStoppedLeading: func() { close(lost) }},
		Name:      kube.Lease,
	})
	if err != nil {
		return err
	}
	c.log.Info("started", "identity", c.identity, "headscale", c.cfg.Headscale.URL)
	failed := make(chan error, 1)
	if served != nil {
		go func() {
			if err := served(); err != nil {
				failed <- err
				cancel()
			}
		}()
	}
	stopping := ctx
	// The Lease is given up only when the loop has ended: else two would lead for a moment.
	held, release := context.WithCancel(klog.NewContext(context.WithoutCancel(ctx), klog.New(nil)))
	defer release()
	go func() {
		<-ctx.Done()
		c.leading.Lock()
		release()
		c.leading.Unlock()
	}()
	elector.Run(held)
	<-lost
	select {
	case err := <-failed:
		return err
	default:
	}
	if stopping.Err() == nil {
		return errors.New("lost the lead: the API server did not take the renewal of the Lease in time; starting anew")
	}
	c.log.Info("stopped")
	return nil
}

// watch keeps the Nodes, cut down to what counts, and asks for a pass where that changes.
func (c *Controller) watch(ctx context.Context) {
	factory := informers.NewSharedInformerFactoryWithOptions(c.client, 0, informers.WithTransform(func(obj any) (any, error) {
		if n, ok := obj.(*corev1.Node); ok {
			return few(n), nil
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
	go func() {
		if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
			c.mu.Lock()
			c.synced = true
			c.mu.Unlock()
			c.poke()
		}
	}()
}

// few keeps of a Node what the controller uses: a whole one is 10 kB.
func few(n *corev1.Node) *corev1.Node {
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
		c.poke()
	}
}

func (c *Controller) dropNode(name string) {
	c.mu.Lock()
	delete(c.nodes, name)
	c.mu.Unlock()
	c.poke()
}

// poke asks for a pass. It never blocks: one that is asked for already will see everything.
func (c *Controller) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
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

// lead runs passes until ctx ends, or held: the lead is lost.
func (c *Controller) lead(ctx, held context.Context) {
	c.leading.Lock()
	defer c.leading.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(held, cancel)()
	if held.Err() != nil || ctx.Err() != nil {
		return
	}
	c.log.Info("leads")
	c.lean(true)
	defer c.lean(false)
	retry, again := retryMin, soon
	for ctx.Err() == nil {
		began := time.Now()
		pending, err := c.pass(ctx)
		took := time.Since(began)
		wait := fullCheck + rand.N(fullCheck/5)
		result := "right"
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			wait, retry = retry, min(2*retry, retryMax)
			result = "failed"
		case pending:
			wait, again, retry = again, min(again*3/2, fullCheck), retryMin
		default:
			again, retry = soon, retryMin
		}
		c.metrics.passes.WithLabelValues(result).Inc()
		c.outcome(err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		case <-c.wake:
			again = soon
			select { // let a burst pass, and let nobody who changes his Node all the time keep us busy
			case <-ctx.Done():
				return
			case <-time.After(max(settle, took)):
			}
		}
	}
}

func (c *Controller) lean(leads bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leads = leads
	c.metrics.leader.Set(0)
	if leads {
		c.metrics.leader.Set(1)
	}
}

// outcome logs what is news.
func (c *Controller) outcome(err error) {
	c.mu.Lock()
	before := c.last
	c.last = err
	c.mu.Unlock()
	switch {
	case err == nil && before != nil:
		c.log.Info("right again")
	case err != nil && (before == nil || before.Error() != err.Error()):
		c.log.Error("pass", "err", err)
	}
}

// Ready implements monitoring.Readiness. A controller is ready when it sees the Nodes: that Headscale is down makes
// another one no better.
func (c *Controller) Ready() (bool, []reconcile.Status) {
	c.mu.Lock()
	defer c.mu.Unlock()
	parts := []reconcile.Status{{Name: "kubernetes", OK: c.synced}}
	if !c.synced {
		parts[0].Error = "has not read the Nodes yet"
	}
	if c.leads {
		last := reconcile.Status{Name: "leader", OK: c.last == nil}
		if c.last != nil {
			last.Error = c.last.Error()
		}
		parts = append(parts, last)
	}
	return c.synced, parts
}
