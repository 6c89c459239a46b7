package nft

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfcmd"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/config/names"
)

// Drops returns how many packets our rules have dropped, by reason (the Drop constants), all of which it has. The kernel counts while
// nobody of ours runs. Where somebody else took the counters away, what they had counted since the last look is lost.
func (t *Tables) Drops() (map[string]uint64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.tally(); err != nil {
		return nil, nfcmd.Explain(err)
	}
	out := make(map[string]uint64, len(reasons))
	for _, r := range reasons {
		out[r] = t.drops[r]
	}
	return out, nil
}

// tally adds what the kernel has counted since the last tally. A counter that says less than it did has begun anew.
func (t *Tables) tally() error {
	if t.drops == nil {
		t.drops, t.seen = map[string]uint64{}, map[string]uint64{}
	}
	for _, f := range families {
		counts, err := countersOf(nfproto[f])
		if err != nil {
			return fmt.Errorf("read the counters of table %s %s: %w", f, names.NFTTable, err)
		}
		for _, reason := range reasons {
			key, now := string(f)+" "+reason, counts[reason]
			if now < t.seen[key] {
				t.seen[key] = 0
			}
			t.drops[reason] += now - t.seen[key]
			t.seen[key] = now
		}
	}
	return nil
}

// countersOf reads the packets that each counter of our table has counted.
func countersOf(fam uint8) (map[string]uint64, error) {
	out := map[string]uint64{}
	err := eachObject(fam, func(name string, o []byte) error {
		a, err := nfnl.Attributes(o)
		if err != nil {
			return err
		}
		data, err := nfnl.Attributes(a[unix.NFTA_OBJ_DATA])
		if err != nil {
			return err
		}
		if n := data[unix.NFTA_COUNTER_PACKETS]; len(n) == 8 {
			out[name] = binary.BigEndian.Uint64(n)
		}
		return nil
	})
	return out, err
}

// eachObject calls do for each object of our table.
func eachObject(fam uint8, do func(name string, attrs []byte) error) error {
	objects, err := nfnl.Request(fam, unix.NFT_MSG_GETOBJ, unix.NLM_F_DUMP, nfnl.Name(unix.NFTA_OBJ_TABLE, names.NFTTable))
	if err != nil {
		return err
	}
	for _, o := range objects {
		a, err := nfnl.Attributes(o)
		if err != nil {
			return err
		}
		if nfnl.Text(a[unix.NFTA_OBJ_TABLE]) != names.NFTTable {
			continue // the filter is only the kernel's, and not every kernel's
		}
		if err := do(nfnl.Text(a[unix.NFTA_OBJ_NAME]), o); err != nil {
			return err
		}
	}
	return nil
}
