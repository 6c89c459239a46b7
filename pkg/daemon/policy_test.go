package daemon

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	kubetesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

// policyFiles are what is kept on disk.
var policyFiles = []string{filepath.Join(paths.StateDir, "policy.json"), filepath.Join(paths.RunDir, "policy-rules.json"), filepath.Join(paths.RunDir, "policy-kept")}

// TestPolicy: NetworkPolicies are in force beside the passes, stay so when the daemon stops, and go when they are switched off, and at
// uninstall; a pod that runs has its link's group as long.
func TestPolicy(t *testing.T) {
	c := testConfig(t)
	t.Setenv("NODE_NAME", "a")
	shell := func(command string) string {
		t.Helper()
		return run(t, "sh", "-c", command)
	}
	link := podlink.Name("c1", "eth0")
	shell("ip link add " + link + " type veth peer eth0")
	t.Cleanup(func() { shell("ip link del " + link) })
	shell("ip link set " + link + " up")
	shell("ip link set " + link + " alias 'net c1/eth0 ns/web u1'")
	shell("ip link set eth0 up")
	shell("ip route add 10.244.1.10 dev " + link + " proto static")
	client := kubetest.New(node("a", "10.244.1.0/24"), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns"}},
		&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "u1"}, Spec: corev1.PodSpec{NodeName: "a"}},
		&networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "deny"}})
	start := func() (d *Daemon, stop func()) {
		d = newDaemon(t, c)
		d.cfg.Network.NetworkPolicy, d.kubernetes = true, nodeview.Of(client, "a", quiet)
		d.policy = d.newPolicy()
		d.board = d.newBoard(d.parts())
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		d.policy.Start(ctx, &wg, d.watchEvents)
		wg.Go(func() { d.kubernetes.Run(ctx, d.loop.Wake) })
		return d, func() { cancel(); wg.Wait() }
	}
	inForce := func() bool {
		return strings.Contains(shell("nft list ruleset"), "10.244.1.10 : goto") && strings.Contains(shell("ip link show "+link), "group 4278")
	}
	d, stop := start()
	defer stop()
	waitUntil(t, func() bool { return d.policy.Err() == nil && inForce() })
	d.pass(t.Context())
	if text := partErrors(d)[partPolicy]; text != "" {
		t.Error(text)
	}
	if s := d.status(t.Context()).Policy; s == nil || !s.InForce || s.Policies != 1 || s.Isolated != 1 || len(s.Unknown) > 0 {
		t.Errorf("%+v", s)
	}
	if m := d.policy.Metrics(); !m.Enforced || m.Chains == 0 || m.Unknown != 0 {
		t.Errorf("%+v", m)
	}
	askAboutPolicy(t, d, func() string { return shell("nft list ruleset") })
	// What was in force once, and is gone round since, is not said to be.
	shell("ip link add kube-ipvs0 type bridge")
	waitUntil(t, func() bool { return d.policy.Err() != nil })
	if s := d.status(t.Context()).Policy; s.InForce {
		t.Errorf("%+v with %v", s, d.policy.Err())
	}
	shell("ip link del kube-ipvs0")
	waitUntil(t, func() bool { return d.policy.Err() == nil })
	shell("nft delete table inet headcni-policy")
	waitUntil(t, inForce)
	shell("ip link set " + link + " group 0")
	waitUntil(t, inForce)
	stop()
	if _, err := os.Stat(policyFiles[0]); err != nil || !inForce() {
		t.Error("a daemon that stops takes policies along, or forgets them:", err)
	}
	d.policy.Leave()
	if !inForce() {
		t.Error("a daemon that stops takes policies along")
	}
	revoked := true
	client.PrependReactor("list", "networkpolicies", func(kubetesting.Action) (bool, runtime.Object, error) {
		return revoked, nil, apierrors.NewForbidden(networkingv1.Resource("networkpolicies"), "", nil)
	})
	d.policy.Leave()
	if out := shell("nft list ruleset") + shell("ip link show "+link); strings.Contains(out, "headcni-policy") || strings.Contains(out, "group 4278") {
		t.Error("new pods of a version that enforces no policies would wait for ever:", out)
	}
	revoked = false
	if _, err := os.Stat(policyFiles[0]); err != nil {
		t.Error(err)
	}

	off := newDaemon(t, c)
	for range 2 {
		if err := off.switchPolicyOff(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	gone := func(when string) {
		t.Helper()
		if out := shell("nft list ruleset"); strings.Contains(out, "headcni-policy") || strings.Contains(shell("ip link show "+link), "group 4278") {
			t.Error(when, out)
		}
		for _, path := range policyFiles {
			if _, err := os.Stat(path); err == nil {
				t.Error(when, "it leaves", path)
			}
		}
	}
	gone("switched off")

	d, stop = start()
	defer stop()
	waitUntil(t, inForce)
	d.policy.Stop()
	if err := uninstall(t.Context(), d.cfg, d.saved, quiet, ""); err != nil {
		t.Fatal(err)
	}
	gone("uninstalled")
}
