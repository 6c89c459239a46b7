// Package labtest is what tests on the lab share: where their programs come from, a lab that ends with its test and
// shows what it logged when the test failed, and waiting on a machine that may be busy.
package labtest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/nstest"
)

// Soon bounds what takes a moment on an idle machine. No test measures speed by it.
const Soon = 60 * time.Second

// New makes a lab that ends with the test, or with the stage whose world it is part of. A data race in a log fails the
// test; a test that failed shows the ends of the logs and keeps them whole with `go test -artifacts`.
func New(t testing.TB, opt lab.Options) *lab.Lab {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*Soon)
	defer cancel()
	l, err := lab.New(ctx, opt)
	if errors.Is(err, lab.ErrMissing) {
		nstest.Skip(t, err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	if k, ok := t.(*keeper); ok {
		k.labs = append(k.labs, l) // whose logs each test of the stage looks at
		return l
	}
	t.Cleanup(func() { showLogs(t, l, nil) })
	return l
}

// Within is a context for what takes a moment, also while the test cleans up.
func Within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(t.Context()), Soon, fmt.Errorf("not within %v", Soon))
	t.Cleanup(cancel)
	return ctx
}

// Eventually waits until try succeeds.
func Eventually(t testing.TB, what string, try func() error) {
	t.Helper()
	EventuallyWithin(t, Soon, what, try)
}

// EventuallyWithin is Eventually for what takes the daemon's minute.
func EventuallyWithin(t testing.TB, bound time.Duration, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(bound)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
