package enforce

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/policy"
)

const floodPort, forbiddenPort = 7777, 7778

// While the table is written in all ways, no packet that is allowed all the time is lost, and none that is forbidden all the time passes.
// UDP that nobody answers is judged anew with each packet.
func TestFlood(t *testing.T) {
	w := newWorld(t)
	base := rules{port: floodPort, peers: aAddrs, out: true}
	w.apply(base.ruleset(), strict)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var flows []*stream
	for i, a := range aAddrs {
		flows = append(flows,
			w.flood(ctx, &wg, w.a, a, w.web, webAddrs[i], floodPort, true), w.flood(ctx, &wg, w.a, a, w.web, webAddrs[i], forbiddenPort, false),
			w.flood(ctx, &wg, w.b, bAddrs[i], w.web, webAddrs[i], floodPort, false),
			w.flood(ctx, &wg, w.web, webAddrs[i], w.a, a, floodPort, true), w.flood(ctx, &wg, w.web, webAddrs[i], w.b, bAddrs[i], floodPort, false))
	}
	for i := range 15 { // rewrites are seven times as many
		for _, r := range floodChanges(i) {
			want := r.rules.ruleset()
			if r.damage != "" {
				w.ns.Run(t, "sh", "-ec", r.damage)
				w.table.Doubt()
			}
			if c := w.apply(want, r.opt); (r.damage == "") != (c.Repaired == nil) {
				t.Errorf("%s: %+v", r.damage, c)
			}
		}
	}
	stop()
	wg.Wait()
	for _, f := range flows {
		f.check(t)
	}
}

type floodChange struct {
	rules  rules
	opt    policy.Options
	damage string
}

// floodChanges are changes of elements, of classes, of the fixed chains, and damage whose repair begins with the old rules in force.
func floodChanges(i int) []floodChange {
	base := rules{port: floodPort, peers: aAddrs, out: true}
	wider := base
	wider.peers = append(wider.peers[:len(wider.peers):len(wider.peers)], netip.AddrFrom4([4]byte{10, 244, 9, byte(i)}))
	other := base
	other.tag = fmt.Sprintf("x%d", i)
	return []floodChange{
		{rules: wider, opt: strict}, {rules: base, opt: strict}, {rules: other, opt: strict},
		{rules: other, opt: policy.Options{Strict: true, Log: true}}, {rules: base, opt: strict},
		{rules: base, opt: strict, damage: "nft add element inet headcni-policy isolated4 { 10.9.9.9 }; nft add chain inet headcni-policy foreign"},
		{rules: base, opt: strict, damage: "nft add rule inet headcni-policy egress counter; nft insert rule inet headcni-policy deny-in drop"},
	}
}

// stream is numbered packets of one sender.
type stream struct {
	what           string
	allowed        bool
	sent, received int
	err            error
}

func (w *world) flood(ctx context.Context, wg *sync.WaitGroup, from *nstest.NS, src netip.Addr, to *nstest.NS, dst netip.Addr, port uint16, allowed bool) *stream {
	w.Helper()
	s := &stream{what: fmt.Sprintf("%s to %s port %d", src, dst, port), allowed: allowed}
	own, other := netip.AddrPortFrom(src, 10000+uint16(len(w.used))), netip.AddrPortFrom(dst, port)
	in, out := w.connect(to, other, own), w.connect(from, own, other)
	w.used = append(w.used, port)
	done := make(chan struct{})
	wg.Go(func() {
		defer close(done)
		for ctx.Err() == nil {
			if _, err := out.Write([]byte("x")); err != nil && !errors.Is(err, unix.EPERM) {
				s.err = err
				return
			}
			s.sent++
			time.Sleep(200 * time.Microsecond)
		}
	})
	wg.Go(func() {
		buf := make([]byte, 16)
		for {
			_ = in.SetReadDeadline(time.Now().Add(100 * time.Millisecond)) // a closed socket fails the read
			_, err := in.Read(buf)
			if err == nil {
				s.received++
				continue
			}
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				s.err = err
				return
			}
			select {
			case <-done:
				return
			default:
			}
		}
	})
	return s
}

func (s *stream) check(t *testing.T) {
	t.Helper()
	t.Logf("%s: %d sent, %d received", s.what, s.sent, s.received)
	want := 0
	if s.allowed {
		want = s.sent
	}
	if s.err != nil || s.sent < 100 || s.received != want {
		t.Errorf("%s: %d packets sent and %d received, want %d: %v", s.what, s.sent, s.received, want, s.err)
	}
}
