package controller

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"

	"github.com/headcni/headcni/pkg/kube"
)

const (
	// The Lease. Another leader takes over at the latest after leaseDuration; one that cannot renew stops before that.
	leaseDuration = 15 * time.Second
	renewDeadline = 10 * time.Second
	retryPeriod   = 2 * time.Second

	// fullCheck is how often Headscale is asked although nothing changed in Kubernetes.
	fullCheck = 30 * time.Second
	// soon is how often while something is under way; where nothing comes of it, ever less often.
	soon = 2 * time.Second
	// settle is how long a burst of events is gathered before a pass.
	settle = 200 * time.Millisecond
	// retryMin and retryMax bound the wait after a pass that failed.
	retryMin = time.Second
	retryMax = time.Minute
)

// campaign waits for the Lease and leads while it is held, until ctx ends. It returns an error when the Lease is lost.
func (c *Controller) campaign(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The Lease is given up only when the loop has ended: else two would lead for a moment.
	held, release := context.WithCancel(klog.NewContext(context.WithoutCancel(ctx), klog.New(nil)))
	defer release()
	var loop sync.Mutex
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta: metav1.ObjectMeta{Name: kube.Lease, Namespace: c.namespace}, Client: c.client.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: c.identity},
		},
		LeaseDuration: leaseDuration, RenewDeadline: renewDeadline, RetryPeriod: retryPeriod, ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{OnStartedLeading: func(held context.Context) {
			loop.Lock()
			defer loop.Unlock()
			c.lead(ctx, held)
		}, OnStoppedLeading: func() {}},
		Name: kube.Lease,
	})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		<-ctx.Done()
		loop.Lock() // the loop has ended, or finds that it need not begin
		defer loop.Unlock()
		release()
	})
	elector.Run(held)
	lost := ctx.Err() == nil
	cancel()
	wg.Wait()
	if lost {
		return errors.New("lost the lead: the API server did not take the renewal of the Lease in time; starting anew")
	}
	return nil
}

// lead runs passes until ctx ends, or held: the lead is lost.
func (c *Controller) lead(ctx, held context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(held, cancel)()
	if held.Err() != nil || ctx.Err() != nil {
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
	c.loop.Settle = func(took time.Duration) time.Duration { return max(settle, took) }
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
