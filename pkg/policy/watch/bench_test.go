package watch

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	goruntime "runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/policy"
)

// asServer makes the test binary an API server with this many pods, and a third as many policies.
const asServer = "HEADCNI_TEST_API_SERVER"

// server streams pods and policies as an API server does, in protobuf.
func server(pods int) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		info, _ := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), "application/vnd.kubernetes.protobuf")
		w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf;stream=watch")
		out := streaming.NewEncoder(info.StreamSerializer.NewFrameWriter(w), scheme.Codecs.EncoderForVersion(info.StreamSerializer.Serializer, corev1.SchemeGroupVersion))
		send := func(typ string, o runtime.Object, version schema.GroupVersion) {
			raw, err := runtime.Encode(scheme.Codecs.EncoderForVersion(info.Serializer, version), o)
			if err == nil {
				err = out.Encode(&metav1.WatchEvent{Type: typ, Object: runtime.RawExtension{Raw: raw}})
			}
			if err != nil && r.Context().Err() == nil {
				panic(err)
			}
		}
		bookmark := metav1.ObjectMeta{ResourceVersion: "9", Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"}}
		switch {
		case strings.HasSuffix(r.URL.Path, "/pods"):
			for i := range pods {
				send("ADDED", largePod(i), corev1.SchemeGroupVersion)
			}
			send("BOOKMARK", &corev1.Pod{ObjectMeta: bookmark}, corev1.SchemeGroupVersion)
		case strings.HasSuffix(r.URL.Path, "/namespaces"):
			for i := range 100 {
				send("ADDED", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("team-", i), Labels: map[string]string{"team": fmt.Sprint(i)}}}, corev1.SchemeGroupVersion)
			}
			send("BOOKMARK", &corev1.Namespace{ObjectMeta: bookmark}, corev1.SchemeGroupVersion)
		default:
			for i := range pods / 3 {
				send("ADDED", largePolicy(i), networkingv1.SchemeGroupVersion)
			}
			send("BOOKMARK", &networkingv1.NetworkPolicy{ObjectMeta: bookmark}, networkingv1.SchemeGroupVersion)
		}
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
}

// largePod is about as large as they are: 5 kB.
func largePod(i int) *corev1.Pod {
	app := fmt.Sprint("app-", i/5%600)
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: fmt.Sprint("team-", i%100), Name: fmt.Sprintf("%s-7d9c6b8f5d-%05d", app, i), ResourceVersion: "5", UID: types.UID(fmt.Sprintf("4be5a08a-17ba-4ab0-ac38-%012d", i)),
			Labels:        map[string]string{"app.kubernetes.io/name": app, "app.kubernetes.io/part-of": "shop", "team": fmt.Sprint(i % 100), "pod-template-hash": "7d9c6b8f5d"},
			Annotations:   map[string]string{"checksum/config": strings.Repeat("0123456789abcdef", 4)},
			ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubelet", FieldsV1: metav1.NewFieldsV1(`{"f:status":"` + strings.Repeat("x", 2000) + `"}`)}},
		},
		Spec: corev1.PodSpec{NodeName: fmt.Sprint("node-", i/110)},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: fmt.Sprintf("10.%d.%d.%d", 100+i/110/250, i/110%250, 2+i%110)}, {IP: fmt.Sprintf("fd00:%x::%x", i/110, 2+i%110)}},
		},
	}
	c := corev1.Container{
		Name: "main", Image: "registry.example.com/shop/" + app + "@sha256:" + strings.Repeat("0123456789abcdef", 4),
		Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
	}
	for e := range 20 {
		c.Env = append(c.Env, corev1.EnvVar{Name: fmt.Sprint("SETTING_", e), Value: "some value of it"})
	}
	p.Spec.Containers = []corev1.Container{c}
	return p
}

func largePolicy(i int) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprint("team-", i%100), Name: fmt.Sprint("policy-", i), UID: types.UID(fmt.Sprint("p-", i)), Generation: 1, ResourceVersion: "6"},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app.kubernetes.io/name": fmt.Sprint("app-", i%600)}},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{
				{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app.kubernetes.io/name": fmt.Sprint("app-", (i+1)%600)}}},
				{NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"team": fmt.Sprint(i % 100)}}, PodSelector: &metav1.LabelSelector{}},
			}}},
		},
	}
}

// TestMain is an API server where the variable says so.
func TestMain(m *testing.M) {
	var pods int
	if _, err := fmt.Sscan(os.Getenv(asServer), &pods); err != nil {
		os.Exit(m.Run())
	}
	s := httptest.NewServer(server(pods))
	fmt.Println(s.URL)
	_, _ = io.Copy(io.Discard, os.Stdin) // until the parent ends
}

// BenchmarkMemory tells the resident memory, in MB, of a process that follows a cluster and has compiled it: rss once it has settled, and
// peak. A third as many policies come with the pods.
func BenchmarkMemory(b *testing.B) {
	for _, pods := range []int{1000, 10000, 30000} {
		b.Run(fmt.Sprint("pods=", pods), func(b *testing.B) {
			self, err := os.Executable()
			if err != nil {
				b.Fatal(err)
			}
			api := exec.Command(self)
			api.Env = append(os.Environ(), fmt.Sprint(asServer, "=", pods))
			stdin, err := api.StdinPipe()
			if err != nil {
				b.Fatal(err)
			}
			stdout, err := api.StdoutPipe()
			if err != nil {
				b.Fatal(err)
			}
			if err := api.Start(); err != nil {
				b.Fatal(err)
			}
			defer func() { _ = api.Wait() }()
			defer stdin.Close()
			var url string
			if _, err := fmt.Fscan(stdout, &url); err != nil {
				b.Fatal(err)
			}
			client, err := kube.NewClient(&rest.Config{Host: url, ContentConfig: rest.ContentConfig{
				ContentType: "application/vnd.kubernetes.protobuf", AcceptContentTypes: "application/vnd.kubernetes.protobuf,application/json",
			}})
			if err != nil {
				b.Fatal(err)
			}
			debug.FreeOSMemory()
			_ = os.WriteFile("/proc/self/clear_refs", []byte("5"), 0) // the peak begins anew, where the kernel lets it
			for b.Loop() {
				follow(b, client, pods)
			}
		})
	}
}

func follow(b *testing.B, client kube.Client, pods int) {
	var nodes []nodeview.Node
	for i := range pods/110 + 1 {
		nodes = append(nodes, nodeview.Node{Name: fmt.Sprint("node-", i), PodCIDRs: prefixes(fmt.Sprintf("10.%d.%d.0/24", 100+i/250, i%250), fmt.Sprintf("fd00:%x::/64", i))})
	}
	w := New(client, "node-3", func() ([]nodeview.Node, bool) { return nodes, true })
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan struct{})
	go func() { w.Run(ctx, func() {}); close(ended) }()
	defer func() { cancel(); <-ended }()
	var c *Cluster
	for end := time.Now().Add(time.Minute); c == nil; c = w.Snapshot() {
		if time.Sleep(50 * time.Millisecond); time.Now().After(end) {
			err, _ := w.Away()
			b.Fatal("the cluster is not whole after a minute: ", err)
		}
	}
	if len(c.Pods) != pods || len(c.Policies) != pods/3 {
		b.Fatalf("%d pods, %d policies", len(c.Pods), len(c.Policies))
	}
	compiler := policy.NewCompiler()
	rules := compiler.Compile(c.Snapshot)
	debug.FreeOSMemory() // as the agent does
	b.ReportMetric(memory(b, "VmRSS:"), "rss-MB")
	b.ReportMetric(memory(b, "VmHWM:"), "peak-MB")
	b.ReportMetric(float64(len(rules.Sets)), "sets")
	goruntime.GC()
	var m goruntime.MemStats
	goruntime.ReadMemStats(&m)
	b.ReportMetric(float64(m.HeapAlloc)/(1<<20), "live-MB")
	goruntime.KeepAlive(rules)
	goruntime.KeepAlive(compiler)
	_ = w.Snapshot() // all of it is still used
}

// memory reads a line of /proc/self/status, in MB.
func memory(b *testing.B, key string) float64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), key)
	var kb float64
	if _, err := fmt.Sscan(rest, &kb); err != nil {
		b.Fatal(err)
	}
	return kb / 1024
}
