package connectivity

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// A full packet is as large as the link, or as the node says that the path is, but no smaller than the tunnel's.
func TestFullSize(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "sh", "-ec", `ip link set lo up mtu 9000; for a in 10.9.9.1 10.9.9.2 10.9.9.3; do ip address add $a/32 dev lo; done
		ip route replace local 10.9.9.2 dev lo table local mtu 1400; ip route replace local 10.9.9.3 dev lo table local mtu 1000`)
	for to, want := range map[string]string{"10.9.9.1": "", "10.9.9.2": "", "10.9.9.3": "a packet of 9000 bytes: write: message too long"} {
		ns.Do(t, func() error {
			server, err := net.ListenPacket("udp", to+":0")
			if err != nil {
				return err
			}
			defer server.Close()
			go func() { _ = echo(server) }() // ends with the socket
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			err = Ask{Kind: KindUDP, To: server.LocalAddr().String(), Size: FullSize}.udp(ctx)
			if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("to %s: %v, want %q", to, err, want)
			}
			return nil
		})
	}
}
