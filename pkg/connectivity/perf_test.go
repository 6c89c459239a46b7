package connectivity

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clienttesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/kube/podexec"
)

// slow is a listener whose connections read no faster than so many bytes a second.
type slow struct {
	net.Listener
	rate float64
}

type slowConn struct {
	net.Conn
	rate  float64
	began time.Time
	read  int
}

func (l slow) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return &slowConn{Conn: c, rate: l.rate, began: time.Now()}, err
}

func (c *slowConn) Read(b []byte) (int, error) {
	time.Sleep(time.Until(c.began.Add(time.Duration(float64(c.read) / c.rate * float64(time.Second)))))
	n, err := c.Conn.Read(b)
	c.read += n
	return n, err
}

// measureAll is what a pod runs.
func measureAll(t *testing.T, ctx context.Context, m Measure) (r Measured) {
	t.Helper()
	b, err := json.Marshal(m)
	var out bytes.Buffer
	if err := errors.Join(err, MeasureAll(ctx, bytes.NewReader(b), &out), json.Unmarshal(out.Bytes(), &r)); err != nil {
		t.Fatal(err, out.String())
	}
	return r
}

// The programs of both pods, over the loopback.
func TestMeasure(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error)
	// Nothing listens there yet: the asker waits.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	to := l.Addr().(*net.TCPAddr).AddrPort()
	l.Close()
	go func() { served <- ServePerf(ctx, int(to.Port()), to.Addr()) }()
	if r := measureAll(t, t.Context(), Measure{to, 500 * time.Millisecond}); r.Error != "" || r.One < 1e6 || r.Eight < 1e6 || r.P50 <= 0 || r.P99 < r.P50 {
		t.Errorf("%+v", r)
	}
	// What says nothing that we know is sent away, and does not keep the server.
	c, err := net.Dial("tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Error(err)
	}
	if n, err := c.Read(make([]byte, 1)); err == nil {
		t.Errorf("%d bytes to somebody else", n)
	}
	if c, err = net.Dial("tcp", to.String()); err != nil { // one that says nothing
		t.Fatal(err)
	}
	defer c.Close()
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if err := ServePerf(t.Context(), int(to.Port()), to.Addr(), netip.MustParseAddr("192.0.2.1")); err == nil {
		t.Error("it listens at an address that is not there")
	}
	over, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if r := measureAll(t, over, Measure{to, 500 * time.Millisecond}); !strings.Contains(r.Error, "refused") && r.Error != "no answer" {
		t.Errorf("where nobody listens: %+v", r)
	}
}

// late is read once at the end of its time.
type late struct{ until time.Time }

func (l late) Read(b []byte) (int, error) {
	time.Sleep(time.Until(l.until))
	return len(b), nil
}

// A stream that waits for its turn is slow, however fast it is then.
func TestCountBulk(t *testing.T) {
	from := time.Now()
	n, took, err := countBulk(late{from.Add(200 * time.Millisecond)}, from, from.Add(100*time.Millisecond))
	if err != nil || n != blockLen || took < 200*time.Millisecond {
		t.Errorf("%d bytes in %v, %v", n, took, err)
	}
}

// What is measured is what arrives, not what the sender's kernel takes.
func TestMeasureArrived(t *testing.T) {
	const rate = 1e6 // bytes a second, of each connection
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- acceptPerf(ctx, slow{l, rate}) }()
	m := Measure{To: l.Addr().(*net.TCPAddr).AddrPort()}
	for streams := range 3 {
		got, err := m.bulk(t.Context(), streams+1, time.Second)
		// A read of one block ends late by up to its length.
		if most := float64(streams+1) * rate * 8; err != nil || got.rate > most*1.5 || got.rate <= 0 || got.sent <= 0 {
			t.Errorf("%d streams of at most %.0f bit/s: %.0f, %v", streams+1, most, got.rate, err)
		}
	}
	l.Close()
	stop()
	<-served
}

func measuredJSON(t *testing.T, m Measured) []byte {
	t.Helper()
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func newPerf(t *testing.T) *world {
	w := newWorld(t)
	w.o.Time = time.Hour
	for i := range w.o.Nodes {
		w.o.Nodes[i].Tailnet = []netip.Addr{netip.AddrFrom4([4]byte{100, 64, 0, byte(i)})}
	}
	w.o.Path = func(context.Context) (func(string, string) string, error) {
		return func(string, string) string { return "direct 192.0.2.1:41641" }, nil
	}
	w.measured = func(string, Measure) []byte {
		return measuredJSON(t, Measured{One: 5e8, Eight: 6e8, P50: time.Millisecond, P99: 2 * time.Millisecond})
	}
	return w
}

func TestPerf(t *testing.T) {
	w := newPerf(t)
	asked := map[string]int{}
	var bound []string
	w.PrependReactor("create", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if p := a.(clienttesting.CreateAction).GetObject().(*corev1.Pod); p.Spec.HostNetwork {
			bound = append(bound, strings.Join(p.Spec.Containers[0].Command[1:], " "))
		} else if len(p.Spec.Containers[0].Ports) != 0 {
			t.Errorf("%s has a hostPort", p.Name)
		}
		return false, nil, nil
	})
	paths := []string{"relayed by fra", "direct 192.0.2.1:41641"}
	w.o.Path = func(context.Context) (func(string, string) string, error) {
		now := paths[0]
		if len(paths) > 1 {
			paths = paths[1:]
		}
		return func(string, string) string { return now }, nil
	}
	rates := []float64{1e8, 3e8, 2e8}
	w.measured = func(from string, m Measure) []byte {
		n := asked[from+m.To.String()]
		asked[from+m.To.String()]++
		one := rates[n%3]
		if strings.HasPrefix(from, "node-") {
			one *= 2
		}
		return measuredJSON(t, Measured{One: one, Eight: 9e8, P50: 500 * time.Microsecond, P99: 20 * time.Millisecond})
	}
	r, err := Perf(t.Context(), w.o)
	// Each with itself and the next one: two families of pods, one of the tailnet and one of the underlay.
	if err != nil || !r.OK || r.Nodes != 3 || r.Pairs != 6 || r.Wanted != 6 || len(r.Rows) != 3*2+3*4 || r.Note != "tailscaled's CPU is not known: the host of c has its own" {
		t.Fatalf("%v, %+v", err, r)
	}
	for _, row := range r.Rows {
		path := ""
		if row.From != row.To && row.Way != ByUnderlay {
			path = "relayed by fra, then direct 192.0.2.1:41641"
		}
		one := 2e8
		if row.Way != ByPods {
			one = 4e8
		}
		if row.Times != 3 || row.One != one || row.P50 != 0.5 || row.P99 != 20 || row.Path != path || row.Error != "" {
			t.Errorf("%+v", row)
		}
	}
	if want := "probe answer-perf 192.168.0.1 100.64.0.1"; len(bound) != 3 || bound[1] != want {
		t.Errorf("pods in nodes' networks are %q, want %q", bound, want)
	}
	w.gone(t)
	var text strings.Builder
	if err := r.Text(&text, 0); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\non a\n  pods      IPv4     0.20 Gbit/s   0.90 Gbit/s   0.50 ms     20 ms\n", "\na -> b   relayed by fra, then direct 192.0.2.1:41641\n",
		"pods have 0.50 of what their nodes have by the tailnet (1 stream, median of 3)\n", "by the underlay"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, text.String())
		}
	}
	for line := range strings.Lines(text.String()) {
		if len(line) > 80 {
			t.Errorf("wide: %s", line)
		}
	}
}

// Time bounds what is measured: few pairs where there is little, and each at least once.
func TestPerfTime(t *testing.T) {
	w := newPerf(t)
	w.o.AllPairs = true
	var least time.Duration
	w.measured = func(_ string, m Measure) []byte { least = m.Time; return measuredJSON(t, Measured{One: 1}) }
	w.o.Time = 24 * time.Second
	// A pair has four ways, a node with itself two.
	if r, err := Perf(t.Context(), w.o); err != nil || r.Pairs != 3 || r.Wanted != 9 || len(r.Rows) != 12 || r.Rows[0].Times != 1 || least < time.Second*16/10 {
		t.Errorf("%v, %v, %+v", err, least, r)
	}
	w.o.Time = 14 * time.Second
	if r, err := Perf(t.Context(), w.o); err != nil || r.Pairs != 2 || r.Rows[0].To != "b" || r.Rows[4].To != "a" || r.Rows[4].From != "a" {
		t.Errorf("%v, %v, %+v", err, least, r)
	}
	w.o.Time = time.Hour
	if r, err := Perf(t.Context(), w.o); err != nil || r.Pairs != 9 {
		t.Errorf("%v, %+v", err, r)
	}
}

// What answers too late does not make it much longer, and is said.
func TestPerfLate(t *testing.T) {
	w := newPerf(t)
	w.o.Time = 20 * time.Millisecond
	asked := 0
	w.measured = func(string, Measure) []byte {
		asked++
		time.Sleep(3 * w.o.Time)
		return measuredJSON(t, Measured{Error: "no answer"})
	}
	w.o.Nodes = w.o.Nodes[:2]
	r, err := Perf(t.Context(), w.o)
	var text strings.Builder
	if err := r.Text(&text, 0); err != nil {
		t.Error(err)
	}
	if err != nil || asked != 1 || r.OK || r.late() != 3 || !strings.Contains(text.String(), "3 of 4 ways were not measured: --time was over") {
		t.Errorf("asked %d times, %v, %+v\n%s", asked, err, r, text.String())
	}
}

func TestPerfFails(t *testing.T) {
	w := newPerf(t)
	w.measured = func(from string, m Measure) []byte {
		switch {
		case from == "asks-a" && m.To.Addr() == netip.MustParseAddr("10.244.0.5"): // the pod of b that answers
			return measuredJSON(t, Measured{Error: "no answer"})
		case from == "node-b" && m.To.Addr() == netip.MustParseAddr("192.168.0.2"):
			return measuredJSON(t, Measured{Error: "refused"})
		}
		return measuredJSON(t, Measured{One: 1e6})
	}
	r, err := Perf(t.Context(), w.o)
	if err != nil || r.OK || len(r.Findings) != 1 || r.Findings[0].ID != findings.PodToPod || r.Findings[0].Where != "a -> b" {
		t.Fatalf("%v, %+v", err, r)
	}
	var text strings.Builder
	if err := r.Text(&text, 60); err != nil || !strings.Contains(text.String(), "b -> c by underlay, IPv4: refused") || !strings.Contains(text.String(), "HC802") {
		t.Errorf("%v:\n%s", err, text.String())
	}
	// Where it is interrupted, and where pods in nodes' networks are refused.
	ctx, stop := context.WithCancel(t.Context())
	w.measured = func(string, Measure) []byte { stop(); return measuredJSON(t, Measured{One: 1e6}) }
	if _, err := Perf(ctx, w.o); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	w.gone(t)
	w.PrependReactor("create", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if p := a.(clienttesting.CreateAction).GetObject().(*corev1.Pod); p.Spec.HostNetwork {
			return true, nil, apierrors.NewForbidden(corev1.Resource("pods"), p.Name, errors.New("no hostNetwork here"))
		}
		return false, nil, nil
	})
	w.measured = func(string, Measure) []byte { return measuredJSON(t, Measured{One: 1e6}) }
	r, err = Perf(t.Context(), w.o)
	if err != nil || !r.OK || !strings.Contains(r.Note, "no hostNetwork here") || slices.ContainsFunc(r.Rows, func(r Rate) bool { return r.Way != ByPods }) {
		t.Errorf("%v, %+v", err, r)
	}
	// An image that is older than headcnictl.
	w2 := newPerf(t)
	w2.measured = func(string, Measure) []byte { return []byte("usage") }
	if r, err := Perf(t.Context(), w2.o); err != nil || r.OK || !strings.Contains(fmt.Sprint(r.Findings), "run headcnictl in pod asks-a") {
		t.Errorf("%v, %+v", err, r)
	}
	if list, err := w2.Client.Namespaces().List(t.Context(), metav1.ListOptions{}); err != nil || len(list.Items) != 0 {
		t.Errorf("left: %v, %v", list, err)
	}
}

// What tailscaled takes is read before and after each measurement, of those that go through it.
func TestPerfCPU(t *testing.T) {
	w := newPerf(t)
	taken := map[string]float64{"tailscaled-a": 3, "tailscaled-b": 70}
	var mu sync.Mutex
	for i, name := range []string{"a", "b", "c"} {
		w.o.Nodes[i].Tailscaled = podexec.Pod{Namespace: "kube-system", Name: "tailscaled-" + name}
	}
	w.measured = func(from string, m Measure) []byte {
		mu.Lock()
		defer mu.Unlock()
		taken["tailscaled-a"] += 5
		taken["tailscaled-b"] += 7
		return measuredJSON(t, Measured{One: 1e9, Sent: 2e9, Congestion: "bbr"})
	}
	var open atomic.Int64
	w.o.Stream = func(_ context.Context, pod podexec.Pod, in io.Reader, out io.Writer, command ...string) error {
		if pod.Name == "tailscaled-c" {
			return podexec.Exit{Code: 2, Stderr: `there is no command "headcnictl probe cpu"`}
		}
		open.Add(1)
		defer open.Add(-1)
		for d := json.NewDecoder(in); ; {
			if err := d.Decode(&struct{}{}); err != nil {
				return nil
			}
			mu.Lock()
			c := CPU{taken[pod.Name]}
			mu.Unlock()
			if err := json.NewEncoder(out).Encode(c); err != nil {
				return err
			}
		}
	}
	r, err := Perf(t.Context(), w.o)
	if err != nil || !r.OK || r.Congestion != "bbr" || open.Load() != 0 {
		t.Fatalf("%v, %+v, %d still run", err, r, open.Load())
	}
	for _, row := range r.Rows {
		want := [2]float64{}
		if row.Way != ByUnderlay && row.From == "a" && row.To == "b" {
			want = [2]float64{2.5, 3.5}
		}
		if got := [2]float64{row.SenderCPU, row.ReceiverCPU}; got != want {
			t.Errorf("%s -> %s by %s: %v, want %v", row.From, row.To, row.Way, got, want)
		}
	}
	var text strings.Builder
	if err := r.Text(&text, 80); err != nil || !strings.Contains(text.String(), "0.00 ms    2.5 + 3.5\n") || !strings.Contains(text.String(), "CPU s/GB\n") ||
		!strings.Contains(text.String(), "is the image older") || !strings.Contains(text.String(), "TCP: bbr\n") {
		t.Errorf("%v:\n%s", err, text.String())
	}
	for line := range strings.Lines(text.String()) {
		if len(line) > 81 {
			t.Errorf("wide: %s", line)
		}
	}
}

func TestTellCPU(t *testing.T) {
	proc := t.TempDir()
	stat := func(pid int, name string, user, system int) {
		t.Helper()
		dir := filepath.Join(proc, fmt.Sprint(pid))
		text := fmt.Sprintf("%d (%s) S 1 1 1 0 -1 4194560 8 0 0 0 %d %d 0 0 20 0 12 0 100 1 1\n", pid, name, user, system)
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "stat"), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	var out strings.Builder
	stat(7, "tailscaled) S (x", 1, 1)
	if err := TellCPU(strings.NewReader("{}"), &out, proc); err == nil || !strings.Contains(err.Error(), "no tailscaled runs here") {
		t.Error(err)
	}
	stat(1, "tailscaled", 150, 100)
	stat(12, "headcnictl", 9, 9)
	if err := TellCPU(strings.NewReader("{} {}"), &out, proc); err != nil || out.String() != "{\"seconds\":2.5}\n{\"seconds\":2.5}\n" {
		t.Errorf("%v, %q", err, out.String())
	}
	// By a real kernel: what this test has taken.
	own, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	before, err := cpuOf("/proc", strings.TrimSpace(string(own)))
	for began, sum := time.Now(), 0; err == nil && time.Since(began) < time.Minute; sum++ {
		if now, err := cpuOf("/proc", strings.TrimSpace(string(own))); err != nil || now.Seconds > before.Seconds {
			return
		}
	}
	t.Errorf("%+v, %v: it never grows", before, err)
}
