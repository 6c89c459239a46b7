package enforce

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"os"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/policy"
)

// digest says what a chain's rules were when we wrote them: our text, and how the kernel lists it. How it does depends on the nft
// program, so there is no other way to know whether rules are still ours.
type digest struct {
	Text, Rules string
}

// textDigest is of rules in nft's syntax.
func textDigest(rules []string) string {
	h := sha256.New()
	for _, r := range rules {
		addDigest(h, []byte(r))
	}
	return sumDigest(h)
}

func addDigest(h hash.Hash, b []byte) {
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(b))))
	h.Write(b)
}

func sumDigest(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)[:12]) }

// oneByOne is up to how many chains are asked for each by its name. More are listed with the whole table.
const oneByOne = 20

// ruleDigests are of the rules of the chains as the kernel lists them, of all chains if none is named. A chain without rules has none.
func ruleDigests(names ...string) (map[string]string, error) {
	filters := [][]nfnl.Attr{nil}
	if len(names) > 0 && len(names) <= oneByOne {
		filters = nil
		for _, name := range names {
			filters = append(filters, []nfnl.Attr{nfnl.Name(unix.NFTA_RULE_CHAIN, name)})
		}
	}
	hashes := map[string]hash.Hash{}
	for i, filter := range filters {
		rules, err := dump(unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, filter...)
		if err != nil {
			return nil, fmt.Errorf("list the rules of table inet %s: %w", policy.Table, err)
		}
		for _, a := range rules {
			name := nfnl.Text(a[unix.NFTA_RULE_CHAIN])
			if filter != nil && name != names[i] {
				continue // not every kernel filters
			}
			if hashes[name] == nil {
				hashes[name] = sha256.New()
			}
			addDigest(hashes[name], a[unix.NFTA_RULE_EXPRESSIONS])
		}
	}
	out := make(map[string]string, len(hashes))
	for name, h := range hashes {
		out[name] = sumDigest(h)
	}
	return out, nil
}

// loadDigests reads what another process has left. Without it chains are written anew.
func (t *Table) loadDigests() {
	if t.digests != nil {
		return
	}
	t.digests = map[string]digest{}
	if t.file == "" {
		return
	}
	b, err := os.ReadFile(t.file)
	if err != nil {
		return // the first start of this boot
	}
	if err := json.Unmarshal(b, &t.digests); err != nil {
		t.digests = map[string]digest{}
	}
}

// saveDigests keeps them for the next process. Where it cannot, that one writes the chains anew: no reason to fail.
func (t *Table) saveDigests() {
	if t.file == "" {
		return
	}
	if b, err := json.Marshal(t.digests); err == nil {
		_ = atomicfile.WriteUnsynced(t.file, b, 0o600)
	}
}
