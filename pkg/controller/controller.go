package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/dns/records"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/monitoring"
	"github.com/headcni/headcni/pkg/reconcile"
)

// Controller is one of the cluster's controllers. Make it with New.
type Controller struct {
	cfg       config.Config
	log       *slog.Logger
	headscale *headscale.Connector
	client    kube.Client
	namespace string
	identity  string
	metrics   *metrics
	now       func() time.Time
	loop      *reconcile.Loop
	// announced are the texts that were announced last, by what they are about: only news is.
	announced map[string]string
	// stands is what stands of that now, by mu.
	stands map[string]reconcile.Status

	// Of the leader's loop: api is the client that keyAt, slowAt and findings are of. keyAt is when the join key was looked for.
	api      *headscale.Client
	keyAt    time.Time
	slowAt   time.Time
	findings []finding // of the slow check
	// namesOf are the zones that the cluster's DNS was last looked at for, namesAt is when, namesNote what was said of it.
	namesOf, namesNote string
	namesAt            time.Time
	section            section
	// recordsOf are the names of Services that the ConfigMap for Headscale was last looked at for, recordsAt is when.
	recordsOf string
	recordsAt time.Time

	// rangesOf are the ranges of services that Kubernetes named last, rangesAt is when.
	rangesOf []netip.Prefix
	rangesAt time.Time

	// nodeNames are those of all nodes of the tailnet, nil before Headscale has told them.
	nodeNames []string

	mu    sync.Mutex
	nodes map[string]node
	// services are those that want a name in the tailnet, by namespace/name; nil before they are read.
	services map[string]records.Service
	synced   bool
	last     error // of the leader's last pass
	leading  bool
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
	client, err := kube.NewClient(rc)
	if err != nil {
		return nil, err
	}
	return newController(c, log, getenv, client, version), nil
}

func newController(c config.Config, log *slog.Logger, getenv func(string) string, client kube.Client, version string) *Controller {
	identity := getenv("POD_NAME")
	if identity == "" {
		identity, _ = os.Hostname() // only to tell leaders apart, with the number behind it
	}
	return &Controller{
		cfg: c, log: log, headscale: headscale.NewConnector(c.Headscale, getenv), client: client, namespace: kube.Namespace(getenv),
		identity: fmt.Sprintf("%s_%08x", identity, rand.Uint32()), metrics: newMetrics(version), now: time.Now,
		loop: reconcile.NewLoop(), announced: map[string]string{}, stands: map[string]reconcile.Status{}, nodes: map[string]node{},
	}
}

// Run waits to lead and then leads, until ctx ends. It ends with an error when the lead is lost: a fresh start is the
// surest way to know nothing that is no longer true.
func (c *Controller) Run(ctx context.Context, listen string) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	var served error
	if listen != "" {
		wait, err := monitoring.Serve(ctx, listen, c.metrics.registry, c)
		if err != nil {
			cancel()
			return err
		}
		wg.Go(func() {
			if served = wait(); served != nil {
				cancel()
			}
		})
	}
	wg.Go(func() { c.watch(ctx) })
	wg.Go(func() { c.watchServices(ctx) })
	c.log.Info("started", "identity", c.identity, "headscale", c.cfg.Headscale.URL)
	err := c.campaign(ctx)
	cancel()
	wg.Wait()
	if served != nil {
		return served
	}
	if err == nil {
		c.log.Info("stopped")
	}
	return err
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
	if c.leading {
		last := reconcile.Status{Name: "leader", OK: c.last == nil}
		if c.last != nil {
			last.Error, last.Findings = c.last.Error(), reconcile.FoundIn(c.last, findings.HeadscaleOther, false)
		}
		parts = append(append(parts, last), c.standing()...)
	}
	return c.synced, parts
}
