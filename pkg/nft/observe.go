package nft

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/config/names"
)

// Writing goes through the nft program; looking goes through netlink, because it costs microseconds and shows every
// attribute, so that no change by hand is missed.

// observeTries bounds the repeats of a look that others disturbed.
const observeTries = 10

var nfproto = map[knftables.Family]uint8{knftables.IPv4Family: unix.NFPROTO_IPV4, knftables.IPv6Family: unix.NFPROTO_IPV6}

var families = []knftables.Family{knftables.IPv4Family, knftables.IPv6Family}

// listing is what the kernel holds of our table in one family: object name -> its attributes. Handles are left
// out, because they change when the same content is written again. Empty: there is no table.
type listing map[string]string

// flatten renders all attributes but those in skip, in the kernel's order.
func flatten(b []byte, skip ...int) (string, error) {
	list, err := nfnl.List(b)
	if err != nil {
		return "", err
	}
	out := ""
	for _, a := range list {
		if !slices.Contains(skip, a.Type) {
			out += fmt.Sprintf("%d=%x;", a.Type, a.Value)
		}
	}
	return out, nil
}

// Attribute numbers that golang.org/x/sys lacks (include/uapi/linux/netfilter/nf_tables.h).
const (
	nftaTableHandle = 4
	nftaSetHandle   = 16
	nftaSetCount    = 20
	nftaChainID     = 11
	nftaObjHandle   = 6
	// NFT_OBJECT_COUNTER, the type of counters.
	nftObjectCounter = 1
	// NFT_SET_INTERVAL, the flag of sets of prefixes.
	nftSetInterval = 4
	// NFT_SET_TIMEOUT and NFT_SET_EVAL, the flags of sets that rules fill.
	nftSetFilled = 0x10 | 0x20
	// NFT_SET_ELEM_INTERVAL_END.
	nftSetElemIntervalEnd = 1
	// Of a key of several parts nft shifts each but the first in by so many bits.
	typeBits = 6
)

// list reads our table of one family.
func list(family knftables.Family) (listing, error) {
	fam := nfproto[family]
	out := listing{}
	res, err := nfnl.Request(fam, unix.NFT_MSG_GETTABLE, 0, nfnl.Name(unix.NFTA_TABLE_NAME, names.NFTTable))
	if errors.Is(err, unix.ENOENT) {
		return out, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list table %s %s: %w", family, names.NFTTable, err)
	}
	for _, r := range res {
		if out["table"], err = flatten(r, nftaTableHandle); err != nil {
			return nil, err
		}
	}
	err = listChains(fam, out)
	if err != nil {
		err = fmt.Errorf("list chains of table %s %s: %w", family, names.NFTTable, err)
	} else if err = listSets(fam, out); err != nil {
		err = fmt.Errorf("list sets of table %s %s: %w", family, names.NFTTable, err)
	} else if err = listObjects(fam, out); err != nil {
		err = fmt.Errorf("list counters of table %s %s: %w", family, names.NFTTable, err)
	}
	if errors.Is(err, unix.ENOENT) { // somebody has just deleted the table
		return listing{}, nil
	}
	return out, err
}

func listChains(fam uint8, out listing) error {
	chains, err := nfnl.Request(fam, unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP) // no filter by table before kernel 6.x
	if err != nil {
		return err
	}
	for _, c := range chains {
		a, err := nfnl.Attributes(c)
		if err != nil {
			return err
		}
		if nfnl.Text(a[unix.NFTA_CHAIN_TABLE]) != names.NFTTable {
			continue
		}
		out["chain "+nfnl.Text(a[unix.NFTA_CHAIN_NAME])], err =
			flatten(c, unix.NFTA_CHAIN_HANDLE, unix.NFTA_CHAIN_USE, unix.NFTA_CHAIN_COUNTERS, nftaChainID)
		if err != nil {
			return err
		}
	}
	rules, err := nfnl.Request(fam, unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, nfnl.Name(unix.NFTA_RULE_TABLE, names.NFTTable))
	if err != nil {
		return err
	}
	texts := map[string]*strings.Builder{} // by chain; a large cluster has thousands of rules
	for _, r := range rules {
		a, err := nfnl.Attributes(r)
		if err != nil {
			return err
		}
		text, err := flatten(r, unix.NFTA_RULE_HANDLE, unix.NFTA_RULE_POSITION, unix.NFTA_RULE_ID)
		if err != nil {
			return err
		}
		chain := nfnl.Text(a[unix.NFTA_RULE_CHAIN])
		if texts[chain] == nil {
			texts[chain] = new(strings.Builder)
		}
		texts[chain].WriteString(text + "\n")
	}
	for chain, text := range texts {
		out["rules of chain "+chain] = text.String()
	}
	return nil
}

func listSets(fam uint8, out listing) error {
	sets, err := nfnl.Request(fam, unix.NFT_MSG_GETSET, unix.NLM_F_DUMP, nfnl.Name(unix.NFTA_SET_TABLE, names.NFTTable))
	if err != nil {
		return err
	}
	for _, s := range sets {
		a, err := nfnl.Attributes(s)
		if err != nil {
			return err
		}
		name := nfnl.Text(a[unix.NFTA_SET_NAME])
		if out["set "+name], err = flatten(s, nftaSetHandle, unix.NFTA_SET_ID, nftaSetCount); err != nil {
			return err
		}
		if name == setAsked || name == setAskers || name == setCurious || name == setSources || name == setMembers || strings.HasPrefix(name, consentPrefix) {
			continue // written by element, or by the kernel
		}
		elements, err := nfnl.Request(fam, unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP,
			nfnl.Name(unix.NFTA_SET_ELEM_LIST_TABLE, names.NFTTable), nfnl.Name(unix.NFTA_SET_ELEM_LIST_SET, name))
		if err != nil {
			return err
		}
		var text strings.Builder
		for _, e := range elements {
			a, err := nfnl.Attributes(e)
			if err != nil {
				return err
			}
			// Only the elements: where a long list is split into messages is up to the kernel.
			if err := writeElements(&text, a[unix.NFTA_SET_ELEM_LIST_ELEMENTS]); err != nil {
				return err
			}
		}
		if len(elements) > 0 {
			out["elements of set "+name] = text.String()
		}
	}
	return nil
}

// listObjects has the counters, without what they have counted.
func listObjects(fam uint8, out listing) error {
	return eachObject(fam, func(name string, o []byte) (err error) {
		out["object "+name], err = flatten(o, unix.NFTA_OBJ_DATA, unix.NFTA_OBJ_USE, nftaObjHandle)
		return err
	})
}

// writeElements renders a list of set elements. An interval is an element at its begin and an "end" element behind it.
// An end at address 0 means nothing (nft adds one when it fills a set that it knows as used), and is left out.
func writeElements(out *strings.Builder, list []byte) error {
	elements, err := nfnl.List(list)
	if err != nil {
		return fmt.Errorf("read set elements: %w", err)
	}
	for _, e := range elements {
		a, err := nfnl.Attributes(e.Value)
		if err != nil {
			return err
		}
		key, err := nfnl.Attributes(a[unix.NFTA_SET_ELEM_KEY])
		if err != nil {
			return err
		}
		end := slices.Equal(a[unix.NFTA_SET_ELEM_FLAGS], []byte{0, 0, 0, nftSetElemIntervalEnd})
		if end && len(bytes.Trim(key[unix.NFTA_DATA_VALUE], "\x00")) == 0 {
			continue
		}
		fmt.Fprintf(out, "%x\n", e.Value)
	}
	return nil
}

// observed is what the kernel holds of our tables at one generation.
type observed struct {
	gen    uint32
	tables map[knftables.Family]listing
}

// observe reads both tables between two equal generations. Where others write all the time, it takes what it got: a
// mixture cannot equal a listing that is right unless our tables were.
func observe() (observed, error) {
	var o observed
	for range observeTries {
		var err error
		if o.gen, err = nfnl.Generation(); err != nil {
			return observed{}, err
		}
		o.tables = map[knftables.Family]listing{}
		for _, f := range families {
			if o.tables[f], err = list(f); err != nil {
				return observed{}, err
			}
		}
		if now, err := nfnl.Generation(); err != nil || now == o.gen {
			return o, err
		}
	}
	return o, nil
}

func (o observed) equal(p observed) bool {
	return maps.EqualFunc(o.tables, p.tables, func(a, b listing) bool { return maps.Equal(a, b) })
}

// lacksRules: nobody has made a table, or not yet its rules, or somebody has deleted it.
func (o observed) lacksRules() bool {
	return slices.ContainsFunc(families, func(f knftables.Family) bool { return o.tables[f]["chain "+chainGuard] == "" })
}

// changes says in words what differs between two looks.
func changes(before, after observed) []string {
	var out []string
	for _, f := range families {
		b, a := before.tables[f], after.tables[f]
		where := fmt.Sprintf("table %s %s", f, names.NFTTable)
		switch {
		case len(b) == 0 && len(a) > 0:
			out = append(out, "add "+where)
			continue
		case len(b) > 0 && len(a) == 0:
			out = append(out, "delete "+where)
			continue
		}
		all := maps.Clone(b)
		maps.Copy(all, a)
		for _, name := range slices.Sorted(maps.Keys(all)) {
			_, had := b[name]
			_, has := a[name]
			switch {
			case b[name] == a[name]:
			case !had:
				out = append(out, "add "+name+" in "+where)
			case !has:
				out = append(out, "delete "+name+" in "+where)
			default:
				out = append(out, "change "+name+" in "+where)
			}
		}
	}
	return out
}

// datatypes are the nft program's own numbers (its enum of that name), which the kernel keeps.
var datatypes = map[string]int{"ipv4_addr": 7, "ipv6_addr": 8, linkType: 20}

// keyType is the number of a set's type.
func keyType(keys string) (n int) {
	for part := range strings.SplitSeq(keys, " . ") {
		n = n<<typeBits | datatypes[part]
	}
	return n
}

// mustRecreate says whether a table holds what filling it cannot put right: objects that t does not have, or sets of another
// kind. (A chain of another kind makes the kernel refuse the transaction.)
func (t table) mustRecreate(have listing) bool {
	known := map[string]bool{"table": true}
	for _, c := range t.counters {
		known["object "+c] = true
		if def, ok := have["object "+c]; ok && !strings.Contains(def, attrText(unix.NFTA_OBJ_TYPE, nftObjectCounter)) {
			return true
		}
	}
	for _, c := range slices.Concat(t.chains, t.otherChains(have)) {
		known["chain "+c.name], known["rules of chain "+c.name] = true, true
	}
	for _, s := range t.sets {
		known["set "+s.name], known["elements of set "+s.name] = true, true
		def, ok := have["set "+s.name]
		flags := attrText(unix.NFTA_SET_FLAGS, nftSetInterval)
		switch {
		case s.keys != "":
			flags = "" // the kernel tells none where there are none
		case s.size > 0:
			flags = attrText(unix.NFTA_SET_FLAGS, nftSetFilled)
		}
		if ok && !(strings.Contains(def, flags) && strings.Contains(def, attrText(unix.NFTA_SET_KEY_TYPE, keyType(cmp.Or(s.keys, addrType(t.family)))))) {
			return true
		}
	}
	for _, name := range stale(t, have) {
		known["set "+name] = true // fill deletes it
	}
	objects := 0
	for name := range have {
		if !known[name] {
			return true
		}
		if strings.HasPrefix(name, "chain ") || strings.HasPrefix(name, "set ") || strings.HasPrefix(name, "object ") {
			objects++
		}
	}
	// The table's use count also has what is not listed: flowtables.
	return len(have) > 0 && !strings.Contains(have["table"], attrText(unix.NFTA_TABLE_USE, objects))
}

// otherChains are those that an earlier release, or somebody else, has put into our table. They can go alone.
func (t table) otherChains(have listing) (out []chain) {
	for _, key := range slices.Sorted(maps.Keys(have)) {
		name, ok := strings.CutPrefix(key, "chain ")
		if ok && !slices.ContainsFunc(t.chains, func(c chain) bool { return c.name == name }) {
			out = append(out, chain{name: name})
		}
	}
	return out
}

// attrText is a number as flatten writes it.
func attrText(typ, value int) string { return fmt.Sprintf("%d=%08x;", typ, value) }
