package reconcile

import (
	"errors"
	"time"
)

// retry is when a part with an error is to be tried again, unless the part says so itself (Soon). The wait doubles each time that
// it has run out, and only then: an event that starts a pass before, or an error of another part, does not make it longer.
type retry struct {
	wait time.Duration // 0 = the part is as it should be
	due  time.Time
}

// after takes the outcome of a try at now into account. It returns how long it is until the next try, and whether there has
// to be one at all.
func (r *retry) after(err error, opt Options, now time.Time) (time.Duration, bool) {
	if err == nil || every[Warning](err) {
		*r = retry{}
		return 0, false
	}
	var soon Soon
	switch isSoon := errors.As(err, &soon); {
	case isSoon && every[Waiting](err):
		return soon.In, true // a look is no try that failed
	case isSoon:
		return min(soon.In, r.failed(opt, now)), true
	}
	return r.failed(opt, now), true
}

// failed is after for a try that failed.
func (r *retry) failed(opt Options, now time.Time) time.Duration {
	switch {
	case r.wait == 0:
		r.wait = opt.RetryMin
	case now.Before(r.due):
		return r.due.Sub(now)
	default:
		r.wait = min(2*r.wait, opt.RetryMax)
	}
	r.due = now.Add(r.wait)
	return r.wait
}
