package labtest

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/netset"
)

// Moment is how long a fault lasts, or something is looked at that must not happen.
const Moment = 700 * time.Millisecond

// Index of a family where lists have IPv4 first.
func Index(v6 bool) int {
	if v6 {
		return 1
	}
	return 0
}

// Family is a family's name.
func Family(v6 bool) string { return []string{"IPv4", "IPv6"}[Index(v6)] }

// ControlAddr is the control host's address on the underlay, where the nodes' are 11 and up.
func ControlAddr(l *lab.Lab, v6 bool) netip.Addr {
	b := l.Nodes[0].Underlay[Index(v6)].AsSlice()
	b[len(b)-1] = 1
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Listen opens a TCP socket that is closed when the test ends. Port 0 is any.
func Listen(t testing.TB, at lab.Place, addr netip.AddrPort) (l net.Listener) {
	t.Helper()
	err := at.Do(func() (err error) {
		l, err = net.Listen("tcp", addr.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// Service tells whoever connects which address it comes from (lab.Ask), until the test ends. Port 0 is any.
func Service(t testing.TB, at lab.Place, addr netip.AddrPort) netip.AddrPort {
	t.Helper()
	l := Listen(t, at, addr)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			fmt.Fprintln(c, netip.MustParseAddrPort(c.RemoteAddr().String()).Addr().Unmap())
			c.Close()
		}
	}()
	return netip.MustParseAddrPort(l.Addr().String())
}

// Echo is a pod's server that tells where a connection comes from.
func Echo(p *lab.Pod, v6 bool) netip.AddrPort { return netip.AddrPortFrom(p.Addr(v6), lab.EchoPort) }

// WantTCP connects to a server that tells whom it sees, which must be want.
func WantTCP(t testing.TB, what string, from lab.Place, to netip.AddrPort, want netip.Addr) {
	t.Helper()
	wantSource(t, what, want, func() (netip.Addr, error) { return lab.Ask(t.Context(), from, to) })
}

// WantUDP sends one packet that must not be fragmented to a pod that sends it back, and must be seen there as want.
func WantUDP(t testing.TB, what string, from lab.Place, to netip.Addr, size int, want netip.Addr) {
	t.Helper()
	wantSource(t, what, want, func() (netip.Addr, error) {
		seen, _, err := lab.Echo(t.Context(), from, to, size)
		return seen, err
	})
}

// wantSource asks until there is an answer: the first handshake with a node that has just joined takes seconds where it
// goes wrong. A wrong answer is one.
func wantSource(t testing.TB, what string, want netip.Addr, ask func() (netip.Addr, error)) {
	t.Helper()
	deadline := time.Now().Add(Soon)
	for {
		seen, err := ask()
		switch {
		case err == nil && seen == want:
			return
		case err == nil:
			t.Errorf("%s: came from %v, want %v", what, seen, want)
			return
		case time.Now().After(deadline):
			t.Errorf("%s: %v", what, err)
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// WantRefused must not get an answer, not even within a while in which anything that works has answered.
func WantRefused(t testing.TB, what string, from lab.Place, to netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Moment)
	defer cancel()
	if seen, err := lab.Ask(ctx, from, to); err == nil {
		t.Errorf("%s: answered, to %v", what, seen)
	}
}

// Scatter sends a datagram to each address, from new sockets, for which nothing is decided yet. What cannot be sent is as good as
// nothing on the wire.
func Scatter(from lab.Place, to ...netip.Addr) error {
	return from.Do(func() error {
		for _, a := range to {
			// With a literal address the dialer stays in this goroutine, and thus on this thread.
			c, err := (&net.Dialer{FallbackDelay: -1}).Dial("udp", netip.AddrPortFrom(a, lab.EchoPort).String())
			if err != nil {
				continue // "network is unreachable"
			}
			_, _ = c.Write([]byte("secret")) // the same
			c.Close()
		}
		return nil
	})
}

// OfTailnet are the addresses of a tailnet's first devices, of tailscaled's own resolver, and of nobody.
func OfTailnet(v6 bool) []netip.Addr {
	if v6 {
		return addrs("fd7a:115c:a1e0::1", "fd7a:115c:a1e0::2", "fd7a:115c:a1e0::3", "fd7a:115c:a1e0::53", "fd7a:115c:a1e0:77::4")
	}
	return addrs("100.64.0.1", "100.64.0.2", "100.64.0.3", "100.100.100.100", "100.127.3.4")
}

// Resolver is where a node's tailscaled answers.
func Resolver(v6 bool) []netip.Addr {
	return []netip.Addr{[]netip.Addr{netset.ResolverIPv4, netset.ResolverIPv6}[Index(v6)]}
}

// OfNobody are addresses of the cluster's that no pod has: one of the first node's, one of a node that there is not.
func OfNobody(v6 bool) []netip.Addr {
	if v6 {
		return addrs("fd00:244:1::fa", "fd00:244:c8::1")
	}
	return addrs("10.244.1.250", "10.244.200.1")
}

func addrs(texts ...string) (out []netip.Addr) {
	for _, t := range texts {
		out = append(out, netip.MustParseAddr(t))
	}
	return out
}

// Flows are streams between pods, of both families.
type Flows []*lab.Stream

// StartFlows starts streams from one pod to another. They need not flow yet.
func StartFlows(t testing.TB, from, to *lab.Pod) (f Flows) {
	t.Helper()
	for _, v6 := range []bool{false, true} {
		name := fmt.Sprintf("%s of %s to %s of %s, %s", from.Name, from.Node.Name, to.Name, to.Node.Name, Family(v6))
		s, err := lab.StartStream(Within(t), name, from, to, to.Addr(v6))
		if err != nil {
			t.Fatal(err)
		}
		f = append(f, s)
	}
	return f
}

// WaitBack waits until something has arrived by each that was sent after since.
func (f Flows) WaitBack(t testing.TB, since time.Time) {
	t.Helper()
	for _, s := range f {
		if _, err := s.WaitBack(Within(t), since); err != nil {
			t.Error(err)
		}
	}
}

// Dark says that nothing flows since a fault, which was one then. What was on its way is no matter.
func (f Flows) Dark(t testing.TB, since time.Time) {
	t.Helper()
	for _, s := range f {
		if back, ok := s.Back(since.Add(Moment / 2)); ok {
			t.Errorf("%s flows, after %v", s.Name, back)
		}
	}
}

// Stop ends the flows, all at once: each waits for what is under way. The reports are in their order.
func (f Flows) Stop() []lab.Report {
	reports := make([]lab.Report, len(f))
	var wg sync.WaitGroup
	for i, s := range f {
		wg.Go(func() { reports[i] = s.Stop() })
	}
	wg.Wait()
	return reports
}

// NoneLost ends the flows, of which not one datagram may be missing.
func (f Flows) NoneLost(t testing.TB) {
	t.Helper()
	for i, r := range f.Stop() {
		if r.Lost > 0 || r.Sent < 10 {
			t.Errorf("%s: lost %d of %d", f[i].Name, r.Lost, r.Sent)
		}
	}
}

// Capture looks at the underlay until the function that it returns is called.
func Capture(t testing.TB, l *lab.Lab) (stop func() lab.Captured) {
	t.Helper()
	c, err := l.CaptureUnderlay()
	if err != nil {
		t.Fatal(err)
	}
	return func() lab.Captured {
		t.Helper()
		got, err := c.Stop()
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
}

// NoneInClear holds that a capture saw packets, none of which was in clear.
func NoneInClear(t testing.TB, c lab.Captured) {
	t.Helper()
	if c.Clear > 0 || c.Total == 0 {
		t.Errorf("%d of %d packets in clear: %v", c.Clear, c.Total, c.Examples)
	}
}
