package enforce

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/policy"
)

// field is a part of a key: nft's name for the type, its number (nft's own, which the kernel keeps) and its size in bytes.
type field struct {
	name   string
	number uint32
	size   int
}

var (
	ipv4Addr    = field{"ipv4_addr", 7, 4}
	ipv6Addr    = field{"ipv6_addr", 8, 16}
	inetProto   = field{"inet_proto", 12, 1}
	inetService = field{"inet_service", 13, 2}
	ctState     = field{"ct_state", 26, 4}
)

// kind is what a set or map is made of.
type kind struct {
	key      []field
	interval bool
	// verdict: it is a map to verdicts.
	verdict bool
	// counts: the kernel fills it.
	counts bool
}

// maxCounted is how many addresses the kernel counts denied packets of: local pods', so many more than there are.
const maxCounted = 65535

// typeText is the type in nft's syntax.
func (k kind) typeText() string {
	names := make([]string, 0, len(k.key))
	for _, f := range k.key {
		names = append(names, f.name)
	}
	text := strings.Join(names, " . ")
	if k.verdict {
		text += " : verdict"
	}
	return text
}

// definition is what the kernel keeps of a kind.
type definition struct {
	flags, keyType, keyLen, dataType, size uint32
	timeout                                bool
}

// typeBits is how far nft shifts the numbers of types in a concatenation.
const typeBits = 6

func (k kind) definition() (d definition) {
	for _, f := range k.key {
		d.keyType = d.keyType<<typeBits | f.number
		d.keyLen += uint32(f.size)
		if len(k.key) > 1 {
			d.keyLen = (d.keyLen + 3) &^ 3
		}
	}
	if k.interval {
		d.flags |= setInterval
	}
	if k.verdict {
		d.flags |= setMap
		d.dataType = dataVerdict
	}
	if k.counts {
		d.flags |= setTimeout | setEval
		d.size = maxCounted
	}
	return d
}

func addr(ipv6 bool) field {
	if ipv6 {
		return ipv6Addr
	}
	return ipv4Addr
}

func kindOf(s *policy.Set) kind {
	k := kind{key: []field{addr(s.IPv6)}, interval: s.Kind == policy.Blocks}
	if s.Kind == policy.Endpoints {
		k.key = append(k.key, inetProto, inetService)
	}
	return k
}

func kindOfMap(m *policy.PortMap) kind {
	if m.Ranges {
		return kind{key: []field{inetService}, interval: true, verdict: true}
	}
	return kind{key: []field{inetProto, inetService}, verdict: true}
}

// fixedKinds are the kinds of the sets and maps that are always there.
func fixedKinds() map[string]kind {
	out := map[string]kind{policy.MapState: {key: []field{ctState}, verdict: true}}
	for family, a := range map[string]field{"4": ipv4Addr, "6": ipv6Addr} {
		one := kind{key: []field{a}}
		for _, name := range []string{policy.MapIn, policy.MapOut} {
			out[name+family] = kind{key: one.key, verdict: true}
		}
		for _, name := range []string{policy.SetIsolated, policy.SetRecheck} {
			out[name+family] = one
		}
		out[policy.SetSelf+family] = kind{key: []field{a, a}}
		for _, name := range []string{policy.SetDeniedIn, policy.SetDeniedOut} {
			out[name+family] = kind{key: one.key, counts: true}
		}
	}
	return out
}

// kindsOf are the kinds of all sets and maps of a ruleset's table.
func kindsOf(r *policy.Ruleset) map[string]kind {
	out := fixedKinds()
	for name, s := range r.Sets {
		out[name] = kindOf(s)
	}
	for name, m := range r.Maps {
		out[name] = kindOfMap(m)
	}
	return out
}

// family is the digit at the end of the names of sets that exist for both.
func family(a netip.Addr) string {
	if a.Is6() {
		return "6"
	}
	return "4"
}

func addrKey(a netip.Addr) string { return string(a.AsSlice()) }

func portKey(p policy.Protocol, port uint16) string {
	return string([]byte{byte(p), 0, 0, 0, byte(port >> 8), byte(port), 0, 0})
}

// member is a member of a set as the kernel has it.
func member(k policy.SetKind, m policy.Member) nfnl.Element {
	key := addrKey(m.Addr)
	if k == policy.Endpoints {
		key += portKey(m.Protocol, m.Port)
	}
	return nfnl.Element{Key: key}
}

// membersOf are a set's elements. An interval is an element at its begin and one behind its end, but at the end of all addresses.
func membersOf(s *policy.Set) []nfnl.Element {
	out := make([]nfnl.Element, 0, len(s.Members))
	for _, m := range s.Members {
		out = append(out, member(s.Kind, m))
		if s.Kind != policy.Blocks {
			continue
		}
		if behind := m.Last.Next(); behind.IsValid() {
			out = append(out, nfnl.Element{Key: addrKey(behind), Flags: nfnl.ElemEnd})
		}
	}
	return out
}

func portsOf(m *policy.PortMap) []nfnl.Element {
	out := make([]nfnl.Element, 0, len(m.Elements))
	for _, e := range m.Elements {
		verdict := "accept"
		if e.Jump != "" {
			verdict = "jump " + e.Jump
		}
		if !m.Ranges {
			out = append(out, nfnl.Element{Key: portKey(e.Protocol, e.First), Verdict: verdict})
			continue
		}
		out = append(out, nfnl.Element{Key: rangeKey(e.First), Verdict: verdict})
		if e.Last < 65535 {
			out = append(out, nfnl.Element{Key: rangeKey(e.Last + 1), Flags: nfnl.ElemEnd})
		}
	}
	return out
}

func rangeKey(port uint16) string { return string(binary.BigEndian.AppendUint16(nil, port)) }

func dispatchOf(a netip.Addr, chain string) nfnl.Element {
	return nfnl.Element{Key: addrKey(a), Verdict: "goto " + chain}
}

// states are the elements of the map of that name.
func states(recheck bool) (out []nfnl.Element) {
	for state, verdict := range policy.StateVerdicts(recheck) {
		out = append(out, nfnl.Element{Key: string(binary.NativeEndian.AppendUint32(nil, uint32(state))), Verdict: verdict})
	}
	return out
}

// isolated are the addresses that a ruleset isolates in any direction.
func isolated(r *policy.Ruleset) map[netip.Addr]bool {
	out := make(map[netip.Addr]bool, len(r.In)+len(r.Out))
	for a := range r.In {
		out[a] = true
	}
	for a := range r.Out {
		out[a] = true
	}
	return out
}

// elementsOf are those of all sets and maps of a ruleset's table but of recheck and of those that the kernel fills.
func elementsOf(want *held) map[string][]nfnl.Element {
	out, r := map[string][]nfnl.Element{}, want.rules
	for name, s := range r.Sets {
		out[name] = membersOf(s)
	}
	for name, m := range r.Maps {
		out[name] = portsOf(m)
	}
	for a, chain := range r.In {
		out[policy.MapIn+family(a)] = append(out[policy.MapIn+family(a)], dispatchOf(a, chain))
	}
	for a, chain := range r.Out {
		out[policy.MapOut+family(a)] = append(out[policy.MapOut+family(a)], dispatchOf(a, chain))
	}
	out[policy.MapState] = states(want.doubt)
	for a := range want.isolated {
		key := addrKey(a)
		out[policy.SetIsolated+family(a)] = append(out[policy.SetIsolated+family(a)], nfnl.Element{Key: key})
		out[policy.SetSelf+family(a)] = append(out[policy.SetSelf+family(a)], nfnl.Element{Key: key + key})
	}
	return out
}

// elementTexts are elements in nft's syntax: keys, and verdicts of maps.
func (k kind) elementTexts(elements []nfnl.Element) (texts [][2]string) {
	for i, e := range elements {
		if e.Flags&nfnl.ElemEnd != 0 {
			continue
		}
		key := k.keyText(e.Key)
		if k.interval {
			last := strings.Repeat("\xff", len(e.Key))
			if i+1 < len(elements) && elements[i+1].Flags&nfnl.ElemEnd != 0 {
				last = before(elements[i+1].Key)
			}
			key += "-" + k.keyText(last)
		}
		texts = append(texts, [2]string{key, e.Verdict})
	}
	return texts
}

// before is the key one less.
func before(key string) string {
	b := []byte(key)
	for i := len(b) - 1; i >= 0; i-- {
		b[i]--
		if b[i] != 0xff {
			break
		}
	}
	return string(b)
}

func (k kind) keyText(key string) string {
	var texts []string
	for _, f := range k.key {
		part := key[:f.size]
		switch {
		case f == ctState:
			texts = append(texts, policy.State(binary.NativeEndian.Uint32([]byte(part))).String())
		case f.size > 2:
			a, _ := netip.AddrFromSlice([]byte(part)) // it has 4 or 16 bytes
			texts = append(texts, a.String())
		case f.size == 2:
			texts = append(texts, fmt.Sprint(binary.BigEndian.Uint16([]byte(part))))
		default:
			texts = append(texts, fmt.Sprint(part[0]))
		}
		key = key[min(len(key), (f.size+3)&^3):]
	}
	return strings.Join(texts, " . ")
}

// sortedKeys orders names, so that the same change is written in the same way.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// Numbers that golang.org/x/sys lacks (include/uapi/linux/netfilter/nf_tables.h).
const (
	setConstant, setInterval, setMap, setTimeout, setEval, setObject = 2, 4, 8, 0x10, 0x20, 0x40
	setAnonymous                                                     = 1
	// dataVerdict is NFT_DATA_VERDICT.
	dataVerdict = 0xffffff00
	// objCounter is NFT_OBJECT_COUNTER.
	objCounter = 1
)

// set names a set of our table for netlink.
func set(name string) nfnl.Set {
	return nfnl.Set{Family: unix.NFPROTO_INET, Table: policy.Table, Name: name}
}
