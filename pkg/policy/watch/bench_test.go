package watch

import (
	"context"
	"fmt"
	"io"
	"net/http/httptest"
	"os"
	"os/exec"
	goruntime "runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/policy"
)

// asServer makes the test binary an API server with this many pods, and a third as many policies.
const asServer = "HEADCNI_TEST_API_SERVER"

// TestMain is an API server where the variable says so.
func TestMain(m *testing.M) {
	var pods int
	if _, err := fmt.Sscan(os.Getenv(asServer), &pods); err != nil {
		os.Exit(m.Run())
	}
	s := httptest.NewServer(&kubetest.Crowd{PodCount: pods, PolicyCount: pods / 3})
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
		nodes = append(nodes, nodeview.Node{Name: fmt.Sprint("node-", i), PodCIDRs: prefixes(kubetest.CrowdRanges(i)...)})
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
