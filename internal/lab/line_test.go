package lab

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/nstest"
)

// TestLine: a wire with a delay loses and reorders nothing, is never too fast, passes what has no checksum and is not cut into
// segments yet, and ends with the lab.
func TestLine(t *testing.T) {
	nstest.Require(t)
	t.Setenv(DirEnv, t.TempDir())
	const delay = 10 * time.Millisecond
	l, err := newMachines(t.Context(), Options{Nodes: 3, Delays: []time.Duration{delay, delay, 0}})
	if err != nil {
		t.Fatal(err)
	}
	near, far, short := l.Nodes[0], l.Nodes[1], l.Nodes[2]
	for i := range near.Underlay {
		for _, tt := range []struct {
			from, to *Node
			way      time.Duration
		}{{near, far, 2 * delay}, {far, near, 2 * delay}, {short, near, delay}, {near, short, delay}} {
			took := latencies(t, tt.from, tt.to, tt.to.Underlay[i])
			if got := slices.Min(took); got < tt.way || got > 2*tt.way {
				t.Errorf("from %s to %s: the fastest took %v instead of %v", tt.from.Name, tt.to.Name, got, tt.way)
			}
		}
		if rate, err := Throughput(t.Context(), near, far, far.Underlay[i], 500*time.Millisecond); err != nil || rate < 1e6 {
			t.Errorf("%s: %.0f bit/s, %v", far.Underlay[i], rate, err)
		}
	}
	if _, err := l.Keep("test", "", nil); err == nil || !strings.Contains(err.Error(), "delay") {
		t.Errorf("a lab with lines was kept: %v", err)
	}
	if err := near.Crash(); err != nil {
		t.Fatal(err)
	}
	if err := near.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := slices.Min(latencies(t, near, far, far.Underlay[0])); got < 2*delay {
		t.Errorf("after another boot: %v", got)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.HasPrefix(to, "socket:") {
			t.Errorf("a socket is left: %s", to)
		}
	}
}

// A wire that loses frames loses about as many as it is to, both ways, and one with a rate carries no more than that.
func TestLossyLine(t *testing.T) {
	nstest.Require(t)
	t.Setenv(DirEnv, t.TempDir())
	const loss, rate, sent = 0.02, 100e6, 1000
	l, err := newMachines(t.Context(), Options{Nodes: 3, Sites: []Site{
		{NAT: Easy, OpenInput: true, Wire: Wire{Loss: loss}}, {NAT: Easy, OpenInput: true, Wire: Wire{Rate: rate}}, {},
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near := l.Nodes[2]
	lossy, slow := l.Nodes[0].Routers[0], l.Nodes[1].Routers[0]
	for _, w := range []struct {
		from, to Place
		addr     netip.Addr
	}{{near, lossy, l.Nodes[0].Underlay[0]}, {lossy, near, near.Underlay[0]}} {
		if lost := sent - arrivals(t, w.from, w.to, w.addr, sent); lost < 1 || lost > 50 { // 20, with a standard deviation of 4.4
			t.Errorf("%d of %d were lost instead of %.0f %%", lost, sent, 100*loss)
		}
	}
	if got, err := Throughput(t.Context(), near, slow, l.Nodes[1].Underlay[0], time.Second); err != nil || got < rate/1000 || got > 1.1*rate {
		t.Errorf("%.0f bit/s where there are %.0f, %v", got, rate, err)
	}
}

// arrivals sends datagrams, in volleys that any receiver has room for, and returns how many have arrived.
func arrivals(t *testing.T, from, to Place, addr netip.Addr, n int) int {
	t.Helper()
	const volley = 50
	var recv net.PacketConn
	err := to.Do(func() (err error) {
		recv, err = net.ListenPacket("udp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer recv.Close()
	send, err := from.Dial(t.Context(), "udp", recv.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer send.Close()
	seen := map[uint64]bool{}
	// read takes what comes until all have, or nothing has for a while.
	read := func(until int, patience time.Duration) {
		buf := make([]byte, 8)
		for len(seen) < until && recv.SetReadDeadline(time.Now().Add(patience)) == nil {
			if _, _, err := recv.ReadFrom(buf); err != nil {
				return
			}
			seen[binary.BigEndian.Uint64(buf)] = true
		}
	}
	for len(seen) == 0 { // the first ones find the neighbour
		if _, err := send.Write(binary.BigEndian.AppendUint64(nil, uint64(n))); err != nil {
			t.Fatal(err)
		}
		read(1, 100*time.Millisecond)
	}
	clear(seen)
	for i := range n {
		if _, err := send.Write(binary.BigEndian.AppendUint64(nil, uint64(i))); err != nil {
			t.Fatal(err)
		}
		if i%volley == volley-1 {
			read(i+1, 50*time.Millisecond)
		}
	}
	read(n, 2*time.Second)
	delete(seen, uint64(n))
	return len(seen)
}

// latencies sends numbered datagrams, in volleys, and returns how long each took. All must arrive, in order.
func latencies(t *testing.T, from, to *Node, addr netip.Addr) []time.Duration {
	t.Helper()
	const volleys, each = 20, 50
	var recv net.PacketConn
	err := to.Do(func() (err error) {
		recv, err = net.ListenPacket("udp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer recv.Close()
	send, err := from.Dial(t.Context(), "udp", recv.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer send.Close()
	began := time.Now()
	done := make(chan error, 1)
	go func() {
		for i := range volleys * each {
			switch {
			case i == 1:
				time.Sleep(100 * time.Millisecond) // the first one finds the neighbour
			case i%each == 0:
				time.Sleep(10 * time.Millisecond)
			}
			b := binary.BigEndian.AppendUint64(nil, uint64(i))
			if _, err := send.Write(binary.BigEndian.AppendUint64(b, uint64(time.Since(began)))); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	var took []time.Duration
	buf := make([]byte, 16)
	for i := range volleys * each {
		if err := recv.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := recv.ReadFrom(buf); err != nil {
			t.Fatalf("datagram %d of %d from %s to %s: %v", i, volleys*each, from.Name, to.Name, err)
		}
		if got := binary.BigEndian.Uint64(buf); got != uint64(i) {
			t.Fatalf("datagram %d came instead of %d", got, i)
		}
		took = append(took, time.Since(began)-time.Duration(binary.BigEndian.Uint64(buf[8:])))
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return took
}
