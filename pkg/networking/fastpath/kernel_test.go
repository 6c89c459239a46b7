package fastpath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/policy"
)

// A flow that stands goes past the rules, both ways, and meets them again at once when the flowtable is held. Without flowtables in the
// kernel it meets them all the time, and that is all.
func TestFlowsGoPastTheRules(t *testing.T) {
	w := newWorld(t)
	able := w.up()
	flows := w.beginAll(w.a, w.b)
	for _, f := range flows {
		if !able {
			if f.become(10) {
				t.Errorf("%s goes past the rules", f)
			}
			continue
		}
		f.fast()
		since := f.count()
		f.alive("past the rules", true)
		if n := since(); n != 0 {
			t.Errorf("%d packets of %s met the rules", n, f)
		}
	}
	if !able {
		return
	}
	release := w.hold()
	for _, f := range flows {
		since := f.count()
		f.alive("held", true)
		if n := since(); n < 2*some {
			t.Errorf("held: %d of %d packets of %s met the rules", n, 2*some, f)
		}
	}
	if w.pass(); flows[0].become(5) {
		t.Errorf("held, %s goes past the rules", flows[0])
	}
	release()
	w.up()
	for _, f := range flows {
		f.fast()
	}
}

func (w *world) hold() (release func()) {
	w.Helper()
	w.node.Do(w, func() (err error) {
		release, err = w.path.Hold()
		return err
	})
	return release
}

// A change of policies that forbids flows ends them, both ways, before Apply returns, and for good; what was denied is counted. Those of a
// neighbour go on, and come to go past the rules again.
func TestPolicyEndsFlows(t *testing.T) {
	w := newWorld(t)
	allowed, forbidden := w.toB(w.a, w.c), w.toB(w.c)
	w.apply(allowed)
	w.recheck(allowed)
	able := w.up()
	flows, neighbours := w.beginAll(w.a, w.b), w.beginAll(w.c, w.b)
	for _, f := range append(slices.Clone(flows), neighbours...) {
		if able {
			f.fast()
		} else {
			f.alive("allowed", true)
		}
	}
	denied := w.denied()
	w.apply(forbidden)
	for _, f := range flows {
		f.alive("forbidden", false)
		if now := w.denied(); now == denied {
			t.Errorf("nothing of %s was counted as denied", f)
		} else {
			denied = now
		}
	}
	w.pass()
	for _, f := range flows {
		f.alive("forbidden, and the flowtable is back", false)
	}
	w.recheck(forbidden)
	for _, f := range neighbours {
		f.alive("a neighbour", true)
		if able {
			f.fast()
		}
	}
	for _, f := range flows {
		f.alive("forbidden, and others go past the rules", false)
	}
	if !able {
		return
	}
	w.apply(allowed)
	w.recheck(allowed)
	w.pass()
	for _, f := range flows {
		if f.network == "udp" { // TCP has had a reset
			f.fast()
		}
	}
}

// Packets of a flow that is cut, sent by another process all the time, do not get through the change: none arrives after Apply has returned.
func TestPolicyEndsAFlood(t *testing.T) {
	w := newWorld(t)
	allowed, forbidden := w.toB(w.a), w.toB()
	rounds := 5
	if testing.Short() {
		rounds = 2
	}
	for family := range 2 {
		for round := range rounds {
			w.apply(allowed)
			w.recheck(allowed)
			able := w.up()
			f := w.begin("udp", family, w.a, w.b)
			if able {
				f.fast()
			} else {
				f.alive("allowed", true)
			}
			ctx, stop := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() {
				for ctx.Err() == nil {
					_, _ = f.client.Write([]byte("x")) // what was refused before is nothing
				}
			})
			w.apply(forbidden)
			nfnl.AwaitPackets() // those that had passed the rules
			rest := f.drain(t)
			w.pass()
			if n := f.drain(t); n > 0 {
				t.Errorf("family %d, round %d: %d packets of a forbidden flood arrived, after %d that had before", family, round, n, rest)
			}
			stop()
			wg.Wait()
			_, _ = f.client.Close(), f.serv.Close()
			w.node.Run(t, "conntrack", "-F")
		}
	}
}

// drain reads what the server has got, until nothing comes for a while.
func (f *flow) drain(t *testing.T) (n int) {
	t.Helper()
	for ; n < 1_000_000; n++ { // more than any socket holds
		_ = f.serv.SetReadDeadline(time.Now().Add(5 * short))
		if _, err := f.serv.Read(make([]byte, len(word))); err != nil {
			return n
		}
	}
	t.Fatal("the flood goes on")
	return n
}

// Where the flowtable cannot be taken away, policies are not written: they would not be in force.
func TestHoldFails(t *testing.T) {
	w := newWorld(t)
	w.apply(w.toB(w.a))
	fault := errors.New("no netlink")
	w.table.Hold = func() (func(), error) { return nil, fault }
	w.node.Do(t, func() error {
		if _, err := w.table.Apply(t.Context(), w.toB(), policy.Options{Strict: true}); !errors.Is(err, fault) {
			t.Errorf("Apply: %v, want %v", err, fault)
		}
		return nil
	})
	w.begin("udp", 0, w.a, w.b).alive("as before", true)
}

// Policies that are switched on end flows that they forbid.
func TestPoliciesSwitchedOn(t *testing.T) {
	w := newWorld(t)
	able := w.up()
	flows := w.beginAll(w.a, w.b)
	for _, f := range flows {
		if able {
			f.fast()
		} else {
			f.alive("without policies", true)
		}
	}
	w.apply(w.toB())
	for _, f := range flows {
		f.alive("switched on", false)
	}
	w.pass()
	for _, f := range flows {
		f.alive("switched on, and the flowtable is back", false)
	}
}

// Who sends another's packets, in a flow that goes past the rules, meets the rules that keep him from it.
func TestForgedPacketsOfAFlow(t *testing.T) {
	w := newWorld(t)
	able := w.up()
	for _, f := range w.beginAll(w.a, w.b) {
		if able {
			f.fast()
		} else {
			f.alive("at first", true)
		}
		before, since := w.drops("pod_forged"), f.count()
		src, dst := w.a.addrs[f.family], w.b.addrs[f.family]
		for _, way := range []struct {
			src, dst netip.Addr
			from, to uint16
		}{{src, dst, own, port}, {dst, src, port, own}} {
			packet := nstest.Packet(way.src, way.dst, unix.IPPROTO_UDP, nstest.UDP(way.src, way.dst, way.from, way.to, "forged"))
			if f.network == "tcp" {
				packet = nstest.Packet(way.src, way.dst, unix.IPPROTO_TCP, nstest.Segment(way.src, way.dst, way.from, way.to, 1, 1, "forged"))
			}
			w.c.ns.Do(t, func() error {
				for range some {
					if err := nstest.Send(packet); err != nil {
						return err
					}
				}
				return nil
			})
		}
		for _, end := range []net.Conn{f.client, f.serv} {
			_ = end.SetReadDeadline(time.Now().Add(short))
			if n, err := end.Read(make([]byte, 100)); err == nil {
				t.Errorf("%s: %d forged bytes arrived", f, n)
			}
		}
		if n := w.drops("pod_forged") - before; n != 2*some {
			t.Errorf("%s: %d of %d forged packets were dropped for that", f, n, 2*some)
		}
		if n := since(); n != 0 {
			t.Errorf("%s: %d forged packets got as far as the forward hook", f, n)
		}
		f.alive("after that", true)
	}
}

// A pod that goes takes its flows along, whoever has its address, or its link's number, next.
func TestPodGoes(t *testing.T) {
	w := newWorld(t)
	able := w.up()
	var flows, others []*flow
	for family := range 2 {
		flows, others = append(flows, w.begin("udp", family, w.a, w.b)), append(others, w.begin("udp", family, w.c, w.b))
	}
	for _, f := range append(slices.Clone(flows), others...) {
		if able {
			f.fast()
		} else {
			f.alive("at first", true)
		}
	}
	old, err := w.node.Handle.LinkByName(w.a.name)
	if err != nil {
		t.Fatal(err)
	}
	w.node.Run(t, "ip", "link", "del", w.a.name)
	if list, _ := w.devices(); able && slices.Contains(list, w.a.name) {
		t.Errorf("the flowtable has %v", list)
	}
	// Another pod has the link's number, and sends from the address of the one that went.
	heir := &pod{ns: nstest.New(t), name: podlink.Name("heir", "eth0"), addrs: []netip.Addr{netip.MustParseAddr("10.244.1.20"), netip.MustParseAddr("fd00:244:1::20")}}
	w.attach(heir, "heir", fmt.Sprint("index ", old.Attrs().Index))
	w.pass()
	for _, f := range flows {
		before := w.drops("pod_forged")
		src, dst := w.a.addrs[f.family], w.b.addrs[f.family]
		packet := nstest.Packet(src, dst, unix.IPPROTO_UDP, nstest.UDP(src, dst, own, port, "forged"))
		heir.ns.Do(t, func() error {
			for range some {
				if err := nstest.Send(packet); err != nil {
					return err
				}
			}
			return nil
		})
		_ = f.serv.SetReadDeadline(time.Now().Add(short))
		if n, err := f.serv.Read(make([]byte, 100)); err == nil {
			t.Errorf("%s: %d bytes of a pod with the link's number arrived", f, n)
		}
		if n := w.drops("pod_forged") - before; n != some {
			t.Errorf("%s: %d of %d were dropped as forged", f, n, some)
		}
	}
	// b goes too, and a pod that policies isolate has its addresses: what was allowed to b's predecessor is not.
	w.node.Run(t, "ip", "link", "del", w.b.name)
	next := &pod{ns: nstest.New(t), name: podlink.Name("next", "eth0"), addrs: w.b.addrs}
	w.attach(next, "next", "")
	w.apply(w.toB(w.a))
	w.pass()
	for _, f := range others {
		heard := w.connect(next.ns, netip.AddrPortFrom(next.addrs[f.family], port), netip.AddrPortFrom(w.c.addrs[f.family], own))
		if n := says(f.client, heard, some, short); n != 0 {
			t.Errorf("%s: who has the address next heard %d of %d", f, n, some)
		}
		_ = heard.Close()
	}
}

// A connection that was idle for so long that it came back from the flowtable is tracked for as long as any other.
func TestIdleConnectionsAreTracked(t *testing.T) {
	w := newWorld(t)
	if !w.up() {
		return
	}
	f := w.begin("tcp", 0, w.a, w.b)
	f.fast()
	tracked := func() string { return w.node.Run(t, "conntrack", "-L", "-p", "tcp", "-s", w.a.addrs[0].String()) }
	for end := time.Now().Add(5 * time.Minute); strings.Contains(tracked(), "OFFLOAD"); time.Sleep(time.Second) {
		if time.Now().After(end) {
			t.Fatalf("it does not come back: %s", tracked())
		}
	}
	m := regexp.MustCompile(`tcp +6 ([0-9]+) ESTABLISHED`).FindStringSubmatch(tracked())
	if m == nil {
		t.Fatal(tracked())
	}
	if left, err := strconv.Atoi(m[1]); err != nil || left < 3600 {
		t.Errorf("it is forgotten in %s s (%v)", m[1], err)
	}
	f.alive("idle for long", true)
}

// What waits at a link's egress, as the bandwidth plugin's limit, holds for flows that go past the rules.
func TestEgressLimit(t *testing.T) {
	w := newWorld(t)
	if !w.up() {
		return // no flow goes past the rules
	}
	f := w.begin("udp", 0, w.a, w.b)
	f.fast()
	w.node.Run(t, "tc", "qdisc", "add", "dev", w.b.name, "root", "tbf", "rate", "8kbit", "burst", "2000", "limit", "2000")
	since := f.count()
	if n := says(f.client, f.serv, 50, short); n > 25 {
		t.Errorf("%d of 50 packets of 528 bytes passed a limit of 1000 bytes a second", n)
	}
	if n := since(); n != 0 {
		t.Errorf("%d packets met the rules", n)
	}
}

// Connections that are translated stay with the rules.
func TestTranslatedStay(t *testing.T) {
	w := newWorld(t)
	if !w.up() {
		return
	}
	for family := range 2 {
		service := []netip.Addr{netip.MustParseAddr("10.96.0.7"), netip.MustParseAddr("fd00:96::7")}[family]
		ip, to := []string{"ip", "ip6"}[family], netip.AddrPortFrom(w.b.addrs[family], port)
		w.node.Run(t, "nft", fmt.Sprintf(`add table %[1]s svc; add chain %[1]s svc p { type nat hook prerouting priority dstnat; }
			add rule %[1]s svc p %[1]s daddr %[2]s udp dport 80 dnat to %[3]s`, ip, service, to))
		f := &flow{world: w, network: "udp", family: family, from: w.a, to: w.b,
			client: w.connect(w.a.ns, netip.AddrPortFrom(w.a.addrs[family], own), netip.AddrPortFrom(service, 80)),
			serv:   w.connect(w.b.ns, to, netip.AddrPortFrom(w.a.addrs[family], own))}
		if f.become(15) {
			t.Error("it goes past the rules")
		}
		_, _ = f.client.Close(), f.serv.Close()
	}
}

// Connections to services of IPVS stay with the rules, which is where their answers get the service's address: conntrack does not call that a translation.
func TestIPVSStays(t *testing.T) {
	w := newWorld(t)
	if !w.up() {
		return
	}
	w.node.Run(t, "sh", "-ec", "ip link add kube-ipvs0 type dummy; ipvsadm -l; echo 1 >/proc/sys/net/ipv4/vs/conntrack")
	for family := range 2 {
		service := netip.AddrPortFrom([]netip.Addr{netip.MustParseAddr("10.96.0.8"), netip.MustParseAddr("fd00:96::8")}[family], 80)
		server := netip.AddrPortFrom(w.b.addrs[family], port)
		w.node.Run(t, "ip", "addr", "add", netip.PrefixFrom(service.Addr(), service.Addr().BitLen()).String(), "dev", "kube-ipvs0", "nodad")
		for network, flag := range map[string]string{"tcp": "-t", "udp": "-u"} {
			w.node.Run(t, "sh", "-ec", fmt.Sprintf("ipvsadm -A %[1]s %[2]s -s rr; ipvsadm -a %[1]s %[2]s -r %[3]s -m", flag, service, server))
			f := w.beginBy(service, network, family, w.a, w.b)
			if f.become(15) {
				t.Errorf("%s goes past the rules", f)
			}
			_, _ = f.client.Close(), f.serv.Close()
		}
	}
}

// The flowtable has the links that there are, also after somebody took everything away, and after what an earlier process has left.
func TestLinksComeAndGo(t *testing.T) {
	w := newWorld(t)
	check := func(when string, want ...string) {
		t.Helper()
		w.pass()
		list, _ := w.devices()
		slices.Sort(list)
		slices.Sort(want)
		if !slices.Equal(list, want) {
			t.Errorf("%s: the flowtable has %v, want %v; %+v\n%s", when, list, want, w.path.State(), w.log.String())
		}
	}
	able := w.up()
	if !able {
		check("without flowtables")
		return
	}
	check("at first", w.a.name, w.b.name, w.c.name)
	gen := w.node.Run(t, "nft", "-a", "list", "table", "inet", names.FastTable)
	d := w.newPod("d", 13)
	check("another", w.a.name, w.b.name, w.c.name, d.name)
	w.node.Run(t, "ip", "link", "del", w.c.name)
	check("one went", w.a.name, w.b.name, d.name)
	handle := func(s string) string { _, after, _ := strings.Cut(s, "# handle "); return strings.Fields(after)[0] }
	if now := w.node.Run(t, "nft", "-a", "list", "table", "inet", names.FastTable); handle(now) != handle(gen) {
		t.Errorf("it was made anew:\n%s\nbefore:\n%s", now, gen)
	}
	w.node.Run(t, "nft", "flush", "ruleset")
	check("all was flushed", w.a.name, w.b.name, d.name)
	if w.log.Len() > 0 {
		t.Error(w.log.String())
	}
}

// What an earlier process has left goes at the start, whether the fast path is on or off.
func TestStartRemovesLeftovers(t *testing.T) {
	for _, on := range []bool{true, false} {
		w := newWorld(t)
		w.node.Run(t, "nft", "add", "table", "inet", names.FastTable)
		p := New(w.path.log, &w.links, on)
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // the loop does nothing: it would in the test's namespace
		var wg sync.WaitGroup
		w.node.Do(t, func() error {
			p.Start(ctx, &wg, func(context.Context, func(context.Context) (<-chan struct{}, error), func()) {})
			return nil
		})
		wg.Wait()
		if out, err := w.node.Command("nft", "list", "table", "inet", names.FastTable).CombinedOutput(); err == nil {
			t.Errorf("on %v: %s", on, out)
		}
		if got := p.State().Why; strings.Contains(got, "network.fastPath") == on {
			t.Errorf("on %v: %q", on, got)
		}
		w.node.Do(t, func() error { return errors.Join(Remove(), Remove()) })
	}
}
