package hosts

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// Numbers of protocols, as IANA has them.
const (
	protoSCTP    = 132
	protoUDPLite = 136
)

// Between pods of one node all protocols pass; between two nodes those that Headscale's policy has a line for. The policy here has one
// for SCTP, and none for UDP-Lite.
func TestOtherProtocols(t *testing.T) {
	w := surroundings.Enter(t)
	for _, v6 := range []bool{false, true} {
		for _, c := range []struct {
			what     string
			from, to *lab.Pod
			proto    int
			want     bool
		}{
			{"SCTP on a node", w.a1, w.a2, protoSCTP, true},
			{"UDP-Lite on a node", w.a1, w.a2, protoUDPLite, true},
			{"SCTP between nodes", w.a1, w.b1, protoSCTP, true},
			{"SCTP between nodes", w.b1, w.a1, protoSCTP, true},
			{"UDP-Lite between nodes", w.a1, w.b1, protoUDPLite, false},
		} {
			got, err := datagrams(t, c.from, c.to, v6, c.proto)
			if err != nil {
				t.Fatal(err)
			}
			if got != c.want {
				t.Errorf("%s, %s: arrives %v, want %v", c.what, labtest.Family(v6), got, c.want)
			}
		}
	}
}

// datagrams sends a few of a protocol, and says whether one arrives with its sender's own address.
func datagrams(t *testing.T, from, to *lab.Pod, v6 bool, proto int) (bool, error) {
	t.Helper()
	network := fmt.Sprintf("ip%d:%d", []int{4, 6}[labtest.Index(v6)], proto)
	in, err := rawSocket(t.Context(), to, network)
	if err != nil {
		return false, err
	}
	defer in.Close()
	out, err := rawSocket(t.Context(), from, network)
	if err != nil {
		return false, err
	}
	defer out.Close()
	buf := make([]byte, 1500)
	for range 5 {
		if _, err := out.WriteTo(make([]byte, 32), &net.IPAddr{IP: to.Addr(v6).AsSlice()}); err != nil {
			return false, err
		}
		if err := in.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			return false, err
		}
		_, src, err := in.ReadFrom(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		} else if err != nil {
			return false, err
		}
		return src.String() == from.Addr(v6).String(), nil
	}
	return false, nil
}

// rawSocket is one in a pod, of one protocol.
func rawSocket(ctx context.Context, p *lab.Pod, network string) (c net.PacketConn, err error) {
	err = p.Do(func() error {
		c, err = new(net.ListenConfig).ListenPacket(ctx, network, "")
		return err
	})
	return c, err
}
