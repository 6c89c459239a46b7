package nfnl

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"go4.org/netipx"
	"golang.org/x/sys/unix"
)

// Attribute and flag numbers that golang.org/x/sys lacks (include/uapi/linux/netfilter/nf_tables.h).
const (
	// ElemEnd and ElemCatchAll are NFT_SET_ELEM_INTERVAL_END, an element that ends an interval, and NFT_SET_ELEM_CATCHALL, which has no key.
	ElemEnd, ElemCatchAll = 1, 2

	// elementsAtOnce bounds a list of elements, which is one attribute of at most 64 KB. The largest here has 80 bytes.
	elementsAtOnce = 500
)

// Element is an element of a set or of a map of verdicts.
type Element struct {
	// Key has the fields' bytes, each padded to 4.
	Key   string
	Flags uint32
	// Verdict is accept, drop, return, jump CHAIN or goto CHAIN. Elements of sets have none.
	Verdict string
	// Odd elements have more than that: a timeout, a counter, another kind of data.
	Odd bool
}

// Set names a set or map.
type Set struct {
	Family      uint8
	Table, Name string
}

// AddElements adds elements to a set.
func (b *Batch) AddElements(table, set string, elements []Element) {
	b.elements(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, table, set, elements)
}

// DelElements takes elements out of a set. Only keys count.
func (b *Batch) DelElements(table, set string, elements []Element) {
	b.elements(unix.NFT_MSG_DELSETELEM, 0, table, set, elements)
}

// FlushSet takes all elements out of a set.
func (b *Batch) FlushSet(table, set string) {
	b.Add(unix.NFT_MSG_DELSETELEM, 0, Name(unix.NFTA_SET_ELEM_LIST_TABLE, table), Name(unix.NFTA_SET_ELEM_LIST_SET, set))
}

func (b *Batch) elements(msg, flags int, table, set string, elements []Element) {
	for len(elements) > 0 {
		n := min(len(elements), elementsAtOnce)
		var list []byte
		for _, e := range elements[:n] {
			list = AppendAttr(list, unix.NFTA_LIST_ELEM|nested, e.encode())
		}
		b.Add(msg, flags, Name(unix.NFTA_SET_ELEM_LIST_TABLE, table), Name(unix.NFTA_SET_ELEM_LIST_SET, set),
			Attr{unix.NFTA_SET_ELEM_LIST_ELEMENTS | nested, list})
		elements = elements[n:]
	}
}

// verdicts are the words for verdict codes (int32).
var verdicts = map[string]int32{"drop": 0, "accept": 1, "continue": unix.NFT_CONTINUE, "return": unix.NFT_RETURN, "jump": unix.NFT_JUMP, "goto": unix.NFT_GOTO}

func (e Element) encode() []byte {
	b := make([]byte, 0, 80)
	if e.Flags != 0 {
		b = AppendAttr(b, unix.NFTA_SET_ELEM_FLAGS, binary.BigEndian.AppendUint32(nil, e.Flags))
	}
	if e.Flags&ElemCatchAll == 0 {
		b = AppendAttr(b, unix.NFTA_SET_ELEM_KEY|nested, AppendAttr(nil, unix.NFTA_DATA_VALUE, []byte(e.Key)))
	}
	if e.Verdict != "" {
		word, chain, _ := strings.Cut(e.Verdict, " ")
		verdict := AppendAttr(nil, unix.NFTA_VERDICT_CODE, binary.BigEndian.AppendUint32(nil, uint32(verdicts[word])))
		if chain != "" {
			verdict = AppendAttr(verdict, unix.NFTA_VERDICT_CHAIN, append([]byte(chain), 0))
		}
		b = AppendAttr(b, unix.NFTA_SET_ELEM_DATA|nested, AppendAttr(nil, unix.NFTA_DATA_VERDICT|nested, verdict))
	}
	return b
}

// Elements returns what a set holds.
func Elements(s Set) ([]Element, error) {
	var out []Element
	err := EachElement(s, func(attrs []byte) error {
		e, err := decode(attrs)
		out = append(out, e)
		return err
	})
	return out, err
}

// EachElement calls do with the attributes of each element of a set.
func EachElement(s Set, do func(attrs []byte) error) error {
	answers, err := Request(s.Family, unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP,
		Name(unix.NFTA_SET_ELEM_LIST_TABLE, s.Table), Name(unix.NFTA_SET_ELEM_LIST_SET, s.Name))
	if err != nil {
		return fmt.Errorf("list the elements of set %s: %w", s.Name, err)
	}
	return eachElement(answers, do)
}

func eachElement(answers [][]byte, do func(attrs []byte) error) error {
	for _, r := range answers {
		list, err := List(Get(r, unix.NFTA_SET_ELEM_LIST_ELEMENTS))
		if err != nil {
			return err
		}
		for _, e := range list {
			if err := do(e.Value); err != nil {
				return err
			}
		}
	}
	return nil
}

// Find returns the element that a look-up of a key finds in a set: in one of intervals the one that begins it.
func Find(s Set, key string) (found Element, ok bool, err error) {
	answers, err := Request(s.Family, unix.NFT_MSG_GETSETELEM, 0,
		Name(unix.NFTA_SET_ELEM_LIST_TABLE, s.Table), Name(unix.NFTA_SET_ELEM_LIST_SET, s.Name),
		Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, Attr{unix.NFTA_LIST_ELEM | nested, Element{Key: key}.encode()}))
	if errors.Is(err, unix.ENOENT) {
		// Either the element or the set is missing.
		_, err := Request(s.Family, unix.NFT_MSG_GETSET, 0, Name(unix.NFTA_SET_TABLE, s.Table), Name(unix.NFTA_SET_NAME, s.Name))
		if err != nil {
			return Element{}, false, fmt.Errorf("find set %s: %w", s.Name, err)
		}
		return Element{}, false, nil
	}
	if err != nil {
		return Element{}, false, fmt.Errorf("look into set %s: %w", s.Name, err)
	}
	err = eachElement(answers, func(attrs []byte) error {
		found, err = decode(attrs)
		ok = true
		return err
	})
	return found, ok, err
}

func decode(attrs []byte) (Element, error) {
	list, err := List(attrs)
	if err != nil {
		return Element{}, err
	}
	var e Element
	for _, a := range list {
		switch a.Type {
		case unix.NFTA_SET_ELEM_KEY:
			e.Key = string(Get(a.Value, unix.NFTA_DATA_VALUE))
		case unix.NFTA_SET_ELEM_FLAGS:
			if len(a.Value) == 4 {
				e.Flags = binary.BigEndian.Uint32(a.Value)
			}
		case unix.NFTA_SET_ELEM_DATA:
			e.Verdict = decodeVerdict(Get(a.Value, unix.NFTA_DATA_VERDICT))
			e.Odd = e.Odd || e.Verdict == ""
		case unix.NFTA_SET_ELEM_USERDATA, unix.NFTA_SET_ELEM_PAD: // a comment
		default:
			e.Odd = true
		}
	}
	return e, nil
}

// decodeVerdict returns "" for what is no verdict that anybody knows.
func decodeVerdict(b []byte) string {
	code := Get(b, unix.NFTA_VERDICT_CODE)
	if len(code) != 4 {
		return ""
	}
	for word, n := range verdicts {
		if n != int32(binary.BigEndian.Uint32(code)) {
			continue
		}
		if chain := Text(Get(b, unix.NFTA_VERDICT_CHAIN)); chain != "" {
			word += " " + chain
		}
		return word
	}
	return ""
}

// Intervals are prefixes as a set of intervals has them: an element at the beginning, and one behind the end unless that is the last address of all.
func Intervals(prefixes []netip.Prefix) (out []Element) {
	for _, p := range prefixes {
		out = append(out, Element{Key: string(p.Addr().AsSlice())})
		if behind := netipx.PrefixLastIP(p).Next(); behind.IsValid() {
			out = append(out, Element{Key: string(behind.AsSlice()), Flags: ElemEnd})
		}
	}
	return out
}

// Prefixes are those of a set of intervals, in order of address. It is false where the set holds anything else: a range that is no prefix, or
// elements that have more than a key.
func Prefixes(elements []Element) (out []netip.Prefix, ok bool) {
	elements = slices.Clone(elements)
	slices.SortFunc(elements, func(a, b Element) int { // where two touch, the end of one is before the beginning of the other
		return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(b.Flags&ElemEnd, a.Flags&ElemEnd))
	})
	if len(elements) > 0 && elements[0].Flags&ElemEnd != 0 && strings.Trim(elements[0].Key, "\x00") == "" {
		elements = elements[1:] // nft adds one to a set that it knows as used, which means nothing
	}
	for len(elements) > 0 {
		begin := elements[0]
		from, valid := netip.AddrFromSlice([]byte(begin.Key))
		if !valid || begin.Odd || begin.Flags != 0 {
			return nil, false
		}
		to := netipx.PrefixLastIP(netip.PrefixFrom(from, 0)) // what goes to the last address of all has no end
		elements = elements[1:]
		if len(elements) > 0 {
			end, valid := netip.AddrFromSlice([]byte(elements[0].Key))
			if !valid || elements[0].Odd || elements[0].Flags != ElemEnd {
				return nil, false
			}
			to, elements = end.Prev(), elements[1:]
		}
		p, isPrefix := netipx.IPRangeFrom(from, to).Prefix()
		if !isPrefix {
			return nil, false
		}
		out = append(out, p)
	}
	return out, true
}

// Within reports whether a set of intervals has an address: the last beginning or end before it decides.
func Within(elements []Element, a netip.Addr) (in bool) {
	if !a.IsValid() {
		return false
	}
	key := string(a.AsSlice())
	last := ""
	for _, e := range elements {
		end := e.Flags&ElemEnd != 0
		if len(e.Key) == len(key) && e.Key <= key && (e.Key > last || last == "" || e.Key == last && !end) {
			last, in = e.Key, !end
		}
	}
	return in
}
