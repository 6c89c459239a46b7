package chaos

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// maxGuests are the pods that come and go and are there at the same time, on each node.
const maxGuests = 3

// cutWithin bounds the moment at which a plugin is killed. Most commands take less.
const cutWithin = 20 * time.Millisecond

// podKinds are commands of a runtime, which fall among other faults.
func podKinds() []*kind {
	pod := func(weight int, name string, do func(*testing.T, *blow)) *kind {
		return &kind{name: name, weight: weight, strike: func(t *testing.T, b *blow) {
			t.Helper()
			b.makeRoom(t)
			do(t, b)
		}, after: finish}
	}
	return []*kind{
		pod(10, "ADD, DEL of an older pod", func(t *testing.T, b *blow) { b.add(t, 1) }),
		pod(8, "two ADDs at once", func(t *testing.T, b *blow) { b.add(t, 2) }),
		pod(10, "kill -9 within ADD, DEL, ADD", func(t *testing.T, b *blow) { b.cutAdd(t, true) }),
		pod(4, "kill -9 within ADD, no DEL", func(t *testing.T, b *blow) { b.cutAdd(t, false) }),
		pod(10, "kill -9 within DEL, DEL", cutDel),
		pod(6, "a pod vanishes, then DEL", func(t *testing.T, b *blow) { b.leave(t, (*lab.Pod).Vanish, (*lab.Pod).Detach) }),
		pod(5, "GC", func(t *testing.T, b *blow) {
			if err := b.n.GC(labtest.Within(t), b.n.pods()); err != nil && !b.spoiled() {
				t.Error(err)
			}
		}),
	}
}

// spoiled tells whether commands may fail for the faults of this round.
func (b *blow) spoiled() bool { return b.r.of(b.s.node).has(func(k *kind) bool { return k.spoils }) }

// makeRoom removes the oldest guest where there are many.
func (b *blow) makeRoom(t *testing.T) {
	t.Helper()
	if len(b.n.guest) >= maxGuests {
		b.leave(t, (*lab.Pod).Remove)
	}
}

// leave ends the oldest guest in some way. What fails is tried again when the faults are over.
func (b *blow) leave(t *testing.T, how ...func(*lab.Pod, context.Context) error) {
	t.Helper()
	if len(b.n.guest) == 0 {
		b.want++ // for the next time
		return
	}
	p := b.n.guest[0]
	b.n.guest = b.n.guest[1:]
	b.w.tally.dels++
	for _, do := range how {
		if err := do(p, labtest.Within(t)); err != nil {
			b.failed(t, p, err)
		}
	}
}

// failed is for a DEL that failed.
func (b *blow) failed(t *testing.T, p *lab.Pod, err error) {
	t.Helper()
	if !b.spoiled() {
		t.Error(err)
	}
	b.pending = append(b.pending, p)
}

// add starts pods at once. Those that the plugin refuses for now are tried again.
func (b *blow) add(t *testing.T, n int) {
	t.Helper()
	added, errs := make([]*lab.Pod, n), make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		b.w.name++
		name := fmt.Sprintf("guest-%d", b.w.name)
		wg.Go(func() { added[i], errs[i] = b.tryAdd(labtest.Within(t), name) })
	}
	wg.Wait()
	for i, p := range added {
		var e *types.Error
		switch err := errs[i]; {
		case err == nil:
			b.w.tally.adds++
			b.n.guest = append(b.n.guest, p)
		case errors.As(err, &e) && e.Code == types.ErrTryAgainLater, b.spoiled():
			b.w.tally.refused++
			b.want++
		default:
			t.Errorf("ADD: %v", err)
			b.want++
		}
		if errs[i] != nil && p != nil {
			b.pending = append(b.pending, p)
		}
	}
}

// tryAdd starts a pod. Where that fails the runtime's DEL follows; a pod that is returned with an error still waits for it.
func (b *blow) tryAdd(ctx context.Context, name string) (*lab.Pod, error) {
	p, err := b.n.Sandbox(ctx, name, lab.PodOptions{})
	if err != nil {
		return nil, err
	}
	if err = p.Attach(ctx); err == nil {
		return p, nil
	}
	if gone := p.Remove(ctx); gone != nil {
		return p, errors.Join(err, gone)
	}
	return nil, err
}

// moment is when the plugin is killed.
func (b *blow) moment() time.Duration { return time.Duration(b.s.pick) % cutWithin }

// cutAdd kills ADD at some moment, unless it is done by then, ends the pod and adds another one.
func (b *blow) cutAdd(t *testing.T, del bool) {
	t.Helper()
	b.w.name++
	p, err := b.n.Sandbox(labtest.Within(t), fmt.Sprintf("guest-%d", b.w.name), lab.PodOptions{Idle: true})
	if err != nil {
		if !b.spoiled() {
			t.Error(err)
		}
		b.want++
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), b.moment())
	defer cancel()
	_ = p.Attach(ctx) // killed, refused, or done: what follows is the same
	b.w.tally.cut++
	end := p.Vanish
	if del {
		end = p.Remove
		b.w.tally.dels++
	}
	if err := end(labtest.Within(t)); err != nil {
		b.failed(t, p, err)
	}
	b.add(t, 1)
}

// cutDel kills the DEL of the oldest guest at some moment; the next one has to do what is left.
func cutDel(t *testing.T, b *blow) {
	t.Helper()
	b.leave(t, func(p *lab.Pod, _ context.Context) error {
		ctx, cancel := context.WithTimeout(t.Context(), b.moment())
		defer cancel()
		_ = p.Detach(ctx) // the same
		b.w.tally.cut++
		return nil
	}, (*lab.Pod).Remove)
}

// finish does what the faults kept from being done: DELs, then ADDs.
func finish(t *testing.T, b *blow) {
	t.Helper()
	for _, p := range b.pending {
		labtest.Eventually(t, "DEL of "+p.Name, func() error { return p.Detach(labtest.Within(t)) })
	}
	labtest.Eventually(t, "ADD", func() error {
		for ; b.want > 0; b.want-- {
			b.w.name++
			p, err := b.tryAdd(labtest.Within(t), fmt.Sprintf("guest-%d", b.w.name))
			if err != nil {
				if p != nil {
					err = errors.Join(err, p.Detach(labtest.Within(t)))
				}
				return err
			}
			b.w.tally.adds++
			b.n.guest = append(b.n.guest, p)
		}
		return nil
	})
}

// guestsTalk holds that the newest guest of each node that was struck by a command talks to all nodes, and all nodes to it.
func (w *world) guestsTalk(t *testing.T, r round) {
	t.Helper()
	for i, n := range w.nodes {
		if k := len(n.guest); k > 0 && r.of(i).has(func(k *kind) bool { return k.after != nil && !k.slow }) {
			w.talks(t, n.guest[k-1])
		}
	}
}

// cutPower cuts a node's power for a moment. Its pods are new ones then; the streams go on until they are.
func cutPower(t *testing.T, b *blow) {
	t.Helper()
	n := b.n
	n.noise.end()
	if err := n.Crash(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(b.s.stay)
	if err := n.Boot(labtest.Within(t)); err != nil {
		t.Fatal(err)
	}
	startTailscaled(t, b)
	if err := n.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	n.guest = nil
	for i := range n.stay {
		labtest.Eventually(t, "the first pods after a power cut", func() error {
			p, err := b.tryAdd(labtest.Within(t), fmt.Sprintf("stay-%d", i+1))
			if err == nil {
				n.stay[i] = p
				b.w.tally.adds++
			}
			return err
		})
	}
	b.w.stopFlows()
	b.w.startFlows(t)
	b.w.startNoise(n)
}
