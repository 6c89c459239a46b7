package store

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/procfs"
	"github.com/headcni/headcni/internal/trusted"
	"github.com/headcni/headcni/pkg/config/paths"
)

const (
	leaseDir   = "leases"
	addressDir = "addresses"
	indexDir   = "index"
	layoutName = "layout"
	layoutText = "headcni-ipam 1\n"
	newName    = ".new"
	asideMark  = ".corrupt-"

	// DefaultLockTimeout is far above any wait for the lock, which is held for well under a millisecond at a time, and
	// below the runtimes' own deadlines for ADD.
	DefaultLockTimeout = 10 * time.Second
)

var (
	// ErrNotFound means that the attachment has no lease.
	ErrNotFound = errors.New("no lease")
	// ErrOwner means that nothing can be leased to such an attachment.
	ErrOwner = errors.New("invalid attachment")
	// ErrTaken means that an address or an attachment has a lease already.
	ErrTaken = errors.New("already leased")
	// ErrCorrupt means that the store is not as any version of this program leaves it.
	ErrCorrupt = errors.New("lease store is corrupt")
)

// Options are a Store's seams; the zero value is right outside tests.
type Options struct {
	// BootID stands for this boot, default the kernel's.
	BootID string
	// FS default System.
	FS FS
	// LockTimeout is the longest wait for the lock; a context may end it earlier. Default DefaultLockTimeout.
	LockTimeout time.Duration
	// Age is how long ago the boot was. Default the kernel's word.
	Age func() time.Duration
}

// Store is the leases of one network. It holds no file open between calls and may be used by many goroutines.
type Store struct {
	dir     string
	bootID  string
	fs      FS
	timeout time.Duration
	age     func() time.Duration
}

// New returns the store in the folder dir. It touches nothing.
func New(dir string, o Options) (*Store, error) {
	s := &Store{dir: dir, bootID: o.BootID, fs: o.FS, timeout: o.LockTimeout, age: o.Age}
	if s.age == nil {
		s.age = sinceBoot
	}
	if s.fs == nil {
		s.fs = System{}
	}
	if s.timeout == 0 {
		s.timeout = DefaultLockTimeout
	}
	if s.bootID == "" {
		var err error
		if s.bootID, err = procfs.Read(paths.BootID); err != nil {
			return nil, fmt.Errorf("read the boot ID: %w; is /proc mounted?", err)
		}
	}
	if !isBoot(s.bootID) {
		return nil, fmt.Errorf("boot ID %q: want a UUID", s.bootID)
	}
	return s, nil
}

// isBoot says whether a name is a boot ID as random(4) gives them: a UUID in lower case. Nothing else in the folder is
// ever removed by us.
func isBoot(name string) bool {
	if len(name) != 36 {
		return false
	}
	for i := range len(name) {
		c, dash := name[i], i == 8 || i == 13 || i == 18 || i == 23
		if dash != (c == '-') || !dash && !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f') {
			return false
		}
	}
	return true
}

// Dir is the network's folder.
func (s *Store) Dir() string { return s.dir }

// Tx is what may be done while the lock is held.
type Tx struct {
	s                 *Store
	net, locked, boot int
	windows           map[netip.Addr]*window
}

// Update runs fn under the lock and makes the store where there is none yet. Nothing is undone when fn fails: each step
// of a Tx is complete in itself.
func (s *Store) Update(ctx context.Context, fn func(*Tx) error) error {
	return s.transact(ctx, true, fn)
}

// Edit is Update for what only ever removes: where there is no store it does nothing and returns ErrNotFound.
func (s *Store) Edit(ctx context.Context, fn func(*Tx) error) error {
	return s.transact(ctx, false, fn)
}

// View runs fn on the store as it is, without the lock: what others are changing is seen half-changed. ErrNotFound where
// there is no store.
func (s *Store) View(fn func(*Tx) error) (err error) {
	tx := &Tx{s: s, net: -1, locked: -1, boot: -1}
	defer tx.close()
	if tx.net, err = s.openNet(false); err != nil {
		return err
	}
	if tx.boot, err = s.openBoot(tx.net); errors.Is(err, unix.ENOENT) {
		return ErrNotFound
	} else if err != nil {
		return err
	}
	if err := tx.checkLayout(); err != nil {
		return err
	}
	return fn(tx)
}

func (s *Store) transact(ctx context.Context, create bool, fn func(*Tx) error) (err error) {
	tx, err := s.begin(ctx, create)
	if err != nil {
		return err
	}
	defer tx.close()
	if tx.boot, err = s.openBoot(tx.net); errors.Is(err, unix.ENOENT) {
		if !create {
			return ErrNotFound
		}
		tx.boot, err = s.create(tx.net)
	}
	if err != nil {
		return err
	}
	if err := tx.checkLayout(); err != nil {
		return err
	}
	return fn(tx)
}

// begin opens the network's folder and takes the lock.
func (s *Store) begin(ctx context.Context, create bool) (*Tx, error) {
	tx := &Tx{s: s, net: -1, locked: -1, boot: -1, windows: map[netip.Addr]*window{}}
	var err error
	tx.net, err = s.openNet(create)
	if err != nil {
		return nil, err
	}
	if !create && s.absent(tx.net, lockName) && s.absent(tx.net, s.bootID) {
		tx.close()
		return nil, ErrNotFound // not even a lock is left where there was nothing
	}
	if tx.locked, err = s.lock(ctx, tx.net); err != nil {
		tx.locked = -1
		tx.close()
		return nil, err
	}
	return tx, nil
}

func (s *Store) absent(dir int, name string) bool {
	_, err := s.fs.Stat(dir, name)
	return errors.Is(err, unix.ENOENT)
}

// Ready says why Update would fail, as far as can be told without making or changing anything.
func (s *Store) Ready(ctx context.Context) error {
	err := s.Edit(ctx, func(*Tx) error { return nil })
	if errors.Is(err, ErrNotFound) {
		err = s.readyToMake()
	}
	return err
}

// readyToMake is Ready where this boot has no store.
func (s *Store) readyToMake() error {
	net, err := s.openNet(false)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer s.fs.Close(net)
	names, err := s.fs.Names(net, ".")
	if err != nil {
		return wrap("list", s.dir, err)
	}
	if i := slices.IndexFunc(names, s.isAside); i >= 0 {
		return s.notRebuilt(names[i])
	}
	return nil
}

func (s *Store) notRebuilt(aside string) error {
	return s.corrupt("it was set aside as " + aside + " and not rebuilt")
}

// close gives the lock back last.
func (tx *Tx) close() {
	for _, w := range tx.windows {
		if w != nil {
			tx.s.fs.Close(w.fd)
		}
	}
	for _, fd := range []int{tx.boot, tx.net, tx.locked} {
		if fd >= 0 {
			tx.s.fs.Close(fd)
		}
	}
}

// openNet opens the network's folder, which only root may be able to change: what is done in it is done by name.
func (s *Store) openNet(create bool) (int, error) {
	if err := trusted.Folder(s.dir); err != nil {
		return -1, fmt.Errorf("use %s for leases: %w", s.dir, err)
	}
	open := func() (int, error) { return s.fs.Open(unix.AT_FDCWD, s.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0) }
	fd, err := open()
	if errors.Is(err, unix.ENOENT) {
		if !create {
			return -1, ErrNotFound
		}
		if err := s.mkdirs(s.dir, 0o700); err != nil {
			return -1, err
		}
		if err := trusted.Folder(s.dir); err != nil { // somebody was faster in a folder that all can write
			return -1, fmt.Errorf("use %s for leases: %w", s.dir, err)
		}
		fd, err = open()
	}
	if err != nil {
		return -1, wrap("open", s.dir, err)
	}
	return fd, nil
}

// mkdirs makes the network's folder for root only: who can open the lock can hold it. Its parents are open to all.
func (s *Store) mkdirs(path string, mode uint32) error {
	err := s.fs.Mkdir(unix.AT_FDCWD, path, mode)
	if errors.Is(err, unix.ENOENT) && filepath.Dir(path) != path {
		if err := s.mkdirs(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := trusted.Way(path); err != nil {
			return err
		}
		err = s.fs.Mkdir(unix.AT_FDCWD, path, mode)
	}
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return wrap("make", path, err)
}

func (s *Store) openBoot(net int) (int, error) {
	fd, err := s.fs.Open(net, s.bootID, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return -1, s.corrupt("it is no folder")
	}
	if err != nil {
		return -1, wrap("open", filepath.Join(s.dir, s.bootID), err)
	}
	return fd, nil
}

// create removes what other boots left and makes this boot's store under a temporary name first: a store that has its
// name is complete, and no other boot's is left then.
func (s *Store) create(net int) (int, error) {
	names, err := s.fs.Names(net, ".")
	if err != nil {
		return -1, wrap("list", s.dir, err)
	}
	for _, n := range names {
		boot, _, _ := strings.Cut(n, asideMark)
		if s.isAside(n) {
			return -1, s.notRebuilt(n)
		}
		if isBoot(boot) && boot != s.bootID {
			if err := removeAll(s.fs, net, n); err != nil {
				return -1, fmt.Errorf("clear %s of an earlier boot: %w", s.dir, err)
			}
		}
	}
	fd, err := s.makeNew(net)
	if err != nil {
		return -1, err
	}
	if err := s.nameNew(net); err != nil {
		s.fs.Close(fd)
		return -1, err
	}
	return fd, nil
}

// makeNew makes an empty store under the temporary name and opens it.
func (s *Store) makeNew(net int) (int, error) {
	if err := removeAll(s.fs, net, newName); err != nil {
		return -1, err
	}
	for _, n := range []string{"", "/" + leaseDir, "/" + addressDir, "/" + indexDir} {
		if err := s.fs.Mkdir(net, newName+n, 0o700); err != nil {
			return -1, wrap("make", filepath.Join(s.dir, newName+n), err)
		}
	}
	if err := s.writeNew(net, newName+"/"+layoutName, []byte(layoutText)); err != nil {
		return -1, err
	}
	fd, err := s.fs.Open(net, newName, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	return fd, wrap("open", filepath.Join(s.dir, newName), err)
}

func (s *Store) nameNew(net int) error {
	return wrap("name", filepath.Join(s.dir, s.bootID), s.fs.Rename(net, newName, s.bootID))
}

// writeNew makes a file, or nothing.
func (s *Store) writeNew(dir int, name string, data []byte) error {
	fd, err := s.fs.Open(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return wrap("make", name, err)
	}
	err = writeAll(s.fs, fd, data, 0)
	s.fs.Close(fd)
	if err != nil {
		return errors.Join(wrap("write", name, err), wrap("remove", name, s.fs.Unlink(dir, name)))
	}
	return nil
}

func (s *Store) corrupt(why string) error {
	return fmt.Errorf("%w: %s: %s", ErrCorrupt, filepath.Join(s.dir, s.bootID), why)
}

func (tx *Tx) checkLayout() error {
	data, err := tx.readSmall(layoutName, 64)
	if errors.Is(err, unix.ENOENT) {
		return tx.s.corrupt("the file layout is missing")
	}
	if errors.Is(err, unix.EFBIG) || noFile(err) {
		return tx.s.corrupt("layout is no file of ours")
	}
	if err != nil {
		return err
	}
	if string(data) != layoutText {
		return tx.s.corrupt(fmt.Sprintf("layout is %q, this program knows %q", data, layoutText))
	}
	for _, n := range []string{leaseDir, addressDir, indexDir} {
		st, err := tx.s.fs.Stat(tx.boot, n)
		if errors.Is(err, unix.ENOENT) || err == nil && !st.folder() {
			return tx.s.corrupt("the folder " + n + " is missing")
		}
		if err != nil {
			return wrap("look at", n, err)
		}
	}
	return nil
}

func (tx *Tx) readSmall(name string, limit int) ([]byte, error) {
	fd, err := tx.s.fs.Open(tx.boot, name, unix.O_RDONLY, 0)
	if err != nil {
		return nil, wrap("open", name, err)
	}
	defer tx.s.fs.Close(fd)
	data, err := readFile(tx.s.fs, fd, limit)
	return data, wrap("read", name, err)
}

// Rebuild sets a corrupt store aside and puts a new one in its place that has the given leases, which are those that
// live. Leases of other writers that can still be read are kept: it is not ours to say that they are dead. It returns
// where the old store is now; "" means that the store was sound, for instance because another process rebuilt it first.
// A Rebuild that is killed leaves the store corrupt, never empty.
func (s *Store) Rebuild(ctx context.Context, writer string, live []Lease) (aside string, err error) {
	tx, err := s.begin(ctx, true)
	if err != nil {
		return "", err
	}
	defer tx.close()
	old, err := s.openBoot(tx.net)
	if errors.Is(err, unix.ENOENT) {
		// No store, or one that an earlier Rebuild set aside.
		if tx.boot, err = s.create(tx.net); err == nil {
			return "", nil
		}
	}
	if old >= 0 {
		defer s.fs.Close(old)
		err = (&Tx{s: s, boot: old}).checkLayout()
	}
	if !errors.Is(err, ErrCorrupt) {
		return "", err
	}
	if tx.boot, err = s.makeNew(tx.net); err != nil {
		return "", err
	}
	if err := tx.refill(live, s.salvage(tx.net, old, writer)); err != nil {
		return "", fmt.Errorf("rebuild the lease store: %w", err)
	}
	if aside, err = s.setAside(tx.net); err != nil {
		return "", err
	}
	return aside, s.nameNew(tx.net)
}

func (tx *Tx) refill(live, rest []Lease) error {
	for _, l := range live {
		if err := tx.Put(l); err != nil {
			return err
		}
	}
	for _, l := range rest {
		if err := tx.Put(l); err != nil && !errors.Is(err, ErrTaken) {
			return err
		}
	}
	return nil
}

// salvage returns the leases of other writers that can be read in the old store, or in the one set aside before.
func (s *Store) salvage(net, old int, writer string) []Lease {
	if old < 0 {
		names, _ := s.fs.Names(net, ".") // without a list there is nothing to salvage
		i := slices.IndexFunc(names, s.isAside)
		if i < 0 {
			return nil
		}
		var err error
		if old, err = s.fs.Open(net, names[i], unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
			return nil
		}
		defer s.fs.Close(old)
	}
	tx := &Tx{s: s, boot: old}
	names, err := s.fs.Names(old, leaseDir)
	if err != nil {
		return nil // the folder is what is missing
	}
	var leases []Lease
	for _, n := range names {
		if e, err := tx.read(n); err == nil && !e.junk && e.Writer != writer {
			leases = append(leases, e.Lease)
		}
	}
	return leases
}

func (s *Store) isAside(name string) bool { return strings.HasPrefix(name, s.bootID+asideMark) }

// setAside gives the corrupt store a name that says so. Only the newest is kept, or a store that breaks again and again
// would fill the disk. What an earlier Rebuild set aside stays where there is nothing newer.
func (s *Store) setAside(net int) (string, error) {
	names, err := s.fs.Names(net, ".")
	if err != nil {
		return "", wrap("list", s.dir, err)
	}
	if i := slices.IndexFunc(names, s.isAside); !slices.Contains(names, s.bootID) && i >= 0 {
		return filepath.Join(s.dir, names[i]), nil
	}
	name := s.bootID + asideMark + time.Now().UTC().Format("20060102T150405.000000000")
	if err := s.fs.Rename(net, s.bootID, name); err != nil {
		return "", wrap("set aside", filepath.Join(s.dir, s.bootID), err)
	}
	for _, n := range names {
		if s.isAside(n) {
			if err := removeAll(s.fs, net, n); err != nil {
				return "", err
			}
		}
	}
	return filepath.Join(s.dir, name), nil
}
