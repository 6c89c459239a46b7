// Package election has one of several programs lead, by a Lease. The elector of client-go does the same and links every kind
// of object that Kubernetes has.
package election

import (
	"context"
	"errors"
	"math/rand/v2"
	"reflect"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// LeaseDuration is after how long without a renewal another one takes over.
	LeaseDuration = 15 * time.Second
	// leadDuration is for how long after its last renewal a leader leads: it has time to stop before another one begins.
	leadDuration = 12 * time.Second
	// retryPeriod is how often the Lease is renewed, or looked at.
	retryPeriod = 2 * time.Second
	// requestTimeout leaves time for a second try where the first gets no answer.
	requestTimeout = 5 * time.Second
)

// ErrLost means that the Lease could not be renewed in time, or that somebody else has it.
var ErrLost = errors.New("lost the lead: the API server did not take the renewal of the Lease in time")

// errTaken means that another one has the Lease.
var errTaken = errors.New("the Lease is taken")

// Candidate is one that may lead.
type Candidate struct {
	Client kube.Client
	// Namespace and Name are those of the Lease.
	Namespace, Name string
	// Identity is a name that no other candidate has.
	Identity string

	// held is the Lease as we took or renewed it last, nil where it has to be read first, and renewedAt when that was.
	held      *coordinationv1.Lease
	renewedAt time.Time
	// seen is what the Lease said when it was last read, and seenAt when it was first seen to: nobody's clock is compared with ours.
	seen   coordinationv1.LeaseSpec
	seenAt time.Time
}

// Run waits for the Lease, and then leads until ctx ends or the Lease is lost, either of which ends the context of lead. The
// Lease is renewed for as long as lead takes to return, and given up after that: so no two lead. It returns ErrLost, or nil
// where ctx has ended.
func (c *Candidate) Run(ctx context.Context, lead func(context.Context)) error {
	for c.try(ctx) != nil {
		// Candidates that were started together do not ask together.
		if reconcile.Sleep(ctx, retryPeriod+rand.N(retryPeriod)); ctx.Err() != nil {
			return nil
		}
	}
	leading, stop := context.WithCancel(ctx)
	defer stop()
	renewing, done := context.WithCancel(context.WithoutCancel(ctx))
	defer done()
	var wg sync.WaitGroup
	var lost bool
	wg.Go(func() {
		lost = c.renew(renewing)
		stop()
	})
	lead(leading)
	done()
	wg.Wait()
	if lost && ctx.Err() == nil {
		return ErrLost
	}
	c.release(context.WithoutCancel(ctx))
	return nil
}

// renew renews the Lease until ctx ends. It returns true where the Lease is lost.
func (c *Candidate) renew(ctx context.Context) (lost bool) {
	for {
		inTime, cancel := context.WithDeadline(ctx, c.renewedAt.Add(leadDuration))
		reconcile.Sleep(inTime, retryPeriod)
		err := c.try(inTime)
		late := inTime.Err() != nil
		cancel()
		switch {
		case ctx.Err() != nil:
			return false
		case err != nil && (late || errors.Is(err, errTaken)):
			return true
		}
	}
}

// try takes or renews the Lease. It returns nil where the Lease is ours.
func (c *Candidate) try(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	leases := c.Client.Leases(c.Namespace)
	now := time.Now()
	lease := c.held
	c.held = nil
	var err error
	if lease == nil {
		if lease, err = leases.Get(ctx, c.Name, metav1.GetOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return err
		}
	}
	switch {
	case err != nil:
		lease = &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: c.Name, Namespace: c.Namespace}}
		lease.Spec = c.claim(lease.Spec, now)
		lease, err = leases.Create(ctx, lease, metav1.CreateOptions{})
	case c.taken(lease.Spec, now):
		return errTaken
	default:
		// The server refuses it where somebody has written since that version.
		lease = lease.DeepCopy()
		lease.Spec = c.claim(lease.Spec, now)
		lease, err = leases.Update(ctx, lease, metav1.UpdateOptions{})
	}
	if err != nil {
		return err
	}
	c.held, c.renewedAt = lease, now
	return nil
}

// taken reports whether the Lease is another one's that may still be alive.
func (c *Candidate) taken(spec coordinationv1.LeaseSpec, now time.Time) bool {
	if !reflect.DeepEqual(spec, c.seen) {
		c.seen, c.seenAt = spec, now
	}
	if holder := value(spec.HolderIdentity); holder == "" || holder == c.Identity {
		return false
	}
	return now.Before(c.seenAt.Add(time.Duration(value(spec.LeaseDurationSeconds)) * time.Second))
}

// claim is the Lease as ours.
func (c *Candidate) claim(was coordinationv1.LeaseSpec, now time.Time) coordinationv1.LeaseSpec {
	out := was
	at := metav1.NewMicroTime(now)
	if value(was.HolderIdentity) != c.Identity {
		out.AcquireTime = &at
		out.LeaseTransitions = new(value(was.LeaseTransitions))
		if was.RenewTime != nil {
			*out.LeaseTransitions++
		}
	}
	out.HolderIdentity, out.LeaseDurationSeconds, out.RenewTime = &c.Identity, new(int32(LeaseDuration/time.Second)), &at
	return out
}

// release gives the Lease up, so that another one need not wait. Where that fails, it waits.
func (c *Candidate) release(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*requestTimeout)
	defer cancel()
	leases := c.Client.Leases(c.Namespace)
	for ctx.Err() == nil {
		// Read anew: a renewal that was cut short may have arrived.
		lease, err := leases.Get(ctx, c.Name, metav1.GetOptions{})
		if err != nil || value(lease.Spec.HolderIdentity) != c.Identity {
			return
		}
		lease = lease.DeepCopy()
		now := metav1.NewMicroTime(time.Now())
		lease.Spec.HolderIdentity, lease.Spec.LeaseDurationSeconds, lease.Spec.RenewTime = nil, new(int32(1)), &now
		if _, err = leases.Update(ctx, lease, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
			return
		}
	}
}

// value is what p points to, the zero value where that is nothing.
func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}
