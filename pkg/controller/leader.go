package controller

import (
	"context"
	"math/rand/v2"
	"time"
)

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
