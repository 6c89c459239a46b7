package nfnl

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// Events of a transaction come before its number, and a number too high tells of lost ones.
func TestTransactions(t *testing.T) {
	head := []byte{unix.NFPROTO_INET, 0, 0, 0}
	of := func(table string) []byte { return AppendAttr(head, unix.NFTA_TABLE_NAME, append([]byte(table), 0)) }
	gen := func(n uint32) []byte {
		return AppendAttr(head, unix.NFTA_GEN_ID, binary.BigEndian.AppendUint32(nil, n))
	}
	r := transactions{table: "ours", last: 7}
	for _, c := range []struct {
		what string
		msgs [][]byte
		gen  uint32
		want Transaction
	}{
		{"of another table", [][]byte{of("theirs"), of("ours too")}, 8, Transaction{Generation: 8}},
		{"of ours among others", [][]byte{of("theirs"), of("ours"), of("theirs")}, 9, Transaction{Generation: 9, Touched: true}},
		{"of nothing", nil, 10, Transaction{Generation: 10}},
		{"after some that were lost", [][]byte{of("theirs")}, 13, Transaction{Generation: 13, Lost: true}},
		{"with a message that is cut", [][]byte{{1}}, 14, Transaction{Generation: 14, Lost: true}},
	} {
		for _, m := range c.msgs {
			if _, ends := r.take(unix.NFT_MSG_NEWSETELEM, m); ends {
				t.Errorf("%s: it ends early", c.what)
			}
		}
		if got, ends := r.take(unix.NFT_MSG_NEWGEN, gen(c.gen)); !ends || got != c.want {
			t.Errorf("%s: %+v, want %+v", c.what, got, c.want)
		}
	}
}
