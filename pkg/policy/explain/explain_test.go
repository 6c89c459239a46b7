package explain_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/golden"
	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/enforce"
	"github.com/headcni/headcni/pkg/policy/explain"
	"github.com/headcni/headcni/pkg/policy/report"
)

// kernel holds a ruleset, and has counted.
type kernel struct {
	*policy.Ruleset
	denied enforce.Denied
}

func (k kernel) Denied(context.Context) (enforce.Denied, error) { return k.denied, nil }

// links have the addresses of a snapshot's pods of the own node, all let out but those that are held.
type links struct {
	s    *policy.Snapshot
	held map[string]bool
}

func (l links) Attached() (map[string]podlink.Attachment, error) {
	out := map[string]podlink.Attachment{}
	for i, p := range l.s.Pods {
		a := podlink.Attachment{Group: names.PolicyLinkGroup, Index: i, Label: p.Namespace + "/" + p.Name}
		if p.Node == l.s.Node && !p.HostNetwork && !p.Done {
			a.Addrs = p.IPs
		}
		if l.held[p.Namespace+"/"+p.Name] {
			a.Group = 0
		}
		out[fmt.Sprint(i)] = a
	}
	return out, nil
}

// explainer answers for a state. The kernel holds what was compiled of inKernel.
func explainer(st *explain.State, inKernel *policy.Snapshot, held ...string) *explain.Explainer {
	k := kernel{policy.Compile(inKernel), enforce.Denied{
		In: map[netip.Addr]uint64{addr("10.244.1.10"): 40, addr("fd00:244:1::10"): 1}, Out: map[netip.Addr]uint64{addr("10.244.1.10"): 7}, Unknown: 3, Stateless: 1,
	}}
	l := links{st.Snapshot, map[string]bool{}}
	for _, name := range held {
		l.held[name] = true
	}
	return &explain.Explainer{State: func() (*explain.State, error) { return st, nil }, Kernel: k, Links: l, Beside: beside}
}

// beside is what other rules refuse: a network behind a device of the tailnet, such a device, and who is beside the node.
func beside(_ string, _ int, _, other netip.Addr, begins bool) (string, error) {
	switch {
	case begins && other == addr("192.168.77.7"):
		return nft.DropTailnetSubnet, nil
	case begins && other == addr("100.64.0.77"):
		return nft.DropTailnetEgress, nil
	case !begins && other == addr("198.51.100.7"):
		return nft.DropLANIngress, nil
	}
	return "", nil
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, addr(s))
	}
	return out
}

// shop is a cluster of two nodes.
func shop(t *testing.T) *policy.Snapshot {
	pod := func(node, namespace, name, app string, ips []netip.Addr, ports ...policy.NamedPort) *policy.Pod {
		return &policy.Pod{Namespace: namespace, Name: name, Node: node, IPs: ips, Ports: ports, Labels: map[string]string{"app": app}}
	}
	s := &policy.Snapshot{
		Node: "one",
		Nodes: []policy.Node{
			{Name: "one", Addrs: addrs("192.168.50.1", "100.64.0.1", "fd7a:115c:a1e0::1")},
			{Name: "two", Addrs: addrs("192.168.50.2", "100.64.0.2", "fd7a:115c:a1e0::2")},
		},
		Namespaces: []policy.Namespace{{Name: "shop"}, {Name: "edge", Labels: map[string]string{"team": "edge"}}},
		PodCIDRs:   []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")},
		Pods: []*policy.Pod{
			pod("one", "shop", "web", "web", addrs("10.244.1.10", "fd00:244:1::10"), policy.NamedPort{Name: "http", Protocol: policy.TCP, Port: 8080}),
			pod("one", "shop", "open", "open", addrs("10.244.1.11", "fd00:244:1::11")),
			pod("one", "shop", "job", "job", addrs("10.244.1.12")),
			pod("one", "shop", "fresh", "fresh", addrs("10.244.1.13")),
			pod("one", "shop", "agent", "agent", addrs("192.168.50.1")),
			pod("two", "shop", "db", "db", addrs("10.244.2.20", "fd00:244:2::20"), policy.NamedPort{Name: "sql", Protocol: policy.TCP, Port: 5432}),
			pod("two", "edge", "gw", "gw", addrs("10.244.2.30")),
		},
	}
	s.Pods[2].Done, s.Pods[4].HostNetwork = true, true
	for name, spec := range map[string]string{
		"deny": "podSelector: {matchLabels: {app: web}}",
		"web": `
podSelector: {matchLabels: {app: web}}
policyTypes: [Ingress, Egress]
ingress:
- from: [{podSelector: {matchLabels: {app: nobody}}}]
- from: [{ipBlock: {cidr: 192.168.50.0/24, except: [192.168.50.128/25]}}, {namespaceSelector: {matchLabels: {team: edge}}, podSelector: {}}]
  ports: [{port: 443}, {port: http}, {port: 9, protocol: UDP}]
- ports: [{port: admin}]
egress:
- to: [{podSelector: {matchLabels: {app: db}}}]
  ports: [{port: sql}]
- ports: [{port: 53, protocol: UDP}, {port: 30000, endPort: 32000}, {protocol: SCTP}]
- to: [{namespaceSelector: {}}]
  ports: [{port: 70000}]`,
		"db": `
podSelector: {matchLabels: {app: db}}
ingress:
- from: [{podSelector: {matchExpressions: [{key: app, operator: In, values: [web, open]}]}}]`,
	} {
		p := &networkingv1.NetworkPolicy{}
		p.Namespace, p.Name = "shop", name
		if err := yaml.UnmarshalStrict([]byte(spec), &p.Spec); err != nil {
			t.Fatal(err)
		}
		s.Policies = append(s.Policies, p)
	}
	return s
}

var began = time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)

func state(s *policy.Snapshot) *explain.State {
	return &explain.State{
		Snapshot: s, Rules: policy.Compile(s), Strict: true,
		Waiting: []explain.Waiting{{Pod: "shop/new", Why: "the API server shows no such pod on this node", Since: began}, {Pod: "shop/fresh", Why: "the API server still shows an earlier pod of that name", Since: began}},
	}
}

func TestText(t *testing.T) {
	s := shop(t)
	broken := *s
	broken.Policies = nil
	for name, c := range map[string]struct {
		q      report.Question
		kernel *policy.Snapshot
		held   string
		wrong  bool
	}{
		"pod":                {q: report.Question{Pod: "web"}},
		"open-pod":           {q: report.Question{Pod: "open"}},
		"remote-pod":         {q: report.Question{Pod: "db"}},
		"host-pod":           {q: report.Question{Pod: "agent"}},
		"unknown-pod":        {q: report.Question{Pod: "new"}},
		"from-named-port":    {q: report.Question{Pod: "web", From: "edge/gw", Port: "http"}},
		"from-denied":        {q: report.Question{Pod: "web", From: "open", Port: "80"}},
		"from-any-port":      {q: report.Question{Pod: "web", From: "edge/gw"}},
		"from-other-node":    {q: report.Question{Pod: "web", From: "two", Port: "443"}},
		"from-own-node":      {q: report.Question{Pod: "web", From: "node/one", Port: "22"}},
		"from-itself":        {q: report.Question{Pod: "web", From: "web", Port: "22"}},
		"from-outside":       {q: report.Question{Pod: "web", From: "203.0.113.9", Port: "9/udp"}},
		"from-unknown":       {q: report.Question{Pod: "web", From: "new", Port: "443"}},
		"from-fresh":         {q: report.Question{Pod: "web", From: "fresh", Port: "443"}},
		"to-remote":          {q: report.Question{Pod: "web", To: "db", Port: "sql"}},
		"to-remote-any-port": {q: report.Question{Pod: "web", To: "db"}},
		"to-nobodys-address": {q: report.Question{Pod: "web", To: "10.244.9.9", Port: "icmp"}},
		"open-to-open":       {q: report.Question{Pod: "open", To: "edge/gw"}},
		"to-subnet":          {q: report.Question{Pod: "open", To: "192.168.77.7", Port: "443"}},
		"to-device":          {q: report.Question{Pod: "open", To: "100.64.0.77"}},
		"from-lan":           {q: report.Question{Pod: "open", From: "198.51.100.7", Port: "80"}},
		"to-lan":             {q: report.Question{Pod: "open", To: "198.51.100.7", Port: "80"}},
		"kernel-empty":       {q: report.Question{Pod: "web", From: "open", Port: "80"}, kernel: &broken, wrong: true},
		"kernel-empty-pod":   {q: report.Question{Pod: "web"}, kernel: &broken, wrong: true},
		"gate-closed":        {q: report.Question{Pod: "open", To: "edge/gw", Port: "80"}, held: "shop/open", wrong: true},
		"remote-from-open":   {q: report.Question{Pod: "db", From: "open", Port: "1"}},
	} {
		synctest.Test(t, func(t *testing.T) { // a kernel that differs is asked again
			if c.kernel == nil {
				c.kernel = s
			}
			c.q.Namespace = "shop"
			e, err := explainer(state(s), c.kernel, "shop/fresh", c.held).Explain(t.Context(), c.q)
			if err != nil {
				t.Fatal(err)
			}
			if e.Wrong() != c.wrong {
				t.Errorf("%s: the kernel differs: %t, want %t", name, e.Wrong(), c.wrong)
			}
			var b strings.Builder
			if err := e.Print(&b); err != nil {
				t.Fatal(err)
			}
			golden.Check(t, "testdata/"+name+".txt", b.String())
		})
	}
}

func TestList(t *testing.T) {
	st := state(shop(t))
	st.Problem = errors.New("the API server cannot be asked")
	l, err := explainer(st, st.Snapshot, "shop/fresh").List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := l.Print(&b, began.Add(12*time.Second)); err != nil {
		t.Fatal(err)
	}
	golden.Check(t, "testdata/list.txt", b.String())
}

// TestWaitingPodSharesAnAddress: of two pods of one address the one that waits need not be the one that was named, and in open mode it is let out.
func TestWaitingPodSharesAnAddress(t *testing.T) {
	for _, strict := range []bool{true, false} {
		s := shop(t)
		twin := *s.Pods[3] // shop/fresh, which waits
		twin.Name, twin.UID = "twin", "0"
		s.Pods = append(s.Pods, &twin)
		s.Pods[3].UID = "1"
		s.Nodes[1].Addrs = append(s.Nodes[1].Addrs, s.Pods[3].IPs...)
		st := state(s)
		st.Strict = strict
		st.Waiting = []explain.Waiting{{Pod: "shop/twin", Why: "it is new", Since: began}}
		for _, from := range []string{"fresh", "twin", "10.244.1.13", "two"} {
			e, err := explainer(st, s, "shop/fresh", "shop/twin").Explain(t.Context(), report.Question{Namespace: "shop", Pod: "open", From: from, Port: "80"})
			if err != nil {
				t.Fatal(err)
			}
			last := e.Answers[len(e.Answers)-1]
			if allowed := last.Verdict == report.Allowed; allowed == strict || !strings.Contains(last.Sides[0].Reason, "it is new") {
				t.Errorf("strict %t, from %s: %+v", strict, from, e)
			}
		}
	}
}

func TestErrorsTellWhatToDo(t *testing.T) {
	x := explainer(state(shop(t)), shop(t))
	for q, want := range map[report.Question]string{
		{Pod: "wbe"}:                                "is shop/web meant?",
		{Pod: "lost/x"}:                             "namespace lost has no pods at all; -n names another",
		{Pod: "unlike"}:                             "kubectl get pods -n shop",
		{Pod: "web", From: "nowhere"}:               "nowhere is no address, no node and no pod",
		{Pod: "web", From: "node/three"}:            "known are one, two",
		{Pod: "web", From: "open", To: "open"}:      "exclude each other",
		{Pod: "web", Port: "80"}:                    "add --from or --to",
		{Pod: "web", From: "open", Port: "80/icmp"}: "/tcp, /udp or /sctp",
		{Pod: "web", From: "open", Port: "70000"}:   "from 1 to 65535",
		{Pod: "web", From: "open", Port: "0"}:       "from 1 to 65535",
		{Pod: "web", From: "open", Port: "sql"}:     "it names http/tcp",
		{Pod: "web", To: "open", Port: "sql"}:       "names no ports: give the number",
		{Pod: "web", From: "job", Port: "80"}:       "it has ended",
		{Pod: "edge/gw", From: "2001:db8::1"}:       "no connection between them",
	} {
		q.Namespace = "shop"
		if _, err := x.Explain(t.Context(), q); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v; want %q in it", q, err, want)
		}
	}
}

// TestAgreesWithTheEvaluator asks about random clusters: what is said of a port is what the evaluator says, what is said of all ports is
// what holds for each, and a kernel that holds what was compiled never differs.
func TestAgreesWithTheEvaluator(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	verdicts := map[report.Verdict]int{}
	for range 30 {
		s := policytest.Cluster(r)
		st := &explain.State{Snapshot: s, Rules: policy.Compile(s), Strict: true}
		x := explainer(st, s)
		for _, f := range policytest.Probes(r, s, 40) {
			v := policy.Evaluate(s, f)
			own, q := v.Ingress, report.Question{From: f.Src.String()}
			if v.Egress.Here {
				own, q = v.Egress, report.Question{To: f.Dst.String()}
			}
			q.Pod, q.Port = own.Pod, fmt.Sprintf("%d/%s", f.Port, f.Protocol)
			if f.Protocol == 1 || f.Protocol == 58 {
				q.Port = "icmp"
			} else if f.Port == 0 {
				continue // no port at all
			}
			answer := find(t, x, q, f)
			if answer == nil {
				continue // no pod has the address (any more)
			}
			if got := answer.Verdict == report.Allowed; got != v.Allowed() {
				t.Fatalf("%+v: said is %s, and the evaluator says %+v", q, answer.Verdict, v)
			}
			q.Port = ""
			all := find(t, x, q, f)
			verdicts[all.Verdict]++
			if all.Verdict == report.Allowed && !v.Allowed() || all.Verdict == report.Denied && v.Allowed() {
				t.Fatalf("%+v: said of all ports is %s, and of %+v the evaluator says %+v", q, all.Verdict, f, v)
			}
		}
		for i := range policytest.LocalPods {
			if _, err := x.Explain(t.Context(), report.Question{Pod: s.Pods[i].Namespace + "/" + s.Pods[i].Name}); err != nil {
				t.Error(err)
			}
		}
	}
	for _, v := range []report.Verdict{report.Allowed, report.Denied, report.Some} {
		if verdicts[v] < 20 {
			t.Errorf("too few connections were %s: %v", v, verdicts)
		}
	}
}

// find returns the answer for a connection. It fails the test where the kernel is said to differ.
func find(t *testing.T, x *explain.Explainer, q report.Question, f policy.Flow) *report.Answer {
	t.Helper()
	e, err := x.Explain(t.Context(), q)
	if err != nil {
		return nil
	}
	if e.Wrong() {
		t.Fatalf("%+v: the kernel holds what was compiled, and is said to differ: %+v", q, e)
	}
	for _, a := range e.Answers {
		for _, src := range a.Src {
			for _, dst := range a.Dst {
				if src == f.Src && dst == f.Dst {
					return &a
				}
			}
		}
	}
	return nil
}
