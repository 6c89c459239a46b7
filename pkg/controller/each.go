package controller

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/headcni/headcni/pkg/headscale"
)

const (
	// parallel is how many calls are under way at most.
	parallel = 8
	// maxListed is how many of many errors or names are spelled out: a thousand nodes can have one trouble.
	maxListed = 5
)

// errNotTried stands for a call that was left for the next pass.
var errNotTried = errors.New("not tried")

// each calls f for all of list, several at once, and returns the errors in list's order. Once nobody answers the rest is
// not tried: a thousand calls that time out take an hour, in which nobody renews the join key.
func each[T any](list []T, f func(T) error) []error {
	errs := make([]error, len(list))
	slots := make(chan struct{}, parallel)
	var dead atomic.Bool
	var wg sync.WaitGroup
	for i, x := range list {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if dead.Load() {
				errs[i] = errNotTried
				return
			}
			errs[i] = f(x)
			if errors.Is(errs[i], headscale.ErrUnreachable) || errors.Is(errs[i], context.DeadlineExceeded) || errors.Is(errs[i], context.Canceled) {
				dead.Store(true)
			}
		})
	}
	wg.Wait()
	return errs
}

// joinErrors makes one error of those of each.
func joinErrors(errs []error) error {
	var listed []error
	more := 0
	for _, err := range errs {
		switch {
		case err == nil, err == errNotTried: // what kept it from being tried is among the errors
		case len(listed) < maxListed:
			listed = append(listed, err)
		default:
			more++
		}
	}
	if more > 0 {
		listed = append(listed, fmt.Errorf("and %d more like these", more))
	}
	return errors.Join(listed...)
}

// unlessGone forgives that something is not there any more: it went since the list was made.
func unlessGone(err error) error {
	if errors.Is(err, headscale.ErrNotFound) {
		return nil
	}
	return err
}
