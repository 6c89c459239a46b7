package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	kubetesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/procfs"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/networking/ipvs"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/enforce"
	"github.com/headcni/headcni/pkg/policy/watch"
	"github.com/headcni/headcni/pkg/reconcile"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// bench is a node with real links and the kernel's own table, and an imitated API server.
type bench struct {
	*testing.T
	client kubetest.Client
	away   atomic.Bool
	host   *nstest.NS
	// dir is on disk, run goes with the boot.
	dir, run string
	table    *enforce.Table
	links    podlink.Handle
	watch    *watch.Watch
	agent    *Agent
	events   []kube.Event
	calls    []string // to table and links, in order
}

// Apply is the table's, and notes that it was called.
func (b *bench) Apply(ctx context.Context, want *policy.Ruleset, opt policy.Options) (enforce.Change, error) {
	b.calls = append(b.calls, "apply")
	return b.table.Apply(ctx, want, opt)
}

func (b *bench) Recheck(ctx context.Context, allowed func(policy.Flow) (bool, bool)) (int, error) {
	return b.table.Recheck(ctx, allowed)
}

func (b *bench) Remove(ctx context.Context) error { return b.table.Remove(ctx) }

func (b *bench) Attached() (map[string]podlink.Attachment, error) { return b.links.Attached() }

// SetGroup is the links', and notes who was let out.
func (b *bench) SetGroup(group uint32, indexes ...int) error {
	if len(indexes) > 0 {
		b.calls = append(b.calls, fmt.Sprint("group ", group))
	}
	return b.links.SetGroup(group, indexes...)
}

// hold has each packet meet the rules, as who carries flows past them does.
func (b *bench) hold() (release func(), err error) {
	b.calls = append(b.calls, "hold")
	return func() { b.calls = append(b.calls, "release") }, nil
}

var errAway = errors.New("connection refused")

func newBench(t *testing.T, objects ...runtime.Object) *bench {
	b := &bench{T: t, client: kubetest.New(objects...), host: nstest.New(t), dir: t.TempDir(), run: t.TempDir()}
	b.client.PrependReactor("*", "*", func(kubetesting.Action) (bool, runtime.Object, error) { return b.away.Load(), nil, errAway })
	t.Cleanup(func() { b.links.Close() })
	return b
}

// start is what a new process begins with.
func (b *bench) start(opt policy.Options) {
	b.Helper()
	nodes := func() ([]nodeview.Node, bool) {
		return []nodeview.Node{{Name: "a", PodCIDRs: prefixes("10.244.1.0/24")}, {Name: "b", PodCIDRs: prefixes("10.244.2.0/24")}}, !b.away.Load()
	}
	b.watch = watch.New(b.client, "a", nodes)
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan struct{})
	go func() { b.watch.Run(ctx, func() {}); close(ended) }()
	b.Cleanup(func() { cancel(); <-ended })
	b.table, b.calls, b.events = enforce.New(filepath.Join(b.run, "chains.json")), nil, nil
	b.agent = New(Config{
		Log: slog.New(slog.NewTextHandler(b.Output(), nil)), Node: "a", Cluster: b.watch, Table: b, Links: b, Options: opt, Hold: b.hold,
		File: filepath.Join(b.dir, "policy.json"), Note: filepath.Join(b.run, "kept"), Changed: func() {}, Tell: func(e kube.Event) { b.events = append(b.events, e) },
		Synced: func(float64) {}, Failed: func() {},
	})
	saver := &b.agent.saver
	b.Cleanup(func() {
		select {
		case <-saver.stop: // the test has ended it
		default:
			saver.end()
		}
	})
}

// pass makes one, and returns what keeps policies from being in force.
func (b *bench) pass() error {
	b.Helper()
	b.host.Do(b, func() error { b.agent.pass(b.Context()); return nil })
	return b.agent.Err()
}

// passUntil makes passes until what it looks at is as it should be.
func (b *bench) passUntil(what string, ok func() bool) {
	b.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if b.pass(); ok() {
			return
		}
	}
	b.Fatalf("did not come to pass in 20 s: %s; %v, %+v", what, b.agent.Err(), b.agent.State())
}

// attach makes a pod's link as the plugin does, up and with carrier.
func (b *bench) attach(id, label, uid, addr string) string {
	b.Helper()
	name, inside := podlink.Name(id, "eth0"), nstest.New(b.T)
	b.host.Run(b, "ip", "link", "add", name, "type", "veth", "peer", "eth0", "netns", inside.Name)
	b.host.Run(b, "ip", "link", "set", name, "alias", strings.TrimSpace("net "+id+"/eth0 "+label+" "+uid), "up")
	b.host.Run(b, "ip", "route", "add", addr, "dev", name, "proto", "static")
	inside.Run(b, "ip", "link", "set", "eth0", "up")
	for end := time.Now().Add(5 * time.Second); !strings.Contains(b.host.Run(b, "ip", "link", "show", name), "state UP"); {
		if time.Sleep(time.Millisecond); time.Now().After(end) {
			b.Fatal("no carrier: ", name)
		}
	}
	return name
}

func (b *bench) grouped(link string) bool {
	b.Helper()
	return strings.Contains(b.host.Run(b, "ip", "link", "show", link), "group 4278")
}

// listed is the table as nft shows it, without counts.
func (b *bench) listed() string {
	b.Helper()
	return b.host.Run(b, "nft", "-s", "list", "ruleset")
}

func pod(name, uid string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(uid), Labels: map[string]string{"app": name}},
		Spec:       corev1.PodSpec{NodeName: "a"},
	}
}

// denyAll isolates the pods with a label.
func denyAll(app string) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "deny-" + app, UID: "p-" + types.UID(app)},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}, PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
		},
	}
}

var strict = policy.Options{Strict: true}

// TestLife: from switching on beside pods that run, over pods that come, wait and go, to switching off.
func TestLife(t *testing.T) {
	b := newBench(t, pod("web", "u1"), denyAll("web"), denyAll("late"), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns"}})
	first := b.attach("c1", "ns/web", "u1", "10.244.1.10")
	nobody := b.attach("c0", "", "", "10.244.1.9")
	b.start(strict)
	b.passUntil("policies in force", func() bool { return b.agent.Err() == nil && b.grouped(first) && b.grouped(nobody) })
	if !b.grouped(first) || !b.grouped(nobody) || !strings.Contains(b.listed(), "10.244.1.10 : goto") {
		t.Error(b.listed())
	}
	if !slices.Equal(b.calls, []string{"group 4278", "apply"}) {
		t.Errorf("pods that run lose packets when policy is switched on: %q", b.calls)
	}
	b.calls = nil
	b.pass()
	if len(b.calls) > 0 {
		t.Errorf("nothing has changed, and yet %q", b.calls)
	}

	late := b.attach("c2", "ns/late", "u2", "10.244.1.11")
	b.pass()
	if u := b.agent.State().Unknown; b.grouped(late) || len(u) != 1 || u[0].Pod != "ns/late" {
		t.Errorf("let out, or not seen: %+v", u)
	}
	b.host.Run(t, "ip", "link", "set", late, "group", "4278")
	b.calls = nil
	if b.pass(); b.grouped(late) || !slices.Equal(b.calls, []string{"hold", "group 0", "release"}) {
		t.Errorf("a pod of which nothing is known stays let out, or its flows do: %q", b.calls)
	}
	if _, err := b.client.CoreV1().Pods("ns").Create(t.Context(), pod("late", "u2"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	b.calls = nil
	b.passUntil("the pod let out", func() bool { return b.grouped(late) })
	if !slices.Equal(b.calls, []string{"apply", "group 4278"}) || !strings.Contains(b.listed(), "10.244.1.11 : goto") {
		t.Errorf("let out before its policies were in: %q", b.calls)
	}

	b.host.Run(t, "ip", "link", "set", first, "group", "0")
	b.pass()
	if !b.grouped(first) {
		t.Error("a group that somebody took stays so")
	}
	if err := b.client.CoreV1().Pods("ns").Delete(t.Context(), "late", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	b.pass()
	if !b.grouped(late) || !strings.Contains(b.listed(), "10.244.1.11 : goto") {
		t.Error("a pod whose link is there is judged no more")
	}
	b.host.Run(t, "ip", "link", "del", late)
	b.pass()
	if strings.Contains(b.listed(), "10.244.1.11") {
		t.Error("a pod whose link is gone is still there:", b.listed())
	}

	b.host.Do(t, func() error { return errors.Join(Off(t.Context(), b, b), Off(t.Context(), b, b)) })
	if b.grouped(first) || b.grouped(nobody) || strings.Contains(b.listed(), policy.Table) {
		t.Error(b.listed())
	}
}

// TestIPVS: policies are not said to be in force where services go round them; the link is seen as it comes and goes, and what is
// written holds all the same.
func TestIPVS(t *testing.T) {
	for _, name := range ipvs.Links {
		b := newBench(t, pod("web", "u1"), denyAll("web"), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns"}})
		first := b.attach("c1", "ns/web", "u1", "10.244.1.10")
		b.start(strict)
		b.passUntil("policies in force", func() bool { return b.agent.Err() == nil && b.grouped(first) })
		var changes <-chan struct{}
		b.host.Do(t, func() (err error) { changes, err = LinkChanges(t.Context()); return err })
		told := func() {
			t.Helper()
			select {
			case <-changes:
			case <-time.After(20 * time.Second):
				t.Fatal("nobody is told")
			}
		}
		b.host.Run(t, "ip", "link", "add", name, "type", "bridge") // kube-proxy's is a dummy, which not every kernel has
		told()
		if err := b.pass(); err == nil || errors.As(err, new(reconcile.Waiting)) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "--proxy-mode=nftables") {
			t.Errorf("%s: %v", name, err)
		}
		if !strings.Contains(b.listed(), "10.244.1.10 : goto") {
			t.Error("what holds without a service is gone:", b.listed())
		}
		b.host.Run(t, "ip", "link", "del", name)
		for b.pass() != nil {
			told() // the kernel may say the link's end in pieces
		}
	}
}

// TestUnknownIsTold: of a pod that waits for long people hear, once, with the reason, and of the end of it.
func TestUnknownIsTold(t *testing.T) {
	b := newBench(t)
	b.attach("c1", "ns/web", "u1", "10.244.1.10")
	b.start(strict)
	b.passUntil("policies in force", func() bool { return b.agent.Err() == nil })
	owners := []owner{{link: link(1, "ns/web", "u1"), why: "no such pod"}}
	n, now := newNotes(func(e kube.Event) { b.events = append(b.events, e) }), time.Now()
	for _, after := range []time.Duration{0, patience - time.Millisecond, patience, 2 * patience} {
		list, next := n.unknown(owners, "; away", true, now.Add(after))
		if told := len(b.events); (told > 0) != (after >= patience) || told > 1 || len(list) != 1 || !list[0].Since.Equal(now) || after < patience && next > patience-after {
			t.Errorf("after %v: %d events, %+v, next in %v", after, told, list, next)
		}
	}
	if e := b.events[0]; e.Resolved || e.About.Kind != "Pod" || e.About.Namespace != "ns" || e.About.Name != "web" || e.About.UID != "u1" ||
		!strings.Contains(e.Note, "no such pod; away") || !strings.Contains(e.Note, "isolated") {
		t.Errorf("%+v", e)
	}
	owners[0].known = true
	n.unknown(owners, "", true, now)
	n.unknown(owners, "", true, now)
	if len(b.events) != 2 || !b.events[1].Resolved {
		t.Errorf("%+v", b.events)
	}
}

// TestFaultIsTold: what a policy says wrongly is said once, on the policy.
func TestFaultIsTold(t *testing.T) {
	bad := denyAll("web")
	bad.Spec.PodSelector.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: "x", Operator: "Near"}}
	b := newBench(t, pod("web", "u1"), bad)
	b.attach("c1", "ns/web", "u1", "10.244.1.10")
	b.start(strict)
	b.passUntil("policies in force", func() bool { return b.agent.Err() == nil })
	b.agent.Repair()
	b.pass()
	if len(b.events) != 1 || b.events[0].About.Kind != "NetworkPolicy" || b.events[0].About.UID != bad.UID || !strings.Contains(b.events[0].Note, "Near") {
		t.Errorf("%+v", b.events)
	}
	if !strings.Contains(b.listed(), "10.244.1.10 : goto") {
		t.Error("the pod that it may have meant is open:", b.listed())
	}
}

// TestAway: without the API server a new process goes by what the last one knew, and what nobody knew waits.
func TestAway(t *testing.T) {
	db := pod("db", "u9")
	db.Spec.NodeName, db.Status.PodIPs = "b", []corev1.PodIP{{IP: "10.244.2.9"}}
	fromDB := denyAll("web")
	fromDB.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}}}}}}
	b := newBench(t, pod("web", "u1"), pod("again", "u2"), db, fromDB, denyAll("again"), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns"}})
	first := b.attach("c1", "ns/web", "u1", "10.244.1.10")
	b.start(strict)
	b.passUntil("policies in force", func() bool { return b.agent.Err() == nil && b.grouped(first) })
	b.agent.saver.end()
	before := b.listed()
	if !strings.Contains(before, "10.244.2.9") {
		t.Fatal(before)
	}

	b.away.Store(true)
	b.start(strict)
	restarted := b.attach("c2", "ns/again", "u2", "10.244.1.11") // kubelet starts it again
	other := b.attach("c3", "ns/other", "u3", "10.244.1.12")
	if err := b.pass(); err == nil || b.agent.State().InForce {
		t.Error("what is old is used before the API server could answer:", err)
	}
	if !b.grouped(first) || b.listed() != before {
		t.Errorf("a restart changed what was in force:\n%s\n%s", before, b.listed())
	}
	b.passUntil("what the last process knew in force", func() bool { return b.agent.State().Stale && b.grouped(restarted) })
	if after := b.listed(); !b.grouped(first) || b.grouped(other) ||
		!strings.Contains(after, "10.244.2.9") || !strings.Contains(after, "10.244.1.11 : goto") || strings.Contains(after, "10.244.1.12") {
		t.Errorf("%s\n%+v", after, b.agent.State())
	}
	if u := b.agent.State().Unknown; len(u) != 1 || u[0].Pod != "ns/other" || !strings.Contains(u[0].Why, "connection refused") {
		t.Errorf("%+v", u)
	}

	b.away.Store(false)
	b.passUntil("the API server's word in force", func() bool { return !b.agent.State().Stale })
	if b.agent.Err() != nil || b.grouped(other) || !b.grouped(first) {
		t.Error(b.agent.Err())
	}
}

// TestAwayBehind: what is on disk is older than what the kernel holds where it could not be written, as on a full disk, or not yet. Without
// the API server a new process takes nothing away for it: pods that run keep all, and new ones wait. Where there is no table, old policies
// are better than none.
func TestAwayBehind(t *testing.T) {
	b := newBench(t, pod("web", "u1"), pod("again", "u2"), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns"}})
	makeRoom := nstest.FillDisk(t, b.dir)
	makeRoom()
	first := b.attach("c1", "ns/web", "u1", "10.244.1.10")
	b.start(strict)
	kept := func() bool {
		_, err := os.Stat(b.agent.Note)
		return err == nil
	}
	b.passUntil("policies in force and kept", func() bool { return b.agent.Err() == nil && b.grouped(first) && kept() })
	if err := os.WriteFile(filepath.Join(b.dir, "ballast"), make([]byte, 64<<10), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	if _, err := b.client.NetworkingV1().NetworkPolicies("ns").Create(t.Context(), denyAll("web"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	isolated := func() bool { return strings.Contains(b.listed(), "10.244.1.10 : goto") }
	b.passUntil("the new policy in force", isolated)
	b.agent.saver.end()

	b.away.Store(true)
	b.start(strict)
	again := b.attach("c2", "ns/again", "u2", "10.244.1.11")
	b.agent.began = time.Now().Add(-time.Hour)
	b.passUntil("an answer", func() bool { return !errors.As(b.agent.Err(), new(reconcile.Waiting)) })
	if !isolated() || !b.grouped(first) || b.grouped(again) || b.agent.Err() == nil {
		t.Errorf("policies of a while ago: isolated %v, %v\n%s", isolated(), b.agent.Err(), b.listed())
	}
	b.host.Run(t, "nft", "delete", "table", "inet", policy.Table)
	b.start(strict)
	b.agent.began = time.Now().Add(-time.Hour)
	b.passUntil("what is known in force", func() bool { return b.agent.State().Stale && b.grouped(again) })
	b.start(strict)
	b.agent.began = time.Now().Add(-time.Hour)
	b.passUntil("the same, which the kernel holds by now", func() bool { return b.agent.State().Stale })

	makeRoom()
	b.away.Store(false)
	b.passUntil("the API server's word in force, and kept", func() bool { return !b.agent.State().Stale && isolated() && kept() })
	b.away.Store(true)
	b.start(strict)
	b.agent.began = time.Now().Add(-time.Hour)
	b.passUntil("what was written in force", func() bool { return b.agent.State().Stale })
	if !isolated() || b.agent.Err() != nil {
		t.Errorf("%v\n%s", b.agent.Err(), b.listed())
	}
}

// TestHalfMade: pods that run lose nothing either where a process before was killed when it had made the table, and not yet its rules.
func TestHalfMade(t *testing.T) {
	for what, made := range map[string]string{
		"a table": "add table inet " + policy.Table, "flushed": "add table inet " + policy.Table + "; add chain inet " + policy.Table + " ingress",
	} {
		b := newBench(t, pod("web", "u1"), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns"}})
		first := b.attach("c1", "ns/web", "u1", "10.244.1.10")
		b.host.Run(t, "nft", made)
		b.start(strict)
		b.passUntil("policies in force", func() bool { return b.agent.Err() == nil && b.grouped(first) })
		if !slices.Equal(b.calls, []string{"group 4278", "apply"}) {
			t.Errorf("%s: pods that run lose packets: %q", what, b.calls)
		}
	}
}

// TestAwayAtFirst: where nobody ever knew anything, pods that run are left alone, and on an empty node the gate stands.
func TestAwayAtFirst(t *testing.T) {
	for _, running := range []bool{true, false} {
		b := newBench(t)
		b.away.Store(true)
		var link string
		if running {
			link = b.attach("c1", "ns/web", "u1", "10.244.1.10")
		}
		b.start(strict)
		b.agent.began = time.Now().Add(-time.Hour)
		b.passUntil("an answer", func() bool { return !errors.As(b.agent.Err(), new(reconcile.Waiting)) })
		if has := strings.Contains(b.listed(), policy.Table); has == running || (b.agent.Err() != nil) != running {
			t.Errorf("with pods: %v, the table is there: %v; %v", running, has, b.agent.Err())
		}
		if running && b.grouped(link) {
			t.Error("in a group without a table")
		}
	}
}

// TestOtherBoot: of a boot before only what concerns the own node is used.
func TestOtherBoot(t *testing.T) {
	file := filepath.Join(t.TempDir(), "policy.json")
	s := saver{file: file, note: filepath.Join(filepath.Dir(file), "kept"), log: slog.New(slog.DiscardHandler), stop: make(chan struct{})}
	c := clusterOf(web("u1", "10.244.1.10"), &policy.Pod{Namespace: "ns", Name: "db", UID: "db", Node: "b", IPs: addrs("10.244.2.2")})
	c.Policies = []*networkingv1.NetworkPolicy{denyAll("web")}
	s.save(c.Snapshot, c.Static)
	s.end()
	boot, err := procfs.Read(paths.BootID)
	if err != nil {
		t.Fatal(err)
	}
	got, err := load(file, "a", boot)
	if err != nil || len(got.Pods) != 2 || len(got.Policies) != 1 || got.Policies[0].UID != "p-web" || got.Static["mirror"] != "hash" {
		t.Fatalf("%v, %+v", err, got)
	}
	if got, err = load(file, "a", "another"); err != nil || len(got.Pods) != 1 || got.Pods[0].Node != "a" {
		t.Errorf("%v, %+v", err, got)
	}
	if got, err = load(file, "b", boot); err != nil || got != nil {
		t.Errorf("another node's: %v, %+v", err, got)
	}
	// A file that lacks its end would lack policies.
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for n := range whole[:len(whole)-1] { // the last byte ends a line
		if err := os.WriteFile(file, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := load(file, "a", boot); err == nil || got != nil {
			t.Fatalf("%d of %d bytes: %v, %+v", n, len(whole), err, got)
		}
	}
}
