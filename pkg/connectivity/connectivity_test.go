package connectivity

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clienttesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/kube/podexec"
)

// The program that asks in pods, and the one that answers, over the loopback.
func TestAskAll(t *testing.T) {
	web := httptest.NewServer(Handler("n1"))
	defer web.Close()
	tls := httptest.NewTLSServer(Handler("n1"))
	defer tls.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	go func() { _ = echo(udp) }() // ends with the socket
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	loopback := netip.MustParseAddr("127.0.0.1")
	http, nobody := web.Listener.Addr().String(), "127.0.0.1:1"
	var asks []Ask
	var want []string
	for _, c := range []struct {
		ask  Ask
		want string
	}{
		{Ask{Kind: KindHTTP, To: http, Node: "n1", Seen: []netip.Addr{loopback}}, ""},
		{Ask{Kind: KindHTTP, To: http, Node: "n2"}, `the pod of "n1" answers`},
		{Ask{Kind: KindHTTP, To: http, Seen: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}, "it sees us as 127.0.0.1"},
		{Ask{Kind: KindHTTP, To: nobody}, "refused"},
		{Ask{Kind: KindHTTP, To: nobody, Denied: true}, ""},
		{Ask{Kind: KindHTTP, To: http, Denied: true}, "it answers, and a policy denies that"},
		{Ask{Kind: KindTCP, To: nobody}, ""},
		{Ask{Kind: KindTLS, To: tls.Listener.Addr().String()}, ""},
		{Ask{Kind: KindTLS, To: nobody}, "refused"},
		{Ask{Kind: KindUDP, To: udp.LocalAddr().String(), Size: 1280}, ""},
		{Ask{Kind: KindUDP, To: udp.LocalAddr().String(), Size: 66000}, "message too long"},
		{Ask{Kind: KindUDP, To: silent.LocalAddr().String(), Size: 100}, "no answer to a packet of 100 bytes"},
		{Ask{Kind: KindName, To: "localhost", Want: loopback}, ""},
		{Ask{Kind: KindName, To: "localhost", Want: netip.MustParseAddr("10.0.0.1")}, "and not 10.0.0.1"},
		{Ask{Kind: "later"}, "older than headcnictl"},
	} {
		c.ask.Within, c.ask.Try = 5*time.Second, 2*time.Second
		if c.want != "" {
			c.ask.Within = 2 * time.Second
		}
		asks, want = append(asks, c.ask), append(want, c.want)
	}
	b, err := json.Marshal(asks)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	var got []Result
	if err := errors.Join(AskAll(t.Context(), bytes.NewReader(b), &out), json.Unmarshal(out.Bytes(), &got)); err != nil || len(got) != len(asks) {
		t.Fatal(err, out.String())
	}
	for i, r := range got {
		if want[i] == "" && r.Error != "" || !strings.Contains(r.Error, want[i]) {
			t.Errorf("%+v: %q, want %q", asks[i], r.Error, want[i])
		}
		if denied := asks[i].Denied && want[i] == ""; denied != (r.For > 0) {
			t.Errorf("%+v: it was so for %v", asks[i], r.For)
		}
	}
	if mtu, err := ownMTU(loopback); err != nil || mtu < 1280 {
		t.Errorf("MTU %d, %v", mtu, err)
	}
	if r := Here(t.Context(), asks[:1]); len(r) != 1 || !r[0].Skipped {
		t.Errorf("the loopback is no tailnet: %+v", r)
	}
}

// world is an API server whose pods run as soon as they are made, on three nodes, and answer what answer says.
type world struct {
	kubetest.Client
	o      Options
	answer func(from string, a Ask) Result
	said   []string
	// measured is what a pod's measurement finds.
	measured func(from string, m Measure) []byte
	// flow is what becomes of one while so many parts were restarted, silent are those of which nothing comes back before.
	flow      func(from string, restarts int) Flow
	silent    []netip.AddrPort
	restarted []string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{Client: kubetest.New(), answer: func(string, Ask) Result { return Result{} }}
	made := 0
	w.PrependReactor("create", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		p := a.(clienttesting.CreateAction).GetObject().(*corev1.Pod)
		made++
		p.Status.Phase = corev1.PodRunning
		p.Status.PodIPs = []corev1.PodIP{{IP: fmt.Sprintf("10.244.0.%d", made)}, {IP: fmt.Sprintf("fd00::%d", made)}}
		return false, nil, nil
	})
	w.PrependReactor("create", "services", func(a clienttesting.Action) (bool, runtime.Object, error) {
		s := a.(clienttesting.CreateAction).GetObject().(*corev1.Service)
		s.Spec.ClusterIPs, s.Spec.Ports[0].NodePort = []string{"10.96.0.7", "fd00:96::7"}, 30007
		return false, nil, nil
	})
	w.PrependReactor("delete", "namespaces", func(clienttesting.Action) (bool, runtime.Object, error) {
		for kind, gvr := range map[string]schema.GroupVersionResource{
			"Pod": corev1.SchemeGroupVersion.WithResource("pods"), "Service": corev1.SchemeGroupVersion.WithResource("services"),
			"NetworkPolicy": networkingv1.SchemeGroupVersion.WithResource("networkpolicies"),
		} {
			list, err := w.Tracker().List(gvr, gvr.GroupVersion().WithKind(kind), Namespace)
			items, err2 := meta.ExtractList(list)
			if err := errors.Join(err, err2); err != nil {
				return true, nil, err
			}
			for _, o := range items {
				if err := w.Tracker().Delete(gvr, Namespace, o.(metav1.Object).GetName()); err != nil {
					return true, nil, err
				}
			}
		}
		return false, nil, nil
	})
	w.o = Options{
		Client: w.Client, Image: "headcni:1", Here: Here, Say: func(format string, args ...any) { w.said = append(w.said, fmt.Sprintf(format, args...)) },
		Exec: func(ctx context.Context, pod podexec.Pod, stdin []byte, command ...string) ([]byte, error) {
			var asks []Ask
			if command[2] == "measure" {
				var m Measure
				err := json.Unmarshal(stdin, &m)
				return w.measured(pod.Name, m), err
			}
			if err := json.Unmarshal(stdin, &asks); err != nil || !slices.Equal(command[1:], []string{"probe", "connect"}) {
				return nil, fmt.Errorf("%v: %w", command, err)
			}
			out := []Result{}
			for _, a := range asks {
				r := w.answer(pod.Name, a)
				if a.Denied && r.Error == "" {
					r.For = time.Second
				}
				out = append(out, r)
			}
			return json.Marshal(out)
		},
	}
	for i, name := range []string{"a", "b", "c"} {
		w.o.Nodes = append(w.o.Nodes, Node{Name: name, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{192, 168, 0, byte(i)})}})
	}
	return w
}

// gone wants nothing left.
func (w *world) gone(t *testing.T) {
	t.Helper()
	if list, err := w.Client.Namespaces().List(t.Context(), metav1.ListOptions{}); err != nil || len(list.Items) != 0 {
		t.Errorf("left: %v, %v", list, err)
	}
}

func TestRun(t *testing.T) {
	w := newWorld(t)
	r, err := Run(t.Context(), w.o)
	if err != nil || !r.OK || r.Nodes != 3 || r.Pairs != 6 || len(r.Families) != 2 {
		t.Fatalf("%v, %+v", err, r)
	}
	for _, g := range r.Groups {
		if g.Right != g.Total || g.Total == 0 && g.Name != tailnet {
			t.Errorf("%+v", g)
		}
	}
	w.gone(t)
	var text, junit strings.Builder
	if err := errors.Join(r.Text(&text), r.JUnit(&junit)); err != nil || !strings.Contains(text.String(), "all right, ") || strings.Contains(text.String(), "HC8") {
		t.Errorf("%v:\n%s", err, text.String())
	}
	// Pods that Pod Security "restricted" takes.
	p := (&test{Options: w.o}).pod(asks, "a", 0)
	sec := p.Spec.Containers[0].SecurityContext
	if *sec.AllowPrivilegeEscalation || !*sec.RunAsNonRoot || sec.Capabilities.Drop[0] != "ALL" || sec.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault || p.Spec.HostNetwork {
		t.Errorf("%+v", sec)
	}
}

// Node c reaches nobody and is reached by nobody: the pairs are named, and nothing else is blamed for it.
func TestRunNames(t *testing.T) {
	w := newWorld(t)
	w.answer = func(from string, a Ask) Result {
		ofC := strings.Contains(a.To, "0.6:") || strings.Contains(a.To, "::6]:")
		if (a.Kind == KindHTTP || a.Kind == KindUDP) && strings.Contains(a.To, fmt.Sprint(":", Port)) && ofC != strings.HasSuffix(from, "-c") {
			return Result{Error: "no answer"}
		}
		return Result{}
	}
	r, err := Run(t.Context(), w.o)
	if err != nil || r.OK || len(r.Findings) != 4 {
		t.Fatalf("%v, %+v", err, r)
	}
	var pairs []string
	for _, f := range r.Findings {
		pairs = append(pairs, f.Where)
		if f.ID != findings.PodToPod || f.Remedy == "" || !strings.Contains(f.Cause, "no answer") {
			t.Errorf("%+v", f)
		}
	}
	slices.Sort(pairs)
	if want := []string{"a -> c", "b -> c", "c -> a", "c -> b"}; !slices.Equal(pairs, want) {
		t.Errorf("%v, want %v", pairs, want)
	}
	var text, junit strings.Builder
	if err := errors.Join(r.Text(&text), r.JUnit(&junit)); err != nil || !strings.Contains(text.String(), "doctor --node c") || strings.Contains(text.String(), "all right") {
		t.Errorf("%v:\n%s", err, text.String())
	}
	var suite struct {
		Failures int `xml:"failures,attr"`
	}
	if err := xml.Unmarshal([]byte(junit.String()), &suite); err != nil || suite.Failures != 1 {
		t.Errorf("%v in %s", err, junit.String())
	}
	w.gone(t)
}

func TestRunWithout(t *testing.T) {
	w := newWorld(t)
	w.PrependReactor("create", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if p := a.(clienttesting.CreateAction).GetObject().(*corev1.Pod); len(p.Spec.Containers[0].Ports) > 0 {
			return true, nil, apierrors.NewForbidden(corev1.Resource("pods"), p.Name, errors.New("no hostPort here"))
		}
		return false, nil, nil
	})
	w.o.NoPolicies = "network.networkPolicy is false on a"
	r, err := Run(t.Context(), w.o)
	if err != nil || !r.OK {
		t.Fatalf("%v, %+v", err, r)
	}
	for _, name := range []string{hosts, policies} {
		i := slices.IndexFunc(r.Groups, func(g Group) bool { return g.Name == name })
		if g := r.Groups[i]; g.Total != 0 || !strings.HasPrefix(g.Note, "not tested: ") {
			t.Errorf("%+v", g)
		}
	}
}

// Whatever ends a test, what it has made goes.
func TestRunCleansUp(t *testing.T) {
	defer func(a, b time.Duration) { beatEvery, deadAfter = a, b }(beatEvery, deadAfter)
	beatEvery, deadAfter = 20*time.Millisecond, time.Second
	w := newWorld(t)
	ctx, stop := context.WithCancel(t.Context())
	w.answer = func(string, Ask) Result { stop(); return Result{} }
	if _, err := Run(ctx, w.o); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	w.gone(t)
	w.answer = func(string, Ask) Result { return Result{} }

	// One that was killed, and one that runs.
	left := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: Namespace, Labels: map[string]string{label: "true"}}}
	if _, err := w.Client.Namespaces().Create(t.Context(), left, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	alive, end := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { (&test{Options: w.o}).beat(alive); close(ended) }()
	if _, err := Run(t.Context(), w.o); err == nil || !strings.Contains(err.Error(), "another test runs") {
		t.Error(err)
	}
	end()
	<-ended
	w.said = nil
	if r, err := Run(t.Context(), w.o); err != nil || !r.OK || !strings.Contains(w.said[0], "removing what an earlier test has left") {
		t.Errorf("%v, said %q", err, w.said)
	}
	w.gone(t)

	// Somebody's own.
	if _, err := w.Client.Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: Namespace}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := Run(t.Context(), w.o); err == nil || !strings.Contains(err.Error(), "is not of a test like this") {
		t.Error(err)
	}
	if _, err := w.Client.Namespaces().Get(t.Context(), Namespace, metav1.GetOptions{}); err != nil {
		t.Error("somebody's namespace is removed:", err)
	}
	// What cannot be removed is said, beside what was found.
	if err := w.Client.Namespaces().Delete(t.Context(), Namespace, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	w.PrependReactor("delete", "namespaces", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(corev1.Resource("namespaces"), Namespace, errors.New("no"))
	})
	if r, err := Run(t.Context(), w.o); err == nil || !strings.Contains(err.Error(), "kubectl delete namespace") || !r.OK || r.Nodes != 3 {
		t.Errorf("%v, %+v", err, r)
	}
}

// Where there are many nodes each asks some, so that every node is asked as often as it asks.
func TestPeers(t *testing.T) {
	x := &test{byNode: map[string]*node{}}
	for i := range 40 {
		n := Node{Name: fmt.Sprint(i)}
		x.Nodes, x.byNode[n.Name] = append(x.Nodes, n), &node{Node: n}
	}
	asked := map[string]int{}
	for _, n := range x.byNode {
		for _, p := range x.peers(n) {
			asked[p.Name]++
		}
	}
	for name, n := range asked {
		if n != few+1 {
			t.Errorf("%s is asked by %d", name, n)
		}
	}
	if x.AllPairs = true; len(x.peers(x.byNode["7"])) != 40 {
		t.Error("not all pairs")
	}
}

func TestPodName(t *testing.T) {
	seen := map[string]string{}
	long := strings.Repeat("n", 70)
	for _, node := range []string{"worker-1", "a.b", "a-b", long, long + "x", "ip-10-0-0-1.eu-central-1.compute.internal"} {
		name := podName(asks, node)
		if len(name) > 63 || strings.Contains(name, ".") || seen[name] != "" {
			t.Errorf("%s is %s, as %q is", node, name, seen[name])
		}
		seen[name] = node
	}
	if got := podName(asks, "worker-1"); got != "asks-worker-1" {
		t.Errorf("a plain name became %s", got)
	}
}
