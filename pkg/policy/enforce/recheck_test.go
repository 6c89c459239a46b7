package enforce

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/policy"
)

// heard reports whether one of two connected sockets hears the other. It sends more than once where it must.
func heard(t *testing.T, from, to *net.UDPConn, must bool) bool {
	t.Helper()
	for range map[bool]int{true: 50, false: 3}[must] {
		_, _ = from.Write([]byte("x")) // a reset of one before is nothing
		_ = to.SetReadDeadline(time.Now().Add(40 * time.Millisecond))
		if _, err := to.Read(make([]byte, 8)); err == nil {
			return true
		}
	}
	return false
}

func (w *world) recheck(want *policy.Ruleset) (left int) {
	w.Helper()
	w.ns.Do(w, func() (err error) {
		left, err = w.table.Recheck(w.Context(), func(f policy.Flow) (egress, ingress bool) {
			egress, _ = want.Judge(want, policy.Egress, f) // a Ruleset has no errors
			ingress, _ = want.Judge(want, policy.Ingress, f)
			return egress, ingress
		})
		return err
	})
	return left
}

// wantRecheck asks the kernel and the Table how many addresses are under recheck.
func (w *world) wantRecheck(when string, n int) {
	w.Helper()
	if got := len(w.elements("recheck4")) + len(w.elements("recheck6")); got != n || w.table.Stats().Recheck != n {
		w.Errorf("%s: %d addresses are under recheck, and %d known of: want %d", when, got, w.table.Stats().Recheck, n)
	}
}

// A flow that was allowed is cut both ways by the change that forbids it, and lives again when it is allowed again; its pod's packets go
// the short way whenever nothing forbidden is tracked. The flow of a neighbour goes on all the time.
func TestRecheck(t *testing.T) {
	w := newWorld(t)
	both := rules{port: 7777, peers: append(append([]netip.Addr{}, aAddrs...), bAddrs...)}
	onlyB := rules{port: 7777, peers: bAddrs}
	otherPort := rules{port: 7778, peers: aAddrs}
	w.apply(both.ruleset(), strict)
	w.wantRecheck("new", 2)
	var ends [2][2]*net.UDPConn // by pod: the client's and the server's
	for family := range 2 {
		for i, client := range []struct {
			ns    *nstest.NS
			addrs []netip.Addr
		}{{w.a, aAddrs}, {w.b, bAddrs}} {
			own, server := netip.AddrPortFrom(client.addrs[family], 9999), netip.AddrPortFrom(webAddrs[family], 7777)
			ends[i] = [2]*net.UDPConn{w.connect(client.ns, own, server), w.connect(w.web, server, own)}
		}
		alive := func(when string, i int, want bool) {
			t.Helper()
			if there, back := heard(t, ends[i][0], ends[i][1], want), heard(t, ends[i][1], ends[i][0], want); there != want || back != want {
				t.Errorf("%s, pod %d: there %v, back %v, want %v", when, i, there, back, want)
			}
		}
		alive("allowed", 0, true)
		alive("allowed", 1, true)
		if left := w.recheck(both.ruleset()); left != 0 {
			t.Errorf("%d stay though all is allowed", left)
		}
		w.wantRecheck("allowed", 0)
		alive("the short way", 0, true)
		for _, step := range []struct {
			what  string
			rules rules
			b     bool
			stay  int
		}{
			{"an address left a set", onlyB, true, 1},
			{"allowed again", both, true, 0},
			{"another class", otherPort, false, 1},
			{"the first class again", both, true, 0},
		} {
			want := step.rules.ruleset()
			c := w.apply(want, strict)
			alive(step.what, 0, step.stay == 0)
			alive(step.what, 1, step.b)
			t.Logf("%s: %+v", step.what, c)
			if left := w.recheck(want); left != step.stay {
				t.Errorf("%s: %d stay, want %d", step.what, left, step.stay)
			}
			w.wantRecheck(step.what, step.stay)
			alive(step.what+", rechecked", 0, step.stay == 0)
			alive(step.what+", rechecked", 1, step.b)
		}
		// One family's flows only are tracked in the rounds that follow.
		w.ns.Run(t, "conntrack", "-F")
	}
	// Without policies nobody is under recheck.
	w.apply(onlyB.ruleset(), strict)
	w.apply(rulesetOfNobody(), strict)
	w.wantRecheck("isolated no more", 0)
}

func rulesetOfNobody() *policy.Ruleset { return &policy.Ruleset{} }

// Who loses rights while a recheck is under way stays, whatever that recheck found.
func TestRecheckOvertaken(t *testing.T) {
	w := newWorld(t)
	allowed, forbidden := rules{port: 7777, peers: aAddrs}, rules{port: 7777}
	w.apply(allowed.ruleset(), strict)
	own, server := netip.AddrPortFrom(aAddrs[0], 9999), netip.AddrPortFrom(webAddrs[0], 7777)
	if !heard(t, w.connect(w.a, own, server), w.connect(w.web, server, own), true) {
		t.Fatal("it is not allowed")
	}
	asked := 0
	w.ns.Do(t, func() error {
		left, err := w.table.Recheck(t.Context(), func(policy.Flow) (egress, ingress bool) {
			if asked++; asked == 1 {
				w.apply(forbidden.ruleset(), strict)
			}
			return true, true
		})
		if err == nil && left != 2 {
			err = fmt.Errorf("%d stay, want web's both addresses", left)
		}
		return err
	})
	if asked == 0 {
		t.Error("the flow was not asked about")
	}
	w.wantRecheck("overtaken", 2)
}

// Counts go up by what is denied, outlive the table, and end with the pod.
func TestDenied(t *testing.T) {
	w := newWorld(t)
	counts := func() (d Denied) {
		w.ns.Do(t, func() (err error) {
			d, err = w.table.Denied(t.Context())
			return err
		})
		return d
	}
	if d := counts(); len(d.In)+len(d.Out) != 0 {
		t.Errorf("counts without a table: %+v", d)
	}
	only := rules{port: 7777, peers: aAddrs, out: true}
	w.apply(only.ruleset(), strict)
	send := func(n int) {
		for i := range n {
			for f := range 2 {
				w.send(w.b, bAddrs[f], webAddrs[f], uint16(20000+i))
				w.send(w.web, webAddrs[f], bAddrs[f], uint16(20000+i))
				w.sendRaw(w.b, nstest.Shapes(bAddrs[f], webAddrs[f], 100)["ICMP echo reply"])
			}
		}
	}
	check := func(when string, n uint64) {
		t.Helper()
		d := counts()
		for _, a := range webAddrs {
			if d.In[a] != n || d.Out[a] != n {
				t.Errorf("%s: %s: %d in and %d out, want %d", when, a, d.In[a], d.Out[a], n)
			}
		}
		if d.Stateless != 2*n {
			t.Errorf("%s: %d of no connection, want %d", when, d.Stateless, 2*n)
		}
		if len(d.In) != 2 || len(d.Out) != 2 {
			t.Errorf("%s: counts of others: %+v", when, d)
		}
	}
	send(3)
	check("at first", 3)
	check("once more", 3)
	w.ns.Run(t, "nft", "delete", "table", "inet", policy.Table)
	w.table.Doubt()
	w.apply(only.ruleset(), strict)
	send(2)
	check("after the table was gone", 5)

	w.ns.Run(t, "ip", "link", "set", "hcb", "group", "0")
	w.send(w.a, aAddrs[0], webAddrs[0], 7777)
	w.send(w.web, webAddrs[0], aAddrs[0], 7777)
	if d := counts(); d.Unknown != 2 {
		t.Errorf("%d of unknown pods, want 2", d.Unknown)
	}

	w.apply(rulesetOfNobody(), strict)
	counts()
	if d := counts(); len(d.In)+len(d.Out) != 0 {
		t.Errorf("counts of pods that are gone: %+v", d)
	}
	if n := len(w.elements("denied-in4")) + len(w.elements("denied-out6")); n != 0 {
		t.Errorf("%d elements of pods that are gone", n)
	}
}

// send sends one datagram from a namespace.
func (w *world) send(ns *nstest.NS, src, dst netip.Addr, port uint16) {
	w.Helper()
	w.sendRaw(ns, nstest.Packet(src, dst, unix.IPPROTO_UDP, nstest.UDP(src, dst, port, port, "x")))
}

func (w *world) sendRaw(ns *nstest.NS, packet []byte) {
	w.Helper()
	ns.Do(w, func() error { return nstest.Send(packet) })
}

// Who is under recheck stays so, whoever empties the set: else what was forbidden would go the short way.
func TestRecheckEmptied(t *testing.T) {
	w := newWorld(t)
	want := rules{port: 7777, peers: aAddrs}.ruleset()
	w.apply(want, strict)
	w.ns.Run(t, "nft", "flush", "set", "inet", policy.Table, "recheck4")
	w.table.Doubt()
	if c := w.apply(want, strict); len(c.Repaired) == 0 {
		t.Errorf("repaired %+v", c)
	}
	w.wantRecheck("emptied", 2)
}
