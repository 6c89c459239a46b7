package scale

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/internal/realparts"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/kube"
)

const (
	// headscaleBatch is Headscale's own default for tuning.node_store_batch_timeout.
	headscaleBatch = 500 * time.Millisecond
	// joiners is how many join one after another a tailnet that is whole.
	joiners = 10
	// atOnce is how many join at once when a cluster starts.
	atOnce = 20
	// patience is for the slowest step of all, on a machine that does other things.
	patience = 40 * time.Minute

	pods = "10.240.0.0/12"
)

// BenchmarkHeadscale is the curve: tailnets of more and more nodes, each of which advertises its pods, with a policy that names addresses and with one
// that names the nodes' tag.
func BenchmarkHeadscale(b *testing.B) {
	tab := newTable("Headscale, by nodes and by what its policy names:")
	for _, c := range []struct {
		policy string
		sizes  []int
		who    string
	}{{"addresses", numbers(b, *sizes), "*"}, {"tag", numbers(b, *tagged), "tag:headcni"}} {
		for _, n := range c.sizes {
			b.Run(fmt.Sprintf("%d/%s", n, c.policy), func(b *testing.B) {
				tab.column(fmt.Sprintf("%d, %s", n, c.policy))
				began, before := time.Now(), load(b)
				newTailnet(b, options{nodes: n + joiners, batch: headscaleBatch, policy: c.who}).measure(tab, n)
				tab.add("load of the machine, before and after", "%s, %s", before, load(b))
				tab.add("the run took, s", "%.0f", time.Since(began).Seconds())
				b.ReportMetric(0, "ns/op")
			})
		}
	}
	tab.print(b)
}

// TestHeadscale holds that what is measured is there to be measured, in small.
func TestHeadscale(t *testing.T) {
	s := newTailnet(t, options{nodes: 4, batch: 10 * time.Millisecond, policy: "*"})
	if r := s.join(0, 3); r.Received == 0 || r.Sent == 0 || r.Polls < 3 {
		t.Errorf("three nodes joined: %+v", r)
	}
	if r := s.join(3, 4); len(r.Seen) != 3 {
		t.Errorf("three others saw %d times the route of one that joined", len(r.Seen))
	}
	if r := s.restart(); r.Polls < 4 || r.Seconds == 0 {
		t.Errorf("after a restart of Headscale four nodes polled %d times", r.Polls)
	}
	if s.calls.Load() == 0 {
		t.Error("the controller asked Headscale nothing")
	}
}

// tailnet is a real Headscale, our controller with an API server that is imitated, and nodes that are simulated.
type tailnet struct {
	t          testing.TB
	headscale  *realparts.World
	api        kubetest.Client
	controller *exec.Cmd
	// calls are those of the controller to Headscale.
	calls atomic.Int64

	nodes *exec.Cmd
	to    *json.Encoder
	from  *bufio.Scanner
}

func nodeName(i int) string { return fmt.Sprintf("node-%d", i) }

func nodeRoute(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(240 + i>>8), byte(i), 0}), 24)
}

// options are of a tailnet.
type options struct {
	nodes  int
	batch  time.Duration // Headscale's tuning.node_store_batch_timeout
	policy string        // whom its policy lets in, beside the pods
}

func newTailnet(t testing.TB, opt options) *tailnet {
	t.Helper()
	simnodes := realparts.Tool(t, "simnodes")
	s := &tailnet{t: t, headscale: realparts.New(t, opt.batch)}
	s.policy(opt.policy)
	var nodes []runtime.Object
	for i := range opt.nodes {
		cidr := nodeRoute(i).String()
		nodes = append(nodes, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName(i), UID: types.UID(nodeName(i)), CreationTimestamp: metav1.Now()},
			Spec: corev1.NodeSpec{PodCIDR: cidr, PodCIDRs: []string{cidr}}})
	}
	watch.DefaultChanSize = int32(10 * opt.nodes) // a watcher that does not keep up panics
	s.api = kubetest.New(nodes...)
	s.controller = startController(t, serveAPI(t, s.api), s.counting(), s.headscale.APIKey())
	s.nodes = exec.Command(simnodes)
	in, err := s.nodes.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.nodes.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.to, s.from = json.NewEncoder(in), bufio.NewScanner(out)
	s.from.Buffer(nil, 1<<26)
	start(t, s.nodes)
	s.send(map[string]any{"server": s.headscale.URL, "key": s.joinKey(), "count": true})
	return s
}

// policy is that of docs/install-by-hand.md, without autoApprovers.
func (s *tailnet) policy(who string) {
	s.t.Helper()
	file := filepath.Join(s.t.TempDir(), "policy.hujson")
	text := fmt.Sprintf(`{"tagOwners": {"tag:headcni": []}, "acls": [{"action": "accept", "src": [%q, %q], "dst": [%q, %q]}],
		"nodeAttrs": [{"target": ["tag:headcni"], "attr": ["cache-network-maps"]}]}`, who, pods, who+":*", pods+":*")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.headscale.CLI("policy", "set", "--file", file)
}

// counting is a way to Headscale that counts requests.
func (s *tailnet) counting() string {
	s.t.Helper()
	to, err := url.Parse(s.headscale.URL)
	if err != nil {
		s.t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to) }, ErrorLog: log.New(io.Discard, "", 0)}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.calls.Add(1)
		proxy.ServeHTTP(w, r)
	}))
	s.t.Cleanup(server.Close)
	return server.URL
}

// joinKey is what the controller made for the nodes.
func (s *tailnet) joinKey() (key string) {
	s.t.Helper()
	until(s.t, "the controller has made a join key", func() bool {
		secret, err := s.api.Secrets("kube-system").Get(s.t.Context(), kube.JoinSecret, metav1.GetOptions{})
		if err == nil {
			key = string(secret.Data[kube.JoinSecretKey])
		}
		return key != ""
	})
	return key
}

// result is what simnodes says of a command.
type result struct {
	Seconds        float64
	Seen           []float64
	Received, Sent int64
	Polls          int
}

// send has simnodes do a command. What a node's daemon writes on its Node is written when the node has joined.
func (s *tailnet) send(command any) result {
	s.t.Helper()
	if err := s.to.Encode(command); err != nil {
		s.t.Fatal(err)
	}
	giveUp := time.AfterFunc(patience, func() { _ = s.nodes.Process.Kill() }) // it may have ended
	defer giveUp.Stop()
	for s.from.Scan() {
		var e struct {
			Joined, NodeKey string
			Done            *result
		}
		if err := json.Unmarshal(s.from.Bytes(), &e); err != nil {
			s.t.Fatal(err)
		}
		if e.Done != nil {
			slices.Sort(e.Done.Seen)
			return *e.Done
		}
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{kube.NodeKey: e.NodeKey, kube.Mode: config.ModeDaemon}}})
		if err == nil {
			_, err = s.api.Nodes().Patch(s.t.Context(), e.Joined, types.MergePatchType, patch, metav1.PatchOptions{})
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	s.t.Fatalf("simnodes has ended before it was done, or was not done within %s: %v", patience, s.from.Err())
	return result{}
}

// join has the nodes from..to-1 join, and waits until all have all routes.
func (s *tailnet) join(from, to int) result {
	s.t.Helper()
	var list []map[string]any
	for i := from; i < to; i++ {
		list = append(list, map[string]any{"name": nodeName(i), "route": nodeRoute(i)})
	}
	return s.send(map[string]any{"join": list, "parallel": atOnce})
}

// restart kills Headscale and waits until all nodes poll again and have all routes. The time is from the kill.
func (s *tailnet) restart() result {
	s.t.Helper()
	s.headscale.Kill()
	if err := s.to.Encode(map[string]any{"forget": true}); err != nil {
		s.t.Fatal(err)
	}
	began := time.Now()
	s.headscale.Start()
	r := s.send(map[string]any{"settle": true})
	r.Seconds = time.Since(began).Seconds()
	return r
}

// measure makes a tailnet of n nodes, then adds joiners, waits idly, and restarts Headscale.
func (s *tailnet) measure(tab *table, n int) {
	s.t.Helper()
	h, c, sim := s.headscale.PID(), s.controller.Process.Pid, s.nodes.Process.Pid
	cpu := func() (headscale, controller, nodes float64) {
		return used(s.t, h).cpu, used(s.t, c).cpu, used(s.t, sim).cpu
	}

	resetPeak(s.t, h)
	h0, c0, s0 := cpu()
	r := s.join(0, n)
	h1, c1, s1 := cpu()
	tab.add(fmt.Sprintf("all join, %d at once: until all have the routes of all, s", atOnce), "%.1f", r.Seconds)
	tab.add("- CPU of Headscale, of the controller, of the simulated nodes, s", "%.1f, %.1f, %.1f", h1-h0, c1-c0, s1-s0)
	tab.add("- from Headscale to each node, from each to Headscale, KB", "%.0f, %.1f", perNode(r.Received, n), perNode(r.Sent, n))
	tab.add("- memory of Headscale, at most and then, MB", "%.0f, %.0f", used(s.t, h).top, used(s.t, h).rss)

	var one result
	h0, _, _ = cpu()
	for i := range joiners {
		r := s.join(n+i, n+i+1)
		one.Seen = append(one.Seen, r.Seen...)
		one.Received += r.Received
	}
	h1, _, _ = cpu()
	slices.Sort(one.Seen)
	tab.add("one more joins: until another has its route, p50, p99, s", "%.2f, %.2f", quantile(one.Seen, 0.5), quantile(one.Seen, 0.99))
	tab.add("- CPU of Headscale, for each that joins, s", "%.2f", (h1-h0)/joiners)
	tab.add("- from Headscale to each other node, for each that joins, KB", "%.1f", perNode(one.Received, n*joiners))

	whole := n + joiners
	s.send(map[string]any{"count": true})
	before := s.calls.Load()
	h0, c0, _ = cpu()
	time.Sleep(*idle)
	h1, c1, _ = cpu()
	minute := idle.Minutes()
	r = s.send(map[string]any{"count": true})
	tab.add("a minute in which nothing happens: CPU of Headscale, of the controller, s", "%.2f, %.2f", (h1-h0)/minute, (c1-c0)/minute)
	tab.add("- to and from each node, KB", "%.2f", perNode(r.Received+r.Sent, whole)/minute)
	tab.add("- calls of the controller to Headscale", "%.0f", float64(s.calls.Load()-before)/minute)
	tab.add("- memory of the controller, MB", "%.0f", used(s.t, c).rss)

	r = s.restart()
	u := used(s.t, s.headscale.PID())
	tab.add("`kill -9` of Headscale, and start: until all poll and have the routes of all, s", "%.1f", r.Seconds)
	tab.add("- CPU of Headscale since its start, s", "%.1f", u.cpu)
	tab.add("- polls that each node began", "%.1f", float64(r.Polls)/float64(whole))
	tab.add("- from Headscale to each node, KB", "%.0f", perNode(r.Received, whole))
	tab.add("- memory of Headscale, at most, MB", "%.0f", u.top)
}

func perNode(bytes int64, nodes int) float64 { return float64(bytes) / 1000 / float64(nodes) }

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}
