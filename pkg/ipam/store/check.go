package store

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Problem is one thing that Check found. Problems of kind "leftover" are what killed processes leave and are harmless.
type Problem struct {
	// Kind is leftover, record, address, index or foreign.
	Kind string `json:"kind"`
	// Path is relative to the boot's folder.
	Path string `json:"path"`
	Text string `json:"text"`
	// Repaired means that it is no more.
	Repaired bool `json:"repaired"`
}

// Check compares records, links and index with each other under the lock; it walks all leases. With repair it also puts
// right what it finds, always so that an address that might be in use stays taken: garbage collection frees it.
func (s *Store) Check(ctx context.Context, repair bool) ([]Problem, error) {
	c := &check{repair: repair}
	err := s.Edit(ctx, func(tx *Tx) error {
		c.Tx = tx
		for _, step := range []func() error{c.load, c.addresses, c.leases, c.indexes} {
			if err := step(); err != nil {
				return err
			}
		}
		return nil
	})
	if errors.Is(err, ErrNotFound) {
		err = nil
	}
	return c.problems, err
}

type check struct {
	*Tx
	repair   bool
	entries  []Entry
	linked   map[uint64][]netip.Addr // by inode
	lost     map[string]bool         // records that are missing in leases, told once
	problems []Problem
}

// report notes a problem and repairs it where that is wanted and possible.
func (c *check) report(kind, path, text string, fix func() error) error {
	p := Problem{Kind: kind, Path: path, Text: text}
	if c.repair && fix != nil {
		if err := fix(); err != nil {
			return fmt.Errorf("repair %s: %w", path, err)
		}
		p.Repaired = true
	}
	c.problems = append(c.problems, p)
	return nil
}

func (c *check) load() (err error) {
	c.entries, err = c.Entries()
	return err
}

// addresses looks for links without a record and records without an owner's name.
func (c *check) addresses() error {
	names, err := c.s.fs.Names(c.boot, addressDir)
	if err != nil {
		return wrap("list", addressDir, err)
	}
	slices.Sort(names)
	known := map[uint64]bool{}
	for _, e := range c.entries {
		known[e.stat.Ino] = true
	}
	c.linked, c.lost = map[uint64][]netip.Addr{}, map[string]bool{}
	for _, n := range names {
		path := addressDir + "/" + n
		a, ok := parseAddressName(n)
		st, err := c.s.fs.Stat(c.boot, path)
		if err != nil {
			return wrap("look at", path, err)
		}
		if !ok || !st.regular() {
			if err := c.report("foreign", path, "not an address of ours; remove it by hand", nil); err != nil {
				return err
			}
			continue
		}
		if known[st.Ino] {
			c.linked[st.Ino] = append(c.linked[st.Ino], a)
			continue
		}
		if err := c.orphan(a); err != nil {
			return err
		}
		// A second address of the same record finds it in its place.
		if c.repair {
			if err := c.reload(known); err != nil {
				return err
			}
			if known[st.Ino] {
				c.linked[st.Ino] = append(c.linked[st.Ino], a)
			}
		}
	}
	return nil
}

func (c *check) reload(known map[uint64]bool) (err error) {
	if c.entries, err = c.Entries(); err != nil {
		return err
	}
	for _, e := range c.entries {
		known[e.stat.Ino] = true
	}
	return nil
}

// orphan deals with an address whose record has lost its name in leases. The record can still be read by the address.
func (c *check) orphan(a netip.Addr) error {
	path := addressName(a)
	data, err := c.readSmall(path, maxRecord)
	if err != nil {
		return err
	}
	l, err := decode(data)
	if err != nil {
		return c.report("address", path, "nobody's: its record cannot be read and has no owner", func() error { return c.free(a) })
	}
	name := leaseDir + "/" + leaseName(l.ContainerID, l.IfName)
	if _, err := c.s.fs.Stat(c.boot, name); err == nil {
		return c.report("address", path, "stale: its owner has another lease now", func() error { return c.free(a) })
	}
	if c.lost[name] {
		return nil
	}
	c.lost[name] = true
	return c.report("record", name, "missing, though its owner holds "+a.String(), func() error {
		return wrap("link", name, c.s.fs.Link(c.boot, path, name))
	})
}

func (c *check) leases() error {
	for _, e := range c.entries {
		if err := c.lease(e); err != nil {
			return err
		}
	}
	return nil
}

func (c *check) lease(e Entry) error {
	path := leaseDir + "/" + e.name
	held := c.linked[e.stat.Ino]
	switch {
	case e.Whole:
		return nil
	case !e.stat.regular():
		return c.report("foreign", path, "not a record of ours; remove it by hand", nil)
	case len(held) == 0:
		return c.report("leftover", path, "holds no address: its ADD or DEL was killed", func() error { return c.Delete(e) })
	case e.junk:
		return c.report("record", path, "cannot be read", c.rewrite(e, held))
	}
	missing, others, err := c.missing(e)
	if err != nil {
		return err
	}
	text, fix := fmt.Sprintf("holds only %v: its ADD or DEL was killed", held), c.complete(e, missing)
	if len(others) > 0 {
		text, fix = text+fmt.Sprintf("; %v went to others since", others), nil
	}
	return c.report("leftover", path, text, fix)
}

// missing returns the addresses that a record names and does not hold: those that nobody has, and those of others.
func (c *check) missing(e Entry) (free, others []netip.Addr, err error) {
	for _, a := range e.Addrs {
		addr := a.Addr.Addr()
		mine, err := c.holds(e, addr)
		if err != nil {
			return nil, nil, err
		}
		linked, err := c.Linked(addr)
		if err != nil {
			return nil, nil, err
		}
		if !linked {
			free = append(free, addr)
		} else if !mine {
			others = append(others, addr)
		}
	}
	return free, others, nil
}

// rewrite makes a record anew from its file name and its links; nil where the name does not tell the owner. It is written
// in place, so that the links, and with them the addresses, are its owner's at every moment.
func (c *check) rewrite(e Entry, held []netip.Addr) func() error {
	if _, ok := ownerOf(e.name); !ok {
		return nil
	}
	l := Lease{Owner: e.Owner, Writer: "repair"}
	for _, a := range held {
		l.Addrs = append(l.Addrs, LeasedAddr{Addr: netip.PrefixFrom(a, a.BitLen())})
	}
	return func() error {
		data, err := encode(l)
		if err != nil {
			return err
		}
		path := leaseDir + "/" + e.name
		fd, err := c.s.fs.Open(c.boot, path, unix.O_WRONLY|unix.O_TRUNC, 0)
		if err != nil {
			return wrap("open", path, err)
		}
		defer c.s.fs.Close(fd)
		return wrap("write", path, writeAll(c.s.fs, fd, data, 0))
	}
}

func (c *check) complete(e Entry, missing []netip.Addr) func() error {
	return func() error {
		for _, a := range missing {
			if err := c.claim(leaseDir+"/"+e.name, a); err != nil {
				return err
			}
		}
		return nil
	}
}

// indexes compares every index with one made from the links.
func (c *check) indexes() error {
	names, err := c.s.fs.Names(c.boot, indexDir)
	if err != nil {
		return wrap("list", indexDir, err)
	}
	slices.Sort(names)
	for _, n := range names {
		path := indexDir + "/" + n
		base, ok := windowOf(n)
		if !ok {
			kind := "foreign"
			if path == indexTemp {
				kind = "leftover"
			}
			if err := c.report(kind, path, "not an index", func() error { return c.unlinkIfThere(path) }); err != nil {
				return err
			}
			continue
		}
		same, err := c.indexRight(base)
		if err != nil {
			return err
		}
		if !same {
			if err := c.report("index", path, "differs from the links", func() error { return c.dropWindow(base) }); err != nil {
				return err
			}
		}
	}
	return nil
}

func windowOf(name string) (netip.Addr, bool) {
	p, err := netip.ParsePrefix(unslash(name))
	return p.Addr(), err == nil && indexName(p.Addr()) == indexDir+"/"+name
}

// unslash turns the last dash of an index name into the slash of a prefix.
func unslash(name string) string {
	b := []byte(name)
	if i := slices.Index(b, '-'); i >= 0 {
		b[i] = '/'
	}
	return string(b)
}

func (c *check) indexRight(base netip.Addr) (bool, error) {
	w, ok := c.windows[base]
	if !ok || w == nil {
		var err error
		w, err = c.openWindow(base)
		if errors.Is(err, ErrIndex) {
			return false, nil
		}
		if err != nil || w == nil {
			return w == nil, err
		}
		c.windows[base] = w
	}
	want := &window{base: base}
	if err := c.fill(want); err != nil {
		return false, err
	}
	for g := range groups {
		have, err := w.bits.group(g)
		if errors.Is(err, ErrIndex) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		empty := want.bits.data[g] == nil
		if empty && *have != (groupData{}) || !empty && *have != *want.bits.data[g] {
			return false, nil
		}
	}
	return true, nil
}
