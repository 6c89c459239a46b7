package labtest

import (
	"context"
	"os"
	"sync"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/nstest"
)

// keeper is who a stage's world belongs to. What is given to it to clean up is cleaned up when the stage ends, and not with
// the test that happened to be the first.
type keeper struct {
	testing.TB // the test that the world is made for, later the one that ends it

	ctx    context.Context
	cancel context.CancelFunc

	mu       sync.Mutex
	cleanups []func()
	labs     []*lab.Lab
	begun    map[*testing.T]marks
}

func newKeeper(t *testing.T) *keeper {
	k := &keeper{TB: t, begun: map[*testing.T]marks{}}
	k.ctx, k.cancel = context.WithCancel(context.WithoutCancel(t.Context()))
	return k
}

// Context implements testing.TB.
func (k *keeper) Context() context.Context { return k.ctx }

// Cleanup implements testing.TB.
func (k *keeper) Cleanup(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.cleanups = append(k.cleanups, f)
}

// TempDir implements testing.TB.
func (k *keeper) TempDir() string {
	k.Helper()
	dir, err := os.MkdirTemp(nstest.Dir(), "stage")
	if err != nil {
		k.Fatal(err)
	}
	k.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			k.Error(err)
		}
	})
	return dir
}

// begin notes where the logs are when a test begins.
func (k *keeper) begin(t *testing.T) {
	m := marks{}
	for _, l := range k.labs {
		m.set(l)
	}
	k.begun[t] = m
}

// end looks at what the logs have got since the test began.
func (k *keeper) end(t *testing.T) {
	t.Helper()
	for _, l := range k.labs {
		showLogs(t, l, k.begun[t])
	}
	delete(k.begun, t)
}

// close cleans everything up, in the name of t.
func (k *keeper) close(t *testing.T) {
	k.TB = t
	k.cancel()
	for {
		k.mu.Lock()
		if len(k.cleanups) == 0 {
			k.mu.Unlock()
			return
		}
		f := k.cleanups[len(k.cleanups)-1]
		k.cleanups = k.cleanups[:len(k.cleanups)-1]
		k.mu.Unlock()
		f()
	}
}
