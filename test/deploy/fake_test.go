package deploy

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/remotecommand"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/reconcile"
)

// fakeEnv names the folder in which the program that stands in for helm finds what to say, and notes how it was called. The test's own binary
// is this program, under its name.
const fakeEnv = "HEADCNI_TEST_FAKE"

// scenario is the world that an installation finds.
type scenario struct {
	Missing     []string // programs
	HelmVersion string   // "" is v3.22.0
	Unreachable bool
	Forbidden   string // the verb and resource of what one may not do
	NoNamespace bool
	Secret      string   // the key that the cluster has
	Owner       string   // release and namespace of the HeadCNI that is there
	DaemonSets  []string // of others, namespace/name
	Nodes       []fakeNode
	MicroK8s    bool
	NotReady    bool   // one of the daemon's pods
	Waiting     string // why containers wait
	Subnet      string // kubeadm's
	HelmFails   string // what `helm upgrade` says
	TestFails   string // what the test's pod says
	Values      string // of the release, in JSON
	Authority   string // the certificates that the chart is given
	Gone        bool   // helm knows no release
	Hangs       string // upgrade or test: that one ends by a signal only
}

// fakeNode is a node. Wrong is what its daemon says.
type fakeNode struct {
	Name, CIDRs, Addr, Flannel string
	NotReady                   bool
	Wrong                      *reconcile.Found
}

// call is how helm was started. Parent is the command line of who did it, Values what the files with values hold.
type call struct {
	Args, Env   []string
	Parent      string
	Values      string
	Interrupted bool
}

func (c call) line() string { return "helm " + strings.Join(c.Args, " ") }

func TestMain(m *testing.M) {
	if dir := os.Getenv(fakeEnv); dir != "" {
		os.Exit(fake(dir, os.Args[1:]))
	}
	os.Exit(tests(m))
}

// program is headcnictl, as it is now.
var program string

func tests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "headcni-deploy-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "headcnictl")
	if out, err := exec.Command("go", "build", "-o", program, "../../cmd/cli").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build headcnictl: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// fake is helm. It returns its exit code.
func fake(dir string, args []string) int {
	var s scenario
	b, err := os.ReadFile(filepath.Join(dir, "scenario"))
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 99
	}
	parent, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", os.Getppid())) // gone already: nothing to see
	c := call{Args: args, Env: os.Environ(), Parent: string(parent)}
	for i, a := range args {
		if a == "--values" {
			b, _ := os.ReadFile(args[i+1]) // the real one would say so
			c.Values += string(b)
		}
	}
	return s.helm(dir, c)
}

func note(dir string, c call) {
	b, err := json.Marshal(c)
	if err == nil {
		var f *os.File
		if f, err = os.OpenFile(filepath.Join(dir, "calls"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
			_, err = f.Write(append(b, '\n'))
			f.Close()
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(99)
	}
}

// hang waits for the signal that ends it.
func hang(dir string, c call) int {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	note(dir, c) // the test waits for this line
	<-stop
	c.Interrupted = true
	note(dir, c)
	return 1
}

// rendered is what helm makes of the chart's configuration.
const rendered = `apiVersion: v1
kind: ConfigMap
metadata: {name: headcni-config}
data:
  daemon.yaml: |
    headscale: {url: "` + url + `"}
    tailscale: {tags: ["tag:headcni"]}
`

func (s scenario) helm(dir string, c call) int {
	if slices.Contains(c.Args, s.Hangs) {
		return hang(dir, c)
	}
	note(dir, c)
	fail := func(text string) int {
		fmt.Fprintln(os.Stderr, "Error:", text)
		return 1
	}
	switch c.Args[0] {
	case "version":
		if s.HelmVersion == "" {
			s.HelmVersion = "v3.22.0+gabcdef"
		}
		fmt.Println(s.HelmVersion)
	case "template":
		if slices.Contains(c.Args, "config.network.mtu=x") {
			return fail("values don't meet the specifications of the schema")
		}
		fmt.Print(rendered)
		if s.Authority != "" {
			b, _ := json.Marshal(s.Authority) // a string
			fmt.Printf("  ca.crt: %s\n", b)
		}
	case "upgrade":
		if s.HelmFails != "" {
			return fail(s.HelmFails)
		}
	case "get":
		fmt.Println(s.Values)
	case "test":
		if s.TestFails != "" {
			return 1
		}
	case "uninstall":
		if s.Gone {
			return fail("uninstall: Release not loaded: headcni: release: not found")
		}
	}
	return 0
}

// cluster is an API server.
type cluster struct {
	kubetest.Client
	s scenario

	mu       sync.Mutex
	requests []string
}

func serve(t *testing.T, namespace string, s scenario) (*cluster, string) {
	t.Helper()
	c := &cluster{s: s, Client: kubetest.New(s.objects(namespace)...)}
	srv := httptest.NewServer(c)
	t.Cleanup(srv.Close)
	return c, srv.URL
}

func (s scenario) objects(namespace string) (out []runtime.Object) {
	meta := func(name, component string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Name: name, Namespace: namespace, Generation: 1,
			Labels: map[string]string{"app.kubernetes.io/name": "headcni", "app.kubernetes.io/component": component}}
	}
	n := int32(len(s.Nodes))
	ready := n
	if s.NotReady {
		ready--
	}
	out = append(out, &appsv1.DaemonSet{ObjectMeta: meta("headcni", "daemon"),
		Status: appsv1.DaemonSetStatus{ObservedGeneration: 1, DesiredNumberScheduled: n, UpdatedNumberScheduled: n, NumberReady: ready}},
		&appsv1.Deployment{ObjectMeta: meta("headcni-controller", "controller"),
			Status: appsv1.DeploymentStatus{ObservedGeneration: 1, UpdatedReplicas: 1, ReadyReplicas: 1}},
		&corev1.Pod{ObjectMeta: meta("headcni-controller-1", "controller"), Status: corev1.PodStatus{Phase: corev1.PodRunning}})
	if !s.NoNamespace {
		out = append(out, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}})
	}
	if s.Secret != "" {
		out = append(out, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "headcni-auth", Namespace: namespace}, Data: map[string][]byte{"api-key": []byte(s.Secret)}})
	}
	if s.Subnet != "" {
		out = append(out, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "kubeadm-config", Namespace: "kube-system"}, Data: map[string]string{
			"ClusterConfiguration": "networking:\n  dnsDomain: cluster.local\n  podSubnet: " + s.Subnet + "\n  serviceSubnet: 10.96.0.0/12\n"}})
	}
	for _, name := range s.DaemonSets {
		ns, name, _ := strings.Cut(name, "/")
		out = append(out, &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: ns}})
	}
	for i, n := range s.Nodes {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: map[string]string{corev1.LabelOSStable: "linux"}, Annotations: map[string]string{}},
			Spec: corev1.NodeSpec{PodCIDRs: strings.Fields(n.CIDRs)}}
		node.Annotations["headcni.io/node-key"] = "nodekey:" + n.Name
		if n.Flannel != "" {
			node.Annotations["flannel.alpha.coreos.com/backend-type"] = n.Flannel
		}
		if s.MicroK8s {
			node.Labels["microk8s.io/cluster"] = "true"
		}
		if n.Addr != "" {
			node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: n.Addr}}
		}
		ready := corev1.ConditionTrue
		if n.NotReady {
			ready = corev1.ConditionFalse
		}
		node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready, LastTransitionTime: metav1.Now()}}
		pod := &corev1.Pod{ObjectMeta: meta("headcni-"+n.Name, "daemon"), Spec: corev1.PodSpec{NodeName: n.Name}, Status: corev1.PodStatus{Phase: corev1.PodRunning}}
		if s.Waiting != "" && i == 0 {
			pod.Status.Phase = corev1.PodPending
			pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "headcni-daemon", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: s.Waiting}}}}
		}
		out = append(out, node, pod)
	}
	return out
}

// ServeHTTP notes requests that change something, and answers those that the imitated API server does not know.
func (c *cluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	exec := strings.HasSuffix(r.URL.Path, "/exec")
	if r.Method != http.MethodGet && !exec {
		c.mu.Lock()
		c.requests = append(c.requests, r.Method+" "+r.URL.Path)
		c.mu.Unlock()
	}
	answer := func(v any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v) // who asked may have gone
	}
	switch path := r.URL.Path; {
	case path == "/version":
		answer(map[string]string{"gitVersion": "v1.37.2"})
	case strings.HasSuffix(path, "/selfsubjectaccessreviews"):
		var q struct {
			Spec struct {
				ResourceAttributes struct{ Verb, Resource string }
			}
		}
		_ = json.NewDecoder(r.Body).Decode(&q) // then it is allowed
		a := q.Spec.ResourceAttributes
		answer(map[string]any{"status": map[string]bool{"allowed": c.s.Forbidden == "" || c.s.Forbidden != a.Verb+" "+a.Resource}})
	case strings.HasSuffix(path, "/clusterroles/headcni") && c.s.Owner != "":
		release, namespace, _ := strings.Cut(c.s.Owner, " -n ")
		answer(metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{
			"meta.helm.sh/release-name": release, "meta.helm.sh/release-namespace": namespace}}})
	case strings.HasSuffix(path, "/pods/headcni-test/log"):
		fmt.Fprintln(w, c.s.TestFails)
	case strings.HasSuffix(path, "/log"):
		fmt.Fprintln(w, "the last line")
	case r.Method == http.MethodDelete && strings.Contains(path, "/pods/headcni-"): // whose controller makes it anew
		answer(metav1.Status{Status: metav1.StatusSuccess})
	case exec:
		_ = kubetest.Exec(w, r, func(stdout, _ io.Writer) metav1.Status { return c.exec(stdout, path) }) // the program says so
	default:
		c.Client.ServeHTTP(w, r)
	}
}

// exec is what daemons and controllers answer.
func (c *cluster) exec(stdout io.Writer, path string) metav1.Status {
	words := strings.Split(path, "/")
	pod := words[len(words)-2]
	if strings.HasPrefix(pod, "headcni-controller") {
		fmt.Fprint(stdout, `{"parts":[{"name":"leader","ok":true}]}`)
		return metav1.Status{Status: metav1.StatusSuccess}
	}
	i := slices.IndexFunc(c.s.Nodes, func(n fakeNode) bool { return "headcni-"+n.Name == pod })
	s := nodestatus.Status{Version: "1", Ready: true, Parts: []reconcile.Status{{Name: "config", OK: true}}}
	for _, p := range strings.Fields(c.s.Nodes[i].CIDRs) {
		s.PodCIDRs = append(s.PodCIDRs, nodestatus.PodCIDR{CIDR: netip.MustParsePrefix(p), Advertised: true, Approved: true})
	}
	if f := c.s.Nodes[i].Wrong; f != nil {
		s.Parts[0] = reconcile.Status{Name: "config", Error: f.Text, Findings: []reconcile.Found{*f}}
	}
	_ = json.NewEncoder(stdout).Encode(s) // who asked may have gone
	return metav1.Status{Status: metav1.StatusSuccess, Reason: remotecommand.NonZeroExitCodeReason}
}

// asked reports whether a request that changes something contains all of what.
func (c *cluster) asked(what string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.requests, func(r string) bool { return strings.Contains(r, what) })
}
