package ipam

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/ipam/store"
)

func allocate(t testing.TB, p *Pool, id string, requested ...string) Lease {
	t.Helper()
	l, err := p.Allocate(context.Background(), Owner{ContainerID: id, IfName: "eth0"}, parse(requested))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func parse(texts []string) (out []netip.Addr) {
	for _, text := range texts {
		out = append(out, netip.MustParseAddr(text))
	}
	return out
}

func addrsOf(l Lease) string {
	var out []string
	for _, a := range l.Addrs {
		out = append(out, a.Addr.String())
	}
	return strings.Join(out, " ")
}

func TestAllocateLookupRelease(t *testing.T) {
	ctx := context.Background()
	p := openWith(t, smallConfig(testDir(t), Sequential), nil)
	before := time.Now()
	o := Owner{ContainerID: "a", IfName: "eth0", PodNamespace: "default", PodName: "web-0"}
	l, err := p.Allocate(ctx, o, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := Lease{Owner: o, Writer: "test", Time: l.Time, Addrs: []LeasedAddr{
		{Addr: netip.MustParsePrefix("10.0.0.2/29"), Gateway: netip.MustParseAddr("10.0.0.1")},
		{Addr: netip.MustParsePrefix("fd00::2/125"), Gateway: netip.MustParseAddr("fd00::1")},
	}}
	cmpAddr := cmp.Comparer(func(a, b LeasedAddr) bool { return a == b })
	if diff := cmp.Diff(want, l, cmpAddr); diff != "" {
		t.Error(diff)
	}
	if l.Time.Before(before.Add(-time.Second)) || l.Time.After(time.Now()) {
		t.Errorf("time %s", l.Time)
	}
	got, err := p.Lookup(ctx, "a", "eth0")
	if diff := cmp.Diff(l, got, cmpAddr); diff != "" || err != nil {
		t.Error(err, diff)
	}
	if again, err := p.Allocate(ctx, o, nil); !errors.Is(err, ErrOwnerHasLease) || addrsOf(again) != addrsOf(l) {
		t.Errorf("second allocation: %s, %v", addrsOf(again), err)
	}
	if other := allocate(t, p, "b"); addrsOf(other) != "10.0.0.3/29 fd00::3/125" {
		t.Errorf("b has %s", addrsOf(other))
	}
	if list, err := p.List(ctx); err != nil || len(list) != 2 || list[0].ContainerID != "a" || list[1].ContainerID != "b" {
		t.Errorf("list: %v, %v", list, err)
	}
	for _, want := range []bool{true, false} {
		if had, err := p.Release(ctx, "a", "eth0"); had != want || err != nil {
			t.Errorf("release: %v, %v, want %v", had, err, want)
		}
	}
	if _, err := p.Lookup(ctx, "a", "eth0"); !errors.Is(err, ErrNotFound) {
		t.Errorf("lookup after release: %v", err)
	}
	if next := allocate(t, p, "c"); addrsOf(next) != "10.0.0.4/29 fd00::4/125" {
		t.Errorf("sequential gave %s, want the next after the last", addrsOf(next))
	}
}

// On disk every strategy gives what it gives in memory, address by address, while leases come and go, to the last one. So much time
// passes that no address is in cooldown.
func TestPoolDoesWhatItsStrategySays(t *testing.T) {
	ctx := context.Background()
	for name, shape := range shapes {
		for _, strategy := range strategies {
			set := rangesOf(t, shape)
			var age time.Duration
			p := openAt(t, Config{Network: "net", DataDir: testDir(t), Strategy: strategy, Sets: [][]Range{set}}, nil, func() time.Duration { return age })
			p.draw = rand.New(rand.NewPCG(11, 12)).Uint64
			draw, r, m := rand.New(rand.NewPCG(11, 12)).Uint64, rand.New(rand.NewPCG(13, 14)), newMemory()
			var last netip.Addr
			var held []Lease
			for i := range 250 {
				age += 2 * cooldown
				if len(held) > 0 && r.IntN(3) == 0 {
					at := r.IntN(len(held))
					if had, err := p.Release(ctx, held[at].ContainerID, "eth0"); !had || err != nil {
						t.Fatal(had, err)
					}
					m.set(t, held[at].Addrs[0].Addr.Addr(), false)
					held = slices.Delete(held, at, at+1)
					continue
				}
				want, err := pick(strategy, newSpace(set), last, m, draw)
				if err != nil {
					t.Fatal(err)
				}
				l, err := p.Allocate(ctx, Owner{ContainerID: fmt.Sprint(i), IfName: "eth0"}, nil)
				if want.rng == nil {
					if !errors.Is(err, ErrExhausted) {
						t.Fatalf("%s %s: %v, want ErrExhausted", name, strategy, err)
					}
					continue
				}
				if err != nil || l.Addrs[0] != (LeasedAddr{Addr: netip.PrefixFrom(want.addr, want.rng.Subnet.Bits()), Gateway: want.rng.Gateway}) {
					t.Fatalf("%s %s: %v, want %s; %v", name, strategy, l.Addrs, want.addr, err)
				}
				m.set(t, want.addr, true) // fails where the address is taken
				last, held = want.addr, append(held, l)
			}
			if got := checked(t, p); len(got) > 0 {
				t.Errorf("%s %s: %+v", name, strategy, got)
			}
		}
	}
}

func TestExhausted(t *testing.T) {
	ctx := context.Background()
	for _, strategy := range strategies {
		p := openWith(t, smallConfig(testDir(t), strategy), nil)
		for i := range smallSize {
			allocate(t, p, fmt.Sprint(i))
		}
		_, err := p.Allocate(ctx, Owner{ContainerID: "late", IfName: "eth0"}, nil)
		if !errors.Is(err, ErrExhausted) || !strings.Contains(err.Error(), "10.0.0.0/29") {
			t.Errorf("%s: %v", strategy, err)
		}
		if _, err := p.Allocate(ctx, Owner{ContainerID: "0", IfName: "eth0"}, nil); !errors.Is(err, ErrOwnerHasLease) {
			t.Errorf("%s: an owner with a lease in a full pool: %v", strategy, err)
		}
		if _, err := p.Release(ctx, "3", "eth0"); err != nil {
			t.Fatal(err)
		}
		allocate(t, p, "late")
		if got := checked(t, p); len(got) > 0 {
			t.Errorf("%s: %+v", strategy, got)
		}
	}
}

func TestRequested(t *testing.T) {
	ctx := context.Background()
	p := openWith(t, smallConfig(testDir(t), Sequential), nil)
	if l := allocate(t, p, "a", "fd00::5", "10.0.0.4"); addrsOf(l) != "10.0.0.4/29 fd00::5/125" {
		t.Errorf("a has %s", addrsOf(l))
	}
	if l := allocate(t, p, "b", "10.0.0.6", "10.0.0.6"); addrsOf(l) != "10.0.0.6/29 fd00::2/125" {
		t.Errorf("b has %s", addrsOf(l))
	}
	for requested, want := range map[string]error{
		"10.0.0.4": ErrInUse, "10.0.0.1": ErrNotInRange, "10.0.0.0": ErrNotInRange, "10.0.0.7": ErrNotInRange, "10.1.0.0": ErrNotInRange,
		"fd00::": ErrNotInRange, "fd00::7": ErrNotInRange, "10.0.0.2 10.0.0.3": ErrNotInRange,
	} {
		_, err := p.Allocate(ctx, Owner{ContainerID: "c", IfName: "eth0"}, parse(strings.Fields(requested)))
		if !errors.Is(err, want) {
			t.Errorf("requested %s: %v, want %v", requested, err, want)
		}
	}
	if _, err := p.Allocate(ctx, Owner{ContainerID: "c", IfName: "eth0"}, parse([]string{"10.0.0.4"})); !strings.Contains(err.Error(), "container a") {
		t.Errorf("the error does not name the holder: %v", err)
	}
	if l := allocate(t, p, "d"); addrsOf(l) != "10.0.0.2/29 fd00::3/125" {
		t.Errorf("a requested address moved the sequence: %s", addrsOf(l))
	}
}

// Leases outlive the configuration they were made by.
func TestConfigChanges(t *testing.T) {
	ctx := context.Background()
	dir := testDir(t)
	old := openWith(t, smallConfig(dir, Sequential), nil)
	a, b := allocate(t, old, "a"), allocate(t, old, "b")
	allocate(t, old, "c")
	changed := smallConfig(dir, DensePack)
	changed.Sets = [][]Range{{{Subnet: netip.MustParsePrefix("10.0.0.0/24"), Start: netip.MustParseAddr("10.0.0.3")}}}
	none := changed
	none.Sets = nil
	p := openWith(t, changed, nil)
	if got, err := p.Lookup(ctx, "a", "eth0"); err != nil || addrsOf(got) != addrsOf(a) {
		t.Errorf("lookup: %s, %v", addrsOf(got), err)
	}
	if got := allocate(t, p, "d"); addrsOf(got) != "10.0.0.5/24" {
		t.Errorf("d has %s, want the lowest that is free in the new range", addrsOf(got))
	}
	if had, err := openWith(t, none, nil).Release(ctx, "a", "eth0"); !had || err != nil {
		t.Errorf("release without ranges: %v, %v", had, err)
	}
	if _, err := openWith(t, none, nil).Allocate(ctx, Owner{ContainerID: "x", IfName: "y"}, nil); !errors.Is(err, ErrNoRanges) {
		t.Errorf("allocate without ranges: %v", err)
	}
	released, err := p.GC(ctx, func(l Lease) bool { return l.ContainerID != "b" })
	if err != nil || len(released) != 1 || addrsOf(released[0]) != addrsOf(b) {
		t.Errorf("gc released %v, %v", released, err)
	}
	if l, err := old.Allocate(ctx, Owner{ContainerID: "e", IfName: "eth0"}, parse([]string{"10.0.0.3", "fd00::2"})); err != nil {
		t.Errorf("freed addresses: %v, %v", l, err)
	}
	if got := checked(t, p); len(got) > 0 {
		t.Errorf("%+v", got)
	}
}

func TestSequenceSurvivesProcesses(t *testing.T) {
	dir := testDir(t)
	var got []string
	for i := range 7 {
		p := openWith(t, smallConfig(dir, Sequential), nil)
		l := allocate(t, p, "a")
		got = append(got, strings.TrimPrefix(l.Addrs[0].Addr.Addr().String(), "10.0.0."))
		if had, err := p.Release(context.Background(), "a", "eth0"); !had || err != nil {
			t.Fatal(i, had, err)
		}
	}
	if want := []string{"2", "3", "4", "5", "6", "2", "3"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// The index is only a help: without it, or with one that says that everything is free or nothing, no address is given
// twice and none is lost.
func TestIndexIsNotTrusted(t *testing.T) {
	for _, strategy := range strategies {
		for _, damage := range []string{"none", "removed before each", "old copy", "all taken"} {
			p := openWith(t, smallConfig(testDir(t), strategy), nil)
			index := filepath.Join(p.Dir(), testBoot, "index", "10.0.0.0-12")
			allocate(t, p, "first")
			empty, err := os.ReadFile(index)
			if err != nil {
				t.Fatal(err)
			}
			held := map[string]Lease{}
			for i := range smallSize - 1 {
				switch damage {
				case "removed before each":
					err = os.Remove(index)
				case "old copy":
					err = os.WriteFile(index, empty, 0o600)
				case "all taken":
					err = os.WriteFile(index, allTaken(empty), 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
				l := allocate(t, p, fmt.Sprint(i))
				held[l.ContainerID] = l
			}
			seen := map[netip.Prefix]bool{}
			for _, l := range held {
				if seen[l.Addrs[0].Addr] {
					t.Errorf("%s, index %s: %s twice", strategy, damage, l.Addrs[0].Addr)
				}
				seen[l.Addrs[0].Addr] = true
			}
		}
	}
}

// allTaken makes an index that is right in itself and says that the first 64 addresses are taken.
func allTaken(index []byte) []byte {
	out := make([]byte, 4096+8)
	copy(out, index[:64])
	out[64] = 64
	for i := 4096; i < len(out); i++ {
		out[i] = 0xff
	}
	return out
}

func TestUsage(t *testing.T) {
	c := smallConfig(testDir(t), Random)
	c.Sets = append(c.Sets, []Range{{Subnet: netip.MustParsePrefix("fd01::/48")}})
	p := openWith(t, c, nil)
	allocate(t, p, "a")
	allocate(t, p, "b")
	got, err := p.Usage(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var text []string
	for _, u := range got {
		text = append(text, fmt.Sprint(u.Subnets, u.Size, u.Used))
	}
	want := []string{"[10.0.0.0/29] 5 2", "[fd00::/125] 5 2", "[fd01::/48] 18446744073709551615 2"}
	if !slices.Equal(text, want) {
		t.Errorf("%q, want %q", text, want)
	}
}

func TestGCOfLeftovers(t *testing.T) {
	ctx := context.Background()
	p := openWith(t, smallConfig(testDir(t), Sequential), nil)
	allocate(t, p, "live")
	dir := filepath.Join(p.Dir(), testBoot)
	for _, err := range []error{
		os.WriteFile(filepath.Join(dir, "leases/empty:eth0"), nil, 0o600), // killed before the write
		os.Truncate(filepath.Join(dir, "leases/live:eth0"), 5),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var asked []string
	_, err := p.GC(ctx, func(l Lease) bool { asked = append(asked, l.ContainerID); return l.ContainerID == "live" })
	slices.Sort(asked)
	if err != nil || !slices.Equal(asked, []string{"empty", "live"}) {
		t.Errorf("asked about %q, %v", asked, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "leases/empty:eth0")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the leftover is still there: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "addresses/10.0.0.2")); err != nil {
		t.Errorf("an address that may be in use was taken: %v", err)
	}
}

func TestNetworks(t *testing.T) {
	dir := testDir(t)
	if got, err := Networks(filepath.Join(dir, "none")); len(got) != 0 || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	allocate(t, openWith(t, smallConfig(dir, Sequential), nil), "a")
	if err := os.Mkdir(filepath.Join(dir, ".hidden"), 0o700); err != nil {
		t.Fatal(err)
	}
	if got, err := Networks(dir); !slices.Equal(got, []string{"net"}) || err != nil {
		t.Errorf("%v, %v", got, err)
	}
}

// tree lists all that is in a folder, with what the files hold.
func tree(t *testing.T, dir string) (out []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			out = append(out, path)
			return err
		}
		data, err := os.ReadFile(path)
		out = append(out, fmt.Sprintf("%s %q", path, data))
		return err
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return out
}

// Whoever only looks, or takes away what is not there, makes and changes nothing: not where there is no folder, nor one of
// another program, nor in the leases of another boot, which a wrong boot ID must not cost.
func TestReadingLeavesNoTrace(t *testing.T) {
	ctx := context.Background()
	const otherBoot = "99999999-2222-3333-4444-555555555555"
	for name, prepare := range map[string]func(dir string) error{
		"nothing": func(string) error { return nil },
		"host-local's": func(dir string) error {
			net := filepath.Join(dir, "net")
			return errors.Join(os.MkdirAll(net, 0o700), os.WriteFile(filepath.Join(net, "10.0.0.2"), []byte("a\r\neth0"), 0o600))
		},
		"another boot's": func(dir string) error {
			p, err := open(smallConfig(dir, Sequential), store.Options{BootID: otherBoot})
			if err != nil {
				return err
			}
			_, err = p.Allocate(ctx, Owner{ContainerID: "a", IfName: "eth0"}, nil)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(testDir(t), "d")
			if err := prepare(dir); err != nil {
				t.Fatal(err)
			}
			before := tree(t, dir)
			p := openWith(t, smallConfig(dir, Sequential), nil)
			list, err1 := p.List(ctx)
			had, err2 := p.Release(ctx, "a", "eth0")
			_, err3 := p.GC(ctx, func(Lease) bool { return false })
			_, err4 := p.Check(ctx, true)
			_, err5 := p.Usage(ctx)
			if err := errors.Join(err1, err2, err3, err4, err5, p.Status(ctx)); err != nil || had || len(list) > 0 {
				t.Errorf("%v, had a lease: %v, list %v", err, had, list)
			}
			if _, err := p.Lookup(ctx, "a", "eth0"); !errors.Is(err, ErrNotFound) {
				t.Error(err)
			}
			if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
				t.Error(diff)
			}
			allocate(t, p, "b")
			if left, err := filepath.Glob(filepath.Join(dir, "net", otherBoot)); err != nil || len(left) > 0 {
				t.Errorf("an allocation leaves %v, %v", left, err)
			}
		})
	}
}

func TestBadOwner(t *testing.T) {
	p := openWith(t, smallConfig(testDir(t), Sequential), nil)
	for _, o := range []Owner{{}, {ContainerID: "a"}, {IfName: "eth0"}, {ContainerID: strings.Repeat("x", 5000), IfName: "eth0"}} {
		if _, err := p.Allocate(context.Background(), o, nil); err == nil {
			t.Errorf("%+v got a lease", o)
		}
	}
	if got := checked(t, p); len(got) > 0 {
		t.Errorf("%+v", got)
	}
}

// A lock that somebody holds on to is an error in time, not a hang.
func TestStatusOfALockedStore(t *testing.T) {
	p := openWith(t, smallConfig(testDir(t), Sequential), nil)
	allocate(t, p, "a")
	lock, err := os.Open(filepath.Join(p.Dir(), "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	if err := p.Status(ctx); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint("pid ", os.Getpid())) {
		t.Errorf("%v", err)
	}
}

// The lease's time is the clock's, whatever it is: nothing depends on it.
func TestClockMayBeWrong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := openWith(t, smallConfig(testDir(t), Sequential), nil)
		if l := allocate(t, p, "a"); l.Time.Year() != 2000 {
			t.Errorf("time %s, want that of the bubble", l.Time)
		}
		if had, err := p.Release(context.Background(), "a", "eth0"); !had || err != nil {
			t.Error(had, err)
		}
	})
}

// fullDisk runs in a mount namespace of its own with a real file system of a few pages.
const fullDiskEnv = "HEADCNI_IPAM_TEST_FULL_DISK"

func TestFullDisk(t *testing.T) {
	if os.Getenv(fullDiskEnv) != "" {
		insideFullDisk(t)
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}, GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}}
	probe := exec.Command("/bin/true")
	probe.SysProcAttr = attr
	if err := probe.Run(); err != nil {
		nstest.Skip(t, fmt.Sprintf("no user namespaces here: %v", err))
	}
	cmd := exec.Command(self, "-test.run=^TestFullDisk$", "-test.v")
	cmd.SysProcAttr = attr
	cmd.Env = append(os.Environ(), fullDiskEnv+"=1", "HEADCNI_TEST_DIR=")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS: TestFullDisk") {
		t.Errorf("%v\n%s", err, out)
	}
}

func insideFullDisk(t *testing.T) {
	ctx := context.Background()
	for size := 1; size <= 24; size++ {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dk", 4*size)); err != nil {
			t.Fatal(err)
		}
		p := openWith(t, smallConfig(dir, Sequential), nil)
		var held []Lease
		var full error
		for i := range smallSize {
			l, err := p.Allocate(ctx, Owner{ContainerID: fmt.Sprint("c", i), IfName: "eth0"}, nil)
			if err == nil {
				held = append(held, l)
			} else if full = err; !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("%d pages: %v, want ENOSPC", size, err)
			}
		}
		for _, l := range held {
			if had, err := p.Release(ctx, l.ContainerID, "eth0"); !had || err != nil {
				t.Fatalf("%d pages: release %s: %v, %v", size, l.ContainerID, had, err)
			}
		}
		if got := checked(t, p); len(got) > 0 {
			t.Fatalf("%d pages: %+v", size, got)
		}
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatalf("%d pages: a file is still open: %v", size, err)
		}
		if size == 24 && full != nil {
			t.Errorf("%d pages should do: %v", size, full)
		}
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	readOnly(t, dir)
	p := openWith(t, smallConfig(dir, Sequential), nil)
	_, err := p.Allocate(ctx, Owner{ContainerID: "a", IfName: "eth0"}, nil)
	if !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), dir) {
		t.Errorf("on a read-only disk: %v", err)
	}
	if err := p.Status(ctx); !errors.Is(err, unix.EROFS) {
		t.Errorf("status on a read-only disk: %v", err)
	}
	if had, err := p.Release(ctx, "a", "eth0"); had || err != nil {
		t.Errorf("release on a read-only disk: %v, %v", had, err)
	}
}

// readOnly looks at leases on a disk that became read-only.
func readOnly(t *testing.T, dir string) {
	ctx := context.Background()
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, ""); err != nil {
		t.Fatal(err)
	}
	p := openWith(t, smallConfig(filepath.Join(dir, "leases"), Sequential), nil)
	want := allocate(t, p, "a")
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	got, err := p.Lookup(ctx, "a", "eth0")
	if err != nil || addrsOf(got) != addrsOf(want) {
		t.Errorf("lookup on a read-only disk: %v, %v", got, err)
	}
	if problems, err := p.Check(ctx, false); err != nil || len(problems) > 0 {
		t.Errorf("check on a read-only disk: %v, %v", problems, err)
	}
	if _, err := p.Release(ctx, "a", "eth0"); !errors.Is(err, unix.EROFS) {
		t.Errorf("release on a read-only disk: %v", err)
	}
	if got, err := p.Lookup(ctx, "a", "eth0"); err != nil || addrsOf(got) != addrsOf(want) {
		t.Errorf("after it: %v, %v", got, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	if _, err := Open(Config{Network: "../x", DataDir: t.TempDir()}); !errors.Is(err, ErrConfig) {
		t.Errorf("%v", err)
	}
	if _, err := open(smallConfig(t.TempDir(), Random), store.Options{BootID: "../../etc"}); err == nil {
		t.Error("a boot ID that is a path was taken")
	}
	p, err := Open(smallConfig(t.TempDir(), Random))
	if err != nil {
		t.Fatal(err)
	}
	allocate(t, p, "with the kernel's boot ID")
}

// An address that is live without a lease is passed over, wherever in the pool it is, and comes when it is free again.
func TestAddressesInUseElsewhere(t *testing.T) {
	ctx := context.Background()
	for _, strategy := range strategies {
		for _, texts := range []string{"10.0.0.2 fd00::2", "10.0.0.3 10.0.0.4 fd00::3 fd00::4", "10.0.0.2 10.0.0.4 10.0.0.6 fd00::2 fd00::4 fd00::6"} {
			live := map[netip.Addr]bool{}
			for _, a := range parse(strings.Fields(texts)) {
				live[a] = true
			}
			c := smallConfig(testDir(t), strategy)
			c.InUse = func(a netip.Addr) bool { return live[a] }
			p := openWith(t, c, nil)
			given := map[netip.Addr]bool{}
			take := func(l Lease) {
				for _, a := range l.Addrs {
					if live[a.Addr.Addr()] || given[a.Addr.Addr()] {
						t.Errorf("%s: %s was given, but is not free", strategy, a.Addr)
					}
					given[a.Addr.Addr()] = true
				}
			}
			for i := range smallSize - len(live)/2 {
				take(allocate(t, p, fmt.Sprint(i)))
			}
			_, err := p.Allocate(ctx, Owner{ContainerID: "late", IfName: "eth0"}, nil)
			if want := fmt.Sprintf("`ip route` the %d that", len(live)/2); !errors.Is(err, ErrExhausted) || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", strategy, err, want)
			}
			if got := checked(t, p); len(got) > 0 {
				t.Errorf("%s: %+v", strategy, got)
			}
			n := len(live) / 2
			clear(live)
			for i := range n {
				take(allocate(t, p, fmt.Sprint("again", i)))
			}
			if len(given) != 2*smallSize {
				t.Errorf("%s: %d addresses could be had, want %d", strategy, len(given), 2*smallSize)
			}
		}
	}
}

// A requested address is the kernel's to refuse: it knows better what stands in the way.
func TestRequestedAddressInUseElsewhere(t *testing.T) {
	c := smallConfig(testDir(t), DensePack)
	c.InUse = func(netip.Addr) bool { t.Error("asked"); return true }
	allocate(t, openWith(t, c, nil), "a", "10.0.0.3", "fd00::3")
}
