package sysdump

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/kube/podexec"
)

// everything is a text with all secrets.
func everything() string {
	var b strings.Builder
	for _, text := range planted() {
		b.WriteString(text + "\n")
	}
	return b.String()
}

// Whatever nodes, logs and objects hold, no secret is in the archive; a node that does not answer is named, and keeps nobody.
func TestClusterHoldsNoSecret(t *testing.T) {
	env := []corev1.EnvVar{{Name: "HEADSCALE_API_KEY", Value: word}}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Name: "headcni-a", Namespace: "kube-system", Labels: map[string]string{"app.kubernetes.io/name": "headcni"}, Annotations: map[string]string{"x": everything()},
	}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Env: env}}}}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "headcni-auth", Namespace: "kube-system"}, Data: map[string][]byte{"api-key": []byte(word)}}
	values := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "headcni-config", Namespace: "kube-system"}, Data: map[string]string{"daemon.yaml": everything()}}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "worker-a", Annotations: map[string]string{"note": everything()}}}
	c := doctor.Cluster{
		Client: kubetest.New(pod, secret, values, node), Namespace: "kube-system", Timeout: 200 * time.Millisecond,
		Exec: func(ctx context.Context, p podexec.Pod, command ...string) ([]byte, error) {
			if p.Name == "headcni-b" {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			if got := strings.Join(command, " "); got != "headcnictl sysdump part" {
				t.Error("runs", got)
			}
			// An older headcnictl there might mask less.
			return json.Marshal(Part{Files: map[string][]byte{"../../nft.txt": []byte(everything())}, Missing: map[string]string{"x": everything()}, Secrets: 2})
		},
	}
	seen := doctor.Seen{Kubernetes: true, Nodes: []doctor.Node{
		{Name: "worker-a", Pod: podexec.Pod{Name: "headcni-a"}, Tailscaled: podexec.Pod{Name: "headcni-tailscaled-a"}}, {Name: "worker-b", Pod: podexec.Pod{Name: "headcni-b"}},
		{Name: "worker-c", Err: errors.New("no pod")},
	}, Controllers: []doctor.Controller{{Pod: podexec.Pod{Name: "controller-1"}}}}
	a := New(Options{Secrets: []string{"known" + word}})
	a.Cluster(t.Context(), c, seen, func(_ context.Context, p podexec.Pod, lines int) ([]byte, error) {
		return []byte("log of " + p.Name + "\n" + everything()), nil
	})
	b, err := a.Bytes("", time.Unix(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, f := range unpack(t, b) {
		gone(t, f.name, string(f.content))
		names[strings.TrimPrefix(f.name, "headcni-sysdump/")] = true
		if f.name == "headcni-sysdump/summary.txt" {
			for _, want := range []string{"nodes/worker-b: ask pod headcni-b: context deadline exceeded", "nodes/worker-c: no pod"} {
				if !strings.Contains(string(f.content), want) {
					t.Errorf("%q is not in %s", want, f.content)
				}
			}
		}
	}
	for _, want := range []string{
		"nodes/worker-a/nft.txt", "nodes/worker-a/daemon.log", "nodes/worker-a/tailscaled.log", "nodes/worker-b/daemon.log", "controller/controller-1/controller.log",
		"cluster/nodes.json", "cluster/pods.json", "cluster/networkpolicies.json", "cluster/configmap-headcni-config.json",
	} {
		if !names[want] {
			t.Errorf("there is no %s among %v", want, names)
		}
	}
}

// The names of pods that the API server or a node tells are masked wherever they stand, and are no file's.
func TestAnonymousCluster(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "frontend-x7", Namespace: "shop"}, Status: corev1.PodStatus{PodIP: "10.244.1.9"}}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "worker-a"}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: "machine7.example.com"}}}}
	c := doctor.Cluster{
		Client: kubetest.New(pod, node), Namespace: "kube-system", Timeout: time.Minute,
		Exec: func(context.Context, podexec.Pod, ...string) ([]byte, error) {
			return json.Marshal(Part{Names: []string{"cart", "redis-0"}, Files: map[string][]byte{"links.txt": []byte("alias cart/redis-0 10.244.1.9")}})
		},
	}
	a := New(Options{Anonymous: true})
	a.Hide("worker-a")
	a.Cluster(t.Context(), c, doctor.Seen{Nodes: []doctor.Node{{Name: "worker-a", Pod: podexec.Pod{Name: "headcni-a"}}}}, func(context.Context, podexec.Pod, int) ([]byte, error) {
		return []byte("pod shop/frontend-x7 at 10.244.1.9 on worker-a (machine7.example.com)"), nil
	})
	b, err := a.Bytes("", time.Unix(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range unpack(t, b) {
		for _, name := range []string{"frontend-x7", "shop", "redis-0", "cart", "10.244.1.9", "worker-a", "machine7"} {
			if strings.Contains(f.name+string(f.content), name) {
				t.Errorf("%s is in %s: %s", name, f.name, f.content)
			}
		}
	}
}

// On this machine, with a daemon's key that has no form of its own.
func TestNodeMasksItsOwnKey(t *testing.T) {
	c := config.Default()
	c.CNI.ConfDir = t.TempDir()
	write(t, c.CNI.ConfDir+"/10-headcni.conflist", `{"odd": "plain`+word+`", "more": "`+word+`"}`)
	key := t.TempDir() + "/key"
	write(t, key, "plain"+word+"\n")
	c.Headscale.APIKeyFile = key
	p := Node(t.Context(), c, func(string) string { return "" }, t.TempDir()+"/none.sock")
	text := string(p.Files["conflists.txt"])
	if strings.Contains(text, "plain"+word) || !strings.Contains(text, `"odd": "***"`) || p.Secrets != 1 {
		t.Errorf("%d masked in %s", p.Secrets, text)
	}
	for _, name := range []string{"rules.txt", "routes.txt", "links.txt", "sysctls.txt", "config.yaml"} {
		if len(p.Files[name]) == 0 {
			t.Errorf("no %s: %s", name, p.Missing[name])
		}
	}
	if p.Missing["status.json"] == "" {
		t.Error("a daemon that does not answer is not named")
	}
}
