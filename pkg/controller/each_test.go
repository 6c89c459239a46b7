package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/headscaletest"
	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/headscale"
)

// crowd is a Headscale that takes its time, and watches how it is called.
type crowd struct {
	*headscaletest.Server
	refuses string // the number of the node whose routes cannot be set, if any

	mu       sync.Mutex
	under    map[string]int // calls under way by node
	now, max int
	twice    bool
}

func (s *crowd) watch(w http.ResponseWriter, r *http.Request) bool {
	id, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/api/v1/node/"), "/")
	s.mu.Lock()
	s.now++
	s.under[id]++
	s.max = max(s.max, s.now)
	s.twice = s.twice || s.under[id] > 1
	s.mu.Unlock()
	time.Sleep(2 * time.Millisecond)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now--
	s.under[id]--
	return r.Method == http.MethodPost && id == s.refuses && headscaletest.Answer(http.StatusBadRequest, `{"code":3,"message":"it will not"}`)(w, r)
}

// approved is what the nodes have, by number.
func (s *crowd) approved() map[uint64][]netip.Prefix {
	routes := map[uint64][]netip.Prefix{}
	for _, n := range s.Nodes() {
		if len(n.Approved) > 0 {
			routes[n.ID] = n.Approved
		}
	}
	return routes
}

// newCrowd has nodes with the numbers from 1 on.
func newCrowd(t *testing.T, nodes int) (*crowd, *Controller, *headscale.Client) {
	t.Helper()
	s := &crowd{Server: headscaletest.New(t), under: map[string]int{}}
	for i := range nodes {
		s.AddNode(headscaletest.Node{NodeKey: crowded(i + 1).NodeKey})
	}
	s.Break(s.watch)
	api, err := headscale.New(headscale.Options{URL: s.URL, Key: secret.New(s.APIKey())})
	if err != nil {
		t.Fatal(err)
	}
	return s, newController(config.Default(), slog.New(slog.DiscardHandler), func(string) string { return "" }, kubetest.New(), "test"), api
}

// crowded is a node of newCrowd's, as far as it is told apart.
func crowded(id int) headscale.Node { return ts(headscale.ID(id), fmt.Sprint(id-1), nil) }

// TestColdStart: a thousand nodes at once. Several calls are under way, but never two for one node.
func TestColdStart(t *testing.T) {
	const nodes = 1000
	s, c, api := newCrowd(t, nodes)
	o := observation{now: now, ranges: prefixes("10.240.0.0/12"), tags: tags}
	for i := range nodes {
		cidr := fmt.Sprintf("10.24%d.%d.0/24", i/256, i%256)
		o.nodes = append(o.nodes, kn(fmt.Sprint("n", i), fmt.Sprint(i), cidr))
		o.tailnet = append(o.tailnet, ts(headscale.ID(i+1), fmt.Sprint(i), []string{cidr}))
	}
	began := time.Now()
	p := makePlan(o)
	planned := time.Since(began)
	if err := c.approve(t.Context(), api, p.approvals, nil); err != nil {
		t.Fatal(err)
	}
	t.Logf("planned in %v; %d calls of 2 ms in %v", planned, len(s.Calls("")), time.Since(began)-planned)
	approved := s.approved()
	for i, n := range o.nodes {
		if got := approved[uint64(i+1)]; !slices.Equal(got, n.cidrs) {
			t.Fatalf("node %d has %v approved", i+1, got)
		}
	}
	if s.max < 2 || s.max > parallel || s.twice {
		t.Errorf("%d calls at once, two for one node: %v", s.max, s.twice)
	}
}

// TestRangeMoves: a range is taken from one before another gets it, whatever else the first is given; where it cannot be
// taken, nobody gets it, and everybody else gets theirs.
func TestRangeMoves(t *testing.T) {
	list := []approval{
		{node: crowded(1), own: prefixes("10.244.1.0/24")},
		{node: crowded(2), own: prefixes("10.244.2.0/24"), stale: prefixes("10.244.1.0/24")},
		{node: crowded(3), own: prefixes("10.244.3.0/24")},
	}
	s, c, api := newCrowd(t, 3)
	give := func() {
		t.Helper()
		if _, err := api.ApproveRoutes(t.Context(), crowded(2), prefixes("10.244.1.0/24"), nil); err != nil {
			t.Fatal(err)
		}
	}
	give()
	if err := c.approve(t.Context(), api, list, nil); err != nil {
		t.Fatal(err)
	}
	set := s.Calls("POST ")[1:]
	if len(set) != 4 || set[0].Path != "/api/v1/node/2/approve_routes" || set[0].Body != `{"routes":[]}` ||
		fmt.Sprint(s.approved()) != "map[1:[10.244.1.0/24] 2:[10.244.2.0/24] 3:[10.244.3.0/24]]" {
		t.Errorf("set in this order: %v; in the end %v", set, s.approved())
	}

	s, c, api = newCrowd(t, 3)
	give()
	s.refuses = "2"
	if err := c.approve(t.Context(), api, list, nil); err == nil || !strings.Contains(err.Error(), "it will not") {
		t.Errorf("the error is lost: %v", err)
	}
	if fmt.Sprint(s.approved()) != "map[2:[10.244.1.0/24] 3:[10.244.3.0/24]]" {
		t.Errorf("approved: %v", s.approved())
	}
}

// TestNobodyAnswers: a thousand calls to a server that is away are not all made, and say so once.
func TestNobodyAnswers(t *testing.T) {
	var tried sync.Map
	list := make([]int, 1000)
	for i := range list {
		list[i] = i
	}
	errs := each(list, func(i int) error {
		tried.Store(i, true)
		return fmt.Errorf("%w at http://hs: no answer", headscale.ErrUnreachable)
	})
	n := 0
	tried.Range(func(any, any) bool { n++; return true })
	if n > parallel {
		t.Errorf("%d calls were made", n)
	}
	if err := joinErrors(errs); !errors.Is(err, headscale.ErrUnreachable) || strings.Contains(err.Error(), errNotTried.Error()) {
		t.Errorf("the error: %v", err)
	}
	errs = each(list, func(i int) error { return fmt.Errorf("node %d: no", i) })
	if text := joinErrors(errs).Error(); strings.Count(text, "\n") != maxListed || !strings.HasSuffix(text, "and 995 more like these") {
		t.Errorf("many errors: %s", text)
	}
}

// TestNumbersAreGivenAnew: a node of the tailnet that has the number of one of ours, which is gone, is not ours.
func TestNumbersAreGivenAnew(t *testing.T) {
	laptop := headscale.Node{ID: 7, NodeKey: "nodekey:l", Created: now.Add(-time.Minute), Approved: prefixes("10.244.1.0/24")}
	was := member{ID: 7, Node: "one", Daemon: true, Routes: prefixes("10.244.1.0/24"), Gone: now.Add(-2 * grace), Created: now.Add(-time.Hour)}
	o := observation{now: now, grace: grace, ranges: prefixes("10.244.0.0/16"), tags: tags, tailnet: []headscale.Node{laptop}, memory: memory{Members: []member{was}}}
	if p := makePlan(o); len(p.remove)+len(p.approvals) > 0 {
		t.Errorf("somebody's machine: %+v", p)
	}
	o.tailnet[0].Created, o.memory.Members[0].Due = was.Created, now.Add(-secondLook)
	if p := makePlan(o); len(p.remove) != 1 {
		t.Errorf("our own stays: %+v", p)
	}
}

// TestSharing: only addresses that are not the tailnet's own count.
func TestSharing(t *testing.T) {
	on := func(name string, ips ...string) node {
		n := kn(name, name)
		for _, ip := range ips {
			n.shared = append(n.shared, netip.MustParseAddr(ip))
		}
		return n
	}
	a, b := ts(1, "a", nil), ts(2, "b", nil)
	a.IPs, b.IPs = []netip.Addr{netip.MustParseAddr("100.64.0.1")}, []netip.Addr{netip.MustParseAddr("100.64.0.2")}
	o := observation{nodes: []node{on("a", "100.64.0.1"), on("b", "100.64.0.2", "100.100.0.7"), on("c", "100.64.9.9")}, tailnet: []headscale.Node{a, b}}
	if got := fmt.Sprint(o.sharing()); got != "[b]" {
		t.Errorf("%s: want b only; c's tailnet address is not known", got)
	}
}

// TestOwnKey: the API key's end is measured, and told in time.
func TestOwnKey(t *testing.T) {
	_, c, _ := newCrowd(t, 0)
	c.now = func() time.Time { return now }
	for _, test := range []struct {
		expires string
		metric  float64
		told    bool
	}{
		{"2026-12-24T12:00:00Z", 1798113600, false}, {"2026-12-01T12:00:00Z", 1796126400, true}, {"1970-01-01T00:00:00Z", 0, false}, {"0001-01-01T00:00:00Z", 0, false},
	} {
		expires, err := time.Parse(time.RFC3339, test.expires)
		if err != nil {
			t.Fatal(err)
		}
		s := headscaletest.New(t)
		s.SetClock(c.now)
		api, err := headscale.New(headscale.Options{URL: s.URL, Key: secret.New(s.APIKeyUntil(expires))})
		if err != nil {
			t.Fatal(err)
		}
		if told := c.ownKey(context.Background(), api); (told != "") != test.told || gauge(t, c, "headcni_headscale_api_key_expiry_timestamp_seconds") != test.metric {
			t.Errorf("%s: told %q, metric %v", test.expires, told, gauge(t, c, "headcni_headscale_api_key_expiry_timestamp_seconds"))
		}
	}
}

// gauge reads one from the registry.
func gauge(t *testing.T, c *Controller, name string) float64 {
	t.Helper()
	families, err := c.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

// counter adds up one of the registry.
func counter(t *testing.T, c *Controller, name string) (sum float64) {
	t.Helper()
	families, err := c.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}
