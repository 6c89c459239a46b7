package nfnl

import (
	"testing"

	"golang.org/x/sys/unix"
)

// What cannot be read may have been anything.
func TestIsRelevant(t *testing.T) {
	const typ = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWCHAIN
	header := []byte{unix.NFPROTO_IPV4, 0, 0, 0}
	for _, c := range []struct {
		what       string
		msg        []byte
		asks, want bool
	}{
		{"nothing", nil, false, false},
		{"a header alone", header, true, false},
		{"a table's name", append(header, 10, 0, 1, 0, 'w', 'a', 'n', 't', 's', 0, 0, 0), true, true},
		{"malformed", append(header, 200, 0, 1, 0), false, true},
	} {
		asked := false
		got := isRelevant(typ, c.msg, func(msg int, attrs map[int][]byte) bool {
			asked = true
			return msg == unix.NFT_MSG_NEWCHAIN && Text(attrs[unix.NFTA_CHAIN_TABLE]) == "wants"
		})
		if got != c.want || asked != c.asks {
			t.Errorf("%s: %v, asked %v", c.what, got, asked)
		}
	}
}
