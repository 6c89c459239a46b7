package controller

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clienttesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/internal/headscaletest"
	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/election"
)

// busy counts the calls of two keys that are under way, each of which takes its time.
type busy struct {
	key2     string
	one, two atomic.Int32
}

func (b *busy) delay(_ http.ResponseWriter, r *http.Request) bool {
	n := &b.one
	if strings.HasSuffix(r.Header.Get("Authorization"), b.key2) {
		n = &b.two
	}
	n.Add(1)
	defer n.Add(-1)
	time.Sleep(300 * time.Millisecond)
	return false
}

func leads(c *Controller) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.leading
}

// TestOneLeads: of two controllers one works; when it is told to stop it ends its pass, and only then does the other begin.
func TestOneLeads(t *testing.T) {
	s := headscaletest.New(t)
	keys := map[string]string{"1": s.APIKey(), "2": s.APIKey()}
	b := &busy{key2: keys["2"]}
	s.Break(b.delay)
	cfg := config.Default()
	cfg.Headscale.URL = s.URL
	client := kubetest.New(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}})
	run := func(digit string) (*Controller, context.CancelFunc, chan error) {
		c := newController(cfg, slog.New(slog.DiscardHandler), func(name string) string {
			return map[string]string{"HEADSCALE_API_KEY": keys[digit], "POD_NAME": digit}[name]
		}, client, "test")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx, "") }()
		return c, cancel, done
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(2 * election.LeaseDuration); !ok(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("waited in vain until %s", what)
			}
		}
	}
	one, stopOne, doneOne := run("1")
	until("the first leads", func() bool { return leads(one) })
	two, stopTwo, doneTwo := run("2")
	defer stopTwo()
	until("the first is at work", func() bool { return b.one.Load() > 0 })
	if leads(two) || b.two.Load() > 0 {
		t.Error("two lead")
	}
	stopOne()
	began := time.Now()
	until("the second is at work", func() bool { return b.two.Load() > 0 })
	if leads(one) {
		t.Error("the second began before the first had ended")
	}
	if took := time.Since(began); took > election.LeaseDuration {
		t.Errorf("the second waited %s: the Lease was not given up", took)
	}
	if err := <-doneOne; err != nil {
		t.Error(err)
	}
	stopTwo()
	if err := <-doneTwo; err != nil {
		t.Error(err)
	}
}

// Run ends with an error where the Lease is lost, and without one where it is told to end. Nothing that it started goes on:
// else the test would not end.
func TestRunEnds(t *testing.T) {
	cfg := config.Default()
	cfg.Headscale.URL = "https://headscale.example.com" // which nobody asks without a key
	for name, lost := range map[string]bool{"lost": true, "told": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := kubetest.New(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}})
				var away atomic.Bool
				client.PrependReactor("update", "leases", func(clienttesting.Action) (bool, runtime.Object, error) {
					return away.Load(), nil, errors.New("the API server is away")
				})
				c := newController(cfg, slog.New(slog.DiscardHandler), func(string) string { return "" }, client, "test")
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				done := make(chan error, 1)
				go func() { done <- c.Run(ctx, "") }()
				time.Sleep(fullCheck)
				if n := counter(t, c, "headcni_controller_passes_total"); n == 0 || !leads(c) {
					t.Errorf("%v passes, leads: %v", n, leads(c))
				}
				if away.Store(lost); !lost {
					cancel()
				}
				if err := <-done; (err != nil) != lost {
					t.Error(err)
				}
				if leads(c) {
					t.Error("leads although Run has ended")
				}
			})
		})
	}
}

// A pass over many nodes takes long, and who joins after it does not wait as long again.
func TestGather(t *testing.T) {
	for took, want := range map[time.Duration]time.Duration{0: settle, time.Second: time.Second, time.Minute: maxSettle} {
		if got := gather(took); got != want {
			t.Errorf("after a pass of %s: %s, want %s", took, got, want)
		}
	}
}

// TestUninstall: a node that answers, and one that is dead.
func TestUninstall(t *testing.T) {
	s := headscaletest.New(t)
	key := s.APIKey()
	for range 3 {
		s.AddNode(headscaletest.Node{})
	}
	cfg := config.Default()
	cfg.Headscale.URL = s.URL
	object := metav1.ObjectMeta{Name: kube.Memory, Namespace: "kube-system"}
	nodes := []runtime.Object{
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "alive", Annotations: map[string]string{kube.NodeKey: "nodekey:a", "mine": "stays"}}},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "dead", Annotations: map[string]string{kube.NodeKey: "nodekey:d"}}},
		&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: kube.Controller, Namespace: "kube-system"}},
		&corev1.ConfigMap{ObjectMeta: object, Data: map[string]string{memoryKey: `{"members":[{"id":"1","node":"alive","daemon":true},{"id":"2","node":"host"}]}`}},
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: kube.JoinSecret, Namespace: "kube-system"}},
	}
	log := &strings.Builder{}
	c := newController(cfg, slog.New(slog.NewTextHandler(log, nil)), func(name string) string {
		return map[string]string{"HEADSCALE_API_KEY": key}[name]
	}, kubetest.New(nodes...), "test")
	start := time.Now()
	c.now = func() time.Time { return start.Add(60 * time.Since(start)) } // two minutes are two seconds
	go func() {
		for t.Context().Err() == nil {
			n, err := c.client.Nodes().Get(context.Background(), "alive", metav1.GetOptions{})
			if err == nil && n.Annotations[kube.Uninstall] == "true" {
				_ = c.annotate(context.Background(), "alive", map[string]any{kube.Uninstalled: "now"}) // the test sees the annotation or not
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	if err := c.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "node=dead") || strings.Contains(log.String(), "node=alive") {
		t.Errorf("the dead node, and no other, must be named:\n%s", log)
	}
	if left := s.Nodes(); len(left) != 2 || left[0].ID != 2 || left[1].ID != 3 {
		t.Errorf("Headscale still has %+v, want all but the one that joined for us", left)
	}
	list, err := c.client.Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range list.Items {
		if n.Name == "alive" && n.Annotations["mine"] != "stays" {
			t.Error("somebody else's annotation is gone")
		}
		for key := range n.Annotations {
			if strings.HasPrefix(key, "headcni.io/") {
				t.Errorf("Node %s keeps %s", n.Name, key)
			}
		}
	}
	if _, err := c.client.Secrets("kube-system").Get(t.Context(), kube.JoinSecret, metav1.GetOptions{}); err == nil {
		t.Error("the join key is still there")
	}
	if err := c.Uninstall(t.Context()); err != nil {
		t.Errorf("again: %v", err)
	}
}

// TestUninstallWithoutHeadscale: it is dead for good. Everything else goes, and what stays there is named.
func TestUninstallWithoutHeadscale(t *testing.T) {
	cfg := config.Default()
	cfg.Headscale.URL = headscaletest.New(t).URL // which refuses every key
	log := &strings.Builder{}
	c := newController(cfg, slog.New(slog.NewTextHandler(log, nil)), func(name string) string {
		return map[string]string{"HEADSCALE_API_KEY": "hskey-api-111111111111-x"}[name]
	}, kubetest.New(&corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: kube.Memory, Namespace: "kube-system"}, Data: map[string]string{memoryKey: `{"members":[{"id":"17","node":"a","daemon":true}]}`},
	}, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: testPod, Namespace: "kube-system"}}), "test")
	if err := c.Uninstall(t.Context()); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "headscale nodes delete") || !strings.Contains(log.String(), "ids=[17]") {
		t.Errorf("the node that stays is not named:\n%s", log)
	}
	if _, err := c.client.Pods("kube-system").Get(t.Context(), testPod, metav1.GetOptions{}); err == nil {
		t.Error("the pod of `helm test` stays")
	}
}
