package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"

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
