package explain_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/enforce"
	"github.com/headcni/headcni/pkg/policy/explain"
	"github.com/headcni/headcni/pkg/policy/nflog"
	"github.com/headcni/headcni/pkg/policy/report"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// TestAsksTheKernel holds real tables against what policies say, and sees what somebody takes out of one.
func TestAsksTheKernel(t *testing.T) {
	nstest.Require(t)
	node := nstest.New(t)
	table := enforce.New(filepath.Join(t.TempDir(), "chains"))
	in := func(st *explain.State) *explain.Explainer {
		node.Do(t, func() error {
			_, err := table.Apply(t.Context(), st.Rules, policy.Options{Strict: true})
			return err
		})
		return &explain.Explainer{State: func() (*explain.State, error) { return st, nil }, Kernel: table, Links: links{s: st.Snapshot}}
	}
	r := rand.New(rand.NewPCG(3, 4))
	asked := 0
	for range 3 {
		s := policytest.Cluster(r)
		x := in(&explain.State{Snapshot: s, Rules: policy.Compile(s), Strict: true})
		node.Do(t, func() error {
			for _, p := range s.Pods[:policytest.LocalPods] {
				e, err := x.Explain(t.Context(), report.Question{Pod: p.Namespace + "/" + p.Name})
				if err != nil {
					return err
				}
				if e.Wrong() {
					t.Errorf("%s: the kernel holds what was compiled, and is said to differ: %+v", p.Name, e)
				}
				for _, a := range e.Answers {
					asked += a.Sides[0].Kernel.Asked + a.Sides[1].Kernel.Asked
				}
			}
			return nil
		})
	}
	if asked < 500 {
		t.Errorf("the kernel was asked about %d connections only", asked)
	}

	s := shop(t)
	x := in(&explain.State{Snapshot: s, Rules: policy.Compile(s), Strict: true})
	ask := func(want bool, text string, q report.Question) {
		t.Helper()
		q.Namespace = "shop"
		node.Do(t, func() error {
			e, err := x.Explain(t.Context(), q)
			if err != nil {
				return err
			}
			var b strings.Builder
			if err := e.Print(&b); err != nil {
				return err
			}
			if e.Wrong() != want || !strings.Contains(b.String(), text) {
				t.Errorf("%+v: differs %t, want %t, and %q in\n%s", q, e.Wrong(), want, text, b.String())
			}
			return nil
		})
	}
	fromGateway := report.Question{Pod: "web", From: "edge/gw", Port: "http"}
	ask(false, "ALLOWED\n", fromGateway)
	for name, set := range policy.Compile(s).Sets {
		if set.Kind == policy.Addresses {
			node.Run(t, "nft", "flush", "set", "inet", policy.Table, name)
		}
	}
	ask(true, "ALLOWED by policies, but THE KERNEL DOES OTHERWISE", fromGateway)
	node.Run(t, "nft", "flush", "map", "inet", policy.Table, "in4")
	ask(true, "DENIED by policies, but THE KERNEL DOES OTHERWISE", report.Question{Pod: "web", From: "open", Port: "80"})
	node.Run(t, "nft", "delete", "table", "inet", policy.Table)
	ask(true, "THE KERNEL COULD NOT BE ASKED", fromGateway)
}

// TestSeesDeniedPackets sends real packets to a pod, one by one and as a flood, and reads what the kernel's rules log.
func TestSeesDeniedPackets(t *testing.T) {
	nstest.Require(t)
	node, inside, outside := nstest.New(t), nstest.New(t), nstest.New(t)
	s := shop(t)
	web, open, gw := addr("10.244.1.10"), addr("10.244.1.11"), addr("10.244.2.30")
	link := func(name string, ns *nstest.NS, own ...netip.Addr) {
		node.Run(t, "sh", "-ec", fmt.Sprintf(`ip link add %[1]s address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02 netns %[2]s
			ip link set %[1]s group %[3]d up; echo 1 >/proc/sys/net/ipv4/ip_forward`, name, ns.Name, names.PolicyLinkGroup))
		ns.Run(t, "sh", "-ec", `ip link set eth0 up; ip link set lo up; ip neigh add 169.254.1.1 lladdr 02:00:00:00:00:01 nud permanent dev eth0
			ip route add 169.254.1.1 dev eth0; ip route add default via 169.254.1.1`)
		for _, a := range own {
			ns.Run(t, "ip", "addr", "add", a.String()+"/32", "dev", "lo")
			node.Run(t, "sh", "-ec", fmt.Sprintf("ip neigh add %[1]s lladdr 02:00:00:00:00:02 nud permanent dev %[2]s; ip route add %[1]s dev %[2]s", a, name))
		}
	}
	link("hcweb", inside, web)
	link("wan", outside, open, gw)
	table := enforce.New(filepath.Join(t.TempDir(), "chains"))
	rules := policy.Compile(s)
	logs := func(on bool) {
		node.Do(t, func() error {
			_, err := table.Apply(t.Context(), rules, policy.Options{Strict: true, Log: on})
			return err
		})
	}
	logs(false)
	x := &explain.Explainer{State: func() (*explain.State, error) { return &explain.State{Snapshot: s, Rules: rules, Strict: true}, nil }, Kernel: table, Links: links{s: s}}
	d := &explain.Drops{Explainer: x, Log: logs, Read: func(ctx context.Context, group uint16, ready func(), do func(nflog.Packet), lost func()) (err error) {
		node.Do(t, func() error { err = nflog.Read(ctx, group, ready, do, lost); return nil })
		return err
	}}
	ctx, stop := context.WithCancel(t.Context())
	events, done := make(chan report.Event, 10000), make(chan error, 1)
	go func() {
		done <- d.Follow(ctx, "shop", "web", func(e report.Event) error { events <- e; return nil })
	}()
	if e := <-events; e.Started == nil {
		t.Fatalf("told first is %+v", e)
	}
	send := func(ns *nstest.NS, src, dst netip.Addr, port uint16, n int) {
		ns.Do(t, func() error {
			for i := range n {
				if err := nstest.Send(nstest.Packet(src, dst, 6, nstest.SYN(src, dst, uint16(2000+i), port))); err != nil {
					return err
				}
			}
			return nil
		})
	}
	expect := func(text string) {
		t.Helper()
		select {
		case e := <-events:
			if e.Drop == nil || !strings.Contains(e.Drop.Text(), text) {
				t.Errorf("told is %+v, want %q", e, text)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("not told of %q", text)
		}
	}
	send(outside, gw, web, 443, 1) // allowed
	send(outside, gw, web, 80, 1)
	expect("ingress edge/gw (10.244.2.30) -> shop/web (10.244.1.10) 80/tcp: isolated by shop/deny, shop/web")
	send(inside, web, open, 81, 1)
	expect("egress  shop/web (10.244.1.10) -> shop/open (10.244.1.11) 81/tcp: isolated by shop/web")
	for _, way := range []struct {
		ns       *nstest.NS
		src, dst netip.Addr
		text     string
	}{
		{outside, gw, web, "ingress edge/gw (10.244.2.30) -> shop/web (10.244.1.10)"},
		{inside, web, gw, "egress  shop/web (10.244.1.10) -> edge/gw (10.244.2.30)"},
	} {
		way.ns.Do(t, func() error { return nstest.Send(nstest.Shapes(way.src, way.dst, 3000)["SYN+FIN"]) })
		expect(way.text + " 9/tcp: it belongs to no connection")
	}
	node.Run(t, "ip", "link", "set", "hcweb", "group", "0")
	send(inside, web, gw, 82, 1)
	expect("egress  shop/web (10.244.1.10) -> edge/gw (10.244.2.30) 82/tcp: policies not known yet")
	node.Run(t, "ip", "link", "set", "hcweb", "group", fmt.Sprint(names.PolicyLinkGroup))

	const flood = 5000
	began := time.Now()
	send(outside, gw, web, 80, flood)
	counted := func() (n uint64) {
		node.Do(t, func() error {
			denied, err := table.Denied(t.Context())
			n = denied.In[web]
			return err
		})
		return n
	}
	for until := time.Now().Add(20 * time.Second); counted() < flood+1; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%d packets are counted, want %d", counted(), flood+1)
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	told, most := len(events), 20+int(10*time.Since(began).Seconds())+1
	if told < 10 || told > most {
		t.Errorf("of a flood of %d packets %d were told, want 10 to %d", flood, told, most)
	}
	if strings.Contains(node.Run(t, "nft", "list", "ruleset"), "group 4278 snaplen") {
		t.Error("nobody follows, and the kernel logs")
	}
}
