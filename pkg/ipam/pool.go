package ipam

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/ipam/store"
)

// cooldown is how long a freed address is not given again while others are free.
const cooldown = 30 * time.Second

// Pool gives the addresses of one network. It may be used by many goroutines, and by many processes at once.
type Pool struct {
	cfg    Config
	spaces []space
	store  *store.Store
	draw   draw
	now    func() time.Time
}

// Open checks the configuration and returns its pool. Nothing is read or made on disk yet, so that a DEL or a look at the
// leases leaves no trace. A configuration without ranges is fine for everything but Allocate.
func Open(cfg Config) (*Pool, error) {
	return open(cfg, store.Options{})
}

func open(cfg Config, o store.Options) (*Pool, error) {
	if err := cfg.Validate(); err != nil && !errors.Is(err, ErrNoRanges) {
		return nil, err
	}
	cfg = cfg.withDefaults()
	s, err := store.New(filepath.Join(cfg.DataDir, cfg.Network), o)
	if err != nil {
		return nil, err
	}
	p := &Pool{cfg: cfg, store: s, draw: rand.Uint64, now: time.Now}
	for _, set := range cfg.Sets {
		p.spaces = append(p.spaces, newSpace(set))
	}
	return p, nil
}

// Networks lists the networks that have a folder under dataDir ("" = the default), sorted.
func Networks(dataDir string) ([]string, error) {
	dir := Config{DataDir: dataDir}.withDefaults().DataDir
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list networks: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && validNetwork(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Config returns the configuration with its defaults.
func (p *Pool) Config() Config { return p.cfg }

// Dir is the folder of the network's leases.
func (p *Pool) Dir() string { return p.store.Dir() }

// Allocate gives the owner one address from each range set: the requested one where a requested address is of that set,
// else one by the strategy. All or none. Errors: ErrExhausted, ErrInUse, ErrNotInRange (also for an address that is
// reserved or excluded, or a second one of the same set), ErrOwnerHasLease (with that lease), ErrOwner, ErrLocked,
// ErrCorrupt, ErrNoRanges, and what the disk says.
func (p *Pool) Allocate(ctx context.Context, o Owner, requested []netip.Addr) (lease Lease, err error) {
	if err := validOwner(o.ContainerID, o.IfName); err != nil {
		return Lease{}, err
	}
	if len(p.spaces) == 0 {
		return Lease{}, fmt.Errorf("network %s: %w to allocate from", p.cfg.Network, ErrNoRanges)
	}
	want, err := p.assign(requested)
	if err != nil {
		return Lease{}, err
	}
	err = p.store.Update(ctx, func(tx *store.Tx) error {
		lease, err = p.allocate(tx, o, want)
		return err
	})
	if err != nil && !errors.Is(err, ErrOwnerHasLease) && !errors.Is(err, ErrOwner) {
		return Lease{}, fmt.Errorf("allocate for %s/%s: %w", o.ContainerID, o.IfName, err)
	}
	return lease, err
}

// assign finds the set of each requested address. The result has one choice per set; those not asked for have no range.
func (p *Pool) assign(requested []netip.Addr) ([]choice, error) {
	want := make([]choice, len(p.spaces))
	for _, a := range requested {
		a = a.Unmap()
		i := slices.IndexFunc(p.spaces, func(s space) bool { _, ok := s.find(a); return ok })
		if i < 0 {
			return nil, fmt.Errorf("requested %s: %w of network %s, or reserved", a, ErrNotInRange, p.cfg.Network)
		}
		if want[i].rng != nil && want[i].addr != a {
			return nil, fmt.Errorf("requested %s: %w left, %s is from the same set", a, ErrNotInRange, want[i].addr)
		}
		rng, _ := p.spaces[i].find(a)
		want[i] = choice{a, rng}
	}
	return want, nil
}

func (p *Pool) allocate(tx *store.Tx, o Owner, want []choice) (Lease, error) {
	e, err := tx.Find(o.ContainerID, o.IfName)
	switch {
	case err == nil && e.Whole:
		return e.Lease, ErrOwnerHasLease
	case err == nil:
		// An ADD or DEL of this attachment was killed half-way.
		if err := tx.Delete(e); err != nil {
			return Lease{}, err
		}
	case !errors.Is(err, ErrNotFound):
		return Lease{}, err
	}
	lease := Lease{Owner: o, Time: p.now().UTC(), Writer: p.cfg.Writer}
	for i := range p.spaces {
		c, err := p.choose(tx, i, want[i])
		if err != nil {
			return Lease{}, err
		}
		lease.Addrs = append(lease.Addrs, LeasedAddr{
			Addr: netip.PrefixFrom(c.addr, c.rng.Subnet.Bits()), Gateway: c.rng.Gateway,
		})
	}
	return lease, tx.Put(lease)
}

// choose picks an address of a set that is really free, and remembers it where the strategy needs that. It remembers
// first: should taking the address fail, one address has been skipped for a round.
func (p *Pool) choose(tx *store.Tx, set int, want choice) (choice, error) {
	if want.rng != nil {
		if linked, err := tx.Linked(want.addr); err != nil {
			return choice{}, err
		} else if linked {
			return choice{}, fmt.Errorf("requested %s: %w by %s", want.addr, ErrInUse, tx.Holder(want.addr))
		}
		return want, nil
	}
	var last netip.Addr
	var err error
	if p.cfg.Strategy == Sequential {
		if last, err = tx.Last(set); err != nil {
			return choice{}, err
		}
	}
	c, err := p.search(tx, set, last)
	if err != nil {
		return choice{}, err
	}
	if p.cfg.Strategy == Sequential {
		err = tx.SetLast(set, c.addr)
	}
	return c, err
}

// search picks until the links, and who else knows, agree that the address is free. Where the index is of no use, or says
// that nothing is free, it is made anew once: that walks all leases, but only in a pool that is damaged or full.
func (p *Pool) search(tx *store.Tx, set int, last netip.Addr) (choice, error) {
	from, inUse, fresh := p.spaces[set], 0, false
	cooling, ignored := false, false // addresses in cooldown are left out; they are taken nevertheless
	for {
		c, err := pick(p.cfg.Strategy, from, last, tx, p.draw)
		switch {
		case err != nil && !errors.Is(err, store.ErrIndex):
			return choice{}, err
		case err == nil && c.rng == nil && cooling:
			from, inUse, cooling = p.spaces[set], 0, false // rather one in cooldown than none
			ignored = true
			continue
		case err == nil && c.rng != nil:
			linked, err := tx.Linked(c.addr)
			if err != nil {
				return choice{}, err
			}
			if list := p.coolingDown(tx, c.addr); !linked && !ignored && len(list) > 0 {
				from, cooling = from.without(list...), true
				continue
			}
			if !linked && (p.cfg.InUse == nil || !p.cfg.InUse(c.addr)) {
				return c, nil
			}
			if !linked {
				// It is not written down: nobody would tell us when it is free again.
				from, inUse = from.without(c.addr), inUse+1
				continue
			}
			err = tx.Heal(c.addr)
			if err != nil && !errors.Is(err, store.ErrIndex) {
				return choice{}, err
			}
			if err == nil {
				continue
			}
		}
		if fresh {
			return choice{}, errors.Join(p.exhausted(set, inUse), err)
		}
		fresh = true
		if err := tx.DropIndex(); err != nil {
			return choice{}, err
		}
	}
}

// coolingDown returns all addresses of a's window that are in cooldown, if a is one of them: other nodes take it for the pod that had it
// until their watch on Pods tells them.
func (p *Pool) coolingDown(tx *store.Tx, a netip.Addr) []netip.Addr {
	base, _ := store.Locate(a)
	if list := tx.CoolingDown(base, cooldown); slices.Contains(list, a) {
		return list
	}
	return nil
}

func (p *Pool) exhausted(set, inUse int) error {
	var subnets []netip.Prefix
	for _, r := range p.cfg.Sets[set] {
		subnets = append(subnets, r.Subnet)
	}
	others := ""
	if inUse > 0 {
		others = fmt.Sprintf(", and `ip route` the %d that have no lease here", inUse)
	}
	return fmt.Errorf("%w in %v of network %s; `headcnictl ipam list` shows who has them%s", ErrExhausted, subnets, p.cfg.Network, others)
}

// Release takes the attachment's lease away and reports whether it had one. It may be repeated.
func (p *Pool) Release(ctx context.Context, containerID, ifName string) (bool, error) {
	err := p.store.Edit(ctx, func(tx *store.Tx) error {
		e, err := tx.Find(containerID, ifName)
		if err != nil {
			return err
		}
		return tx.Delete(e)
	})
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("release %s/%s: %w", containerID, ifName, err)
	}
	return true, nil
}

// Lookup returns the attachment's lease, or ErrNotFound.
func (p *Pool) Lookup(ctx context.Context, containerID, ifName string) (Lease, error) {
	var e store.Entry
	find := func(tx *store.Tx) (err error) {
		e, err = tx.Find(containerID, ifName)
		return err
	}
	err := p.store.View(find)
	if err == nil && !e.Whole {
		// Somebody may be at it right now: wait for them.
		err = p.store.Edit(ctx, find)
	}
	if err == nil && !e.Whole {
		err = fmt.Errorf("%w: its ADD or DEL was killed half-way", ErrNotFound)
	}
	if err != nil {
		return Lease{}, fmt.Errorf("look up %s/%s: %w", containerID, ifName, err)
	}
	return e.Lease, nil
}

// List returns all leases in the order of their first address.
func (p *Pool) List(_ context.Context) ([]Lease, error) {
	entries, err := p.entries()
	if err != nil {
		return nil, fmt.Errorf("list the leases of %s: %w", p.cfg.Network, err)
	}
	leases := make([]Lease, 0, len(entries))
	for _, e := range entries {
		if e.Whole {
			leases = append(leases, e.Lease)
		}
	}
	slices.SortFunc(leases, func(a, b Lease) int { return a.Addrs[0].Addr.Addr().Compare(b.Addrs[0].Addr.Addr()) })
	return leases, nil
}

func (p *Pool) entries() (entries []store.Entry, err error) {
	err = p.store.View(func(tx *store.Tx) error {
		entries, err = tx.Entries()
		return err
	})
	if errors.Is(err, ErrNotFound) {
		err = nil
	}
	return entries, err
}

// GC releases every lease that keep does not want and returns those released; it goes on past errors. Only leases that
// existed when GC began and have not changed since are released, so an ADD at the same time loses nothing. keep runs
// without the lock. It is also asked about what a killed ADD or DEL left, which may lack everything but the owner.
func (p *Pool) GC(ctx context.Context, keep func(Lease) bool) ([]Lease, error) {
	entries, err := p.entries()
	if err != nil {
		return nil, fmt.Errorf("collect garbage of %s: %w", p.cfg.Network, err)
	}
	var released []Lease
	var errs []error
	for _, e := range entries {
		if keep(e.Lease) {
			continue
		}
		// The lock is taken for each, so that no ADD waits for all of them.
		err := p.store.Edit(ctx, func(tx *store.Tx) error {
			gone, err := tx.DeleteUnchanged(e)
			if gone && err == nil {
				released = append(released, e.Lease)
			}
			return err
		})
		if err != nil && !errors.Is(err, ErrNotFound) {
			errs = append(errs, fmt.Errorf("collect %s/%s: %w", e.ContainerID, e.IfName, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	return released, errors.Join(errs...)
}

// Check looks for what is wrong on disk, and with repair puts it right (store.Store.Check).
func (p *Pool) Check(ctx context.Context, repair bool) ([]Problem, error) {
	return p.store.Check(ctx, repair)
}

// Rebuild replaces a corrupt store by one that has the live leases, and says where the old one is now; "" where it was
// sound. Leases of other writers are kept as far as they can be read.
func (p *Pool) Rebuild(ctx context.Context, live []Lease) (aside string, err error) {
	return p.store.Rebuild(ctx, p.cfg.Writer, live)
}

// statusWait bounds the wait for the lock: runtimes ask every few seconds.
const statusWait = 2 * time.Second

// Status says why an ADD could not be served: the store is corrupt, locked, read-only or on a full disk. It makes nothing. A
// pool without a free address is no fault here: the node is fine, and saying otherwise would make it NotReady.
func (p *Pool) Status(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, statusWait)
	defer cancel()
	if err := p.store.Ready(ctx); err != nil {
		return err
	}
	dir := p.Dir()
	var fs unix.Statfs_t
	err := unix.Statfs(dir, &fs)
	for ; errors.Is(err, unix.ENOENT) && dir != filepath.Dir(dir); err = unix.Statfs(dir, &fs) {
		dir = filepath.Dir(dir) // the first ADD makes what is missing
	}
	if err != nil {
		return fmt.Errorf("look at the disk of %s: %w", dir, err)
	}
	switch {
	case fs.Flags&unix.ST_RDONLY != 0:
		return fmt.Errorf("%s is on a read-only disk: %w", dir, unix.EROFS)
	case fs.Bfree == 0 || fs.Files > 0 && fs.Ffree == 0:
		return fmt.Errorf("the disk of %s is full: %w", dir, unix.ENOSPC)
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return fmt.Errorf("write to %s: %w", dir, err)
	}
	return nil
}

// Usage is how much of a range set is in use.
type Usage struct {
	Subnets []netip.Prefix `json:"subnets"`
	// Size is the number of addresses that can be given, at most the highest uint64.
	Size uint64 `json:"size"`
	Used uint64 `json:"used"`
}

// Usage counts the addresses in use of each range set. It walks all leases, without the lock.
func (p *Pool) Usage(ctx context.Context) ([]Usage, error) {
	leases, err := p.List(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]Usage, len(p.spaces))
	for i, s := range p.spaces {
		out[i].Size = s.size().lo
		if s.size().hi != 0 {
			out[i].Size = ^uint64(0)
		}
		for _, r := range p.cfg.Sets[i] {
			out[i].Subnets = append(out[i].Subnets, r.Subnet)
		}
	}
	for _, l := range leases {
		for _, a := range l.Addrs {
			for i, s := range p.spaces {
				if _, ok := s.find(a.Addr.Addr()); ok {
					out[i].Used++
				}
			}
		}
	}
	return out, nil
}
