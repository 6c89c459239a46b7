package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

func addr(text string) netip.Addr { return netip.MustParseAddr(text) }

func addrs(texts ...string) (out []netip.Addr) {
	for _, t := range texts {
		out = append(out, addr(t))
	}
	return out
}

// small is a cluster of two nodes. On the own node, one: web, b, hostpod, two bare pods of the namespace lab; elsewhere the rest.
func small() *Snapshot {
	pod := func(node, name string, labels string, ips []netip.Addr, ports ...NamedPort) *Pod {
		ns, short, _ := strings.Cut(name, "/")
		p := &Pod{Namespace: ns, Name: short, UID: types.UID(name), Node: node, IPs: ips, Ports: ports, Labels: map[string]string{}}
		for _, l := range strings.Fields(labels) {
			k, v, _ := strings.Cut(l, "=")
			p.Labels[k] = v
		}
		return p
	}
	http := func(port uint16) NamedPort { return NamedPort{"http", TCP, port} }
	s := &Snapshot{
		Node: "one",
		Nodes: []Node{
			{"one", addrs("192.168.50.1", "100.64.0.1", "fd7a:115c:a1e0::1")},
			{"two", addrs("192.168.50.2", "100.64.0.2", "fd7a:115c:a1e0::2")},
			{"three", addrs("192.168.50.200", "100.64.0.3")},
		},
		Namespaces: []Namespace{
			{"shop", map[string]string{"team": "shop"}}, {"edge", map[string]string{"team": "edge"}}, {"bare", nil},
		},
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")},
		Pods: []*Pod{
			pod("one", "shop/web", "app=web", addrs("10.244.1.10", "fd00:244:1::10"), http(8080), NamedPort{"dns", UDP, 53}),
			pod("one", "shop/b", "app=b", addrs("10.244.1.11"), http(8081)),
			pod("one", "shop/hostpod", "app=host", addrs("192.168.50.1")),
			pod("two", "shop/db", "app=db", addrs("10.244.2.20", "fd00:244:2::20"), http(9090)),
			pod("two", "edge/gw", "app=gw", addrs("10.244.2.30", "fd00:244:2::30"), http(9091)),
			pod("two", "edge/hostgw", "app=gw", addrs("192.168.50.2")),
			pod("two", "bare/x", "", addrs("10.244.2.40")),
			pod("two", "new/y", "app=y", addrs("10.244.2.50")), // its namespace is not known yet
			pod("two", "shop/job", "app=job", addrs("10.244.2.60")),
			pod("two", "edge/heir", "app=heir", addrs("10.244.2.60")),
			pod("two", "edge/leaving", "app=leaving", addrs("10.244.2.70")),
		},
	}
	for _, p := range s.Pods {
		p.HostNetwork = strings.HasPrefix(p.Name, "host")
		p.Done, p.Terminating = p.Name == "job", p.Name == "leaving"
	}
	return s
}

// policy makes a NetworkPolicy shop/NAME of its spec.
func policy(t testing.TB, name, spec string) *networkingv1.NetworkPolicy {
	t.Helper()
	p := &networkingv1.NetworkPolicy{}
	if err := yaml.UnmarshalStrict([]byte(spec), &p.Spec); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, spec)
	}
	p.Namespace, p.Name = "shop", name
	return p
}

// flow reads "SRC DST PROTOCOL[/PORT]".
func flow(t testing.TB, text string) Flow {
	t.Helper()
	var src, dst, l4 string
	if _, err := fmt.Sscan(text, &src, &dst, &l4); err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	names := map[string]string{
		"web": "10.244.1.10", "web6": "fd00:244:1::10", "b": "10.244.1.11", "db": "10.244.2.20", "db6": "fd00:244:2::20",
		"gw": "10.244.2.30", "gw6": "fd00:244:2::30", "bare": "10.244.2.40", "new": "10.244.2.50", "heir": "10.244.2.60",
		"leaving": "10.244.2.70", "unseen": "10.244.9.9", "one": "192.168.50.1", "one-ts": "100.64.0.1", "two": "192.168.50.2",
		"two-ts": "100.64.0.2", "two6": "fd7a:115c:a1e0::2", "three-ts": "100.64.0.3", "out": "203.0.113.5", "out6": "2001:db8::5",
	}
	end := func(name string) netip.Addr {
		if a, ok := names[name]; ok {
			return addr(a)
		}
		return addr(name)
	}
	f := Flow{Src: end(src), Dst: end(dst)}
	name, port, _ := strings.Cut(l4, "/")
	f.Protocol = map[string]Protocol{"tcp": TCP, "udp": UDP, "sctp": SCTP, "icmp": 1}[name]
	if port != "" {
		if _, err := fmt.Sscan(port, &f.Port); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
	}
	return f
}

const (
	webIs  = "podSelector: {matchLabels: {app: web}}\n"
	denyIt = webIs + "policyTypes: [Ingress, Egress]\n"
)

// cases are the rows of the test list: policies of the namespace shop, and flows that pass and do not.
var cases = []struct {
	name       string
	policies   []string
	pass, drop []string
}{
	{"no policy", nil, []string{"gw web tcp/1", "web out udp/1", "out6 web6 sctp/1", "gw web icmp"}, nil},
	{"deny all: the own node and itself stay", []string{denyIt},
		[]string{"one web tcp/80", "one-ts web udp/1", "web one tcp/10250", "web web tcp/8080", "b gw tcp/1"},
		[]string{"b web tcp/80", "out web tcp/80", "two web tcp/80", "two-ts web tcp/80", "web out tcp/1", "web db icmp", "out6 web6 tcp/1"}},
	{"egress forbids, ingress allows", []string{"podSelector: {matchLabels: {app: b}}\npolicyTypes: [Egress]", webIs + "ingress: [{}]"},
		[]string{"gw web tcp/80"}, []string{"b web tcp/80"}},
	{"all, none, no list", []string{webIs + "ingress: []"}, []string{"web out tcp/1"}, []string{"gw web tcp/1"}},
	{"one empty rule allows all", []string{webIs + "ingress: [{}]"}, []string{"gw web tcp/1", "out6 web6 icmp"}, nil},
	{"types absent, egress set: both", []string{webIs + "egress: [{}]"}, []string{"web gw tcp/1"}, []string{"gw web tcp/1"}},
	{"types absent, nothing set: ingress", []string{webIs}, []string{"web gw tcp/1"}, []string{"gw web tcp/1"}},
	{"types egress only", []string{webIs + "policyTypes: [Egress]\ningress: [{}]"}, []string{"gw web tcp/1"}, []string{"web gw tcp/1"}},
	{"a type that nobody knows isolates", []string{webIs + "policyTypes: [Sideways]"}, nil, []string{"web gw tcp/1", "gw web tcp/1"}},
	{"policies add up", []string{denyIt, webIs + "ingress: [{from: [{podSelector: {matchLabels: {app: b}}}]}]"},
		[]string{"b web tcp/1"}, []string{"db web tcp/1"}},
	{"podSelector alone: own namespace", []string{webIs + "ingress: [{from: [{podSelector: {}}]}]"},
		[]string{"db web tcp/1", "b web icmp"}, []string{"gw web tcp/1", "out web tcp/1", "unseen web tcp/1"}},
	{"namespaceSelector {}: the cluster's pods, unseen too", []string{webIs + "ingress: [{from: [{namespaceSelector: {}}]}]"},
		[]string{"gw web tcp/1", "db web tcp/1", "new web tcp/1", "unseen web tcp/1", "gw6 web6 tcp/1"}, []string{"out web tcp/1", "two-ts web tcp/1"}},
	{"both selectors empty: the same", []string{webIs + "ingress: [{from: [{namespaceSelector: {}, podSelector: {}}]}]"},
		[]string{"gw web tcp/1", "unseen web tcp/1"}, []string{"out web tcp/1"}},
	{"both selectors are one condition", []string{webIs + "ingress: [{from: [{namespaceSelector: {matchLabels: {team: edge}}, podSelector: {matchLabels: {app: gw}}}]}]"},
		[]string{"gw web tcp/1"}, []string{"heir web tcp/1", "db web tcp/1", "two web tcp/1"}},
	{"a missing key is not in, and does not exist", []string{webIs + "ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: team, operator: NotIn, values: [edge]}]}}, {podSelector: {matchExpressions: [{key: app, operator: DoesNotExist}]}}]}]"},
		[]string{"bare web tcp/1", "db web tcp/1"}, []string{"gw web tcp/1", "new web tcp/1"}},
	{"host-network pods are nobody by label", []string{"podSelector: {}\ningress: [{from: [{namespaceSelector: {matchLabels: {team: edge}}}]}]"},
		[]string{"gw web tcp/1", "out one tcp/1"}, []string{"two web tcp/1", "two-ts web tcp/1"}},
	{"a completed pod has no address", []string{webIs + "ingress: [{from: [{podSelector: {matchLabels: {app: job}}}]}]"}, nil, []string{"heir web tcp/1"}},
	{"a terminating pod still talks", []string{webIs + "ingress: [{from: [{namespaceSelector: {matchLabels: {team: edge}}}]}]"}, []string{"leaving web tcp/1", "heir web tcp/1"}, nil},
	{"blocks and excepts", []string{webIs + "ingress: [{from: [{ipBlock: {cidr: 203.0.113.7/24, except: [203.0.113.128/25]}}]}]"},
		[]string{"203.0.113.5 web tcp/1", "203.0.113.127 web tcp/1"}, []string{"203.0.113.128 web tcp/1", "203.0.114.1 web tcp/1", "out6 web6 tcp/1"}},
	{"an except does not forbid what another rule allows", []string{webIs + "ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24, except: [203.0.113.0/25]}}, {ipBlock: {cidr: 203.0.113.5/32}}]}]"},
		[]string{"out web tcp/1", "203.0.113.200 web tcp/1"}, []string{"203.0.113.6 web tcp/1"}},
	{"except equal to the block", []string{webIs + "ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24, except: [203.0.113.0/24]}}]}]"}, nil, []string{"out web tcp/1"}},
	{"a node is known by all its addresses", []string{webIs + "ingress: [{from: [{ipBlock: {cidr: 192.168.50.0/24, except: [192.168.50.128/25]}}]}]"},
		[]string{"two web tcp/1", "two-ts web tcp/1", "two6 web6 tcp/1"}, []string{"three-ts web tcp/1", "192.168.50.200 web tcp/1", "out6 web6 tcp/1"}},
	{"an excepted node loses all its addresses", []string{webIs + "ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [192.168.50.2/32]}}]}]"},
		[]string{"out web tcp/1", "three-ts web tcp/1"}, []string{"two web tcp/1", "two-ts web tcp/1", "two6 web6 tcp/1"}},
	{"/0 is of its own family", []string{webIs + "ingress: [{from: [{ipBlock: {cidr: '::/0'}}]}]"}, []string{"out6 web6 tcp/1", "gw6 web6 tcp/1"}, []string{"out web tcp/1"}},
	{"blocks hold pods too", []string{webIs + "ingress: [{from: [{ipBlock: {cidr: 10.244.2.0/24}}]}]"}, []string{"db web tcp/1"}, []string{"b web tcp/1"}},
	{"exact port, TCP by default", []string{webIs + "ingress: [{ports: [{port: 80}]}]"}, []string{"out web tcp/80"}, []string{"out web udp/80", "out web tcp/81", "out web sctp/80", "gw web icmp"}},
	{"SCTP", []string{webIs + "ingress: [{ports: [{port: 80, protocol: SCTP}]}]"}, []string{"out web sctp/80"}, []string{"out web tcp/80", "out web sctp/79"}},
	{"no number: any port of the protocol", []string{webIs + "ingress: [{ports: [{protocol: UDP}]}]"}, []string{"out web udp/0", "out web udp/65535"}, []string{"out web tcp/1", "gw web icmp"}},
	{"endPort", []string{webIs + "ingress: [{ports: [{port: 100, endPort: 200}, {port: 150, endPort: 250}, {port: 7, endPort: 7}]}]"},
		[]string{"out web tcp/100", "out web tcp/175", "out web tcp/250", "out web tcp/7"}, []string{"out web tcp/99", "out web tcp/251", "out web tcp/8", "out web udp/150"}},
	{"all ports", []string{webIs + "ingress: [{ports: [{port: 1, endPort: 65535}]}]"}, []string{"out web tcp/1", "out web tcp/65535"}, []string{"out web udp/1"}},
	{"named port of the pod", []string{webIs + "ingress: [{ports: [{port: http}]}]"}, []string{"out web tcp/8080", "out6 web6 tcp/8080"}, []string{"out web udp/8080", "out web tcp/9090"}},
	{"named port, other protocol", []string{webIs + "ingress: [{ports: [{port: dns}]}]"}, nil, []string{"out web tcp/53", "out web udp/53"}},
	{"named port of the peers, each its own", []string{webIs + "egress: [{to: [{podSelector: {}}, {namespaceSelector: {matchLabels: {team: edge}}}], ports: [{port: http}]}]"},
		[]string{"web db tcp/9090", "web gw tcp/9091", "web db6 tcp/9090"}, []string{"web db tcp/9091", "web gw tcp/9090", "web out tcp/9090"}},
	{"named port to anybody", []string{webIs + "egress: [{ports: [{port: http}]}]"}, []string{"web gw tcp/9091"}, []string{"web out tcp/9091", "web bare tcp/9091"}},
	{"named port behind a block of one family", []string{webIs + "egress: [{to: [{ipBlock: {cidr: 10.244.2.0/24}}], ports: [{port: http}]}]"}, []string{"web db tcp/9090"}, []string{"web db6 tcp/9090"}},
	{"a rule's peers and ports go together", []string{webIs + "ingress: [{from: [{podSelector: {matchLabels: {app: b}}}], ports: [{port: 80}]}, {from: [{podSelector: {matchLabels: {app: db}}}], ports: [{port: 81}]}]"},
		[]string{"b web tcp/80", "db web tcp/81"}, []string{"b web tcp/81", "db web tcp/80"}},

	// What the API server would refuse, or an old one let in: it gives no rights.
	{"a peer that says nothing", []string{webIs + "ingress: [{from: [{}]}]"}, nil, []string{"gw web tcp/1", "out web tcp/1"}},
	{"block and selector in one peer", []string{webIs + "ingress: [{from: [{podSelector: {}, ipBlock: {cidr: 0.0.0.0/0}}]}]"}, nil, []string{"b web tcp/1", "out web tcp/1"}},
	{"no block", []string{webIs + "ingress: [{from: [{ipBlock: {cidr: everywhere}}, {ipBlock: {cidr: ''}}]}]"}, nil, []string{"out web tcp/1"}},
	{"an except that is none", []string{webIs + "ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [here]}}]}]"}, nil, []string{"out web tcp/1"}},
	{"ports out of range", []string{webIs + "ingress: [{ports: [{port: 0}, {port: 65536}, {port: -1}, {port: 9, endPort: 8}, {port: 9, endPort: 65536}, {endPort: 9}, {port: http, endPort: 9000}, {port: 5, protocol: ICMP}]}]"},
		nil, []string{"out web tcp/0", "out web tcp/9", "out web tcp/8", "out web tcp/8080", "out web tcp/5", "gw web icmp"}},
	{"an unknown operator of a peer", []string{webIs + "ingress: [{from: [{podSelector: {matchExpressions: [{key: app, operator: Like, values: [b]}]}}]}]"}, nil, []string{"b web tcp/1"}},
	{"In without values", []string{webIs + "ingress: [{from: [{podSelector: {matchExpressions: [{key: app, operator: NotIn}]}}]}]"}, nil, []string{"b web tcp/1"}},
	{"a label that none can have", []string{webIs + "ingress: [{from: [{podSelector: {matchExpressions: [{key: app, operator: NotIn, values: ['a b']}]}}]}]"}, nil, []string{"b web tcp/1"}},
	{"an unknown operator of the subject isolates what is left, with no rights", []string{"podSelector: {matchLabels: {app: web}, matchExpressions: [{key: app, operator: Like, values: [w]}]}\ningress: [{}]"},
		[]string{"gw b tcp/1"}, []string{"gw web tcp/1"}},
}

// TestCases: the evaluator and what is compiled say the same of each row.
func TestCases(t *testing.T) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := small()
			for i, spec := range c.policies {
				s.Policies = append(s.Policies, policy(t, fmt.Sprintf("p%d", i), spec))
			}
			rules := Compile(s)
			for want, flows := range map[bool][]string{true: c.pass, false: c.drop} {
				for _, text := range flows {
					f := flow(t, text)
					v := Evaluate(s, f)
					if v.AllowedHere() != want {
						t.Errorf("%s: allowed is %t, want %t: %+v", text, !want, want, v)
					}
					if v.Egress.Reason == OwnNode || v.Ingress.Reason == OwnNode {
						continue // such a flow passes no chain
					}
					in, _ := rules.Judge(rules, Ingress, f)
					out, _ := rules.Judge(rules, Egress, f)
					if got := in && out; got != want {
						t.Errorf("%s: compiled allows it: %t", text, got)
					}
				}
			}
		})
	}
}

func TestEvaluateTellsWhy(t *testing.T) {
	s := small()
	s.Policies = append(s.Policies,
		policy(t, "some", webIs+"ingress: [{from: [{podSelector: {matchLabels: {app: none}}}]}, {from: [{podSelector: {}}, {ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: 80}, {port: 79, endPort: 81}]}]"),
		policy(t, "all", webIs+"ingress: [{}]"), nil)
	both := []string{"shop/all", "shop/some"}
	got := Evaluate(s, flow(t, "db web tcp/80"))
	want := Verdict{
		Egress: Judgement{Allowed: true, Pod: "shop/db", Reason: NotIsolated},
		Ingress: Judgement{Allowed: true, Here: true, Pod: "shop/web", Isolating: both, Rules: []Match{
			{"shop/all", 0, -1, -1}, {"shop/some", 1, 0, 0}, {"shop/some", 1, 0, 1}, {"shop/some", 1, 1, 0}, {"shop/some", 1, 1, 1},
		}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	for text, want := range map[string]Judgement{
		"one web tcp/80": {Allowed: true, Here: true, Pod: "shop/web", Reason: OwnNode, Isolating: both},
		"web web tcp/80": {Allowed: true, Here: true, Pod: "shop/web", Reason: Itself, Isolating: both},
		"web out tcp/80": {Allowed: true, Reason: NoPod},
	} {
		if diff := cmp.Diff(want, Evaluate(s, flow(t, text)).Ingress); diff != "" {
			t.Errorf("%s (-want +got)\n%s", text, diff)
		}
	}
}

// The other end's policies are asked too, and the own node does not enforce them.
func TestEvaluateElsewhere(t *testing.T) {
	s := small()
	s.Policies = append(s.Policies, policy(t, "db", "podSelector: {matchLabels: {app: db}}"))
	v := Evaluate(s, flow(t, "web db tcp/80"))
	if v.Allowed() || !v.AllowedHere() || v.Ingress.Here || v.Ingress.Pod != "shop/db" {
		t.Errorf("%+v", v)
	}
}

func TestContestedAddress(t *testing.T) {
	twin := func(s *Snapshot, change func(*Pod)) {
		p := *s.Pods[0] // web
		p.Name, p.UID, p.Labels = "twin", "twin", map[string]string{"app": "twin"}
		change(&p)
		s.Pods = append(s.Pods, &p)
	}
	for name, c := range map[string]struct {
		spec   string
		change func(*Pod)
		want   Reason
		allow  bool
	}{
		"no policy for either": {"podSelector: {matchLabels: {app: b}}", func(*Pod) {}, NotIsolated, true},
		"a policy for one":     {webIs + "ingress: [{}]", func(*Pod) {}, Contested, false},
		"the other leaves":     {webIs + "ingress: [{}]", func(p *Pod) { p.Terminating = true }, "", true},
		"the other is done":    {webIs + "ingress: [{}]", func(p *Pod) { p.Done = true }, "", true},
		"the other is away":    {webIs + "ingress: [{}]", func(p *Pod) { p.Node = "two" }, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			s := small()
			s.Policies = append(s.Policies, policy(t, "p", c.spec))
			twin(s, c.change)
			got := Evaluate(s, flow(t, "gw web tcp/80")).Ingress
			if got.Allowed != c.allow || got.Reason != c.want {
				t.Errorf("%+v", got)
			}
		})
	}
}
