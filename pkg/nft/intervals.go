package nft

import (
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/config/names"
)

// Rules and the sets that they ask do not change at the same moment, although one transaction has both (nft_set_rbtree): while the kernel commits, it
// finds elements of a set of intervals late, after new rules are in force (seen on Linux 6.18), or not at all, where elements that come or go hide
// others. For that moment a packet to the cluster meets rules that say that it goes to nobody, and is refused. So sets are filled before the first
// rule asks them, and what is in a set and is to be in it stays.

// prepare makes the sets of prefixes that the kernel lacks, and fills them. It reports whether it did: where not, a later transaction makes them.
func (t *Tables) prepare(w table, have listing) bool {
	batch := nfnl.NewBatch(nfproto[w.family])
	for i, s := range w.sets {
		if _, there := have["set "+s.name]; there || s.filled() {
			continue
		}
		if batch.Len() == 0 {
			batch.Add(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, nfnl.Name(unix.NFTA_TABLE_NAME, names.NFTTable))
		}
		kind := addrType(w.family)
		batch.Add(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, nfnl.Name(unix.NFTA_SET_TABLE, names.NFTTable), nfnl.Name(unix.NFTA_SET_NAME, s.name),
			nfnl.Uint32(unix.NFTA_SET_FLAGS, nftSetInterval), nfnl.Uint32(unix.NFTA_SET_KEY_TYPE, uint32(keyType(kind))),
			nfnl.Uint32(unix.NFTA_SET_KEY_LEN, addrLen(w.family)), nfnl.Uint32(unix.NFTA_SET_ID, uint32(i+1)))
		batch.AddElements(names.NFTTable, s.name, nfnl.Intervals(s.elements))
	}
	return batch.Len() > 0 && t.conn.Run(batch) == nil
}

// held is what t's sets of prefixes hold in the kernel, without those that it lacks or that hold anything else.
func (t table) held() (map[string][]netip.Prefix, error) {
	out := map[string][]netip.Prefix{}
	for _, s := range t.sets {
		if s.filled() {
			continue
		}
		elements, err := nfnl.Elements(nfnl.Set{Family: nfproto[t.family], Table: names.NFTTable, Name: s.name})
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if prefixes, ok := nfnl.Prefixes(elements); ok {
			out[s.name] = prefixes
		}
	}
	return out, nil
}
