package bench

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/headcni/headcni/pkg/policy"
)

// kubeRouter is another implementation of NetworkPolicies, whose rules are in iptables and ipset. docs/networkpolicy.md says how to get it.
var kubeRouter = flag.String("kube-router", "", "the program kube-router, to compare what its NetworkPolicies cost; ipset and Kubernetes' programs must be in $PATH")

const (
	rivalAPI   = "https://127.0.0.1:6443"
	rivalToken = "rival"
)

// applyRival has kube-router bring the policies into the node's kernel, and ends it then: its rules stay, and nothing else of it is
// there while packets are counted.
func (n *policyNode) applyRival(b *testing.B, s *policy.Snapshot) {
	b.Helper()
	dir := b.TempDir()
	for name, text := range map[string]string{
		"tokens": rivalToken + ",admin,admin,system:masters\n",
		"kubeconfig": fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"x","contexts":[{"name":"x","context":{"cluster":"x","user":"x"}}],
"clusters":[{"name":"x","cluster":{"server":%q,"insecure-skip-tls-verify":true}}],"users":[{"name":"x","user":{"token":%q}}]}`, rivalAPI, rivalToken),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			b.Fatal(err)
		}
	}
	n.node.Run(b, "sh", "-ec", "ip link set lo up; ip link add uplink type bridge; ip address add 192.168.77.11/24 dev uplink; ip link set uplink up")
	key := filepath.Join(dir, "sa.key")
	n.node.Run(b, "openssl", "genrsa", "-out", key, "2048")
	stop := []func(){
		n.background(b, dir, "etcd", "--data-dir="+filepath.Join(dir, "etcd"), "--unsafe-no-fsync"),
		n.background(b, dir, "kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--advertise-address=192.168.77.11", "--service-cluster-ip-range=10.96.0.0/16",
			"--cert-dir="+dir, "--token-auth-file="+filepath.Join(dir, "tokens"), "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount",
			"--service-account-issuer=https://x", "--service-account-key-file="+key, "--service-account-signing-key-file="+key),
	}
	config := &rest.Config{Host: rivalAPI, BearerToken: rivalToken, TLSClientConfig: rest.TLSClientConfig{Insecure: true}, QPS: 1000, Burst: 1000,
		Dial: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			n.node.Do(b, func() error {
				c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
				return nil
			})
			return c, err
		}}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		b.Fatal(err)
	}
	await(b, "the API server", func() error {
		_, err := client.CoreV1().Namespaces().Get(b.Context(), "default", metav1.GetOptions{})
		return err
	})
	if err := fill(b.Context(), client, s); err != nil {
		b.Fatal(err)
	}
	stop = append(stop, n.background(b, dir, *kubeRouter, "--run-firewall", "--run-router=false", "--run-service-proxy=false", "--run-loadbalancer=false", "--iptables-sync-period=30s",
		"--kubeconfig="+filepath.Join(dir, "kubeconfig"), "--hostname-override="+s.Node, "--service-cluster-ip-range=10.96.0.0/16"))
	await(b, "kube-router", func() error {
		// A chain for each pod, which every chain of a policy is called from.
		rules := n.node.Run(b, "iptables-save", "-t", "filter")
		pods, policies := strings.Count(rules, ":KUBE-POD-FW-"), strings.Count(rules, "-j KUBE-NWPLCY-")
		if pods != len(policyPods) || policies < len(policyPods)*len(s.Policies) {
			return fmt.Errorf("%d pods, %d calls of policies", pods, policies)
		}
		return nil
	})
	for i := range stop {
		stop[len(stop)-1-i]()
	}
}

// background starts a program in the node's namespace.
func (n *policyNode) background(b *testing.B, dir, name string, args ...string) (stop func()) {
	b.Helper()
	cmd := n.node.Command(name, args...)
	log, err := os.Create(filepath.Join(dir, filepath.Base(name)+".log"))
	if err != nil {
		b.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		var killed *exec.ExitError
		if err := cmd.Wait(); err != nil && !errors.As(err, &killed) {
			b.Error(err)
		}
		_ = log.Close()
		if b.Failed() {
			text, _ := os.ReadFile(log.Name())
			b.Logf("%s:\n%s", name, text[max(0, len(text)-3000):])
		}
	})
	b.Cleanup(stop)
	return stop
}

func await(b *testing.B, what string, do func() error) {
	b.Helper()
	for end := time.Now().Add(4 * time.Minute); ; time.Sleep(500 * time.Millisecond) {
		err := do()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			b.Fatalf("wait for %s: %v", what, err)
		}
	}
}

// fill has the API server know what a snapshot knows.
func fill(ctx context.Context, c kubernetes.Interface, s *policy.Snapshot) error {
	nodes := map[string]string{s.Node: "192.168.77.11", "two": "192.168.77.12"}
	for name, addr := range nodes {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: addr}}}}
		if _, err := c.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	for _, ns := range s.Namespaces {
		if _, err := c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns.Name}}, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	for _, p := range s.Pods {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels},
			Spec: corev1.PodSpec{NodeName: p.Node, Containers: []corev1.Container{{Name: "x", Image: "x"}}}}
		pod, err := c.CoreV1().Pods(p.Namespace).Create(ctx, pod, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, HostIP: nodes[p.Node], PodIP: p.IPs[0].String(), PodIPs: []corev1.PodIP{{IP: p.IPs[0].String()}}}
		if _, err := c.CoreV1().Pods(p.Namespace).UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err != nil {
			return err
		}
	}
	for _, p := range s.Policies {
		if _, err := c.NetworkingV1().NetworkPolicies(p.Namespace).Create(ctx, p, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	return nil
}
