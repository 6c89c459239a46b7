package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/headcni/headcni/internal/cluster"
	"github.com/headcni/headcni/pkg/kube"
)

// TestStolenNode is root on a worker without a controller, and tries what its tokens and keys are good for.
func TestStolenNode(t *testing.T) {
	w := start(t, cluster.Options{ProxyMode: *proxyMode})
	w.apply(t, "echo.yaml", echoManifest)
	w.install(t, nil)
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)
	eventually(t, "pods", 2*time.Minute, w.findPods)
	// One controller, on the control plane's node by preference: both workers are without.
	w.kubectl(t, "scale", "-n", namespace, "deployment/headcni-controller", "--replicas=1")
	var holder *cluster.Node
	eventually(t, "one controller", time.Minute, func(ctx context.Context) error {
		pods, err := w.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=controller"})
		if err != nil {
			return err
		}
		if len(pods.Items) != 1 || !isReady(&pods.Items[0]) {
			return fmt.Errorf("%d controllers", len(pods.Items))
		}
		holder, err = w.Node(pods.Items[0].Spec.NodeName)
		return err
	})
	others := slices.DeleteFunc(slices.Clone(w.Workers()), func(n *cluster.Node) bool { return n == holder })
	s := &stolen{world: w, node: others[0], other: w.Nodes[0], holder: holder}
	if s.other == s.node {
		s.other = others[1]
	}
	t.Run("APIKeyIsNotThere", s.testAPIKey)
	t.Run("Daemon", s.testDaemonToken)
	t.Run("Kubelet", s.testKubelet)
	t.Run("Tailscaled", s.testTailscaled)
}

// stolen is a node in wrong hands, another that is not, and the one with the controller.
type stolen struct {
	*world
	node, other, holder *cluster.Node
}

// findKey looks for Headscale's API key in everything that root on a node sees.
func (s *stolen) findKey(t *testing.T, n *cluster.Node) (found []string) {
	t.Helper()
	for _, root := range []string{"/etc", "/run", "/var/lib/kubelet", "/var/lib/headcni", "/var/lib/cni", "/var/lib/tailscale", "/var/log", "/opt/cni"} {
		base := n.Path(root)
		err := filepath.WalkDir(base, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil // gone since, or nothing that can be read
			}
			text, err := os.ReadFile(path)
			if err == nil && strings.Contains(string(text), s.Control.APIKey) {
				found = append(found, root+strings.TrimPrefix(path, base))
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	out, err := n.Run(within(t, time.Minute), "bash", "-c", "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null || :")
	if err != nil {
		t.Error(err)
	}
	if len(out) < 1000 {
		t.Errorf("the processes of %s say %d bytes only", n.Name, len(out))
	}
	if strings.Contains(out, s.Control.APIKey) {
		found = append(found, "a process")
	}
	return found
}

func (s *stolen) testAPIKey(t *testing.T) {
	if found := s.findKey(t, s.node); len(found) > 0 {
		t.Errorf("the API key is on %s: %v", s.node.Name, found)
	}
	if len(s.findKey(t, s.holder)) == 0 {
		t.Errorf("nor is it found on %s, which has the controller: this looks in the wrong places", s.holder.Name)
	}
}

// attempt is something that must be refused.
type attempt struct {
	what string
	try  func(context.Context) error
}

func refused(t *testing.T, attempts []attempt) {
	t.Helper()
	for _, a := range attempts {
		if err := a.try(within(t, 10*time.Second)); err == nil {
			t.Errorf("it may %s", a.what)
		} else if text := err.Error(); !strings.Contains(text, "forbidden") && !strings.Contains(text, "denied") && !strings.Contains(text, "not permitted") {
			t.Errorf("%s fails for another reason: %v", a.what, err)
		} else {
			t.Logf("refused: %s: %v", a.what, err)
		}
	}
}

// as is a client with a token, or with a kubeconfig where token is "".
func (s *stolen) as(t *testing.T, token string, kubeconfig []byte) kubernetes.Interface {
	t.Helper()
	config := rest.AnonymousClientConfig(s.Config)
	config.BearerToken = token
	if token == "" {
		var err error
		if config, err = clientcmd.RESTConfigFromKubeConfig(kubeconfig); err != nil {
			t.Fatal(err)
		}
	}
	config.Dial = s.Config.Dial
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// patch merges JSON into a Node, or into its status.
func patch(client kubernetes.Interface, node, change string, subresource ...string) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := client.CoreV1().Nodes().Patch(ctx, node, types.MergePatchType, []byte(change), metav1.PatchOptions{}, subresource...)
		return err
	}
}

func read(client kubernetes.Interface, secret string) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := client.CoreV1().Secrets(namespace).Get(ctx, secret, metav1.GetOptions{})
		return err
	}
}

func annotation(key, value string) string {
	return fmt.Sprintf(`{"metadata":{"annotations":{%q:%q}}}`, key, value)
}

// daemonToken is the token of the stolen node's daemon, from its disk.
func (s *stolen) daemonToken(t *testing.T) string {
	t.Helper()
	pods, err := s.Client.CoreV1().Pods(namespace).List(within(t, time.Minute), metav1.ListOptions{
		LabelSelector: "app.kubernetes.io/component=daemon", FieldSelector: "spec.nodeName=" + s.node.Name,
	})
	if err != nil || len(pods.Items) != 1 {
		t.Fatalf("%d daemons on %s, %v", len(pods.Items), s.node.Name, err)
	}
	pattern := s.node.Path("/var/lib/kubelet/pods/" + string(pods.Items[0].UID) + "/volumes/kubernetes.io~projected/*/token")
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) != 1 {
		t.Fatalf("%s: %v, %v", pattern, files, err)
	}
	token, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	return string(token)
}

func (s *stolen) testDaemonToken(t *testing.T) {
	c := s.as(t, s.daemonToken(t), nil)
	own, other := s.node.Name, s.other.Name
	view, err := json.Marshal(kube.View{State: kube.StateRouted, Routes: cluster.PodPrefixes()})
	if err != nil {
		t.Fatal(err)
	}
	if err := patch(c, own, annotation(kube.Mode, "daemon"))(within(t, time.Minute)); err != nil {
		t.Errorf("the daemon may not write its own annotation: %v", err)
	}
	refused(t, []attempt{
		{"read the API key", read(c, kube.AuthSecret)},
		{"list Secrets", func(ctx context.Context) error {
			_, err := c.CoreV1().Secrets(namespace).List(ctx, metav1.ListOptions{})
			return err
		}},
		{"write another Node's key", patch(c, other, annotation(kube.NodeKey, "nodekey:00"))},
		{"write its own approval", patch(c, own, annotation(kube.Headscale, string(view)))},
		{"say that the controller gave it its CIDRs", patch(c, own, annotation(kube.Allocated, "true"))},
		{"have itself uninstalled by annotation", patch(c, own, annotation(kube.Uninstall, "true"))},
		{"label its Node", patch(c, own, `{"metadata":{"labels":{"node-role.kubernetes.io/control-plane":""}}}`)},
		{"taint its Node", patch(c, own, `{"spec":{"taints":[{"key":"a","effect":"NoExecute"}]}}`)},
		{"change another Node's status", patch(c, other, `{"status":{"conditions":[]}}`, "status")},
		{"change its own Node's addresses", patch(c, own, `{"status":{"addresses":[{"type":"InternalIP","address":"192.0.2.1"}]}}`, "status")},
		{"create a pod", func(ctx context.Context) error {
			_, err := c.CoreV1().Pods(namespace).Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "mine"}}, metav1.CreateOptions{})
			return err
		}},
		{"change the controller's memory", func(ctx context.Context) error {
			_, err := c.CoreV1().ConfigMaps(namespace).Patch(ctx, kube.Memory, types.MergePatchType, []byte(`{"data":null}`), metav1.PatchOptions{})
			return err
		}},
	})
}

func (s *stolen) testKubelet(t *testing.T) {
	kubeconfig, err := os.ReadFile(s.node.Path("/etc/kubernetes/kubelet.kubeconfig"))
	if err != nil {
		t.Fatal(err)
	}
	c := s.as(t, "", kubeconfig)
	// The Node is there, which is looked at last of all: a Node that may be made is refused for that.
	register := func(podCIDRs ...string) func(context.Context) error {
		return func(ctx context.Context) error {
			n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: s.node.Name}}
			if len(podCIDRs) > 0 {
				n.Spec.PodCIDR, n.Spec.PodCIDRs = podCIDRs[0], podCIDRs
			}
			_, err := c.CoreV1().Nodes().Create(ctx, n, metav1.CreateOptions{})
			return err
		}
	}
	if err := register()(within(t, time.Minute)); !apierrors.IsAlreadyExists(err) {
		t.Errorf("it may not make its Node anew at all, as kubelets do: %v", err)
	}
	refused(t, []attempt{
		{"read the API key", read(c, kube.AuthSecret)},
		{"read the join key", read(c, kube.JoinSecret)},
		{"write another Node's key", patch(c, s.other.Name, annotation(kube.NodeKey, "nodekey:00"))},
		{"make its Node anew, with pod CIDRs of its choice", register("10.244.128.0/17")},
		{"get a token of the controller's account", func(ctx context.Context) error {
			_, err := c.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, "headcni-controller", &authv1.TokenRequest{}, metav1.CreateOptions{})
			return err
		}},
	})
	// podCIDRs are for good once they are set: the API server refuses it as invalid.
	err = patch(c, s.node.Name, `{"spec":{"podCIDR":"10.244.0.0/16","podCIDRs":["10.244.0.0/16"]}}`)(within(t, time.Minute))
	if err == nil {
		t.Error("it may widen its own podCIDRs")
	}
}

// hsNode is a node as Headscale's own client shows it.
type hsNode struct {
	Name      string   `json:"name"`
	GivenName string   `json:"given_name"`
	Approved  []string `json:"approved_routes"`
	Available []string `json:"available_routes"`
	IPs       []string `json:"ip_addresses"`
}

func (w *world) headscaleNodes(t *testing.T) (nodes []hsNode) {
	t.Helper()
	out, err := w.Control.Run(within(t, time.Minute), "headscale", "nodes", "list-routes", "--output", "json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(out), &nodes); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return nodes
}

// testTailscaled announces, with the node's own tailnet identity, the pods of another node and the whole pool; and claims
// the other's identity by annotation. Approved is what was.
func (s *stolen) testTailscaled(t *testing.T) {
	before := s.approved(t)
	if len(before) != len(s.Nodes) {
		t.Fatalf("approved before: %v", before)
	}
	theirs, err := s.other.Object(within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	s.freezeDaemon(t)
	routes := append(slices.Clone(theirs.Spec.PodCIDRs), "10.244.0.0/16", "fd00:244::/48", "0.0.0.0/0", "::/0", "10.96.0.0/16")
	if _, err := s.node.Run(within(t, time.Minute), "tailscale", "--socket=/run/headcni/tailscaled.sock", "set", "--advertise-routes="+strings.Join(routes, ",")); err != nil {
		t.Fatal(err)
	}
	announced := func() bool {
		return slices.ContainsFunc(s.headscaleNodes(t), func(n hsNode) bool {
			return slices.Contains(n.Available, "10.244.0.0/16")
		})
	}
	eventually(t, "Headscale hears of the routes", time.Minute, func(context.Context) error {
		if !announced() {
			return fmt.Errorf("not announced: %+v", s.headscaleNodes(t))
		}
		return nil
	})
	c := s.as(t, s.daemonToken(t), nil)
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Second) {
		s.notWider(t, before)
	}
	s.told(t, "advertises [", theirs.Spec.PodCIDRs[0])
	if err := patch(c, s.node.Name, annotation(kube.NodeKey, theirs.Annotations[kube.NodeKey]))(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Second) {
		s.notWider(t, before)
	}
	s.told(t, "is not what it says it is")
	// The other's pods are reached where they are.
	from := s.echo[s.holder.Name]
	for _, p := range s.echo {
		if p.Spec.NodeName == s.node.Name || p.Spec.NodeName == s.holder.Name {
			continue
		}
		for _, a := range addrs(t, p) {
			if out, err := s.get(within(t, 10*time.Second), from, url(a, 8080, "/hostname")); err != nil || strings.TrimSpace(out) != p.Name {
				t.Errorf("%s answers %q, %v", p.Name, out, err)
			}
		}
	}
}

// told waits for an Event with all of these words.
func (s *stolen) told(t *testing.T, words ...string) {
	t.Helper()
	eventually(t, "an Event tells", 2*time.Minute, func(ctx context.Context) error {
		events, err := s.Client.EventsV1().Events("").List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(e.Note, w) }) {
				return nil
			}
		}
		return fmt.Errorf("no Event with %q among %d", words, len(events.Items))
	})
}

// approved are the routes that Headscale has approved, by node.
func (s *stolen) approved(t *testing.T) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	for _, n := range s.headscaleNodes(t) {
		name := n.GivenName
		if name == "" {
			name = n.Name
		}
		slices.Sort(n.Approved)
		out[name] = n.Approved
	}
	return out
}

func (s *stolen) notWider(t *testing.T, before map[string][]string) {
	t.Helper()
	for name, routes := range s.approved(t) {
		for _, r := range routes {
			if !slices.Contains(before[name], r) {
				t.Errorf("Headscale has approved %s for %s", r, name)
			}
			if netip.MustParsePrefix(r).Bits() == 0 {
				t.Errorf("%s is an exit node", name)
			}
		}
	}
}

// freezeDaemon stops the stolen node's daemon, which would take the wrong routes back.
func (s *stolen) freezeDaemon(t *testing.T) {
	t.Helper()
	const stop = `for p in /proc/[0-9]*; do [[ $(tr '\0' ' ' <$p/cmdline) != /usr/local/bin/headcni-daemon\ run* ]] || { kill -STOP ${p#/proc/}; echo stopped; }; done`
	if out, err := s.node.Run(within(t, time.Minute), "bash", "-c", stop); err != nil || !strings.Contains(out, "stopped") {
		t.Fatalf("stop the daemon: %q %v", out, err)
	}
}
