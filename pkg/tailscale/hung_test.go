package tailscale

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Only a connection on which the kernel asks in vain is ended, and none that is merely silent or has just lost a packet.
func TestHung(t *testing.T) {
	for what, c := range map[string]struct {
		info unix.TCPInfo
		want bool
	}{
		"busy":                       {unix.TCPInfo{Last_ack_recv: 40, Unacked: 3}, false},
		"idle, as Headscale's are":   {unix.TCPInfo{Last_ack_recv: 14_900}, false},
		"idle, and asked once":       {unix.TCPInfo{Last_ack_recv: 15_100, Probes: 1}, false},
		"idle, and asked in vain":    {unix.TCPInfo{Last_ack_recv: 30_100, Probes: 2}, true},
		"repeats for a few seconds":  {unix.TCPInfo{Last_ack_recv: 6_000, Unacked: 2, Retransmits: 5, Rto: 6_528_000}, false},
		"was idle, then repeats":     {unix.TCPInfo{Last_ack_recv: 60_000, Unacked: 2, Retransmits: 3, Rto: 1_632_000}, false},
		"has something under way":    {unix.TCPInfo{Last_ack_recv: 20_000, Unacked: 1, Retransmits: 1}, false},
		"repeats and nobody answers": {unix.TCPInfo{Last_ack_recv: 13_000, Unacked: 2, Retransmits: 6, Rto: 13_056_000}, true},
		"a kernel that does not say": {unix.TCPInfo{}, false},
	} {
		if got := hung(c.info); got != c.want {
			t.Errorf("%s: %v, want %v", what, got, c.want)
		}
	}
}
