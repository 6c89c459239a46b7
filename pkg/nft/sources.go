package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/nfcmd"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/config/names"
)

// Sources says which addresses each pod's link, by index, sends from, which spares their packets a lookup in the FIB. It returns what it
// changed. What another process has said stays until the first call.
//
// The index of a link that is gone comes again only where somebody asks for it; until the next call the new link may send from the
// addresses of the old.
func (t *Tables) Sources(want map[int][]netip.Addr) (changed int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sources = want
	return t.writeSources()
}

func (t *Tables) writeSources() (changed int, err error) {
	if t.sources == nil {
		return 0, nil
	}
	var errs []error
	for _, f := range families {
		batch := nfnl.NewBatch(nfproto[f])
		n, err := fill(batch, f, setSources, sourceKeys(f, t.sources))
		if err == nil {
			err = t.conn.Run(batch)
		}
		if errors.Is(err, unix.ENOENT) {
			continue // the table comes with the next Sync
		}
		changed += n
		if err != nil {
			errs = append(errs, fmt.Errorf("write pods' sources to table %s %s: %w", f, names.NFTTable, nfcmd.Explain(err)))
		}
	}
	return changed, errors.Join(errs...)
}

// sourceKeys are the elements of the set: a link's index in the host's byte order, and an address.
func sourceKeys(f knftables.Family, sources map[int][]netip.Addr) map[string]bool {
	keys := map[string]bool{}
	for link, addrs := range sources {
		for _, a := range addrs {
			if a.Is6() == (f == knftables.IPv6Family) {
				keys[string(append(indexKey(link), a.AsSlice()...))] = true
			}
		}
	}
	return keys
}

func indexKey(link int) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(link)) }

// fill adds to a batch what makes a set of our table hold the elements of want, and says how many changes that is.
func fill(batch *nfnl.Batch, f knftables.Family, set string, want map[string]bool) (changed int, err error) {
	have, err := nfnl.Elements(nfnl.Set{Family: nfproto[f], Table: names.NFTTable, Name: set})
	if err != nil {
		return 0, err
	}
	var gone, come []nfnl.Element
	known := map[string]bool{}
	for _, e := range have {
		known[e.Key] = true
		if !want[e.Key] {
			gone = append(gone, nfnl.Element{Key: e.Key})
		}
	}
	for key := range want {
		if !known[key] {
			come = append(come, nfnl.Element{Key: key})
		}
	}
	batch.DelElements(names.NFTTable, set, gone)
	batch.AddElements(names.NFTTable, set, come)
	return len(gone) + len(come), nil
}
