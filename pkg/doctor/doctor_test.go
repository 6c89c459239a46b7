package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/headcni/headcni/internal/golden"
	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/kube/podexec"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/reconcile"
)

var now = time.Date(2026, 11, 28, 14, 6, 0, 0, time.UTC)

// healthy is a node of three on which all is right.
func healthy(name, cidr string) Node {
	return Node{
		Name: name, PodCIDRs: []netip.Prefix{netip.MustParsePrefix(cidr)},
		Status: &nodestatus.Status{
			Version: "0.2.0", Ready: true, Mode: "daemon", Tun: "headcni01", TunMTU: 1280,
			Parts:    []reconcile.Status{{Name: "config", OK: true}, {Name: "approval", OK: true}},
			PodCIDRs: []nodestatus.PodCIDR{{CIDR: netip.MustParsePrefix(cidr), Advertised: true, Approved: true}},
			Policy:   &nodestatus.Policy{InForce: true, Policies: 31, Isolated: 4},
			FastPath: &nodestatus.FastPath{Links: 12},
			Tailnet: &nodestatus.Tailnet{ControlURL: "https://hs.example.com", Peers: []nodestatus.Peer{
				{Name: "x", Path: "direct", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.9.0/24")}},
				{Name: "laptop", Path: "relayed"},
			}},
		},
	}
}

func leading() Controller {
	return Controller{Parts: []reconcile.Status{{Name: "kubernetes", OK: true}, {Name: "leader", OK: true}}}
}

func found(id findings.ID, severity findings.Severity, text string) reconcile.Status {
	return reconcile.Status{Name: "approval", Error: text, Since: now.Add(-4 * time.Minute), Findings: []reconcile.Found{{ID: id, Severity: severity, Text: text}}}
}

func TestHealthyIsSilent(t *testing.T) {
	s := Seen{Kubernetes: true, Nodes: []Node{healthy("fra-1", "10.244.1.0/24"), healthy("fra-2", "10.244.2.0/24")}, Controllers: []Controller{leading()}}
	s.Nodes[1].Status.FastPath = &nodestatus.FastPath{Why: "this kernel has no flowtables"}
	for _, thorough := range []bool{false, true} {
		if r := NewReport("0.2.0", s, thorough); !r.OK || len(r.Findings) != 0 {
			t.Errorf("%+v", r.Findings)
		}
	}
	var b strings.Builder
	if err := (Text{Now: now}).Status(&b, NewReport("0.2.0", s, false)); err != nil {
		t.Fatal(err)
	}
	golden.Check(t, "testdata/healthy.txt", b.String())
}

// unwell has one of each kind of trouble.
func unwell() Seen {
	home := healthy("home-1", "10.244.1.128/25")
	home.Status.Ready, home.Status.Version = false, "0.1.9"
	home.Status.Parts[1] = found(findings.APIKeyRefused, findings.Fail, "the API key in Secret kube-system/headcni-auth was refused (401)")
	home.Skew = 5 * time.Minute
	waits := healthy("new-1", "10.244.3.0/24")
	waits.Status.Ready = false
	waits.Status.Parts[0] = reconcile.Status{Name: "config", Error: "not tried yet"}
	drops := healthy("old-1", "10.244.4.0/24")
	drops.Status.Dropped = map[string]uint64{"cluster_in_clear": 3, "lan_ingress": 900}
	drops.Status.Tailnet.Peers[0].Path = "relayed"
	drops.Status.Policy.Unknown = []nodestatus.UnknownPod{{Pod: "shop/web", Since: now.Add(-2 * time.Hour), Why: "the API server has not told"}}
	return Seen{Kubernetes: true, Nodes: []Node{
		healthy("fra-1", "10.244.1.0/24"), home, waits, drops, {Name: "gone", Err: errNoDaemon}, {Name: "dead", Err: errors.New("ask pod headcni-x: no answer in time")},
	}, Controllers: []Controller{{Err: errors.New("pod headcni-controller-1 is Pending")}, {Parts: append(leading().Parts, found(findings.PolicyLacksMaps, findings.Warn, "add nodeAttrs"))}}}
}

func TestUnwell(t *testing.T) {
	r := NewReport("0.2.0", unwell(), true)
	var got []string
	for _, f := range r.Findings {
		got = append(got, f.Where+" "+string(f.ID)+" "+string(f.Severity))
	}
	want := []string{
		"cluster HC124 fail", "cluster HC122 warn", "cluster HC224 warn", "controller HC303 warn", "home-1 HC221 fail", "new-1 HC123 fail",
		"old-1 HC401 warn", "old-1 HC127 warn", "old-1 HC602 warn", "gone HC120 fail", "dead HC121 fail",
	}
	if diff := cmp.Diff(want, got); r.OK || diff != "" {
		t.Error(r.OK, diff)
	}
	if want := "2 of 6 nodes right: cluster HC124, home-1 HC221, new-1 HC123, gone HC120, dead HC121"; r.Summary() != want {
		t.Error(r.Summary())
	}
	for name, width := range map[string]int{"status": 0, "narrow": 80} {
		var b strings.Builder
		if err := (Text{Now: now, Width: width}).Status(&b, NewReport("0.2.0", unwell(), false)); err != nil {
			t.Fatal(err)
		}
		golden.Check(t, "testdata/"+name+".txt", b.String())
	}
	var b strings.Builder
	if err := (Text{Now: now, Width: 110}).Doctor(&b, r); err != nil {
		t.Fatal(err)
	}
	golden.Check(t, "testdata/doctor.txt", b.String())
}

// What many nodes say is said once: Headscale's outage is no screen for each node.
func TestSameFindingOnce(t *testing.T) {
	var s Seen
	for _, name := range []string{"a", "b", "c", "d", "e", "f", "g"} {
		n := healthy(name, "10.244.1.0/24")
		n.Status.Parts[1] = found(findings.HeadscaleUnreached, findings.Fail, "cannot reach Headscale")
		s.Nodes = append(s.Nodes, n)
	}
	s.Nodes[3].Status.Parts[1].Since = now.Add(-time.Hour)
	r := NewReport("0.2.0", s, false)
	var b strings.Builder
	if err := (Text{Now: now}).Status(&b, r); err != nil {
		t.Fatal(err)
	}
	if len(r.Findings) != 7 || strings.Count(b.String(), "HC220") != 1 || !strings.Contains(b.String(), "a, b, c, d, e and 2 more  approval  HC220 Headscale cannot be reached (1 h)\n") {
		t.Errorf("%d findings:\n%s", len(r.Findings), b.String())
	}
}

// A newer daemon may name what this program does not know.
func TestUnknownID(t *testing.T) {
	n := healthy("a", "10.244.1.0/24")
	n.Status.Parts[1] = found("HC299", findings.Fail, "new")
	r := NewReport("0.2.0", Seen{Nodes: []Node{n}}, false)
	if r.OK || len(r.Findings) != 1 || r.Findings[0].ID != "HC299" || r.Findings[0].Remedy == "" {
		t.Errorf("%+v", r)
	}
}

func TestSkew(t *testing.T) {
	for name, c := range map[string]struct {
		said time.Time
		want time.Duration
	}{
		"between": {now.Add(time.Second), 0}, "ahead": {now.Add(time.Minute), 58 * time.Second}, "behind": {now.Add(-time.Minute), -time.Minute}, "older daemon": {time.Time{}, 0},
	} {
		if got := skew(now, now.Add(2*time.Second), c.said); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func pod(name, node, part string, phase corev1.PodPhase) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "kube-system", Labels: map[string]string{"app.kubernetes.io/name": "headcni", component: part}},
		Spec:       corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: phase},
	}
}

// A Node that the DaemonSet leaves out by choice has no daemon, and that is right; one that it should be on is missed.
func TestChosen(t *testing.T) {
	node := func(name string, labels map[string]string) corev1.Node {
		return corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
	}
	plain, virtual := node("a", map[string]string{"cores": "4"}), node("v", map[string]string{"type": "virtual-kubelet", "cores": "64"})
	require := func(terms ...corev1.NodeSelectorTerm) corev1.PodSpec {
		return corev1.PodSpec{Affinity: &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: terms}}}}
	}
	term := func(key string, op corev1.NodeSelectorOperator, values ...string) corev1.NodeSelectorTerm {
		return corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: key, Operator: op, Values: values}}}
	}
	for name, c := range map[string]struct {
		spec           corev1.PodSpec
		plain, virtual bool
	}{
		"all":           {corev1.PodSpec{}, true, true},
		"nodeSelector":  {corev1.PodSpec{NodeSelector: map[string]string{"type": "virtual-kubelet"}}, false, true},
		"NotIn":         {require(term("type", corev1.NodeSelectorOpNotIn, "virtual-kubelet")), true, false},
		"In":            {require(term("type", corev1.NodeSelectorOpIn, "virtual-kubelet")), false, true},
		"DoesNotExist":  {require(term("type", corev1.NodeSelectorOpDoesNotExist)), true, false},
		"Exists":        {require(term("type", corev1.NodeSelectorOpExists)), false, true},
		"Gt":            {require(term("cores", corev1.NodeSelectorOpGt, "8")), false, true},
		"Lt":            {require(term("cores", corev1.NodeSelectorOpLt, "8")), true, false},
		"one of two":    {require(term("type", corev1.NodeSelectorOpExists), term("cores", corev1.NodeSelectorOpLt, "8")), true, true},
		"an empty term": {require(corev1.NodeSelectorTerm{}), false, false},
		"nonsense":      {require(term("cores", "Like", "8")), false, false},
		"by name": {require(corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{
			{Key: "metadata.name", Operator: corev1.NodeSelectorOpNotIn, Values: []string{"v"}}}}), true, false},
	} {
		if p, v := chosen(c.spec, &plain), chosen(c.spec, &virtual); p != c.plain || v != c.virtual {
			t.Errorf("%s: %v and %v, want %v and %v", name, p, v, c.plain, c.virtual)
		}
	}
}

func TestCluster(t *testing.T) {
	objects := func() []runtime.Object {
		set := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: "headcni", Namespace: "kube-system"}}
		set.Spec.Template.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{
			{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "type", Operator: corev1.NodeSelectorOpNotIn, Values: []string{"virtual-kubelet"}}}}}}}}
		virtual := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "virtual", Labels: map[string]string{"type": "virtual-kubelet"}}}
		windows := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "w", Labels: map[string]string{corev1.LabelOSStable: "windows"}}}
		left := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "left", Annotations: map[string]string{"headcni.io/uninstalled": "true"}}}
		out := []runtime.Object{set, virtual, windows, left, pod("old", "a", daemon, corev1.PodFailed), pod("new", "a", daemon, corev1.PodRunning), pod("b", "b", daemon, corev1.PodRunning),
			pod("c", "c", daemon, corev1.PodPending), pod("controller", "a", controller, corev1.PodRunning)}
		for _, name := range []string{"a", "b", "c", "d"} {
			out = append(out, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}})
		}
		return out
	}
	var mu sync.Mutex
	var asked []string
	exec := func(ctx context.Context, p podexec.Pod, command ...string) ([]byte, error) {
		mu.Lock()
		asked = append(asked, p.Name+"/"+p.Container+": "+strings.Join(command, " "))
		mu.Unlock()
		switch p.Name {
		case "new":
			b, err := json.Marshal(healthy("a", "10.244.1.0/24").Status)
			return b, errors.Join(err, podexec.Exit{Code: 1, Stderr: "the node is not ready"})
		case "controller":
			return []byte(`{"ready":true,"parts":[{"name":"leader","ok":true}]}`), nil
		}
		<-ctx.Done() // a node that does not answer must not keep the others
		return nil, ctx.Err()
	}
	c := Cluster{Client: kubetest.New(objects()...), Namespace: "kube-system", Exec: exec, Timeout: 100 * time.Millisecond}
	s, err := c.Look(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, n := range s.Nodes {
		text := "answered"
		if n.Err != nil {
			text = n.Err.Error()
		}
		got = append(got, n.Name+": "+text)
	}
	want := []string{
		"a: answered", "b: ask pod b: context deadline exceeded", "c: pod c is Pending", "d: no pod of the DaemonSet headcni is on this Node",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	slices.Sort(asked)
	if diff := cmp.Diff([]string{
		"b/headcni-daemon: headcni-daemon status -o json", "controller/headcni-controller: headcni-controller health -o json", "new/headcni-daemon: headcni-daemon status -o json",
	}, asked); diff != "" {
		t.Error(diff)
	}
	c.Node = "a"
	if s, err := c.Look(t.Context()); err != nil || len(s.Nodes) != 1 {
		t.Error(s.Nodes, err)
	}
	c.Node = "A"
	if _, err := c.Look(t.Context()); err == nil || err.Error() != `there is no Node "A": there are a, b, c, d, left, virtual, w` {
		t.Error(err)
	}
	c.Node, c.Namespace = "", "elsewhere"
	if _, err := c.Look(t.Context()); !errors.Is(err, ErrNoPods) {
		t.Error(err)
	}
	c.Namespace = "kube-system"
	c.Exec = func(context.Context, podexec.Pod, ...string) ([]byte, error) {
		return nil, fmt.Errorf("%w: pods is forbidden", podexec.ErrForbidden)
	}
	if _, err := c.Look(t.Context()); err == nil || !strings.Contains(err.Error(), "needs the right to create pods/exec in namespace kube-system") {
		t.Error(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if _, err := c.Look(ctx); !errors.Is(err, context.Canceled) {
		t.Error("an interrupted look was taken for a finding:", err)
	}
}

// TestRelayed: of two nodes that reach each other through a relay only, the one says so whose router is the reason.
func TestRelayed(t *testing.T) {
	for _, tt := range []struct {
		name, own, peer string
		direct          bool
		want            findings.ID
	}{
		{"this router changes ports", "hard", "easy", true, findings.HardNAT},
		{"the other one does", "easy", "hard", true, findings.PeerRelayed},
		{"neither does", "easy", "none", true, findings.RouterAnswers},
		{"no UDP at all", "unknown", "easy", false, findings.UDPBlocked},
		{"not known, but UDP gets out", "unknown", "easy", true, findings.PeerRelayed},
		{"an older daemon", "", "", false, findings.PeerRelayed},
	} {
		a, b := healthy("a", "10.244.1.0/24"), healthy("b", "10.244.2.0/24")
		pods := b.PodCIDRs
		a.Status.Tailnet = &nodestatus.Tailnet{Name: "a", NAT: tt.own, Peers: []nodestatus.Peer{{Name: "b", Path: "relayed", PodCIDRs: pods}}}
		b.Status.Tailnet = &nodestatus.Tailnet{Name: "b", NAT: tt.peer}
		if tt.direct {
			a.Status.Tailnet.Peers = append(a.Status.Tailnet.Peers, nodestatus.Peer{Name: "c", Path: "direct", PodCIDRs: pods})
		}
		var got []findings.ID
		for _, f := range NewReport("0.2.0", Seen{Nodes: []Node{a, b}}, true).Findings {
			got = append(got, f.ID)
		}
		if !slices.Equal(got, []findings.ID{tt.want}) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}
