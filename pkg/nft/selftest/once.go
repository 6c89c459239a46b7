package selftest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/headcni/headcni/pkg/nft"
)

// onceTimeout bounds the self-test. It takes a tenth of a second.
const onceTimeout = 30 * time.Second

// Once is the self-test of the guard: once for a process, beside the passes, so that no pod waits for it.
type Once struct {
	// Running is done once no test runs. One that runs ends with the context of Result.
	Running sync.WaitGroup

	mu    sync.Mutex
	begun bool
	text  string // for people, "" before it has ended
	err   error  // nil also where it could not run
}

// Result begins the test at the first call, and returns what it found so far. ended is called once it has.
func (g *Once) Result(ctx context.Context, cfg nft.Config, ended func(passed *bool)) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.begun {
		g.begun = true
		g.Running.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, onceTimeout)
			defer cancel()
			done, err := Run(ctx, cfg)
			ended(g.take(done, err))
		})
	}
	return g.err
}

// take notes the outcome, and returns whether the test passed: nil where it did not run.
func (g *Once) take(done []Result, err error) *bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	passed := err == nil
	switch {
	case errors.Is(err, ErrNotRun):
		g.text = err.Error()
		return nil
	case err != nil:
		g.text = "self-test FAILED"
		g.err = fmt.Errorf("self-test in a network namespace of its own: %w; pods' packets may leave in clear where routing rules do not hold: "+
			"tell us the kernel's and nft's versions, and what `nft list ruleset` says", err)
	default:
		g.text = fmt.Sprintf("self-test passed, %d packets in clear stopped and counted", len(done))
	}
	return &passed
}

// Said is what the test found, in words.
func (g *Once) Said() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.text
}
