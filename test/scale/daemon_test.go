package scale

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config"
)

const (
	// heartbeat is how often a kubelet writes its Node's status, by its default.
	heartbeat = 5 * time.Minute
	// churn: ten pods a second change where pods change at all.
	churn = 100 * time.Millisecond
)

// crowds are the clusters of BenchmarkDaemon.
var crowds = []struct {
	name                  string
	nodes, pods, policies int
	policy                bool
	churn                 time.Duration
}{
	{name: "1,000 Nodes, 30,000 pods, networkPolicy: false", nodes: 1000, pods: 30000},
	{name: "the same, networkPolicy: true, no policy", nodes: 1000, pods: 30000, policy: true, churn: churn},
	{name: "the same, 10,000 policies", nodes: 1000, pods: 30000, policies: 10000, policy: true, churn: churn},
}

// BenchmarkDaemon is the daemon of one node in a large cluster.
func BenchmarkDaemon(b *testing.B) {
	tab := newTable("`headcni-daemon` of one node, by what the cluster has:")
	for _, c := range crowds {
		b.Run(c.name, func(b *testing.B) {
			tab.column(c.name)
			before := load(b)
			crowd := &kubetest.Crowd{NodeCount: c.nodes, PodCount: c.pods, PolicyCount: c.policies, Heartbeat: heartbeat, Churn: c.churn}
			startDaemon(b, crowd, c.policy).measure(tab)
			tab.add("load of the machine, before and after", "%s, %s", before, load(b))
			b.ReportMetric(0, "ns/op")
		})
	}
	tab.print(b)
}

// TestDaemon holds that what is measured is there to be measured, in small.
func TestDaemon(t *testing.T) {
	crowd := &kubetest.Crowd{NodeCount: 20, PodCount: 100, PolicyCount: 10, Heartbeat: 10 * time.Second, Churn: churn}
	d := startDaemon(t, crowd, true)
	if u := used(t, d.node.Daemon.PID()); u.rss < 5 {
		t.Errorf("the daemon has %.1f MB", u.rss)
	}
	sent := crowd.Sent.Load()
	labtest.Eventually(t, "changes are streamed", func() error {
		if crowd.Sent.Load() == sent {
			return fmt.Errorf("%d bytes", sent)
		}
		return nil
	})
	if count, _ := d.passes(t); count == 0 {
		t.Error("no pass was counted")
	}
}

// daemon is a node's own, with an API server that is imitated.
type daemon struct {
	t     testing.TB
	node  *lab.Node
	crowd *kubetest.Crowd
}

func startDaemon(t testing.TB, crowd *kubetest.Crowd, policy bool) *daemon {
	t.Helper()
	l := labtest.New(t, lab.Options{Nodes: 1, Spare: 1, Modes: []string{config.ModeHost}, Bin: labtest.Programs(t)})
	n := l.Nodes[0]
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "own", UID: "1"}}
	var routes []string
	for _, p := range n.PodCIDRs {
		routes = append(routes, p.String())
	}
	node.Spec.PodCIDRs = routes
	crowd.Client = kubetest.New(node)
	listener := labtest.Listen(t, n, netip.MustParseAddrPort("127.0.0.1:0"))
	// A watch would otherwise outlast the test's own server.
	ctx, cancel := context.WithCancel(context.Background())
	server := &http.Server{Handler: crowd, BaseContext: func(net.Listener) context.Context { return ctx }}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = server.Serve(listener) }() // it ends with the test
	t.Cleanup(func() { cancel(); server.Close(); <-ended })
	const kubeconfig = "/etc/headcni/kubeconfig"
	if err := os.WriteFile(n.Path(kubeconfig), []byte(kubeconfigFor("http://"+listener.Addr().String())), 0o600); err != nil {
		t.Fatal(err)
	}
	labtest.StartTailscaled(t, n)
	labtest.Up(t, l, n, labtest.AuthKey(t, l))
	err := n.ConfigureDaemon(func(_ *lab.Node, c map[string]any) {
		labtest.Section(c, "kubernetes")["kubeconfig"] = kubeconfig
		labtest.Section(c, "kubernetes")["nodeName"] = node.Name
		network := labtest.Section(c, "network")
		delete(network, "podCIDRs")
		delete(network, "clusterCIDRs")
		network["networkPolicy"] = policy
	})
	if err == nil {
		err = n.StartDaemon()
	}
	if err != nil {
		t.Fatal(err)
	}
	labtest.Approve(t, l, n, routes...)
	within, cancelWait := context.WithTimeout(t.Context(), patience)
	defer cancelWait()
	if err := n.WaitReady(within); err != nil {
		t.Fatal(err)
	}
	return &daemon{t: t, node: n, crowd: crowd}
}

// passes is how many passes there were, and how long they took in all, in seconds.
func (d *daemon) passes(t testing.TB) (count, seconds float64) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: d.node.Dial, DisableKeepAlives: true}}
	resp, err := client.Get("http://127.0.0.1:9669/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(body)) {
		_, _ = fmt.Sscanf(line, "headcni_reconcile_duration_seconds_count %g", &count) // each line is one or the other or neither
		_, _ = fmt.Sscanf(line, "headcni_reconcile_duration_seconds_sum %g", &seconds)
	}
	return count, seconds
}

func (d *daemon) measure(tab *table) {
	d.t.Helper()
	pid := d.node.Daemon.PID()
	started := used(d.t, pid)
	tab.add("from its start until ready: CPU, s", "%.1f", started.cpu)
	tab.add("- from the API server, MB", "%.1f", float64(d.crowd.Sent.Load())/1e6)
	// The first passes, and what the start has left over, end first: pods are read on where the node has none that wait for policies.
	time.Sleep(*idle)
	tab.add("- memory at most, until a minute later, MB", "%.0f", used(d.t, pid).top)
	resetPeak(d.t, pid)
	before, bytes := used(d.t, pid), d.crowd.Sent.Load()
	count, seconds := d.passes(d.t)
	time.Sleep(*idle)
	after, minutes := used(d.t, pid), idle.Minutes()
	count2, seconds2 := d.passes(d.t)
	tab.add("a minute later, for a minute: memory, at most, MB", "%.0f, %.0f", after.rss, after.top)
	tab.add("- CPU, s", "%.2f", (after.cpu-before.cpu)/minutes)
	tab.add("- from the API server, KB", "%.0f", float64(d.crowd.Sent.Load()-bytes)/1e3/minutes)
	tab.add("- passes, and how long each, ms", "%.1f, %.0f", (count2-count)/minutes, 1e3*(seconds2-seconds)/max(1, count2-count))
}
