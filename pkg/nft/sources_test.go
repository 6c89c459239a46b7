package nft

import (
	"errors"
	"io/fs"
	"net/netip"
	"strconv"
	"testing"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/internal/nstest"
)

// sources says the truth about the world's pods.
func (w *world) sources() map[int][]netip.Addr {
	all := map[int][]netip.Addr{}
	for _, a := range worldAddrs {
		all[w.index("hca")] = append(all[w.index("hca")], a.podA)
		all[w.index("hcb")] = append(all[w.index("hcb")], a.podB)
	}
	return all
}

// say has the kernel hold sources.
func (w *world) say(tables *Tables, all map[int][]netip.Addr) (changed int) {
	w.t.Helper()
	w.node.Do(w.t, func() (err error) { changed, err = tables.Sources(all); return err })
	return changed
}

// What the cache holds passes without the FIB, and nothing else does: another pod's address, one that was moved to another pod, that of
// a link whose index has come again.
func TestSourcesSpareTheFIB(t *testing.T) {
	t.Parallel()
	for family, a := range worldAddrs {
		t.Run(family, func(t *testing.T) {
			w := newWorld(t)
			w.sync(typical())
			hear := func(what string, from *nstest.NS, src netip.Addr, want bool) {
				t.Helper()
				p := packet{from: from, src: src, to: w.lan, dst: a.lan}
				heard := w.heard
				if want {
					heard = w.waitFor
				}
				if got := heard(p); got.IsValid() != want {
					t.Errorf("%s: from %s arrives: %v, want %v", what, src, got.IsValid(), want)
				}
			}
			w.own(w.podB, "eth0", a.podA)
			w.own(w.podA, "eth0", a.podB)
			for _, known := range []bool{false, true} {
				if known {
					w.say(w.tables, w.sources())
				}
				hear("its own address", w.podA, a.podA, true)
				hear("its own address", w.podB, a.podB, true)
				hear("the other pod's", w.podB, a.podA, false)
				hear("the other pod's", w.podA, a.podB, false)
			}
			// The FIB would have nothing of pod A's address any more: it is the cache that lets it pass.
			w.node.Run(t, "ip", "route", "del", a.podA.String(), "dev", "hca")
			before := w.drops()[DropPodForged]
			w.send(packet{from: w.podA, src: a.podA, to: w.lan, dst: a.lan})
			w.send(packet{from: w.podB, src: a.podB, to: w.lan, dst: a.lan})
			if got := w.drops()[DropPodForged]; got != before {
				t.Errorf("%d dropped of what the cache knows", got-before)
			}
			// The address is the other pod's now.
			w.node.Run(t, "ip", "route", "add", a.podA.String(), "dev", "hcb")
			w.say(w.tables, map[int][]netip.Addr{w.index("hcb"): {a.podA, a.podB}})
			hear("an address that was moved", w.podA, a.podA, false)
			hear("an address that was moved", w.podB, a.podA, true)
			// A new link gets the index of one that is gone.
			index := w.index("hcb")
			w.node.Run(t, "ip", "link", "del", "hcb")
			late := nstest.New(t)
			w.node.Run(t, "ip", "link", "add", "name", "hcc", "index", strconv.Itoa(index), "type", "veth", "peer", "name", "eth0", "netns", "/run/netns/"+late.Name)
			w.say(w.tables, map[int][]netip.Addr{})
			w.node.Run(t, "ip", "link", "set", "hcc", "up")
			late.Run(t, "ip", "link", "set", "eth0", "up")
			w.own(late, "eth0", a.podB)
			gateway := map[string]string{"IPv4": "169.254.1.1", "IPv6": "fe80::1"}[family]
			late.Run(t, "ip", "neigh", "add", gateway, "lladdr", w.mac("hcc").String(), "nud", "permanent", "dev", "eth0")
			late.Run(t, "ip", "route", "add", gateway, "dev", "eth0")
			late.Run(t, "ip", "route", "add", "default", "via", gateway, "dev", "eth0")
			before = w.drops()[DropPodForged]
			hear("an index that came again", late, a.podB, false)
			if w.drops()[DropPodForged] == before {
				t.Error("nothing was sent from the new link")
			}
		})
	}
}

// Sources changes what differs, outlives the process, and is put back with the table by who knows it.
func TestSources(t *testing.T) {
	w := newWorld(t)
	w.sync(typical())
	holds := func(what string, want int) {
		t.Helper()
		n := 0
		for _, f := range families {
			w.node.Do(t, func() error {
				all, err := nfnl.Elements(nfnl.Set{Family: nfproto[f], Table: "headcni", Name: setSources})
				n += len(all)
				return err
			})
		}
		if n != want {
			t.Errorf("%s: the kernel holds %d, want %d", what, n, want)
		}
	}
	if n := w.say(w.tables, w.sources()); n != 4 {
		t.Errorf("%d changes, want 4", n)
	}
	if n := w.say(w.tables, w.sources()); n != 0 {
		t.Errorf("the same again: %d changes", n)
	}
	if done := mustSync(t, w.node, w.tables, typical()); len(done) > 0 {
		t.Errorf("a sync after it changes %q", done)
	}
	next := New()
	if done := mustSync(t, w.node, next, typical()); len(done) > 0 {
		t.Errorf("the next process changes %q", done)
	}
	holds("the next process", 4)
	if n := w.say(next, w.sources()); n != 0 {
		t.Errorf("the next process: %d changes", n)
	}
	for _, harm := range []string{"delete table ip headcni", "flush set ip6 headcni sources", "add set ip headcni odd { type mark; }",
		"delete table ip6 headcni; add table ip6 headcni; add set ip6 headcni sources { type mark; }"} {
		w.node.Run(t, "nft", harm)
		mustSync(t, w.node, next, typical())
		w.say(next, w.sources())
		holds(harm, 4)
	}
	if n := w.say(next, map[int][]netip.Addr{}); n != 4 {
		t.Errorf("no pods: %d changes", n)
	}
	holds("no pods", 0)
	w.node.Run(t, "nft", "delete table ip headcni")
	w.node.Do(t, func() error {
		if n, err := next.Sources(w.sources()); n != 2 || !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("one table gone: %d changes, want 2, and %v", n, err)
		}
		return nil
	})
}

// The tailnet's members change without the rules being written anew, and are put back.
func TestMembersAreWrittenByElement(t *testing.T) {
	w := newWorld(t)
	cfg := typical()
	w.sync(cfg)
	handle := firstHandle(t, w.node, "guard")
	holds := func(what string, want int) {
		t.Helper()
		var n int
		w.node.Do(t, func() error {
			all, err := nfnl.Elements(nfnl.Set{Family: nfproto["ip"], Table: "headcni", Name: setMembers})
			n = len(all)
			return err
		})
		if n != want {
			t.Errorf("%s: the kernel holds %d, want %d", what, n, want)
		}
		if got := firstHandle(t, w.node, "guard"); got != handle {
			t.Errorf("%s: rules were written anew", what)
		}
	}
	holds("at first", 2)
	cfg.Members = append(cfg.Members, netip.MustParseAddr("100.64.0.10"))
	w.sync(cfg)
	holds("one more", 3)
	w.node.Run(t, "nft", "flush set ip headcni members")
	w.sync(cfg)
	holds("flushed by somebody", 3)
	cfg.Members = nil
	w.sync(cfg)
	holds("none", 0)
}
