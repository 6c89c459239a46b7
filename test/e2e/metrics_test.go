package e2e

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/cluster"
)

// counts are what a node's daemon says it has counted.
type counts struct{ allocated, released, setUp float64 }

func (w *world) counts(ctx context.Context, n *cluster.Node) (counts, error) {
	out, err := n.Run(ctx, "curl", "-sS", "-m", "5", "http://127.0.0.1:9669/metrics")
	m := metrics(out)
	if _, ok := m["headcni_ip_allocations_total"]; err == nil && !ok {
		err = fmt.Errorf("no headcni_ip_allocations_total on %s", n.Name)
	}
	return counts{m["headcni_ip_allocations_total"], m["headcni_ip_releases_total"], m["headcni_pod_network_setup_duration_seconds_count"]}, err
}

// TestMetrics holds the daemons' counters to what Kubernetes has made of them: 200 pods come and go on a node, and the
// daemon is away for a part of it.
func TestMetrics(t *testing.T) {
	const many, rounds = 50, 4
	w := start(t, cluster.Options{Workers: 2, ProxyMode: *proxyMode})
	w.install(t, nil)
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)
	w.kubectl(t, "create", "namespace", echoes)
	n := w.Workers()[0]
	quiet := func() counts {
		last := counts{allocated: -1} // is no reading
		eventually(t, "the counters come to rest", time.Minute, func(ctx context.Context) error {
			now, err := w.counts(ctx, n)
			if err == nil && now != last {
				last, err = now, fmt.Errorf("%+v", now)
				time.Sleep(3 * time.Second)
			}
			return err
		})
		return last
	}
	w.kubectl(t, "rollout", "status", "-n", "kube-system", "deployment/coredns", "--timeout=110s") // its pods may be on the node
	before := quiet()
	for round := range rounds {
		if round == 1 {
			w.awayDaemon(t, n, true)
		}
		w.apply(t, "many.yaml", fmt.Sprintf(manyManifest, many, n.Name))
		w.kubectl(t, "rollout", "status", "-n", echoes, "deployment/many", "--timeout=110s")
		w.kubectl(t, "delete", "deployment", "-n", echoes, "many", "--cascade=foreground")
		eventually(t, "the pods are gone", 100*time.Second, func(ctx context.Context) error {
			pods, err := w.Client.CoreV1().Pods(echoes).List(ctx, metav1.ListOptions{})
			if err == nil && len(pods.Items) > 0 {
				err = fmt.Errorf("%d are left", len(pods.Items))
			}
			return err
		})
		if round == 2 {
			w.awayDaemon(t, n, false)
		}
	}
	after := quiet()
	// A restarted daemon counts on from where it was. A sandbox has an address of each family, and is set up once.
	got := counts{after.allocated - before.allocated, after.released - before.released, after.setUp - before.setUp}
	setUp, refused := sandboxes(t, n, "many-")
	if want := (counts{2 * setUp, 2 * setUp, setUp}); got != want || setUp < many*rounds {
		t.Errorf("counted %+v for %d pods of %v sandboxes, want %+v; ADD failed for %d more", got, many*rounds, setUp, want, refused)
	}
}

// sandboxes returns how many sandboxes of pods whose names begin with prefix containerd has set up on a node, and for how many ADD
// failed. kubelet makes another one for a pod whose first has failed after ADD.
func sandboxes(t *testing.T, n *cluster.Node, prefix string) (setUp float64, refused int) {
	t.Helper()
	text, err := os.ReadFile(n.Containerd.Log)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		switch {
		case !strings.Contains(line, `msg="RunPodSandbox for name:\"`+prefix), strings.Contains(line, "returns sandbox id"):
		case !strings.Contains(line, "level=error"):
			setUp++
		case strings.Contains(line, "failed to setup network"):
			setUp--
			refused++
		}
	}
	return setUp, refused
}

// awayDaemon takes the daemon off a node, or brings it back.
func (w *world) awayDaemon(t *testing.T, n *cluster.Node, away bool) {
	t.Helper()
	// The daemon runs where a Node does not have this label.
	const patch = `{"spec":{"template":{"spec":{"affinity":{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[{"key":"away","operator":"DoesNotExist"}]}]}}}}}}}`
	if away {
		w.kubectl(t, "patch", "daemonset", "-n", namespace, "headcni", "--patch", patch)
		w.kubectl(t, "label", "node", n.Name, "away=yes")
	} else {
		w.kubectl(t, "label", "node", n.Name, "away-")
	}
	eventually(t, "the daemon", time.Minute, func(ctx context.Context) error {
		pods, err := w.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{
			LabelSelector: "app.kubernetes.io/component=daemon", FieldSelector: "spec.nodeName=" + n.Name,
		})
		if err != nil {
			return err
		}
		ready := 0
		for i := range pods.Items {
			if isReady(&pods.Items[i]) && pods.Items[i].Status.Phase == corev1.PodRunning {
				ready++
			}
		}
		if away && len(pods.Items) > 0 || !away && ready == 0 {
			return fmt.Errorf("%d pods, %d ready", len(pods.Items), ready)
		}
		return nil
	})
}
