package e2e

import (
	"context"
	_ "embed" // testdata
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/internal/cluster"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config/names"
)

//go:embed testdata/policy.yaml
var policyManifest string

const policyNamespace = "policy"

// parties are the pods of policy.yaml and where they are listened to.
type parties struct {
	*world
	// pods are friend, foe and talker on each worker, by role and the node's name.
	pods  map[string]map[string]*corev1.Pod
	ns    map[types.UID]*nstest.NS
	ears  map[types.UID]*ear
	near  *cluster.Node // the talkers' node
	other *cluster.Node
}

// policyWorld starts a cluster with the pods of policy.yaml, and listens to friends and foes.
func policyWorld(t *testing.T, install func(w *world)) *parties {
	t.Helper()
	w := start(t, cluster.Options{ProxyMode: *proxyMode})
	install(w)
	w.apply(t, "echo.yaml", echoManifest)
	w.apply(t, "policy.yaml", policyManifest)
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)
	eventually(t, "pods", 2*time.Minute, w.findPods)
	w.firstPing(t)
	p := &parties{world: w, near: w.Workers()[0], other: w.Workers()[1]}
	p.find(t)
	return p
}

// find looks the pods up, opens their namespaces, and listens.
func (p *parties) find(t *testing.T) {
	t.Helper()
	eventually(t, "friends, foes and talkers", 2*time.Minute, func(ctx context.Context) error {
		p.pods = map[string]map[string]*corev1.Pod{"friend": {}, "foe": {}, "talker": {}}
		list, err := p.Client.CoreV1().Pods(policyNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app"})
		if err != nil {
			return err
		}
		n := 0
		for i := range list.Items {
			pod := &list.Items[i]
			if !isReady(pod) || pod.DeletionTimestamp != nil {
				return fmt.Errorf("%s is not ready", pod.Name)
			}
			p.pods[pod.Labels["app"]][pod.Spec.NodeName] = pod
			n++
		}
		if n != 6 {
			return fmt.Errorf("%d pods, want 6", n)
		}
		return nil
	})
	p.ns, p.ears = map[types.UID]*nstest.NS{}, map[types.UID]*ear{}
	for role, pods := range p.pods {
		for _, pod := range pods {
			_, p.ns[pod.UID] = p.sandbox(t, pod)
			if role != "talker" {
				p.ears[pod.UID] = listen(t, p.ns[pod.UID])
			}
		}
	}
}

func (p *parties) ear(role string, n *cluster.Node) *ear { return p.ears[p.pods[role][n.Name].UID] }

// targets are all addresses of the pods of a role.
func (p *parties) targets(t *testing.T, role string) (all []netip.Addr) {
	for _, n := range []*cluster.Node{p.near, p.other} {
		all = append(all, addrs(t, p.pods[role][n.Name])...)
	}
	return all
}

// TestPolicy has NetworkPolicies in force while pods start, things change, and parts fail. Packets are counted where they arrive.
func TestPolicy(t *testing.T) {
	p := policyWorld(t, func(w *world) { w.install(t, policyValues(true)) })
	p.awaitSilence(t)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *parties)
	}{
		{"Starts", testStarts},
		{"Flows", testFlows},
		{"SwitchedOff", testSwitchedOff},
		{"DaemonKilled", testDaemonKilled},
		{"ContainerdRestart", testContainerdRestart},
		{"WithoutAPIServer", testWithoutAPIServer},
		{"PowerCut", testPowerCut},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, p) })
	}
}

func policyValues(on bool) map[string]any {
	return map[string]any{"config": map[string]any{"network": map[string]any{"networkPolicy": on}}}
}

// awaitSilence waits until policies are in force for the talkers that are there.
func (p *parties) awaitSilence(t *testing.T) {
	t.Helper()
	talker := p.ns[p.pods["talker"][p.near.Name].UID]
	for i, addr := range p.targets(t, "foe") {
		foe := p.ear("foe", []*cluster.Node{p.near, p.other}[i/2])
		s := speak(t, talker, fmt.Sprint("await-", addr), addr)
		eventually(t, "policies are in force", time.Minute, func(context.Context) error {
			n := foe.count()
			if time.Sleep(500 * time.Millisecond); foe.count() > n {
				return fmt.Errorf("%s still gets through", s.name)
			}
			return nil
		})
		s.end()
	}
}

// underSpeech has a talker speak to all friends and foes while do runs. Friends must have heard all of it. What foes heard is returned.
func (p *parties) underSpeech(t *testing.T, name string, do func()) (foes int) {
	t.Helper()
	talker := p.ns[p.pods["talker"][p.near.Name].UID]
	nodes := []*cluster.Node{p.near, p.other}
	before := 0
	for _, n := range nodes {
		before += p.ear("foe", n).count()
	}
	var toFriends, toFoes []*speech
	for i, addr := range p.targets(t, "friend") {
		toFriends = append(toFriends, speak(t, talker, fmt.Sprintf("%s-friend-%d", name, i), addr))
	}
	for i, addr := range p.targets(t, "foe") {
		toFoes = append(toFoes, speak(t, talker, fmt.Sprintf("%s-foe-%d", name, i), addr))
	}
	time.Sleep(200 * time.Millisecond)
	do()
	time.Sleep(200 * time.Millisecond)
	for i, s := range toFriends {
		s.wantWhole(t, p.ear("friend", nodes[i/2]))
	}
	for _, s := range toFoes {
		s.end()
	}
	after := 0
	for _, n := range nodes {
		after += p.ear("foe", n).count()
	}
	t.Logf("%d allowed and %d other packets were sent", sent(toFriends), sent(toFoes))
	return after - before
}

func sent(all []*speech) (n int) {
	for _, s := range all {
		n += s.sent
	}
	return n
}

// wantNone is for what foes must not hear.
func wantNone(t *testing.T, foes int) {
	t.Helper()
	if foes > 0 {
		t.Errorf("%d forbidden packets got through", foes)
	}
}

// talk is what a pod does from its first instruction on: 8 targets, of which half are forbidden, each 50 ms.
const talk = `began=$EPOCHREALTIME fd=10
for to in $TO; do eval "exec $fd>/dev/udp/$to/$PORT"; fd=$((fd + 1)); done
exec 3<> <(:)
for ((i = 0; ROUNDS == 0 || i < ROUNDS; i++)); do
	for ((f = 10; f < fd; f++)); do printf '%s %d %s' "$NAME" $i $began >&$f; done
	((i)) || for to in $FOES; do (: >/dev/tcp/$to/$PORT) & done
	read -t 0.05 -u 3
done 2>/dev/null
kill $(jobs -p) 2>/dev/null
exit 0`

// talkerPod is a pod that talks to all friends and foes.
func (p *parties) talkerPod(t *testing.T, name string, rounds int, restart corev1.RestartPolicy) *corev1.Pod {
	join := func(all []netip.Addr) (s string) {
		for _, a := range all {
			s += " " + a.String()
		}
		return s
	}
	friends, foes, no, grace := join(p.targets(t, "friend")), join(p.targets(t, "foe")), false, int64(0)
	env := func(name, value string) corev1.EnvVar { return corev1.EnvVar{Name: name, Value: value} }
	return &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: policyNamespace, Labels: map[string]string{"role": "talker"}},
		Spec: corev1.PodSpec{
			NodeName: p.near.Name, RestartPolicy: restart, TerminationGracePeriodSeconds: &grace,
			EnableServiceLinks: &no, AutomountServiceAccountToken: &no,
			Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
			Containers: []corev1.Container{{
				Name: "talk", Image: p.Agnhost, Command: []string{"bash", "-c", talk},
				Env: []corev1.EnvVar{env("NAME", name), env("TO", friends+foes), env("FOES", foes), env("PORT", strconv.Itoa(talkPort)), env("ROUNDS", strconv.Itoa(rounds))},
			}},
		},
	}
}

// testStarts starts 200 pods, one at a time and 20 at once, that send from their first instruction.
func testStarts(t *testing.T, p *parties) {
	links := watchLinks(t, p.near)
	var before [2]int
	nodes := []*cluster.Node{p.near, p.other}
	for i, n := range nodes {
		before[i] = p.ear("foe", n).count()
	}
	single := p.startTalkers(t, links, "one", 100, 1)
	batch := p.startTalkers(t, links, "many", 5, 20)
	for i, n := range nodes {
		p.ear("foe", n).wantSilence(t, n.Name, before[i])
	}
	single.report(t, "one at a time")
	batch.report(t, "20 at once")
}

// starts is what was measured of many.
type starts struct {
	inForce, first []time.Duration // after the link was made
	early          int             // pods whose first instruction came before their policies were in force
	muted          []int           // datagrams to a friend before the first that got through
}

func (s *starts) report(t *testing.T, what string) {
	t.Helper()
	quantile := func(all []time.Duration, q float64) float64 {
		slices.Sort(all)
		return all[min(int(q*float64(len(all))), len(all)-1)].Seconds() * 1e3
	}
	slices.Sort(s.muted)
	t.Logf("%d starts, %s: from ADD's link to policies in force %.1f ms (median), %.1f ms (p99); to the pod's first instruction %.0f ms, %.0f ms at least (minimum), %.0f ms (p99); %d pods were first; datagrams to a friend before one got through: %d at most",
		len(s.inForce), what, quantile(s.inForce, 0.5), quantile(s.inForce, 0.99), quantile(s.first, 0.5), quantile(s.first, 0), quantile(s.first, 0.99), s.early, s.muted[len(s.muted)-1])
}

// startTalkers starts some pods at once, waits until friends have heard all of them, and so on.
func (p *parties) startTalkers(t *testing.T, links *linkLog, name string, rounds, atOnce int) *starts {
	t.Helper()
	out := &starts{}
	pods := p.Client.CoreV1().Pods(policyNamespace)
	for round := range rounds {
		var wg sync.WaitGroup
		var all []string
		for i := range atOnce {
			pod := p.talkerPod(t, fmt.Sprintf("%s-%d-%d", name, round, i), 1000, corev1.RestartPolicyNever)
			all = append(all, pod.Name)
			wg.Go(func() {
				if _, err := pods.Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		for _, name := range all {
			eventually(t, name+" is heard", time.Minute, func(context.Context) error {
				for _, n := range []*cluster.Node{p.near, p.other} {
					if v := p.ear("friend", n).of(name); v.packets < 10 {
						return fmt.Errorf("%d datagrams", v.packets)
					}
				}
				return nil
			})
		}
		for _, name := range all {
			born, inForce := links.of(policyNamespace + "/" + name)
			v := p.ear("friend", p.near).of(name)
			if born.IsZero() || inForce.IsZero() {
				t.Fatalf("%s: its link was made at %v, its policies were in force at %v", name, born, inForce)
			}
			out.inForce, out.first = append(out.inForce, inForce.Sub(born)), append(out.first, v.began.Sub(born))
			out.muted = append(out.muted, v.first)
			if v.began.Before(inForce) {
				out.early++
			}
			if err := pods.Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
				t.Error(err)
			}
		}
	}
	return out
}

// linkLog has when links of a node were made and when their policies were in force.
type linkLog struct {
	mu            sync.Mutex
	born, inForce map[string]time.Time // by the link's name
	nameOf        map[string]string    // by the pod's
	done          chan struct{}
	closed        sync.WaitGroup
}

// watchLinks begins such a log. It ends with the test.
func watchLinks(t *testing.T, n *cluster.Node) *linkLog {
	t.Helper()
	l := &linkLog{born: map[string]time.Time{}, inForce: map[string]time.Time{}, nameOf: map[string]string{}, done: make(chan struct{})}
	ns, err := netns.GetFromPath(fmt.Sprintf("/proc/%d/ns/net", n.PID()))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	updates := make(chan netlink.LinkUpdate, 4096)
	if err := netlink.LinkSubscribeWithOptions(updates, l.done, netlink.LinkSubscribeOptions{
		Namespace: &ns, ReceiveBufferSize: 4 << 20, ErrorCallback: func(err error) {
			select {
			case <-l.done:
			default:
				t.Errorf("watch links: %v", err)
			}
		},
	}); err != nil {
		t.Fatal(err)
	}
	l.closed.Go(func() {
		for u := range updates {
			l.note(u.Attrs(), time.Now())
		}
	})
	t.Cleanup(func() { close(l.done); l.closed.Wait() })
	return l
}

func (l *linkLog) note(a *netlink.LinkAttrs, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, known := l.born[a.Name]; !known {
		l.born[a.Name] = at
	}
	if f := strings.Fields(a.Alias); len(f) >= 3 {
		l.nameOf[f[2]] = a.Name
	}
	if _, known := l.inForce[a.Name]; !known && a.Group == names.PolicyLinkGroup {
		l.inForce[a.Name] = at
	}
}

func (l *linkLog) of(pod string) (born, inForce time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.born[l.nameOf[pod]], l.inForce[l.nameOf[pod]]
}

// changeBound is how long a change may take here. It is no measure of speed: this machine has two processors for three nodes.
const changeBound = 10 * time.Second

// testFlows changes labels and policies under flows: what is forbidden is cut both ways, and nothing else is lost.
func testFlows(t *testing.T, p *parties) {
	talker, friend := p.pods["talker"][p.near.Name], p.pods["friend"][p.other.Name]
	p.kubectl(t, "label", "pod", "-n", policyNamespace, friend.Name, "far=yes")
	neighbour := p.ear("friend", p.near)
	s := speak(t, p.ns[talker.UID], "neighbour", addrs(t, p.pods["friend"][p.near.Name])[0])
	run := func(args ...string) func(*testing.T) {
		return func(t *testing.T) { p.kubectl(t, args...) }
	}
	for i, addr := range addrs(t, friend) {
		for _, change := range []struct {
			what           string
			forbid, permit func(*testing.T)
		}{
			{"label of the peer", run("label", "pod", "-n", policyNamespace, friend.Name, "role=stranger", "--overwrite"),
				run("label", "pod", "-n", policyNamespace, friend.Name, "role=friend", "--overwrite")},
			{"another policy", func(t *testing.T) { p.apply(t, "by-namespace.yaml", byNamespace) }, run("label", "namespace", policyNamespace, "talks=yes")},
			{"label of the namespace", run("label", "namespace", policyNamespace, "talks-"), run("delete", "networkpolicy", "-n", policyNamespace, "by-namespace")},
		} {
			t.Run(fmt.Sprintf("%s, IPv%d", change.what, 4+2*i), func(t *testing.T) {
				p.cut(t, talker, friend, addr, change.forbid, change.permit)
			})
		}
	}
	s.wantWhole(t, neighbour)
}

// byNamespace lets the friend on the other node be talked to from namespaces with a label only.
const byNamespace = `{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: by-namespace, namespace: policy},
spec: {podSelector: {matchLabels: {far: "yes"}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {talks: "yes"}}}]}]}}`

// cut has both ends of a TCP connection speak, forbids it, and permits it again.
func (p *parties) cut(t *testing.T, from, to *corev1.Pod, addr netip.Addr, forbid, permit func(*testing.T)) {
	var l net.Listener
	p.ns[to.UID].Do(t, func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(addr, talkPort).String())
		return err
	})
	defer l.Close()
	dial := func() (c net.Conn, err error) {
		p.ns[from.UID].Do(t, func() error {
			d := net.Dialer{FallbackDelay: -1, Timeout: 200 * time.Millisecond}
			c, err = d.DialContext(t.Context(), "tcp", l.Addr().String())
			return nil
		})
		return c, err
	}
	client, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	ends := []*talkingEnd{newEnd(client), newEnd(server)}
	time.Sleep(300 * time.Millisecond)
	for i, e := range ends {
		if last, _ := e.state(); time.Since(last) > 200*time.Millisecond {
			t.Errorf("end %d hears nothing while it may", i)
		}
	}
	forbid(t)
	began := time.Now() // the API server has it
	eventually(t, "the connection is cut", changeBound, func(context.Context) error {
		for i, e := range ends {
			if last, _ := e.state(); time.Since(last) < time.Second {
				return fmt.Errorf("end %d still hears the other", i)
			}
		}
		return nil
	})
	for i, e := range ends {
		last, err := e.state()
		t.Logf("end %d heard the other until %.0f ms after the change: %v", i, max(0, last.Sub(began).Seconds()*1e3), err)
		e.c.Close()
		e.wg.Wait()
	}
	if c, err := dial(); err == nil {
		c.Close()
		t.Error("a new connection is possible")
	}
	permit(t)
	began = time.Now()
	eventually(t, "a connection is possible again", changeBound, func(context.Context) error {
		c, err := dial()
		if err == nil {
			c.Close()
		}
		return err
	})
	t.Logf("a new connection %.0f ms after it was permitted", time.Since(began).Seconds()*1e3)
}

// talkingEnd is an end of a connection that writes a byte each 10 ms and notes when it last read one.
type talkingEnd struct {
	c    net.Conn
	wg   sync.WaitGroup
	mu   sync.Mutex
	last time.Time
	err  error
}

func newEnd(c net.Conn) *talkingEnd {
	e := &talkingEnd{c: c, last: time.Now()}
	e.wg.Go(func() {
		for err := error(nil); err == nil; time.Sleep(10 * time.Millisecond) {
			_, err = c.Write([]byte{0})
		}
	})
	e.wg.Go(func() {
		buf := make([]byte, 64)
		for {
			_, err := c.Read(buf)
			e.mu.Lock()
			if err != nil {
				e.err = err
				e.mu.Unlock()
				return
			}
			e.last = time.Now()
			e.mu.Unlock()
		}
	})
	return e
}

func (e *talkingEnd) state() (last time.Time, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.last, e.err
}

// testSwitchedOff switches policies off and on again by an upgrade.
func testSwitchedOff(t *testing.T, p *parties) {
	tables := func(want bool) {
		t.Helper()
		for _, n := range p.Workers() {
			out, err := n.Run(within(t, time.Minute), "nft", "list", "tables")
			if got := strings.Contains(out, "table inet "+names.PolicyTable+"\n"); err != nil || got != want {
				t.Errorf("on %s the table is there: %v (%v), want %v", n.Name, got, err, want)
			}
		}
	}
	foes := p.underSpeech(t, "off", func() {
		p.install(t, policyValues(false))
		p.daemonsReady(t, "headcni")
		eventually(t, "foes are heard", changeBound, func(context.Context) error { return p.foesHear(true) })
		tables(false)
	})
	if foes == 0 {
		t.Error("foes hear nothing: this test proves nothing")
	}
	foes = p.underSpeech(t, "on", func() {
		p.install(t, policyValues(true))
		p.daemonsReady(t, "headcni")
		eventually(t, "foes are not heard any more", changeBound, func(context.Context) error { return p.foesHear(false) })
		tables(true)
	})
	t.Logf("%d packets got through until policies were in force again", foes)
}

// foesHear says whether all foes hear something at present, or none.
func (p *parties) foesHear(want bool) error {
	before := map[*ear]int{}
	for _, pod := range p.pods["foe"] {
		before[p.ears[pod.UID]] = p.ears[pod.UID].count()
	}
	time.Sleep(500 * time.Millisecond)
	for e, n := range before {
		if (e.count() > n) != want {
			return fmt.Errorf("a foe hears something: %v", !want)
		}
	}
	return nil
}

// killDaemon ends the daemon as a crash does, and returns when kubelet has started another.
func (p *parties) killDaemon(t *testing.T) {
	t.Helper()
	pid, err := daemonPID(p.near)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.near.Run(within(t, time.Minute), "kill", "-9", pid); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another daemon", time.Minute, func(context.Context) error {
		again, err := daemonPID(p.near)
		if err == nil && again == pid {
			err = errors.New("the same daemon")
		}
		return err
	})
}

func testDaemonKilled(t *testing.T, p *parties) {
	wantNone(t, p.underSpeech(t, "killed", func() {
		p.killDaemon(t)
		p.daemonsReady(t, "headcni")
		time.Sleep(time.Second)
	}))
}

func testContainerdRestart(t *testing.T, p *parties) {
	wantNone(t, p.underSpeech(t, "containerd", func() {
		for _, n := range p.Workers() {
			if err := n.RestartContainerd(within(t, time.Minute)); err != nil {
				t.Error(err)
			}
		}
	}))
	eventually(t, "nodes", time.Minute, p.WaitReady)
}

// testWithoutAPIServer stops the API server, then kills the daemon, and has static pods start: one that was there before, and a new one.
func testWithoutAPIServer(t *testing.T, p *parties) {
	static := func(name string) func() {
		pod := p.talkerPod(t, name, 0, corev1.RestartPolicyAlways)
		file := p.near.Path(cluster.ManifestsDir + "/" + name + ".json")
		if err := writeJSON(file, pod); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := os.Remove(file); err != nil {
				t.Error(err)
			}
		}
	}
	friend := p.ear("friend", p.other)
	packets := func(name string) int { return friend.of(name).packets }
	hears := func(name string, from int) func(context.Context) error {
		return func(context.Context) error {
			if packets(name) <= from {
				return errors.New("not heard")
			}
			return nil
		}
	}
	defer static("known")()
	eventually(t, "the static pod is heard", time.Minute, hears("known", 0))
	mirror, err := p.Client.CoreV1().Pods(policyNamespace).Get(t.Context(), "known-"+p.near.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	mirror.UID = types.UID(mirror.Annotations[corev1.MirrorPodAnnotationKey]) // the runtime knows it by this
	time.Sleep(2 * time.Second)                                               // a snapshot is kept
	wantNone(t, p.underSpeech(t, "away", func() {
		if err := p.APIServer.Kill(); err != nil {
			t.Fatal(err)
		}
		p.killDaemon(t)
		id, _ := p.sandbox(t, mirror)
		if _, err := p.near.Run(within(t, time.Minute), "ctr", "--namespace=k8s.io", "task", "kill", "--signal=SIGKILL", id); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second) // the old one is gone
		n := packets("known")
		defer static("new")()
		eventually(t, "the restarted static pod is heard without the API server", time.Minute, hears("known", n))
		eventually(t, "the new static pod runs", time.Minute, func(ctx context.Context) error {
			out, err := p.near.Run(ctx, "ctr", "--namespace=k8s.io", "containers", "ls", "-q", `labels."io.kubernetes.pod.name"==new-`+p.near.Name+`,labels."io.kubernetes.container.name"==talk`)
			if err == nil && strings.TrimSpace(out) == "" {
				err = errors.New("no container")
			}
			return err
		})
		time.Sleep(2 * time.Second)
		t.Logf("without the API server, friends heard %d datagrams of the new static pod", packets("new"))
		if err := p.StartAPIServer(within(t, time.Minute)); err != nil {
			t.Fatal(err)
		}
		// kubelet tells of it when it next looks at the pod, which it does each minute and a half at most.
		eventually(t, "the new static pod is heard", 3*time.Minute, hears("new", 0))
	}))
}

// testPowerCut cuts a node's power: its pods start again with it, and talk from their first instruction.
func testPowerCut(t *testing.T, p *parties) {
	pod := p.talkerPod(t, "survivor", 0, corev1.RestartPolicyAlways)
	if _, err := p.Client.CoreV1().Pods(policyNamespace).Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	friend, foe := p.ear("friend", p.other), p.ear("foe", p.other)
	before := foe.count()
	heard := func(least int) func(context.Context) error {
		return func(context.Context) error {
			if v := friend.of(pod.Name); v.packets < least {
				return fmt.Errorf("%d datagrams", v.packets)
			}
			return nil
		}
	}
	eventually(t, "the pod is heard", time.Minute, heard(20))
	if err := p.near.Kill(); err != nil {
		t.Fatal(err)
	}
	n := friend.of(pod.Name).packets
	if err := p.near.Boot(within(t, 2*time.Minute)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pod is heard again", 2*time.Minute, heard(n+100))
	foe.wantSilence(t, "over a power cut", before)
}

// These hold the image and the chart of a version that enforced no policies, as `make image-at` makes them.
const (
	oldImageEnv = "HEADCNI_OLD_IMAGE"
	oldChartEnv = "HEADCNI_OLD_CHART"
)

// TestPolicyUpgrade goes to this version from one that enforced no policies, and back, while pods that policies concern talk.
func TestPolicyUpgrade(t *testing.T) {
	old := cluster.Chart{Image: os.Getenv(oldImageEnv), Dir: os.Getenv(oldChartEnv)}
	if old.Image == "" || old.Dir == "" {
		nstest.Skip(t, oldImageEnv+" and "+oldChartEnv+" are not set; run `make e2e-policy`")
	}
	installOld := func(w *world) {
		if err := w.Install(within(t, time.Minute), old); err != nil {
			t.Fatal(err)
		}
	}
	p := policyWorld(t, func(w *world) {
		if err := w.ImportImage(within(t, time.Minute), old.Image); err != nil {
			t.Fatal(err)
		}
		installOld(w)
	})
	if err := p.foesHearSpeech(t); err != nil {
		t.Fatalf("before the upgrade: %v", err)
	}
	p.underSpeech(t, "upgrade", func() {
		p.install(t, nil)
		p.daemonsReady(t, "headcni")
		eventually(t, "foes are not heard any more", changeBound, func(context.Context) error { return p.foesHear(false) })
	})
	p.startAndHear(t, "after-upgrade", false)
	// The older version knows nothing of the table: it is this one that takes it away.
	foes := p.underSpeech(t, "back", func() {
		p.install(t, policyValues(false))
		p.daemonsReady(t, "headcni")
		installOld(p.world)
		p.daemonsReady(t, "headcni")
	})
	if foes == 0 {
		t.Error("policies are in force without anybody who keeps them so")
	}
	p.startAndHear(t, "after-rollback", true)
}

// foesHearSpeech has a talker speak to foes for a moment, of whom all must hear it.
func (p *parties) foesHearSpeech(t *testing.T) (err error) {
	p.underSpeech(t, "probe", func() { err = p.foesHear(true) })
	return err
}

// startAndHear starts a pod that friends must hear, and foes if they may.
func (p *parties) startAndHear(t *testing.T, name string, foes bool) {
	t.Helper()
	if _, err := p.Client.CoreV1().Pods(policyNamespace).Create(t.Context(), p.talkerPod(t, name, 100, corev1.RestartPolicyNever), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*cluster.Node{p.near, p.other} {
		eventually(t, name+" is heard", time.Minute, func(context.Context) error {
			if v := p.ear("friend", n).of(name); v.packets < 10 {
				return fmt.Errorf("%d datagrams", v.packets)
			}
			return nil
		})
		if got := p.ear("foe", n).of(name).packets; (got > 0) != foes {
			t.Errorf("the foe on %s heard %d datagrams of %s, may hear some: %v", n.Name, got, name, foes)
		}
	}
}
