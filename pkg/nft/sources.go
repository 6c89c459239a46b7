package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/nfcmd"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/config/names"
)

// Sources says which addresses each pod's link, by index, sends from, which spares their packets a lookup in the FIB. It returns what it
// changed. What another process has said stays until the first call. Its error is fs.ErrNotExist
// where there is no IPv4 table (yet) that checks what pods send: the next Sync brings it, with what was said.
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
		changed += n
		switch {
		case errors.Is(err, unix.ENOENT) && f == knftables.IPv4Family:
			errs = append(errs, fmt.Errorf("there is no table %s %s: %w", f, names.NFTTable, fs.ErrNotExist))
		case errors.Is(err, unix.ENOENT): // a kernel without IPv6 has an empty one
		case err != nil:
			errs = append(errs, fmt.Errorf("write pods' sources to table %s %s: %w", f, names.NFTTable, nfcmd.Explain(err)))
		}
	}
	return changed, errors.Join(errs...)
}

// ofSources: an element of that set has come or gone. Who flushes it makes packets slower.
func ofSources(msg int, attrs map[int][]byte) bool {
	return (msg == unix.NFT_MSG_NEWSETELEM || msg == unix.NFT_MSG_DELSETELEM) && nfnl.Text(attrs[unix.NFTA_SET_ELEM_LIST_TABLE]) == names.NFTTable &&
		nfnl.Text(attrs[unix.NFTA_SET_ELEM_LIST_SET]) == setSources
}

// writeMembers has the kernel hold the tailnet's members, by element: they come and go more often than anything else changes.
func (t *Tables) writeMembers(want []netip.Addr) error {
	keys := map[string]bool{}
	for _, a := range want {
		keys[string(a.AsSlice())] = true
	}
	batch := nfnl.NewBatch(unix.NFPROTO_IPV4)
	_, err := fill(batch, knftables.IPv4Family, setMembers, keys)
	if err == nil {
		err = t.conn.Run(batch)
	}
	if err != nil {
		t.members = nil
		if errors.Is(err, unix.ENOENT) {
			return nil // somebody has just taken the table away: the next Sync, which that brings, makes it anew
		}
		return fmt.Errorf("write the tailnet's members to table ip %s: %w", names.NFTTable, nfcmd.Explain(err))
	}
	t.members = slices.Clone(want)
	return nil
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
