package connectivity

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/podexec"
)

// Options of a test.
type Options struct {
	Client kube.Client
	// Exec runs a command in a pod.
	Exec func(ctx context.Context, pod podexec.Pod, stdin []byte, command ...string) ([]byte, error)
	// Stream is Exec for a command that is spoken with.
	Stream func(ctx context.Context, pod podexec.Pod, stdin io.Reader, stdout io.Writer, command ...string) error
	// Nodes to test.
	Nodes []Node
	// Image of HeadCNI, which every node has.
	Image string
	// AllPairs tests each node with each; else, where there are many, with some.
	AllPairs bool
	// NoPolicies says why NetworkPolicies are not tested, "" = they are.
	NoPolicies string
	// Disrupt says what is restarted at the end, nil = nothing.
	Disrupt *Disrupt
	// Here asks from this machine what it reaches by a tailnet.
	Here func(context.Context, []Ask) []Result
	// Say tells what is under way.
	Say func(format string, args ...any)
	// Time is how long a measurement takes, and Path asks how a node reaches another, by the tailnet: for Perf alone.
	Time time.Duration
	Path func(context.Context) (func(from, to string) string, error)
}

// Node is one to test, with its own addresses, one of each family, and those that it has in the tailnet, which Perf needs.
type Node struct {
	Name    string
	Addrs   []netip.Addr
	Tailnet []netip.Addr
	// Tailscaled is the pod whose CPU Perf asks for, the zero Pod where the host has its own.
	Tailscaled podexec.Pod
}

// Groups of questions, in the order in which they are reported.
const (
	pods     = "test pods"
	podToPod = "pod to pod"
	sizes    = "packet sizes"
	services = "pod to service"
	names    = "DNS"
	ports    = "node port"
	hosts    = "host port"
	egress   = "pod to node"
	apiSrv   = "pod to API server"
	policies = "policy"
	tailnet  = "this machine to pod"
	restarts = "restarts"
)

var groups = []string{pods, podToPod, sizes, services, names, ports, hosts, egress, apiSrv, policies, tailnet, restarts}

// idOf says which finding it is where a group is not right.
var idOf = map[string]findings.ID{
	pods: findings.TestPods, podToPod: findings.PodToPod, sizes: findings.PacketSizes, services: findings.ServicesFail, names: findings.NamesFail,
	ports: findings.PortsFail, hosts: findings.PortsFail, egress: findings.EgressFails, apiSrv: findings.EgressFails, policies: findings.PoliciesFail,
	tailnet: findings.TailnetToPod, restarts: findings.Interrupted,
}

const (
	// answerWithin is how long to wait for what should work, refuseWithin for what a policy should stop.
	answerWithin, refuseWithin = 12 * time.Second, 20 * time.Second
	// execSlack is what running a command in a pod may take beside.
	execSlack = 30 * time.Second
	// nodesAtOnce is how many pods are asked at the same time, and few with how many others a node is tested where there are many.
	nodesAtOnce, few = 16, 8
	kubeletPort      = 10250
)

// node is one under test.
type node struct {
	Node
	// Addresses of its pods.
	asks, answers []netip.Addr
	// away: its pods do not run, which was said.
	away bool
}

type test struct {
	Options
	roles      []string // of the pods on each node
	perf       bool     // the pods measure
	made       int      // pods
	mu         sync.Mutex
	byNode     map[string]*node
	report     Report
	more       map[[2]string]int // causes beside the first, by group and pair
	noHostPort string
	noInNode   string
}

// question is an Ask with what is said of it.
type question struct {
	group, to string
	Ask
}

// Run tests, and removes what it has made, also where it is interrupted. An error means that there is no answer, or that something is left.
func Run(ctx context.Context, o Options) (Report, error) {
	t := newTest(o, asks, answers)
	if err := t.mayDisrupt(ctx); err != nil {
		return t.report, err
	}
	err := t.around(ctx, func() error {
		service, err := t.createService(ctx)
		if err != nil {
			return err
		}
		if err := t.start(ctx); err != nil {
			return err
		}
		t.count()
		if t.noHostPort != "" {
			t.note(hosts, "not tested: the cluster's rules allow no hostPort here: %s", t.noHostPort)
		}
		t.Say("asking from pod to pod")
		if _, err := t.ask(ctx, func(n *node) []question { return t.questions(n, service) }); err != nil {
			return err
		}
		if err := t.testPolicies(ctx); err != nil {
			return err
		}
		t.fromHere(ctx)
		if err := t.disrupt(ctx); err != nil {
			return err
		}
		return ctx.Err()
	})
	return t.report, err
}

func newTest(o Options, roles ...string) *test {
	t := &test{Options: o, roles: roles, byNode: map[string]*node{}, more: map[[2]string]int{},
		report: Report{OK: true, Findings: []doctor.Finding{}, Groups: []Group{}}}
	for _, n := range o.Nodes {
		t.byNode[n.Name] = &node{Node: n}
	}
	return t
}

// around does something in the namespace, which it makes before and removes after, whatever has happened.
func (t *test) around(ctx context.Context, do func() error) (err error) {
	began := time.Now()
	if err := t.claim(ctx); err != nil {
		return err
	}
	beating, stop := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { t.beat(beating) })
	defer func() {
		stop()
		wg.Wait()
		if bad := t.remove(context.WithoutCancel(ctx)); bad != nil { // also where ctx has ended
			err = errors.Join(err, bad)
		}
		t.report.Seconds = time.Since(began).Seconds()
	}()
	return do()
}

// start makes the pods, and waits for them.
func (t *test) start(ctx context.Context) error {
	began := time.Now()
	t.Say("starting %d pods in namespace %s", len(t.roles)*len(t.Nodes), Namespace)
	if err := t.createPods(ctx); err != nil {
		return err
	}
	if err := t.waitPods(ctx); err != nil {
		return err
	}
	t.report.Started = time.Since(began).Seconds()
	return nil
}

// count fills in how much is tested.
func (t *test) count() {
	t.report.Nodes = len(t.Nodes)
	for _, n := range t.byNode {
		t.report.Pods += len(t.roles)
		if n.away {
			continue
		}
		t.right(pods, 1)
		t.report.Pairs += len(t.peers(n)) - 1
		if len(n.asks) > len(t.report.Families) {
			t.report.Families = nil
			for _, a := range n.asks {
				t.report.Families = append(t.report.Families, netset.Family(a))
			}
		}
	}
}

// peers are the nodes that a node's pod asks: itself, and all others or some. Whom a node does not ask, others do.
func (t *test) peers(n *node) (out []*node) {
	i := slices.IndexFunc(t.Nodes, func(o Node) bool { return o.Name == n.Name })
	count := len(t.Nodes)
	if !t.AllPairs && count > 2*few {
		count = few + 1
	}
	for k := range count {
		if p := t.byNode[t.Nodes[(i+k)%len(t.Nodes)].Name]; !p.away {
			out = append(out, p)
		}
	}
	return out
}

// sameFamily finds the address of a's family.
func sameFamily(addrs []netip.Addr, a netip.Addr) []netip.Addr {
	i := slices.IndexFunc(addrs, func(b netip.Addr) bool { return a.Is4() == b.Is4() })
	if i < 0 {
		return nil
	}
	return addrs[i : i+1]
}

// questions are those of a node's pod.
func (t *test) questions(n *node, s *corev1.Service) (out []question) {
	add := func(group, to string, a Ask) {
		a.Within = answerWithin
		out = append(out, question{group, to, a})
	}
	peers := t.peers(n)
	for _, p := range peers {
		for _, a := range p.answers {
			if len(sameFamily(n.asks, a)) > 0 {
				add(podToPod, p.Name, Ask{Kind: KindHTTP, To: at(a, Port), Node: p.Name, Seen: n.asks})
				add(sizes, p.Name, Ask{Kind: KindUDP, To: at(a, Port), Size: 100})
				add(sizes, p.Name, Ask{Kind: KindUDP, To: at(a, Port), Size: FullSize})
			}
		}
	}
	clusterIPs := kube.ClusterIPs(s)
	for _, a := range clusterIPs {
		add(services, "the Service", Ask{Kind: KindHTTP, To: at(a, 80)})
	}
	// With the search list of the pod, whatever the cluster's domain is.
	for _, a := range clusterIPs {
		add(names, "the cluster's DNS", Ask{Kind: KindName, To: s.Name + "." + s.Namespace, Want: a})
	}
	// The own node, and the next one.
	for _, p := range peers[:min(len(peers), 2)] {
		for _, a := range p.Addrs {
			if len(sameFamily(n.asks, a)) == 0 {
				continue
			}
			add(egress, p.Name, Ask{Kind: KindTCP, To: at(a, kubeletPort)})
			if len(sameFamily(clusterIPs, a)) > 0 && len(s.Spec.Ports) > 0 && s.Spec.Ports[0].NodePort != 0 {
				add(ports, p.Name, Ask{Kind: KindHTTP, To: at(a, int(s.Spec.Ports[0].NodePort))})
			}
			if t.noHostPort == "" {
				add(hosts, p.Name, Ask{Kind: KindHTTP, To: at(a, HostPort), Node: p.Name})
			}
		}
	}
	add(apiSrv, "the API server", Ask{Kind: KindTLS, To: APIServer})
	return out
}

// ask has all nodes' pods ask, and returns for how long at least all had been so at the end.
func (t *test) ask(ctx context.Context, of func(*node) []question) (time.Duration, error) {
	return t.askFrom(ctx, asks, of)
}

func (t *test) askFrom(ctx context.Context, from string, of func(*node) []question) (time.Duration, error) {
	var wg sync.WaitGroup
	free := make(chan struct{}, nodesAtOnce)
	least := time.Hour
	for _, n := range t.byNode {
		list := of(n)
		if n.away || len(list) == 0 {
			continue
		}
		wg.Go(func() {
			free <- struct{}{}
			defer func() { <-free }()
			results, err := t.exec(ctx, n, from, list)
			if err != nil {
				if ctx.Err() == nil {
					t.fail(pods, n.Name, "%v", err)
				}
				return
			}
			for i, q := range list {
				if results[i].Error != "" {
					t.fail(q.group, n.Name+" -> "+q.to, "%s: %s", q.what(), results[i].Error)
				} else {
					t.right(q.group, 1)
				}
				t.mu.Lock()
				least = min(least, results[i].For)
				t.mu.Unlock()
			}
		})
	}
	wg.Wait()
	return least, ctx.Err()
}

// what says in a word or two what was asked.
func (q question) what() string {
	switch {
	case q.Kind == KindUDP && q.Size == FullSize:
		return q.To + ", packets of the MTU"
	case q.Kind == KindUDP:
		return "UDP " + q.To
	case q.Kind == KindName:
		return q.To + " is " + q.Want.String()
	}
	return q.To
}

// exec runs the questions in a pod.
func (t *test) exec(ctx context.Context, n *node, from string, list []question) ([]Result, error) {
	var in []Ask
	limit := execSlack
	for _, q := range list {
		in = append(in, q.Ask)
		limit = max(limit, execSlack+q.Within*time.Duration(len(list)/atOnce+1))
	}
	var results []Result
	if err := t.inPod(ctx, limit, from, n, in, &results, "connect"); err != nil {
		return nil, err
	}
	if len(results) != len(list) {
		return nil, fmt.Errorf("%d answers of pod %s to %d questions", len(results), podName(from, n.Name), len(list))
	}
	return results, nil
}

// inPod runs one of `headcnictl probe` in a pod, which reads in and writes out as JSON.
func (t *test) inPod(ctx context.Context, limit time.Duration, who string, n *node, in, out any, probe ...string) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	b, err := json.Marshal(in)
	if err != nil {
		return err
	}
	pod := podexec.Pod{Namespace: Namespace, Name: podName(who, n.Name), Container: container}
	b, err = t.Exec(ctx, pod, b, append([]string{program, "probe"}, probe...)...)
	switch {
	case errors.Is(err, podexec.ErrForbidden):
		err = fmt.Errorf("%w; %s", err, Rights)
	case err == nil:
		err = json.Unmarshal(b, out)
	}
	if err != nil {
		return fmt.Errorf("run headcnictl in pod %s: %w", pod.Name, err)
	}
	return nil
}

// testPolicies denies and allows, and measures how long each took to hold.
func (t *test) testPolicies(ctx context.Context) error {
	if t.NoPolicies != "" {
		t.note(policies, "not tested: %s", t.NoPolicies)
		return nil
	}
	t.Say("asking with NetworkPolicies in force")
	http, tcp := intstr.FromInt32(Port), corev1.ProtocolTCP
	byLabel := networkingv1.NetworkPolicyIngressRule{
		From:  []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{role: asks}}}},
		Ports: []networkingv1.NetworkPolicyPort{{Port: &http, Protocol: &tcp}},
	}
	byNamespace := networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{{
		NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"kubernetes.io/metadata.name": Namespace}},
	}}}
	byBlock := networkingv1.NetworkPolicyIngressRule{}
	for _, n := range t.byNode {
		for _, a := range n.answers {
			byBlock.From = append(byBlock.From, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: netip.PrefixFrom(a, a.BitLen()).String()}})
		}
	}
	var took time.Duration
	for _, step := range []struct {
		name  string
		rules []networkingv1.NetworkPolicyIngressRule
		// after is removed first.
		after string
		// What each pod may then: by TCP as one that asks, by UDP as one, by TCP as one that answers.
		tcp, udp, other bool
	}{
		{name: "deny-all"},
		{name: "allow-label-and-port", rules: []networkingv1.NetworkPolicyIngressRule{byLabel}, tcp: true},
		{name: "allow-namespace", rules: []networkingv1.NetworkPolicyIngressRule{byNamespace}, tcp: true, udp: true, other: true},
		{name: "allow-block", rules: []networkingv1.NetworkPolicyIngressRule{byBlock}, after: "allow-namespace", tcp: true, other: true},
	} {
		began := time.Now()
		if err := t.policy(ctx, step.name, step.rules...); err != nil {
			return err
		}
		if step.after != "" {
			if err := t.Client.NetworkPolicies(Namespace).Delete(ctx, step.after, metav1.DeleteOptions{}); err != nil {
				return rights(err)
			}
		}
		held, err := t.askUnder(ctx, step.name, step.tcp, step.udp, step.other)
		if err != nil {
			return err
		}
		took = max(took, time.Since(began)-held)
	}
	t.note(policies, "deny all, allow by label and port, by namespace, by ipBlock; held within %.1f s", took.Seconds())
	return nil
}

// askUnder asks from each node, as both of its pods, its own pod and that of the next node.
func (t *test) askUnder(ctx context.Context, step string, tcp, udp, other bool) (time.Duration, error) {
	questions := func(n *node, first, second Kind, allowed ...bool) (out []question) {
		peers := t.peers(n)
		for _, p := range peers[:min(len(peers), 2)] {
			if t.broken(n.Name + " -> " + p.Name) {
				continue // whatever policies say
			}
			for _, a := range p.answers {
				for i, kind := range []Kind{first, second} {
					if kind == "" || len(sameFamily(n.asks, a)) == 0 || first == KindHTTP && second == "" && p == n {
						continue // a pod is never kept from itself
					}
					q := question{policies, p.Name, Ask{Kind: kind, To: at(a, Port), Within: answerWithin, Try: shortTry, Size: 100, Denied: !allowed[i]}}
					if q.Denied {
						q.Within = refuseWithin
					}
					q.to += " under " + step
					out = append(out, q)
				}
			}
		}
		return out
	}
	least := make([]time.Duration, 2)
	errs := make([]error, 2)
	var wg sync.WaitGroup
	wg.Go(func() {
		least[0], errs[0] = t.ask(ctx, func(n *node) []question { return questions(n, KindHTTP, KindUDP, tcp, udp) })
	})
	wg.Go(func() {
		least[1], errs[1] = t.askFrom(ctx, answers, func(n *node) []question { return questions(n, KindHTTP, "", other, false) })
	})
	wg.Wait()
	return min(least[0], least[1]), errors.Join(errs...)
}

// fromHere asks all pods from this machine, where it reaches pods by the tailnet. No policy is in force any more.
func (t *test) fromHere(ctx context.Context) {
	var list []question
	var in []Ask
	for _, n := range t.byNode {
		for _, a := range n.asks { // policies select the others
			q := question{tailnet, n.Name, Ask{Kind: KindHTTP, To: at(a, Port), Node: n.Name, Within: answerWithin}}
			list, in = append(list, q), append(in, q.Ask)
		}
	}
	asked := 0
	for i, r := range t.Here(ctx, in) {
		switch {
		case r.Skipped:
			continue
		case r.Error != "":
			t.fail(tailnet, "this machine -> "+list[i].to, "%s: %s", list[i].what(), r.Error)
		default:
			t.right(tailnet, 1)
		}
		asked++
	}
	if asked == 0 {
		t.note(tailnet, "not tested: this machine does not reach pods by a tailnet")
	}
}

func (t *test) group(name string) *Group {
	i := slices.IndexFunc(t.report.Groups, func(g Group) bool { return g.Name == name })
	if i < 0 {
		t.report.Groups = append(t.report.Groups, Group{Name: name})
		slices.SortFunc(t.report.Groups, func(a, b Group) int { return slices.Index(groups, a.Name) - slices.Index(groups, b.Name) })
		i = slices.IndexFunc(t.report.Groups, func(g Group) bool { return g.Name == name })
	}
	return &t.report.Groups[i]
}

func (t *test) right(group string, n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g := t.group(group)
	g.Right, g.Total = g.Right+n, g.Total+n
}

func (t *test) note(group, format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.group(group).Note = fmt.Sprintf(format, args...)
}

// fail notes what is not right between two. Of one group and pair there is one finding.
func (t *test) fail(group, where, format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.group(group).Total++
	t.report.OK = false
	if group == sizes && t.find(podToPod, where) >= 0 {
		return // it does not reach it at all, which was said
	}
	cause := strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", "; ")
	if i := t.find(group, where); i >= 0 {
		f, pair := &t.report.Findings[i], [2]string{group, where}
		if t.more[pair]++; t.more[pair] < 3 {
			f.Cause += "; " + cause
		} else if t.more[pair] == 3 {
			f.Cause += "; and others"
		}
		return
	}
	t.report.Findings = append(t.report.Findings, doctor.Found(idOf[group], where, group, cause))
}

func (t *test) find(group, where string) int {
	return slices.IndexFunc(t.report.Findings, func(f doctor.Finding) bool { return f.What == group && f.Where == where })
}

// broken reports whether a pair does not reach each other even without policies.
func (t *test) broken(pair string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.find(podToPod, pair) >= 0
}

// Find finds the Nodes' addresses, and the image that the daemons run.
func Find(ctx context.Context, client kube.Client, namespace, selector string, names []string) (nodes []Node, image string, err error) {
	list, err := client.Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, "", fmt.Errorf("list the Nodes: %w", err)
	}
	for _, name := range names {
		i := slices.IndexFunc(list.Items, func(n corev1.Node) bool { return n.Name == name })
		if i < 0 {
			return nil, "", fmt.Errorf("there is no Node %q", name)
		}
		n := Node{Name: name}
		for _, a := range list.Items[i].Status.Addresses {
			if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == corev1.NodeInternalIP && len(sameFamily(n.Addrs, ip)) == 0 {
				n.Addrs = append(n.Addrs, ip)
			}
		}
		nodes = append(nodes, n)
	}
	own, err := client.Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, "", fmt.Errorf("list HeadCNI's pods in namespace %s: %w", namespace, err)
	}
	for _, p := range own.Items {
		for _, c := range p.Spec.Containers {
			if c.Name == "headcni-daemon" {
				return nodes, c.Image, nil
			}
		}
	}
	return nil, "", fmt.Errorf("no pod of HeadCNI's daemon in namespace %s, whose image the test uses", namespace)
}
