package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/ipam/store"
)

const testBoot = "11111111-2222-3333-4444-555555555555"

var (
	errInjected = unix.EIO
	errCrashed  = errors.New("this process is dead")
)

// fault says what goes wrong at one system call.
type fault struct {
	name string
	// at answers the n-th call that changes the store, and every one after it; once is whether only that one fails.
	once bool
	err  error
	// half writes half of a write before it fails.
	half bool
	// reads counts calls that read, too.
	reads bool
	// space spares the calls that need no room on the disk.
	space bool
}

var faults = []fault{
	{name: "error", once: true, err: errInjected},
	{name: "read or write error", once: true, err: errInjected, reads: true},
	{name: "short write", once: true, err: unix.ENOSPC, half: true},
	{name: "disk full from here on", err: unix.ENOSPC, space: true},
	{name: "dead disk from here on", err: errInjected},
	{name: "crash", err: errCrashed},
	{name: "crash inside a write", err: errCrashed, half: true},
}

// faultFS is the real file system until the n-th counted call. What a killed process would not do any more, its undoing
// included, it does not do: a crash fails every later change.
type faultFS struct {
	store.System
	fault fault
	n     int // the call that goes wrong; 0 = none
	calls int
	fired bool
	open  atomic.Int64
}

// trip counts a call and says what it is to return.
func (f *faultFS) trip(change, room bool) (fail bool) {
	if !change && !f.fault.reads || f.fault.space && !room {
		return false
	}
	f.calls++
	if f.n == 0 || f.calls < f.n || f.fault.once && f.calls > f.n {
		return false
	}
	f.fired = true
	return true
}

func (f *faultFS) Open(dir int, name string, flags int, mode uint32) (int, error) {
	create := flags&(unix.O_CREAT|unix.O_TRUNC) != 0
	if name == "lock" {
		create = false // made once; to fail here is to fail before anything began
	}
	if f.trip(create, create) {
		return -1, f.fault.err
	}
	fd, err := f.System.Open(dir, name, flags, mode)
	if err == nil {
		f.open.Add(1)
	}
	return fd, err
}

func (f *faultFS) Close(fd int) {
	f.open.Add(-1)
	f.System.Close(fd)
}

func (f *faultFS) Read(fd int, b []byte, off int64) (int, error) {
	if f.trip(false, false) {
		return 0, f.fault.err
	}
	return f.System.Read(fd, b, off)
}

func (f *faultFS) Stat(dir int, name string) (store.Stat, error) {
	if f.trip(false, false) {
		return store.Stat{}, f.fault.err
	}
	return f.System.Stat(dir, name)
}

func (f *faultFS) Names(dir int, name string) ([]string, error) {
	if f.trip(false, false) {
		return nil, f.fault.err
	}
	return f.System.Names(dir, name)
}

func (f *faultFS) Write(fd int, b []byte, off int64) (int, error) {
	if !f.trip(true, true) {
		return f.System.Write(fd, b, off)
	}
	if f.fault.half && f.calls == f.n {
		n, err := f.System.Write(fd, b[:len(b)/2], off)
		if err != nil || f.fault.err == errCrashed {
			return n, f.fault.err
		}
		return n, nil // the rest of the write will say ENOSPC
	}
	return 0, f.fault.err
}

func (f *faultFS) Link(dir int, from, to string) error {
	if f.trip(true, true) {
		return f.fault.err
	}
	return f.System.Link(dir, from, to)
}

func (f *faultFS) Unlink(dir int, name string) error {
	if f.trip(true, false) {
		return f.fault.err
	}
	return f.System.Unlink(dir, name)
}

func (f *faultFS) Mkdir(dir int, name string, mode uint32) error {
	if f.trip(true, true) {
		return f.fault.err
	}
	return f.System.Mkdir(dir, name, mode)
}

func (f *faultFS) Rmdir(dir int, name string) error {
	if f.trip(true, false) {
		return f.fault.err
	}
	return f.System.Rmdir(dir, name)
}

func (f *faultFS) Rename(dir int, from, to string) error {
	if f.trip(true, false) {
		return f.fault.err
	}
	return f.System.Rename(dir, from, to)
}

// smallConfig has 5 addresses of each family.
func smallConfig(dir string, s Strategy) Config {
	return Config{
		Network: "net", DataDir: dir, Strategy: s, Writer: "test",
		Sets: [][]Range{
			{{Subnet: netip.MustParsePrefix("10.0.0.0/29")}},
			{{Subnet: netip.MustParsePrefix("fd00::/125"), End: netip.MustParseAddr("fd00::6")}},
		},
	}
}

const smallSize = 5

func openWith(t testing.TB, c Config, fs store.FS) *Pool {
	t.Helper()
	return openAt(t, c, fs, nil)
}

// openAt is openWith at an age of the boot.
func openAt(t testing.TB, c Config, fs store.FS, age func() time.Duration) *Pool {
	t.Helper()
	p, err := open(c, store.Options{BootID: testBoot, FS: fs, Age: age})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// script is what a run does: owners with + allocate, with - release, and with ! are garbage to collect.
var script = []string{"+a", "+b", "-a", "+c", "+a", "-b", "!c", "+d", "+e", "-e", "!a"}

// state is what a run must have left.
type state struct {
	held map[string]Lease
	// unsure owners were at it when the process died.
	unsure map[string]bool
}

func run(t *testing.T, p *Pool, fs *faultFS) state {
	t.Helper()
	ctx := context.Background()
	s := state{map[string]Lease{}, map[string]bool{}}
	for _, step := range script {
		id := step[1:]
		if step[0] == '+' {
			l, err := p.Allocate(ctx, Owner{ContainerID: id, IfName: "eth0"}, nil)
			if err == nil {
				s.held[id] = l
				delete(s.unsure, id)
			} else if !fs.fired {
				t.Fatalf("%s: %v", step, err)
			} else if fs.fault.err == errCrashed || !fs.fault.once {
				s.unsure[id] = true // nothing could be undone
			}
		} else {
			had, err := take(p, step)
			if err != nil && !fs.fired {
				t.Fatalf("%s: %v", step, err)
			}
			if _, held := s.held[id]; err == nil && held != had && !s.unsure[id] {
				t.Errorf("%s: had a lease: %v, want %v", step, had, held)
			}
			delete(s.held, id)
			delete(s.unsure, id)
			if err != nil {
				s.unsure[id] = true
			}
		}
		if fs.fired && fs.fault.err == errCrashed {
			break
		}
	}
	return s
}

func take(p *Pool, step string) (had bool, err error) {
	ctx, id := context.Background(), step[1:]
	if step[0] == '-' {
		return p.Release(ctx, id, "eth0")
	}
	released, err := p.GC(ctx, func(l Lease) bool { return l.ContainerID != id })
	return len(released) > 0, err
}

// seed leaves a store of an earlier boot, which the first allocation removes.
func seed(t *testing.T, c Config) {
	t.Helper()
	old, err := open(c, store.Options{BootID: "99999999-2222-3333-4444-555555555555"})
	if err != nil {
		t.Fatal(err)
	}
	allocate(t, old, "of another boot")
}

// Every system call that changes the store (and every one that reads it) is made to fail in every way. Afterwards the
// leases that were given are there, no other is, and each address can be had exactly once.
func TestEveryStepFails(t *testing.T) {
	for _, strategy := range strategies {
		for _, f := range faults {
			if f.reads && strategy != Sequential {
				continue // no other reads more, and these are most of the calls
			}
			t.Run(fmt.Sprintf("%s/%s", strategy, f.name), func(t *testing.T) {
				t.Parallel()
				n := 1
				for ; ; n++ {
					fs := &faultFS{fault: f, n: n}
					dir := filepath.Join(testDir(t), "d")
					if strategy == Random {
						seed(t, smallConfig(dir, strategy))
					}
					s := run(t, openWith(t, smallConfig(dir, strategy), fs), fs)
					verify(t, fmt.Sprintf("call %d", n), smallConfig(dir, strategy), s)
					if left := fs.open.Load(); left != 0 {
						t.Errorf("call %d: %d files left open", n, left)
					}
					if t.Failed() {
						return
					}
					if !fs.fired {
						break
					}
				}
				t.Logf("%d calls", n-1)
				if n < 50 {
					t.Errorf("only %d calls were made to fail: the faults are not where the work is", n-1)
				}
			})
		}
	}
}

// verify looks at a store as the next process finds it, goes on allocating, and empties it.
func verify(t *testing.T, at string, c Config, s state) {
	t.Helper()
	ctx := context.Background()
	p := openWith(t, c, nil)
	for _, problem := range checked(t, p) {
		if problem.Kind != "leftover" {
			t.Errorf("%s: %+v", at, problem)
		}
	}
	for id, want := range s.held {
		got, err := p.Lookup(ctx, id, "eth0")
		if err != nil || !slices.Equal(got.Addrs, want.Addrs) {
			t.Errorf("%s: %s was given %v and now has %v: %v", at, id, want.Addrs, got.Addrs, err)
		}
	}
	leases, err := p.List(ctx)
	if err != nil {
		t.Errorf("%s: %v", at, err)
	}
	for _, l := range leases {
		if _, ok := s.held[l.ContainerID]; !ok && !s.unsure[l.ContainerID] {
			t.Errorf("%s: %s has %v, which nobody was given", at, l.ContainerID, l.Addrs)
		}
	}
	for id := range s.unsure {
		if _, err := p.Release(ctx, id, "eth0"); err != nil {
			t.Errorf("%s: release %s: %v", at, id, err)
		}
	}
	fill(t, at, p, s.held)
	if problems := checked(t, p); len(problems) > 0 {
		t.Errorf("%s: at the end: %+v", at, problems)
	}
}

// fill gives every address that is left, wants each to be new, and gives them all back.
func fill(t *testing.T, at string, p *Pool, held map[string]Lease) {
	t.Helper()
	ctx := context.Background()
	given := map[netip.Addr]string{}
	take := func(l Lease) {
		for _, a := range l.Addrs {
			if other, ok := given[a.Addr.Addr()]; ok {
				t.Errorf("%s: %s was given to %s and to %s", at, a.Addr, other, l.ContainerID)
			}
			given[a.Addr.Addr()] = l.ContainerID
		}
	}
	for _, l := range held {
		take(l)
	}
	for i := 0; ; i++ {
		l, err := p.Allocate(ctx, Owner{ContainerID: fmt.Sprint("fill", i), IfName: "eth0"}, nil)
		if errors.Is(err, ErrExhausted) {
			break
		}
		if err != nil {
			t.Errorf("%s: fill: %v", at, err)
			return
		}
		take(l)
	}
	if len(given) != 2*smallSize {
		t.Errorf("%s: %d addresses could be had, want %d", at, len(given), 2*smallSize)
	}
	leases, err := p.List(ctx)
	if err != nil {
		t.Errorf("%s: %v", at, err)
	}
	for _, l := range leases {
		if had, err := p.Release(ctx, l.ContainerID, l.IfName); !had || err != nil {
			t.Errorf("%s: release %s: %v, %v", at, l.ContainerID, had, err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(p.Dir(), testBoot, "addresses")); err != nil || len(left) > 0 {
		t.Errorf("%s: %d addresses left over; %v", at, len(left), err)
	}
}

func checked(t *testing.T, p *Pool) []Problem {
	t.Helper()
	problems, err := p.Check(context.Background(), false)
	if err != nil {
		t.Error(err)
	}
	return problems
}

// A release on a full disk frees the address, even where the disk has no room to overwrite (btrfs): else a full disk
// could never be left.
func TestReleaseOnAFullDisk(t *testing.T) {
	ctx := context.Background()
	c := smallConfig(testDir(t), Sequential)
	if _, err := openWith(t, c, nil).Allocate(ctx, Owner{ContainerID: "a", IfName: "eth0"}, nil); err != nil {
		t.Fatal(err)
	}
	full := openWith(t, c, &faultFS{fault: fault{err: unix.ENOSPC, space: true}, n: 1})
	if _, err := full.Allocate(ctx, Owner{ContainerID: "b", IfName: "eth0"}, nil); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("allocate on a full disk: %v, want ENOSPC", err)
	}
	if had, err := full.Release(ctx, "a", "eth0"); !had || err != nil {
		t.Errorf("release on a full disk: %v, %v", had, err)
	}
	verify(t, "afterwards", c, state{})
}

// A rebuild that is cut off anywhere leaves either the corrupt store or one with all live leases, never an empty one.
func TestRebuildFailsAtEveryStep(t *testing.T) {
	ctx := context.Background()
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			for n := 1; ; n++ {
				c := smallConfig(filepath.Join(testDir(t), "d"), Sequential)
				good := openWith(t, c, nil)
				live, err := good.Allocate(ctx, Owner{ContainerID: "live", IfName: "eth0"}, nil)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.Remove(filepath.Join(good.Dir(), testBoot, "layout")); err != nil {
					t.Fatal(err)
				}
				fs := &faultFS{fault: f, n: n}
				_, rebuildErr := openWith(t, c, fs).Rebuild(ctx, []Lease{live})
				if _, err := good.Lookup(ctx, "live", "eth0"); errors.Is(err, ErrNotFound) && rebuildErr == nil {
					t.Fatalf("call %d: rebuilt without the live lease", n)
				}
				l, err := good.Allocate(ctx, Owner{ContainerID: "new", IfName: "eth0"}, nil)
				if err == nil && l.Addrs[0] == live.Addrs[0] {
					t.Fatalf("call %d: %s was given twice", n, l.Addrs[0].Addr)
				}
				if err != nil && !errors.Is(err, ErrCorrupt) {
					t.Fatalf("call %d: %v", n, err)
				}
				if _, err := good.Rebuild(ctx, []Lease{live}); err != nil {
					t.Fatalf("call %d: second rebuild: %v", n, err)
				}
				verify(t, fmt.Sprintf("call %d", n), c, state{held: map[string]Lease{"live": live}, unsure: map[string]bool{"new": true}})
				if t.Failed() || !fs.fired {
					break
				}
			}
		})
	}
}

// A repair that is cut off anywhere takes nothing from anybody, and the next one completes it.
func TestRepairFailsAtEveryStep(t *testing.T) {
	ctx := context.Background()
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			for n := 1; ; n++ {
				c := smallConfig(filepath.Join(testDir(t), "d"), DensePack)
				good := openWith(t, c, nil)
				held := map[string]Lease{}
				for _, id := range []string{"a", "b", "c"} {
					held[id] = allocate(t, good, id)
				}
				dir := filepath.Join(good.Dir(), testBoot)
				spoil(t, filepath.Join(dir, "leases/a:eth0"), "truncate")
				spoil(t, filepath.Join(dir, "index/10.0.0.0-12"), "junk")
				spoil(t, filepath.Join(dir, "leases/left:eth0"), "truncate")
				if err := errors.Join(os.Remove(filepath.Join(dir, "leases/b:eth0")), os.Remove(filepath.Join(dir, "addresses/fd00::4"))); err != nil {
					t.Fatal(err)
				}
				fs := &faultFS{fault: f, n: n}
				_, _ = openWith(t, c, fs).Check(ctx, true) // how it ends is not the question
				if _, err := good.Check(ctx, true); err != nil {
					t.Fatalf("call %d: second repair: %v", n, err)
				}
				for id, l := range held {
					got, err := good.Lookup(ctx, id, "eth0")
					if err != nil || len(got.Addrs) != 2 || got.Addrs[0].Addr.Addr() != l.Addrs[0].Addr.Addr() || got.Addrs[1].Addr.Addr() != l.Addrs[1].Addr.Addr() {
						t.Fatalf("call %d: %s held %s and has %s: %v", n, id, addrsOf(l), addrsOf(got), err)
					}
					held[id] = got // a rewritten record knows neither gateway nor prefix length
				}
				verify(t, fmt.Sprintf("call %d", n), c, state{held: held})
				if t.Failed() || !fs.fired {
					break
				}
			}
		})
	}
}

// Junk in place of any file is recovered from or refused, and no address is given twice.
func TestJunkInAnyFile(t *testing.T) {
	ctx := context.Background()
	for _, how := range []string{"junk", "truncate", "half", "folder", "link", "FIFO"} {
		for _, name := range []string{"leases/a:eth0", "leases/new:eth0", "addresses/10.0.0.2", "addresses/10.0.0.5", "index/10.0.0.0-12", "index/fd00::-108", "last.0", "layout", "index/.new"} {
			t.Run(how+" "+name, func(t *testing.T) {
				c := smallConfig(testDir(t), Sequential)
				p := openWith(t, c, nil)
				given := map[netip.Addr]bool{}
				for _, id := range []string{"a", "b"} {
					l, err := p.Allocate(ctx, Owner{ContainerID: id, IfName: "eth0"}, nil)
					if err != nil {
						t.Fatal(err)
					}
					given[l.Addrs[0].Addr.Addr()], given[l.Addrs[1].Addr.Addr()] = true, true
				}
				spoil(t, filepath.Join(p.Dir(), testBoot, name), how)
				for i := range smallSize {
					id := "new"
					if i > 0 {
						id = fmt.Sprint("new", i)
					}
					l, err := p.Allocate(ctx, Owner{ContainerID: id, IfName: "eth0"}, nil)
					if name == "layout" && !errors.Is(err, ErrCorrupt) {
						t.Errorf("got %v, want ErrCorrupt, which has the store rebuilt", err)
					}
					if err != nil {
						continue // refused is fine
					}
					for _, a := range l.Addrs {
						if given[a.Addr.Addr()] {
							t.Errorf("%s was given twice", a.Addr)
						}
						given[a.Addr.Addr()] = true
					}
				}
				isFile := slices.Contains([]string{"junk", "truncate", "half"}, how) && name != "layout"
				isHint := name == "last.0" || strings.HasPrefix(name, "index/") // whatever is in its place
				if (isFile || isHint) && len(given) < 2*smallSize-2 {
					t.Errorf("only %d addresses could be had", len(given))
				}
			})
		}
	}
}

func spoil(t *testing.T, path, how string) {
	t.Helper()
	var err error
	switch how {
	case "junk":
		err = os.WriteFile(path, []byte(strings.Repeat("junk\n", 2000)), 0o600)
	case "truncate":
		err = os.WriteFile(path, nil, 0o600)
	case "half":
		data, _ := os.ReadFile(path) // a file that is not there has no half
		err = os.WriteFile(path, data[:len(data)/2], 0o600)
	case "folder":
		err = errors.Join(os.RemoveAll(path), os.MkdirAll(path+"/x", 0o700))
	case "link":
		err = errors.Join(os.RemoveAll(path), os.Symlink("/nowhere", path))
	case "FIFO":
		err = errors.Join(os.RemoveAll(path), unix.Mkfifo(path, 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
}
