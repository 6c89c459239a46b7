// Package nfnl speaks netlink with nf_tables: what the kernel holds, how often it was changed, each change as it happens, and
// transactions that change elements of sets. That costs microseconds, where the nft program costs milliseconds, and shows every attribute.
package nfnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// dumpTries bounds the repeats of a dump that a concurrent change interrupted (NLM_F_DUMP_INTR).
	dumpTries = 10
	// attrMask takes the flags (nested, byte order) off an attribute's type.
	attrMask = 0x3fff
	// headerLen is the size of struct nfgenmsg, which begins every message.
	headerLen = 4
)

// header is struct nfgenmsg {family, version, u16 resource}.
type header []byte

func (h header) Len() int          { return len(h) }
func (h header) Serialize() []byte { return h }

// Attr is an attribute of a message.
type Attr struct {
	Type  int // without flags
	Value []byte
}

// Name is an attribute that names an object.
func Name(typ int, name string) Attr { return Attr{Type: typ, Value: nl.ZeroTerminated(name)} }

// Request sends one nf_tables message (unix.NFT_MSG_*) about a family (unix.NFPROTO_*), and returns the attributes of each answer.
func Request(family uint8, msg, flags int, attrs ...Attr) ([][]byte, error) {
	for try := 0; ; try++ {
		req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|msg, flags)
		req.AddData(header{family, unix.NFNETLINK_V0, 0, 0})
		for _, a := range attrs {
			req.AddData(nl.NewRtAttr(a.Type, a.Value))
		}
		res, err := req.Execute(unix.NETLINK_NETFILTER, 0)
		if errors.Is(err, netlink.ErrDumpInterrupted) && try < dumpTries {
			continue
		}
		if err != nil {
			return nil, err
		}
		for i := range res {
			res[i] = res[i][headerLen:]
		}
		return res, nil
	}
}

// Generation returns the number of nf_tables transactions in this network namespace so far: the same number means the
// same rules. All tables of all owners count.
func Generation() (uint32, error) {
	res, err := Request(unix.AF_UNSPEC, unix.NFT_MSG_GETGEN, 0)
	if errors.Is(err, unix.EINVAL) { // nfnetlink knows no such subsystem and could not load it
		err = fmt.Errorf("%w (%w)", unix.EPROTONOSUPPORT, err)
	}
	if err != nil {
		return 0, fmt.Errorf("ask for the nf_tables generation: %w", err)
	}
	for _, r := range res {
		a, err := Attributes(r)
		if err != nil {
			return 0, err
		}
		if id := a[unix.NFTA_GEN_ID]; len(id) == 4 {
			return binary.BigEndian.Uint32(id), nil
		}
	}
	return 0, errors.New("ask for the nf_tables generation: the kernel's answer has none")
}

// List splits attributes, in the kernel's order.
func List(b []byte) ([]Attr, error) {
	var out []Attr
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return nil, fmt.Errorf("read an nf_tables message: an attribute of %d bytes in %d", n, len(b))
		}
		out = append(out, Attr{Type: int(binary.NativeEndian.Uint16(b[2:])) & attrMask, Value: b[unix.SizeofNlAttr:n]})
		b = b[min((n+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(b)):]
	}
	return out, nil
}

// Attributes splits attributes by type. Of several of one type it has the last.
func Attributes(b []byte) (map[int][]byte, error) {
	list, err := List(b)
	if err != nil {
		return nil, err
	}
	out := make(map[int][]byte, len(list))
	for _, a := range list {
		out[a.Type] = a.Value
	}
	return out, nil
}

// Get returns the value of the first attribute of a type, nil where there is none. It allocates nothing.
func Get(b []byte, typ int) []byte {
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return nil
		}
		if int(binary.NativeEndian.Uint16(b[2:]))&attrMask == typ {
			return b[unix.SizeofNlAttr:n:n]
		}
		b = b[min((n+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(b)):]
	}
	return nil
}

// Text is a value that ends with a zero.
func Text(b []byte) string {
	if i := slices.Index(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
