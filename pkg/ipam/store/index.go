package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// An index file is one Bitmap:
//
//	0     "headcni-index 1 <window>\n", padded with zeros to 64 bytes
//	64    addresses taken, uint16 per group
//	576   fullest block, uint8 per group
//	832   the address being changed, uint64: 0 for none, else its offset + 1
//	1024  the addresses freed last, each with when (cooldown.go)
//	4096  one bit per address, in little-endian words
//
// The file is sparse: it takes 4 KiB and what is in use. The address being changed comes last in its block of the file,
// so that it is cleared only when the summary is written, however short the write.
const (
	indexHead     = 64
	indexTaken    = indexHead
	indexFullest  = indexTaken + 2*groups
	indexIntent   = indexFullest + groups
	indexUsed     = indexIntent + 8
	indexCooldown = 1024
	indexRead     = indexCooldown + cooldownSlots*cooldownSlot
	indexData     = 4096
	indexTemp     = "index/.new"
)

type window struct {
	base netip.Addr
	name string
	fd   int
	bits Bitmap
	// freed are the addresses that were freed last, in no order.
	freed [cooldownSlots]freed
}

func indexName(base netip.Addr) string {
	return fmt.Sprintf("index/%s-%d", base, base.BitLen()-WindowBits)
}

func indexHeader(base netip.Addr) []byte {
	b := make([]byte, indexHead)
	copy(b, fmt.Sprintf("headcni-index 1 %s\n", base))
	return b
}

// window opens the index of a window once per transaction. Where there is none it is made from the links if create is
// set; else nil is returned: an address needs no index to be taken or freed.
func (tx *Tx) window(base netip.Addr, create bool) (*window, error) {
	if w, ok := tx.windows[base]; ok && (w != nil || !create) {
		return w, nil
	}
	w, err := tx.openWindow(base)
	if errors.Is(err, ErrIndex) {
		if err := tx.dropWindow(base); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	if w == nil && create {
		if w, err = tx.buildWindow(base); err != nil {
			return nil, err
		}
	}
	tx.windows[base] = w
	return w, nil
}

// openWindow returns nil where there is no index, and ErrIndex where there is none to trust.
func (tx *Tx) openWindow(base netip.Addr) (*window, error) {
	w := &window{base: base, name: indexName(base)}
	var err error
	w.fd, err = tx.s.fs.Open(tx.boot, w.name, unix.O_RDWR, 0)
	if errors.Is(err, unix.EROFS) {
		w.fd, err = tx.s.fs.Open(tx.boot, w.name, unix.O_RDONLY, 0) // to look is allowed
	}
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if noFile(err) {
		return nil, ErrIndex
	}
	if err != nil {
		return nil, wrap("open", w.name, err)
	}
	if err := tx.readWindow(w); err != nil {
		tx.s.fs.Close(w.fd)
		if noFile(err) {
			err = ErrIndex
		}
		return nil, err
	}
	return w, nil
}

func (tx *Tx) readWindow(w *window) error {
	b := make([]byte, indexRead)
	if err := readUpTo(tx.s.fs, w.fd, b, 0); err != nil {
		return wrap("read", w.name, err)
	}
	if !bytes.Equal(b[:indexHead], indexHeader(w.base)) {
		return ErrIndex
	}
	for g := range groups {
		w.bits.taken[g] = binary.LittleEndian.Uint16(b[indexTaken+2*g:])
		w.bits.fullest[g] = b[indexFullest+g]
	}
	w.bits.load = func(g int, d *groupData) error { return tx.readGroup(w, g, d) }
	w.readCooldown(b[indexCooldown:])
	intent := binary.LittleEndian.Uint64(b[indexIntent:])
	if intent == 0 {
		return nil
	}
	if intent > WindowSize {
		return ErrIndex
	}
	return tx.finish(w, uint32(intent-1))
}

func (tx *Tx) readGroup(w *window, g int, d *groupData) error {
	b := make([]byte, 8*groupWords)
	if err := readUpTo(tx.s.fs, w.fd, b, indexData+int64(g)*int64(len(b))); err != nil {
		return wrap("read", w.name, err)
	}
	for i := range d {
		d[i] = binary.LittleEndian.Uint64(b[8*i:])
	}
	return nil
}

// readUpTo fills b; what lies beyond the end of the file stays zero, as a hole does.
func readUpTo(fs FS, fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, err := fs.Read(fd, b, off)
		if err != nil || n == 0 {
			return err
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// finish completes the change at which another process was killed. The group's summary may be the one from before.
func (tx *Tx) finish(w *window, offset uint32) error {
	linked, err := tx.Linked(At(w.base, offset))
	if err != nil {
		return err
	}
	g := int(offset >> groupBits)
	d := new(groupData)
	if err := tx.readGroup(w, g, d); err != nil {
		return err
	}
	w.bits.data[g] = d
	if _, err := w.bits.Set(offset, linked); err != nil {
		return err
	}
	w.bits.taken[g], w.bits.fullest[g] = d.summary()
	return tx.writeWindow(w, offset)
}

// intend announces a change, mark completes it.
func (tx *Tx) intend(w *window, offset uint32) error {
	b := binary.LittleEndian.AppendUint64(nil, uint64(offset)+1)
	return wrap("write", w.name, writeAll(tx.s.fs, w.fd, b, indexIntent))
}

func (tx *Tx) mark(w *window, offset uint32, taken bool) error {
	if _, err := w.bits.Set(offset, taken); err != nil {
		return err
	}
	return tx.writeWindow(w, offset)
}

// writeWindow writes what belongs to one address, its word and then the summary, and with that ends the intent.
func (tx *Tx) writeWindow(w *window, offset uint32) error {
	d, err := w.bits.group(int(offset >> groupBits))
	if err != nil {
		return err
	}
	word := binary.LittleEndian.AppendUint64(nil, d[offset%groupSize/64])
	if err := writeAll(tx.s.fs, w.fd, word, indexData+int64(offset/64)*8); err != nil {
		return wrap("write", w.name, err)
	}
	return wrap("write", w.name, writeAll(tx.s.fs, w.fd, w.bits.encode()[indexTaken:], indexTaken))
}

// encode is the file's first block without its head and without an intent.
func (b *Bitmap) encode() []byte {
	out := make([]byte, indexUsed)
	for g := range groups {
		binary.LittleEndian.PutUint16(out[indexTaken+2*g:], b.taken[g])
		out[indexFullest+g] = b.fullest[g]
	}
	return out
}

// buildWindow makes an index from the links, in a temporary file that then takes its name.
func (tx *Tx) buildWindow(base netip.Addr) (_ *window, err error) {
	w := &window{base: base, name: indexName(base)}
	if err := tx.fill(w); err != nil {
		return nil, err
	}
	if err := tx.unlinkIfThere(indexTemp); err != nil {
		return nil, err
	}
	w.fd, err = tx.s.fs.Open(tx.boot, indexTemp, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return nil, wrap("make", w.name, err)
	}
	if err := tx.writeBuilt(w); err != nil {
		tx.s.fs.Close(w.fd)
		// Left behind, it is removed by the next who makes an index.
		return nil, errors.Join(err, tx.unlinkIfThere(indexTemp))
	}
	w.bits.load = func(g int, d *groupData) error { return tx.readGroup(w, g, d) }
	return w, nil
}

func (tx *Tx) writeBuilt(w *window) error {
	head := w.bits.encode()
	copy(head, indexHeader(w.base))
	if err := writeAll(tx.s.fs, w.fd, head, 0); err != nil {
		return wrap("write", w.name, err)
	}
	for g, d := range w.bits.data {
		if d == nil {
			continue
		}
		var b []byte
		for _, word := range d {
			b = binary.LittleEndian.AppendUint64(b, word)
		}
		if err := writeAll(tx.s.fs, w.fd, b, indexData+int64(g)*int64(len(b))); err != nil {
			return wrap("write", w.name, err)
		}
	}
	return wrap("name", w.name, tx.s.fs.Rename(tx.boot, indexTemp, w.name))
}

// fill marks every linked address of the window. It walks all addresses.
func (tx *Tx) fill(w *window) error {
	names, err := tx.s.fs.Names(tx.boot, addressDir)
	if err != nil {
		return wrap("list", addressDir, err)
	}
	for _, n := range names {
		a, ok := parseAddressName(n)
		if !ok {
			continue
		}
		base, offset := Locate(a)
		if base != w.base {
			continue
		}
		w.bits.add(offset)
	}
	w.bits.summarise()
	return nil
}

// dropWindow removes an index that is wrong or cannot be written. The next allocation in the window makes it anew.
func (tx *Tx) dropWindow(base netip.Addr) error {
	if w := tx.windows[base]; w != nil {
		tx.s.fs.Close(w.fd)
	}
	delete(tx.windows, base)
	return tx.unlinkIfThere(indexName(base))
}

func (tx *Tx) unlinkIfThere(name string) error {
	switch err := tx.s.fs.Unlink(tx.boot, name); {
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EISDIR):
		return removeAll(tx.s.fs, tx.boot, name)
	default:
		return wrap("remove", name, err)
	}
}
