package election

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clienttesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/kube"
)

// run has a candidate try until ctx ends. It leads for as long as it may, and works on for that long after.
func run(ctx context.Context, client kube.Client, name string, leading *atomic.Int32, after time.Duration) <-chan error {
	c := &Candidate{Client: client, Namespace: "ns", Name: "lease", Identity: name}
	ended := make(chan error, 1)
	go func() {
		ended <- c.Run(ctx, func(ctx context.Context) {
			leading.Add(1)
			<-ctx.Done()
			time.Sleep(after)
			leading.Add(-1)
		})
	}()
	return ended
}

func lease(t *testing.T, client kube.Client) coordinationv1.LeaseSpec {
	t.Helper()
	l, err := client.Leases("ns").Get(t.Context(), "lease", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return l.Spec
}

// The Lease is renewed while the leader finishes its work, then given up, and the next one takes it within a few seconds.
func TestHandOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := kubetest.New()
		var one, two atomic.Int32
		ctxOne, stopOne := context.WithCancel(t.Context())
		ctxTwo, stopTwo := context.WithCancel(t.Context())
		endedOne := run(ctxOne, client, "one", &one, time.Minute)
		time.Sleep(time.Second)
		endedTwo := run(ctxTwo, client, "two", &two, 0)
		time.Sleep(5 * time.Minute)
		if s := lease(t, client); one.Load() != 1 || two.Load() != 0 || value(s.HolderIdentity) != "one" || value(s.LeaseTransitions) != 0 ||
			time.Since(s.RenewTime.Time) > retryPeriod || time.Since(s.AcquireTime.Time) < 5*time.Minute || *s.LeaseDurationSeconds != 15 {
			t.Errorf("%d and %d lead, %+v", one.Load(), two.Load(), s)
		}
		stopOne()
		time.Sleep(time.Minute - time.Second)
		if one.Load() != 1 || two.Load() != 0 {
			t.Error("the second began before the first had ended")
		}
		if err := <-endedOne; err != nil {
			t.Error(err)
		}
		time.Sleep(2*retryPeriod + time.Second)
		if s := lease(t, client); two.Load() != 1 || value(s.HolderIdentity) != "two" || value(s.LeaseTransitions) != 1 {
			t.Errorf("the second waits although the Lease was given up: %+v", s)
		}
		stopTwo()
		if err := <-endedTwo; err != nil {
			t.Error(err)
		}
	})
}

// hanging is a client whose requests for Leases get no answer while hangs says so.
type hanging struct {
	kubetest.Client
	hangs func() bool
}

func (h hanging) Leases(namespace string) leases {
	return hangingLeases{h.Client.Leases(namespace), h.hangs}
}

type leases = kube.Objects[*coordinationv1.Lease, *coordinationv1.LeaseList]

type hangingLeases struct {
	leases
	hangs func() bool
}

func (h hangingLeases) Get(ctx context.Context, name string, o metav1.GetOptions) (*coordinationv1.Lease, error) {
	if h.hangs() {
		<-ctx.Done()
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return h.leases.Get(ctx, name, o)
}

func (h hangingLeases) Update(ctx context.Context, l *coordinationv1.Lease, o metav1.UpdateOptions) (*coordinationv1.Lease, error) {
	if h.hangs() {
		<-ctx.Done()
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return h.leases.Update(ctx, l, o)
}

// A leader whose renewals fail stops before another one may begin; one that finds another's name in the Lease stops at once.
func TestLost(t *testing.T) {
	for name, took := range map[string]time.Duration{"away": leadDuration, "hangs": leadDuration, "taken": 2 * retryPeriod} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := kubetest.New()
				var broken atomic.Bool
				client.PrependReactor("*", "leases", func(a clienttesting.Action) (bool, runtime.Object, error) {
					switch {
					case !broken.Load():
						return false, nil, nil
					case name == "taken" && a.GetVerb() == "update":
						return true, nil, apierrors.NewConflict(schema.GroupResource{Resource: "leases"}, "lease", nil)
					}
					return name != "taken", nil, errors.New("the API server is away")
				})
				var leading atomic.Int32
				ended := run(t.Context(), hanging{client, func() bool { return name == "hangs" && broken.Load() }}, "one", &leading, 0)
				time.Sleep(time.Minute + time.Second) // between two renewals
				renewed := lease(t, client).RenewTime.Time
				if name == "taken" {
					other := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "lease", Namespace: "ns"}, Spec: coordinationv1.LeaseSpec{
						HolderIdentity: new("two"), LeaseDurationSeconds: new(int32(15)),
					}}
					if _, err := client.Leases("ns").Update(t.Context(), other, metav1.UpdateOptions{}); err != nil {
						t.Fatal(err)
					}
				}
				broken.Store(true)
				if err := <-ended; !errors.Is(err, ErrLost) || leading.Load() != 0 {
					t.Errorf("%v, leading: %d", err, leading.Load())
				}
				if d := time.Since(renewed); d > took || d >= LeaseDuration {
					t.Errorf("led for %s after the last renewal, want %s", d, took)
				}
			})
		})
	}
}

// A candidate waits for as long as a dead leader's Lease lasts, by its own clock: the leader's may be wrong.
func TestTakeOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := kubetest.New()
		old := metav1.NewMicroTime(time.Now().Add(-time.Hour))
		dead := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "lease", Namespace: "ns"}, Spec: coordinationv1.LeaseSpec{
			HolderIdentity: new("dead"), LeaseDurationSeconds: new(int32(40)), RenewTime: &old, LeaseTransitions: new(int32(3)),
		}}
		if _, err := client.Leases("ns").Create(t.Context(), dead, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		var leading atomic.Int32
		ctx, stop := context.WithCancel(t.Context())
		ended := run(ctx, client, "one", &leading, 0)
		time.Sleep(39 * time.Second)
		if leading.Load() != 0 {
			t.Error("took the Lease while it may be held")
		}
		time.Sleep(2*retryPeriod + time.Second)
		if s := lease(t, client); leading.Load() != 1 || value(s.HolderIdentity) != "one" || *s.LeaseTransitions != 4 || *s.LeaseDurationSeconds != 15 {
			t.Errorf("leads: %d, %+v", leading.Load(), s)
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if s := lease(t, client); s.HolderIdentity != nil {
			t.Errorf("the Lease is not given up: %+v", s)
		}
	})
}
