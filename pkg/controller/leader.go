package controller

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/election"
)

const (
	// fullCheck is how often Headscale is asked although nothing changed in Kubernetes.
	fullCheck = 30 * time.Second
	// soon is how often while something is under way; where nothing comes of it, ever less often.
	soon = 2 * time.Second
	// settle is how long a burst of events is gathered before a pass, maxSettle how long at most after one that took long: each call to Headscale
	// costs it a tenth of a second, and a hundred nodes that join are a pass of half a minute, after which the next one that joins waits.
	settle    = 200 * time.Millisecond
	maxSettle = 2 * time.Second
	// retryMin and retryMax bound the wait after a pass that failed.
	retryMin = time.Second
	retryMax = time.Minute
)

// campaign waits for the Lease and leads while it is held, until ctx ends. It returns an error when the Lease is lost.
func (c *Controller) campaign(ctx context.Context) error {
	candidate := election.Candidate{Client: c.client, Namespace: c.namespace, Name: kube.Lease, Identity: c.identity}
	if err := candidate.Run(ctx, c.lead); err != nil {
		return fmt.Errorf("%w; starting anew", err)
	}
	return nil
}

// lead runs passes until ctx ends.
func (c *Controller) lead(ctx context.Context) {
	if ctx.Err() != nil {
		return
	}
	c.log.Info("leading")
	c.setLeading(true)
	defer c.setLeading(false)
	p := pace{retryMin, soon}
	c.loop.Pass = func(ctx context.Context, woken bool) time.Duration {
		pending, err := c.pass(ctx)
		if ctx.Err() != nil {
			return 0 // we are being stopped: an interrupted pass is no news
		}
		result := "right"
		if err != nil {
			result = "failed"
		}
		c.metrics.passes.WithLabelValues(result).Inc()
		c.outcome(err)
		return p.next(woken, pending, err)
	}
	// Let a burst pass, and let nobody who changes his Node all the time keep us busy.
	c.loop.Settle = gather
	c.loop.Run(ctx)
}

// pace is how long the next waits are: after a pass that failed, and while something is under way.
type pace struct{ retry, again time.Duration }

// next is how long to wait after a pass. woken: an event had asked for it.
func (p *pace) next(woken, pending bool, err error) time.Duration {
	if woken {
		p.again = soon
	}
	wait := fullCheck + rand.N(fullCheck/5)
	switch {
	case err != nil:
		wait, p.retry = p.retry, min(2*p.retry, retryMax)
	case pending:
		wait, p.again, p.retry = p.again, min(p.again*3/2, fullCheck), retryMin
	default:
		*p = pace{retryMin, soon}
	}
	return wait
}

// gather is how long to wait for more events after a pass that took that long.
func gather(took time.Duration) time.Duration { return min(max(settle, took), maxSettle) }

func (c *Controller) setLeading(leading bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leading = leading
	c.metrics.leader.Set(0)
	if leading {
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
		c.log.Info("works again")
	case err != nil && (before == nil || before.Error() != err.Error()):
		c.log.Error("pass", "err", err)
	}
}
