package connectivity

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	clienttesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/kube/podexec"
)

// gate echoes, but for what it is told to drop.
type gate struct {
	net.PacketConn
	shut            atomic.Bool
	passed, dropped atomic.Int64
}

func (g *gate) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		n, from, err := g.PacketConn.ReadFrom(b)
		if err != nil || !g.shut.Load() {
			g.passed.Add(1)
			return n, from, err
		}
		g.dropped.Add(1)
	}
}

// Of what is sent while the other end is away, all is counted and nothing else.
func TestSendFlows(t *testing.T) {
	var gates []*gate
	in := Flows{Back: time.Second}
	for range 2 {
		c, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		g := &gate{PacketConn: c}
		go func() { _ = echo(g) }() // ends with the socket
		gates, in.To = append(gates, g), append(in.To, netip.MustParseAddrPort(c.LocalAddr().String()))
	}
	stdin, end := io.Pipe()
	answer, stdout := io.Pipe()
	go func() { stdout.CloseWithError(SendFlows(t.Context(), stdin, stdout)) }()
	var begun Flowing
	lines := json.NewDecoder(answer)
	if err := errors.Join(json.NewEncoder(end).Encode(in), lines.Decode(&begun)); err != nil || len(begun.Silent) != 0 {
		t.Fatal(err, begun)
	}
	reach := func(count *atomic.Int64, n int64) {
		t.Helper()
		for count.Load() < n {
			if t.Context().Err() != nil {
				t.Fatal(t.Context().Err())
			}
			time.Sleep(time.Millisecond)
		}
	}
	away := func(g *gate, n int64) {
		t.Helper()
		reach(&g.passed, g.passed.Load()+2) // what was sent before it counts may still be on the way
		g.shut.Store(true)
		reach(&g.dropped, n)
	}
	away(gates[0], 10)
	gates[0].shut.Store(false)
	away(gates[1], 5) // and it never comes back
	end.Close()
	var got []Flow
	if err := lines.Decode(&got); err != nil || len(got) != 2 {
		t.Fatal(err, got)
	}
	if f := got[0]; !f.Back || int64(f.Lost) != gates[0].dropped.Load() || f.Gap <= 0 || f.Sent <= f.Lost {
		t.Errorf("away for a while: %+v, %d were dropped", f, gates[0].dropped.Load())
	}
	if f := got[1]; f.Back || f.Lost < 5 || f.Gap < flowCalm {
		t.Errorf("away for good: %+v", f)
	}
	if err := SendFlows(t.Context(), strings.NewReader("{"), io.Discard); err == nil {
		t.Error("half a question is taken")
	}
}

// parts are those that a test of node c restarts: where one is deleted, another comes.
func (w *world) parts(t *testing.T) {
	t.Helper()
	w.o.Disrupt = &Disrupt{Node: "c"}
	made := 0
	make := func(component string) *corev1.Pod {
		made++
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				Name: fmt.Sprintf("%s-%d", component, made), Namespace: "kube-system", UID: types.UID(fmt.Sprint(made)), Labels: map[string]string{"component": component},
			},
			Spec:   corev1.PodSpec{NodeName: "c"},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
		}
	}
	gvr := corev1.SchemeGroupVersion.WithResource("pods")
	for _, name := range []string{"daemon", "tailscaled"} {
		p := make(name)
		if err := w.Tracker().Create(gvr, p, p.Namespace); err != nil {
			t.Fatal(err)
		}
		w.o.Disrupt.Parts = append(w.o.Disrupt.Parts, Part{
			Name: name, Pod: podexec.Pod{Namespace: p.Namespace, Name: p.Name}, Selector: "component=" + name, Carries: name == "tailscaled",
		})
	}
	w.PrependReactor("delete", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		d := a.(clienttesting.DeleteActionImpl)
		if d.Namespace != "kube-system" || len(d.DeleteOptions.DryRun) > 0 {
			return d.Namespace == "kube-system", nil, nil
		}
		w.restarted = append(w.restarted, d.Name)
		component, _, _ := strings.Cut(d.Name, "-")
		p := make(component)
		return true, nil, errors.Join(w.Tracker().Delete(gvr, d.Namespace, d.Name), w.Tracker().Create(gvr, p, p.Namespace))
	})
	w.o.Stream = func(ctx context.Context, pod podexec.Pod, in io.Reader, out io.Writer, command ...string) error {
		var f Flows
		d := json.NewDecoder(in)
		if err := d.Decode(&f); err != nil || !slices.Equal(command[1:], []string{"probe", "flows"}) {
			return fmt.Errorf("%v: %w", command, err)
		}
		if err := json.NewEncoder(out).Encode(Flowing{Silent: w.silent}); err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, io.MultiReader(d.Buffered(), in)); err != nil {
			return err
		}
		results := []Flow{}
		for range f.To {
			results = append(results, w.flow(pod.Name, len(w.restarted)))
		}
		return json.NewEncoder(out).Encode(results)
	}
}

func TestDisrupt(t *testing.T) {
	w := newWorld(t)
	w.parts(t)
	w.flow = func(from string, restart int) Flow {
		f := Flow{Sent: 100, Back: true}
		if restart == 2 && from != "answers-b" { // that of tailscaled
			f.Lost, f.Gap = 40, 800*time.Millisecond
		}
		return f
	}
	r, err := Run(t.Context(), w.o)
	if err != nil || !r.OK || len(r.Disruptions) != 2 || !slices.Equal(w.restarted, []string{"daemon-1", "tailscaled-2"}) {
		t.Fatalf("%v, %+v, restarted %v", err, r, w.restarted)
	}
	// Within each of three nodes, between c and each of the others, and from one of these to the other.
	for _, d := range r.Disruptions {
		if len(d.Flows) != (3+4+1)*2 {
			t.Errorf("%d flows: %+v", len(d.Flows), d.Flows)
		}
	}
	i := slices.IndexFunc(r.Groups, func(g Group) bool { return g.Name == restarts })
	if g := r.Groups[i]; g.Right != 32 || g.Total != 32 {
		t.Errorf("%+v", g)
	}
	var text bytes.Buffer
	if err := r.Text(&text); err != nil || !strings.Contains(text.String(), "restart of tailscaled on c") || !strings.Contains(text.String(), "100      40    800 ms") {
		t.Errorf("%v:\n%s", err, text.String())
	}
	w.gone(t)
}

// Gaps that are longer than a restart explains are found, by pair; nothing is blamed on what goes through the part that starts anew for a while.
func TestDisruptFinds(t *testing.T) {
	w := newWorld(t)
	w.parts(t)
	w.flow = func(from string, restart int) Flow {
		switch {
		case restart == 1 && from == "answers-a":
			return Flow{Sent: 100, Lost: 60, Gap: 1200 * time.Millisecond, Back: true}
		case restart == 2 && from == "answers-c":
			return Flow{Sent: 100, Lost: 90, Gap: time.Minute}
		}
		return Flow{Sent: 100, Back: true}
	}
	r, err := Run(t.Context(), w.o)
	if err != nil || r.OK {
		t.Fatalf("%v, %+v", err, r)
	}
	found := map[string]string{}
	for _, f := range r.Findings {
		if f.ID != findings.Interrupted {
			t.Errorf("%+v", f)
		}
		found[f.Where] = f.Cause
	}
	for where, cause := range map[string]string{
		"a -> a": "60 of 100 datagrams were lost while daemon was restarted, for 1.2 s", "a -> c": "where 1 s are expected at most",
		"c -> a": "nothing comes back any more since tailscaled", "c -> b": "60.0 s", "c -> c": "nothing comes back",
	} {
		if !strings.Contains(found[where], cause) {
			t.Errorf("%s: %q, want %q", where, found[where], cause)
		}
	}
	var junit bytes.Buffer
	var suite struct {
		Failures int `xml:"failures,attr"`
	}
	if err := errors.Join(r.JUnit(&junit), xml.Unmarshal(junit.Bytes(), &suite)); err != nil || suite.Failures != 1 {
		t.Errorf("%v: %s", err, junit.String())
	}
	w.gone(t)
}

// Nothing is restarted where that is refused, or where something is not right beforehand.
func TestDisruptLeaves(t *testing.T) {
	w := newWorld(t)
	w.parts(t)
	w.flow = func(string, int) Flow { return Flow{Sent: 1, Back: true} }
	w.silent = []netip.AddrPort{netip.MustParseAddrPort("10.244.0.1:8080")}
	left := func(r Report, what string) {
		t.Helper()
		i := slices.IndexFunc(r.Groups, func(g Group) bool { return g.Name == restarts })
		if i < 0 || !strings.Contains(r.Groups[i].Note, "not done: ") || len(w.restarted) > 0 {
			t.Errorf("%s: %+v, restarted %v", what, r, w.restarted)
		}
		w.gone(t)
	}
	r, err := Run(t.Context(), w.o)
	if err != nil || !r.OK {
		t.Errorf("%v, %+v", err, r)
	}
	left(r, "a pod that does not answer")
	w.answer = func(_ string, a Ask) Result {
		if a.Kind == KindName {
			return Result{Error: "no answer"}
		}
		return Result{}
	}
	r, err = Run(t.Context(), w.o)
	if err != nil || r.OK {
		t.Errorf("%v, %+v", err, r)
	}
	left(r, "no names")
	w.PrependReactor("delete", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(corev1.Resource("pods"), "daemon-1", errors.New("no"))
	})
	w.said = nil
	if _, err := Run(t.Context(), w.o); err == nil || !strings.Contains(err.Error(), DisruptRights+"kube-system") || len(w.restarted) > 0 || len(w.said) > 0 {
		t.Errorf("%v, said %q", err, w.said)
	}
	w.gone(t)
}
