package nodeview

import (
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	kubetesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/reconcile"
)

func TestPlanNodeWrite(t *testing.T) {
	want := Want{
		NodeKey: "nodekey:1", Mode: "host", Up: true,
		TailnetIPs: []netip.Addr{prefixes("100.64.0.1/32")[0].Addr(), prefixes("fd7a:115c:a1e0::1/128")[0].Addr()},
	}
	n := node("a")
	all := map[string]string{kube.NodeKey: "nodekey:1", kube.Mode: "host", kube.TailnetIPs: "100.64.0.1,fd7a:115c:a1e0::1"}
	if w := planNodeWrite(n, want); !cmp.Equal(w.annotations, all) || !w.up {
		t.Errorf("new Node: %+v", w)
	}
	if w := planNodeWrite(n, Want{}); len(w.annotations) > 0 || w.up {
		t.Errorf("tailscaled away: %+v", w)
	}
	n.Annotations = map[string]string{kube.NodeKey: "nodekey:0", kube.Mode: "host", kube.TailnetIPs: all[kube.TailnetIPs]}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionTrue, Reason: "NoRouteCreated"}}
	if w := planNodeWrite(n, want); !cmp.Equal(w.annotations, map[string]string{kube.NodeKey: "nodekey:1"}) || !w.up {
		t.Errorf("key changed, cloud says no route: %+v", w)
	}
	n.Status.Conditions[0].Status = corev1.ConditionFalse
	if w := planNodeWrite(n, want); w.up {
		t.Error("says again what stands there")
	}
}

func TestEventsOnTheNode(t *testing.T) {
	w, client, _ := startWatch(t, node("a"))
	for range maxEvents + 5 {
		w.Report("firewall", false, strings.Repeat("long ", 1000))
	}
	w.Report("firewall", true, "right again")
	if err := w.events.send(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	list, err := client.EventsV1().Events("default").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != maxEvents {
		t.Fatalf("%d events, %v", len(list.Items), err)
	}
	for _, e := range list.Items {
		if e.Regarding.Name != "a" || e.Action != "firewall" || e.EventTime.IsZero() {
			t.Errorf("%+v", e)
		}
	}
}

// A watch that is denied just after the API server has started is no news; one that stays denied is.
func TestDenialsPassOrAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := kubetest.New(node("a", "10.244.1.0/24"))
		nodes := schema.GroupResource{Resource: "nodes"}
		deny := true
		client.PrependReactor("list", "nodes", func(kubetesting.Action) (bool, runtime.Object, error) {
			return deny, nil, apierrors.NewForbidden(nodes, "", errors.New("RBAC: clusterrole not found"))
		})
		w := Of(client, "a", slog.New(slog.DiscardHandler))
		w.changed = func() {}
		ask := func() error {
			_, err := client.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
			w.answered(err)
			_, err = w.Sync(t.Context(), w.View(), Want{})
			return err
		}
		var waiting reconcile.Waiting
		for range 2 {
			if err := ask(); !errors.As(err, &waiting) {
				t.Errorf("at once: %v", err)
			}
			time.Sleep(denialPatience / 2)
		}
		if err := ask(); err == nil || errors.As(err, &waiting) || !strings.Contains(err.Error(), "ClusterRole") {
			t.Errorf("after %s: %v", denialPatience, err)
		}
		deny = false
		if err := ask(); !errors.As(err, &waiting) { // not synced yet
			t.Errorf("granted: %v", err)
		}
		deny = true
		if err := ask(); !errors.As(err, &waiting) {
			t.Errorf("denied again: %v", err)
		}
	})
}

// What an event meets with must not keep the annotations from the Node that the controller waits for.
func TestDeniedEventsHoldNothingBack(t *testing.T) {
	client := kubetest.New(node("a", "10.244.1.0/24"))
	client.PrependReactor("create", "events", func(kubetesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "events"}, "", errors.New("not granted"))
	})
	w := Of(client, "a", slog.New(slog.DiscardHandler))
	w.synced, w.own = true, node("a", "10.244.1.0/24")
	w.Report("firewall", false, "wrong")
	done, err := w.Sync(t.Context(), w.View(), Want{Up: true})
	var waiting reconcile.Waiting
	if len(done) != 1 || !errors.As(err, &waiting) {
		t.Errorf("did %v, %v", done, err)
	}
	n, err := client.CoreV1().Nodes().Get(t.Context(), "a", metav1.GetOptions{})
	if err != nil || len(n.Status.Conditions) != 1 {
		t.Errorf("%+v, %v", n.Status.Conditions, err)
	}
}
