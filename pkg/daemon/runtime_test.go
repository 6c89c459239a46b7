package daemon

import (
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/membership"
	"github.com/headcni/headcni/pkg/monitoring"
	"github.com/headcni/headcni/pkg/reconcile"
)

// notReady is what kubelet writes with containerd, and with CRI-O.
var notReady = []string{
	"container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:Network plugin returns error: cni plugin not initialized",
	"container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:Network plugin returns error: " +
		"No CNI configuration file in /etc/kubernetes/cni/net.d/. Has your network provider started?",
}

func setReady(t *testing.T, client kubetest.Client, status corev1.ConditionStatus, message string) {
	t.Helper()
	n := node("a", "10.244.1.0/24")
	n.Status.Conditions = []corev1.NodeCondition{
		{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse},
		{Type: corev1.NodeReady, Status: status, Message: message, LastHeartbeatTime: metav1.Now()},
	}
	if _, err := client.CoreV1().Nodes().Update(t.Context(), n, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// A conflist that the runtime does not read: said as a part, to the API server as an event, and taken back when kubelet is
// content.
func TestRuntimeThatLooksElsewhere(t *testing.T) {
	k, client := startWatch(t, node("a", "10.244.1.0/24"))
	waitUntil(t, func() bool { return k.View().Synced })
	d := &Daemon{cfg: config.Default(), log: quiet, kubernetes: k, metrics: monitoring.NewMetrics("test")}
	var parts []reconcile.Part[*pass]
	for _, p := range d.parts() {
		if p.Name == partRuntime || p.Name == partKubernetes {
			p.Needs = nil
			parts = append(parts, p)
		}
	}
	d.board = d.newBoard(parts)
	look := func() (ready bool, text string) {
		t.Helper()
		d.board.Run(t.Context(), &pass{seen: observation{Seen: membership.Seen{Kubernetes: k.View()}}})
		ready, _ = d.board.Ready()
		return ready, partErrors(d)[partRuntime]
	}
	inNode := func(text string) func() bool { return func() bool { return k.View().PluginNotReady() == text } }
	for _, text := range notReady {
		setReady(t, client, corev1.ConditionFalse, text)
		waitUntil(t, inNode(text))
		d.conflistAt = time.Time{} // the conflist waits for something else, which has a part of its own
		if ready, got := look(); !ready || got != "" {
			t.Errorf("without a conflist: %v, %q", ready, got)
		}
		d.conflistAt = time.Now()
		if ready, got := look(); !ready || !strings.Contains(got, "has not seen") {
			t.Errorf("at once: %v, %q", ready, got)
		}
		d.conflistAt = time.Now().Add(-conflist.RuntimePatience)
		ready, got := look()
		for _, want := range []string{"/etc/cni/net.d/10-headcni.conflist", text, "cni.confDir /etc/cni/net.d and cni.binDir /opt/cni/bin"} {
			if ready || !strings.Contains(got, want) {
				t.Errorf("ready %v, %q; want %q in it", ready, got, want)
			}
		}
		setReady(t, client, corev1.ConditionTrue, "kubelet is posting ready status")
		waitUntil(t, inNode(""))
		if ready, got := look(); !ready || got != "" {
			t.Errorf("in the end: %v, %q", ready, got)
		}
	}
	setReady(t, client, corev1.ConditionFalse, "PLEG is not healthy")
	waitUntil(t, inNode(""))
	if ready, got := look(); !ready || got != "" {
		t.Errorf("NotReady for another reason: %v, %q", ready, got)
	}
	list, err := client.EventsV1().Events("default").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range list.Items {
		got = append(got, e.Reason)
		if e.Action != partRuntime {
			t.Errorf("an event about %s: %s", e.Action, e.Note)
		}
	}
	slices.Sort(got)
	if want := []string{kube.ReasonNotRight, kube.ReasonNotRight, kube.ReasonRight, kube.ReasonRight}; !slices.Equal(got, want) {
		t.Errorf("events %v; want %v", got, want)
	}
}
