package enforce

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/policy"
)

// A Table answers what the kernel's own look-ups find, whatever was applied.
var _ policy.Elements = (*Table)(nil)

// Dispatch implements policy.Elements.
func (t *Table) Dispatch(dir policy.Direction, a netip.Addr) (chain string, found bool, err error) {
	name := policy.MapOut
	if dir == policy.Ingress {
		name = policy.MapIn
	}
	e, found, err := t.find(name+family(a), addrKey(a))
	if err != nil || !found {
		return "", false, err
	}
	chain, is := strings.CutPrefix(e.Verdict, "goto ")
	if !is {
		return "", false, fmt.Errorf("map %s: %s has the verdict %q: want one that goes to a chain", name, a, e.Verdict)
	}
	return chain, true, nil
}

// Port implements policy.Elements.
func (t *Table) Port(portMap string, p policy.Protocol, port uint16) (jump string, found bool, err error) {
	keyLen, err := t.keyLenOf(portMap)
	if err != nil {
		return "", false, err
	}
	key := portKey(p, port)
	if keyLen == inetService.size {
		key = rangeKey(port)
	}
	e, found, err := t.find(portMap, key)
	if err != nil || !found || e.Verdict == "accept" {
		return "", found && err == nil, err
	}
	jump, is := strings.CutPrefix(e.Verdict, "jump ")
	if !is {
		return "", false, fmt.Errorf("map %s: %s %d has the verdict %q: want accept or a jump", portMap, p, port, e.Verdict)
	}
	return jump, true, nil
}

// Has implements policy.Elements.
func (t *Table) Has(name string, m policy.Member) (bool, error) {
	keyLen, err := t.keyLenOf(name)
	if err != nil {
		return false, err
	}
	kind := policy.Addresses
	if keyLen > len(m.Addr.AsSlice()) {
		kind = policy.Endpoints
	}
	_, found, err := t.find(name, member(kind, m).Key)
	return found, err
}

func (t *Table) find(name, key string) (nfnl.Element, bool, error) {
	e, found, err := nfnl.Find(set(name), key)
	return e, found, t.notThere(name, err)
}

// keyLenOf returns the length of a set's keys, in bytes.
func (t *Table) keyLenOf(name string) (int, error) {
	res, err := nfnl.Request(unix.NFPROTO_INET, unix.NFT_MSG_GETSET, 0,
		nfnl.Name(unix.NFTA_SET_TABLE, policy.Table), nfnl.Name(unix.NFTA_SET_NAME, name))
	if err == nil && len(res) == 0 {
		err = unix.ENOENT
	}
	if err != nil {
		return 0, t.notThere(name, err)
	}
	a, err := nfnl.Attributes(res[0])
	return int(number(a[unix.NFTA_SET_KEY_LEN])), err
}

// notThere says what to do about an error of a look-up.
func (t *Table) notThere(set string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("table inet %s has no %s (%w): the daemon is still at work, or somebody has changed the table: try again", policy.Table, set, err)
	}
	return fmt.Errorf("look into %s of table inet %s: %w", set, policy.Table, t.explain(err))
}
