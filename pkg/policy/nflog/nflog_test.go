package nflog

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

const group = 4278

// listen reads a group in a namespace until the test ends.
func listen(t *testing.T, ns *nstest.NS) <-chan Packet {
	t.Helper()
	packets, ready, done := make(chan Packet, 100), make(chan struct{}), make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	go ns.Do(t, func() error {
		done <- Read(ctx, group, func() { close(ready) }, func(p Packet) { packets <- p }, func() { t.Error("the kernel lost packets") })
		return nil
	})
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-ready:
	case err := <-done:
		done <- err
		t.Fatal(err)
	}
	return packets
}

func next(t *testing.T, packets <-chan Packet) Packet {
	t.Helper()
	select {
	case p := <-packets:
		if since := time.Since(p.Time); since < 0 || since > time.Minute {
			t.Errorf("a packet of %s", p.Time)
		}
		p.Time = time.Time{}
		return p
	case <-time.After(10 * time.Second):
		t.Fatal("no packet was logged")
	}
	return Packet{}
}

func TestRead(t *testing.T) {
	nstest.Require(t)
	ns := nstest.New(t)
	ns.Run(t, "sh", "-ec", `ip link set lo up; ip -6 addr add fd00::1/128 dev lo nodad
		nft add table inet t; nft 'add chain inet t in { type filter hook input priority 0; }'
		nft add rule inet t in log prefix '"in "' group 4278 snaplen 96; nft add rule inet t in drop`)
	packets := listen(t, ns)
	for _, c := range []struct {
		addr     string
		protocol uint8
		payload  func(netip.Addr) []byte
		src, dst uint16
	}{
		{"127.0.0.1", unix.IPPROTO_UDP, func(a netip.Addr) []byte { return nstest.UDP(a, a, 1000, 80, "hello") }, 1000, 80},
		{"fd00::1", unix.IPPROTO_TCP, func(a netip.Addr) []byte { return nstest.SYN(a, a, 1001, 443) }, 1001, 443},
		{"127.0.0.1", unix.IPPROTO_ICMP, func(a netip.Addr) []byte { return nstest.Echo(a, a, 9) }, 0, 0},
	} {
		a := netip.MustParseAddr(c.addr)
		ns.Do(t, func() error { return nstest.Send(nstest.Packet(a, a, c.protocol, c.payload(a))) })
		want := Packet{Prefix: "in", Src: a, Dst: a, Protocol: c.protocol, SrcPort: c.src, DstPort: c.dst}
		if got := next(t, packets); got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	ns.Do(t, func() error {
		if err := Read(t.Context(), group, func() { t.Error("two read one group") }, nil, nil); !errors.Is(err, unix.EPERM) {
			t.Errorf("a second reader: %v", err)
		}
		return nil
	})
}

// TestCut: whatever is missing at the end, nothing is read that is not there.
func TestCut(t *testing.T) {
	lo := netip.MustParseAddr("127.0.0.1")
	packet := nstest.Packet(lo, lo, unix.IPPROTO_TCP, nstest.SYN(lo, lo, 1, 2))
	body := nfnl.AppendAttr(make([]byte, headerLen), attrPrefix, []byte("in \x00"))
	body = nfnl.AppendAttr(body, attrPayload, packet)
	if p, ok := decode(body); !ok || p.Prefix != "in" || p.DstPort != 2 {
		t.Fatalf("%+v, %t", p, ok)
	}
	for n := range body {
		decode(body[:n])
	}
	for n := range packet {
		if _, ok := read(packet[:n]); ok != (n >= 20) {
			t.Errorf("%d bytes of a packet: %t", n, ok)
		}
	}
	packet[0] = 0x4f // options that are not there
	read(packet)
	packet[6], packet[7] = 0, 1
	if p, _ := read(packet); p.DstPort != 0 {
		t.Errorf("a later fragment has no ports: %+v", p)
	}
	for n := range 64 {
		eachMessage(make([]byte, n), func(uint16, []byte) { t.Error("a message in nothing") })
	}
}
