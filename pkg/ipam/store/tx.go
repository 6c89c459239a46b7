package store

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// Entry is a lease as it is found.
type Entry struct {
	Lease
	// Whole means that the attachment holds every address that the record names. What is not whole is what a killed ADD
	// or DEL left: nobody relies on it.
	Whole bool

	name string
	stat Stat
	junk bool // the record cannot be read; Owner is from the file name
}

// Find reads the lease of an attachment. ErrNotFound where it has none.
func (tx *Tx) Find(containerID, ifName string) (Entry, error) {
	e, err := tx.read(leaseName(containerID, ifName))
	if errors.Is(err, unix.ENOENT) {
		return Entry{}, ErrNotFound
	}
	if err != nil {
		return Entry{}, err
	}
	if !e.junk && (e.ContainerID != containerID || e.IfName != ifName) {
		return Entry{}, tx.s.corrupt(fmt.Sprintf("%s/%s is the record of %q", leaseDir, e.name, e.ContainerID))
	}
	return e, nil
}

// read reads one record. A record that cannot be understood is not an error.
func (tx *Tx) read(name string) (Entry, error) {
	path := leaseDir + "/" + name
	e := Entry{name: name}
	fd, err := tx.s.fs.Open(tx.boot, path, unix.O_RDONLY, 0)
	switch {
	case noFile(err): // it must not keep garbage collection from all others
		e.stat, err = tx.s.fs.Stat(tx.boot, path)
	case err != nil:
		return Entry{}, wrap("open", path, err)
	default:
		defer tx.s.fs.Close(fd)
		e.stat, err = tx.s.fs.Stat(fd, "")
	}
	if err != nil {
		return Entry{}, wrap("look at", path, err)
	}
	owner, named := ownerOf(name)
	if e.stat.regular() {
		data, err := readFile(tx.s.fs, fd, maxRecord)
		if err != nil && !errors.Is(err, unix.EFBIG) {
			return Entry{}, wrap("read", path, err)
		}
		if e.Lease, err = decode(data); err == nil && leaseName(e.ContainerID, e.IfName) == name {
			e.Whole, err = tx.holdsAll(e)
			return e, err
		}
	}
	if !named {
		owner = Owner{ContainerID: name}
	}
	e.Lease, e.junk = Lease{Owner: owner}, true
	return e, nil
}

func (tx *Tx) holdsAll(e Entry) (bool, error) {
	for _, a := range e.Addrs {
		if mine, err := tx.holds(e, a.Addr.Addr()); !mine || err != nil {
			return false, err
		}
	}
	return true, nil
}

// holds reports whether the address is linked to this very record.
func (tx *Tx) holds(e Entry, a netip.Addr) (bool, error) {
	st, err := tx.s.fs.Stat(tx.boot, addressName(a))
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil && st.sameFile(e.stat), wrap("look at", addressName(a), err)
}

func addressName(a netip.Addr) string { return addressDir + "/" + a.String() }

func parseAddressName(name string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(name)
	return a, err == nil && a.String() == name && a.Zone() == ""
}

// Linked reports whether somebody holds the address.
func (tx *Tx) Linked(a netip.Addr) (bool, error) {
	_, err := tx.s.fs.Stat(tx.boot, addressName(a))
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, wrap("look at", addressName(a), err)
}

// Holder says who holds an address, for messages.
func (tx *Tx) Holder(a netip.Addr) string {
	data, err := tx.readSmall(addressName(a), maxRecord)
	if err != nil {
		return "somebody"
	}
	l, err := decode(data)
	if err != nil {
		return "an unreadable record"
	}
	return strings.TrimPrefix(l.PodNamespace+"/"+l.PodName, "/") + " container " + l.ContainerID + " " + l.IfName
}

// Put gives the lease's addresses to its owner, all or none. ErrTaken where the owner or an address has a lease.
func (tx *Tx) Put(l Lease) error {
	data, err := encode(l)
	if err != nil {
		return err
	}
	name := leaseName(l.ContainerID, l.IfName)
	path := leaseDir + "/" + name
	if err := tx.s.writeNew(tx.boot, path, data); errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w: %s", ErrTaken, name)
	} else if err != nil {
		return err
	}
	for i, a := range l.Addrs {
		if err := tx.claim(path, a.Addr.Addr()); err != nil {
			for _, b := range l.Addrs[:i] {
				err = errors.Join(err, tx.free(b.Addr.Addr()))
			}
			return errors.Join(err, wrap("remove", path, tx.s.fs.Unlink(tx.boot, path)))
		}
	}
	return nil
}

// claim links an address to a record, or does nothing.
func (tx *Tx) claim(path string, a netip.Addr) error {
	base, offset := Locate(a)
	w, err := tx.window(base, false)
	if err != nil {
		return err
	}
	if w != nil {
		if err := tx.intend(w, offset); err != nil {
			return err
		}
	}
	if err := tx.s.fs.Link(tx.boot, path, addressName(a)); errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w: %s by %s", ErrTaken, a, tx.Holder(a))
	} else if err != nil {
		return wrap("link", addressName(a), err)
	}
	if w == nil {
		return nil
	}
	err = tx.mark(w, offset, true)
	if errors.Is(err, ErrIndex) {
		return tx.dropWindow(base)
	}
	if err != nil {
		return errors.Join(err, tx.free(a))
	}
	return nil
}

// free unlinks an address. The index never stands in the way: where it cannot be written, on a full disk that copies
// before it writes, it is removed.
func (tx *Tx) free(a netip.Addr) error {
	base, offset := Locate(a)
	w, err := tx.window(base, false)
	if err == nil && w != nil {
		err = tx.intend(w, offset)
	}
	if err != nil {
		if dropErr := tx.dropWindow(base); dropErr != nil {
			return errors.Join(err, dropErr)
		}
		w = nil
	}
	if err := tx.unlinkIfThere(addressName(a)); err != nil {
		return err
	}
	if w == nil {
		return nil
	}
	if err := tx.mark(w, offset, false); err != nil {
		return tx.dropWindow(base)
	}
	return nil
}

// Delete takes everything that the entry holds away from its owner. It may be repeated after a failure.
func (tx *Tx) Delete(e Entry) error {
	held, err := tx.held(e)
	if err != nil {
		return err
	}
	for _, a := range held {
		if e.Whole {
			tx.coolDown(a) // before, so that it does not become free without
		}
		if err := tx.free(a); err != nil {
			return err
		}
	}
	return tx.unlinkIfThere(leaseDir + "/" + e.name)
}

// held returns the addresses that are linked to the entry's record.
func (tx *Tx) held(e Entry) (held []netip.Addr, err error) {
	if e.junk && e.stat.Nlink > 1 {
		return tx.search(e)
	}
	for _, a := range e.Addrs {
		mine, err := tx.holds(e, a.Addr.Addr())
		if err != nil {
			return nil, err
		}
		if mine {
			held = append(held, a.Addr.Addr())
		}
	}
	return held, nil
}

// search walks all addresses for those of a record that no longer names them.
func (tx *Tx) search(e Entry) (held []netip.Addr, err error) {
	names, err := tx.s.fs.Names(tx.boot, addressDir)
	if err != nil {
		return nil, wrap("list", addressDir, err)
	}
	for _, n := range names {
		a, ok := parseAddressName(n)
		if !ok {
			continue
		}
		mine, err := tx.holds(e, a)
		if err != nil {
			return nil, err
		}
		if mine {
			held = append(held, a)
		}
	}
	return held, nil
}

// Entries reads all leases. Those that vanish meanwhile, when it is called without the lock, are left out.
func (tx *Tx) Entries() ([]Entry, error) {
	names, err := tx.s.fs.Names(tx.boot, leaseDir)
	if err != nil {
		return nil, wrap("list", leaseDir, err)
	}
	entries := make([]Entry, 0, len(names))
	for _, n := range names {
		e, err := tx.read(n)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, err
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// DeleteUnchanged is Delete for an entry that was read without the lock. It does nothing and returns false where the
// attachment has another lease by now. Under the lock nothing is half-way, so what is not whole is nobody's.
func (tx *Tx) DeleteUnchanged(e Entry) (bool, error) {
	now, err := tx.read(e.name)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil || now.Whole && (!e.Whole || !e.Lease.equal(now.Lease)) {
		return false, err
	}
	return true, tx.Delete(now)
}

// Bitmap is the index of a window, made where there is none yet.
func (tx *Tx) Bitmap(base netip.Addr) (*Bitmap, error) {
	w, err := tx.window(base, true)
	if err != nil {
		return nil, err
	}
	return &w.bits, nil
}

// Heal marks an address that turned out to be taken although the index said otherwise.
func (tx *Tx) Heal(a netip.Addr) error {
	base, offset := Locate(a)
	w, err := tx.window(base, false)
	if err != nil || w == nil {
		return err
	}
	return tx.mark(w, offset, true)
}

// DropIndex removes the indexes of all windows that were looked at, so that they are made anew from the links.
func (tx *Tx) DropIndex() error {
	var errs []error
	for base := range tx.windows {
		errs = append(errs, tx.dropWindow(base))
	}
	return errors.Join(errs...)
}

// lastSize is the fixed length of the file: written in one go in place, it is never torn.
const lastSize = 48

// Last is the address that a range set gave last; the zero value where it gave none or the file is of no use.
func (tx *Tx) Last(set int) (netip.Addr, error) {
	data, err := tx.readSmall(lastName(set), lastSize)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EFBIG) || noFile(err) {
		return netip.Addr{}, nil
	}
	if err != nil {
		return netip.Addr{}, err
	}
	a, err := netip.ParseAddr(strings.TrimSpace(string(data)))
	if err != nil {
		return netip.Addr{}, nil // junk costs no more than starting from the first address
	}
	return a, nil
}

// SetLast keeps it.
func (tx *Tx) SetLast(set int, a netip.Addr) error {
	name := lastName(set)
	fd, err := tx.s.fs.Open(tx.boot, name, unix.O_WRONLY|unix.O_CREAT, 0o600)
	if noFile(err) {
		if err := tx.unlinkIfThere(name); err != nil {
			return err
		}
		fd, err = tx.s.fs.Open(tx.boot, name, unix.O_WRONLY|unix.O_CREAT, 0o600)
	}
	if err != nil {
		return wrap("open", name, err)
	}
	defer tx.s.fs.Close(fd)
	text := fmt.Sprintf("%-*s\n", lastSize-1, a)
	return wrap("write", name, writeAll(tx.s.fs, fd, []byte(text), 0))
}

func lastName(set int) string { return fmt.Sprintf("last.%d", set) }
