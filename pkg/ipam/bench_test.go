package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/headcni/headcni/pkg/ipam/store"
)

// BenchmarkLease measures one allocation and one release, for pools of all sizes filled to 0, 50, 90 and 99 %. The cost
// is to be flat. A /64 cannot be filled: it gets as many leases as the /16.
func BenchmarkLease(b *testing.B) {
	for _, strategy := range strategies {
		for _, pool := range []struct {
			prefix string
			fillOf int
		}{{"10.0.0.0/24", 1 << 8}, {"10.0.0.0/16", 1 << 16}, {"10.0.0.0/12", 1 << 20}, {"fd00::/64", 1 << 16}} {
			if testing.Short() && pool.fillOf > 1<<16 {
				continue
			}
			b.Run(fmt.Sprintf("strategy=%s/pool=%d", strategy, pfx(pool.prefix).Bits()), func(b *testing.B) {
				c := Config{Network: "net", DataDir: testDir(b), Strategy: strategy, Sets: [][]Range{{{Subnet: pfx(pool.prefix)}}}}
				p, filled := openWith(b, c, nil), 0
				for _, percent := range []int{0, 50, 90, 99} {
					filled = fillTo(b, p, filled, pool.fillOf*percent/100, pool.fillOf)
					b.Run(fmt.Sprintf("fill=%d", percent), func(b *testing.B) { benchLease(b, p) })
				}
			})
		}
	}
}

func benchLease(b *testing.B, p *Pool) {
	ctx := context.Background()
	warm, err := p.Allocate(ctx, Owner{ContainerID: "warm", IfName: "eth0"}, nil) // makes the index
	if err != nil {
		b.Fatal(err)
	}
	var alloc, release time.Duration
	i := 0
	for b.Loop() {
		o := Owner{ContainerID: fmt.Sprint("bench", i), IfName: "eth0", PodNamespace: "default", PodName: "web-0"}
		i++
		t0 := time.Now()
		if _, err := p.Allocate(ctx, o, nil); err != nil {
			b.Fatal(err)
		}
		t1 := time.Now()
		if _, err := p.Release(ctx, o.ContainerID, o.IfName); err != nil {
			b.Fatal(err)
		}
		alloc, release = alloc+t1.Sub(t0), release+time.Since(t1)
	}
	b.ReportMetric(float64(alloc.Nanoseconds())/float64(i), "ns/allocate")
	b.ReportMetric(float64(release.Nanoseconds())/float64(i), "ns/release")
	if _, err := p.Release(ctx, warm.ContainerID, warm.IfName); err != nil {
		b.Fatal(err)
	}
}

// fillTo takes addresses scattered over the pool, by links to a few records, without the pool's help: a million leases
// are made in seconds. It goes on from the have-th to the want-th.
func fillTo(b testing.TB, p *Pool, have, want, size int) int {
	b.Helper()
	ctx := context.Background()
	if _, err := p.Allocate(ctx, Owner{ContainerID: "x", IfName: "eth0"}, nil); err != nil {
		b.Fatal(err)
	}
	if _, err := p.Release(ctx, "x", "eth0"); err != nil {
		b.Fatal(err)
	}
	dir := filepath.Join(p.Dir(), testBoot)
	first := numberOf(p.cfg.Sets[0][0].Subnet.Addr())
	record := ""
	for n := have; n < want; n++ {
		if n == have || n%30000 == 0 { // ext4 allows 65,000 links to a file
			record = filepath.Join(dir, "leases", fmt.Sprintf("fill%d:eth0", n))
			if err := os.WriteFile(record, nil, 0o600); err != nil {
				b.Fatal(err)
			}
		}
		at := n * 40503 % size // odd, so every address comes once
		if at < 2 || at == size-1 {
			continue // reserved
		}
		a := first.add(number{lo: uint64(at)}).addr(p.cfg.Sets[0][0].Subnet.Addr())
		if err := syscall.Link(record, filepath.Join(dir, "addresses", a.String())); err != nil {
			b.Fatal(err)
		}
	}
	// The index knows nothing of these: let it be made anew.
	window, _ := store.Locate(p.cfg.Sets[0][0].Subnet.Addr())
	if err := os.Remove(filepath.Join(dir, "index", fmt.Sprintf("%s-%d", window, window.BitLen()-store.WindowBits))); err != nil && !os.IsNotExist(err) {
		b.Fatal(err)
	}
	return want
}

// countingFS counts what is asked of the file system.
type countingFS struct {
	store.System
	calls, bytes int
}

func (f *countingFS) Open(dir int, name string, flags int, mode uint32) (int, error) {
	f.calls++
	return f.System.Open(dir, name, flags, mode)
}

func (f *countingFS) Close(fd int) {
	f.calls++
	f.System.Close(fd)
}

func (f *countingFS) Read(fd int, b []byte, off int64) (int, error) {
	n, err := f.System.Read(fd, b, off)
	f.calls, f.bytes = f.calls+1, f.bytes+n
	return n, err
}

func (f *countingFS) Write(fd int, b []byte, off int64) (int, error) {
	f.calls, f.bytes = f.calls+1, f.bytes+len(b)
	return f.System.Write(fd, b, off)
}

func (f *countingFS) Names(dir int, name string) ([]string, error) {
	names, err := f.System.Names(dir, name)
	f.calls += 3 + len(names)
	return names, err
}

func (f *countingFS) Stat(dir int, name string) (store.Stat, error) {
	f.calls++
	return f.System.Stat(dir, name)
}

func (f *countingFS) Link(dir int, from, to string) error {
	f.calls++
	return f.System.Link(dir, from, to)
}

func (f *countingFS) Unlink(dir int, name string) error {
	f.calls++
	return f.System.Unlink(dir, name)
}

// The number of system calls for an address, there and back, and of the bytes that they move, is the same in all pools,
// however full. This is what BenchmarkLease shows in time, without the noise.
func TestCostIsFlat(t *testing.T) {
	ctx := context.Background()
	for _, strategy := range strategies {
		var all []string
		for _, pool := range []struct {
			prefix string
			fillOf int
		}{{"10.0.0.0/24", 1 << 8}, {"10.0.0.0/20", 1 << 12}, {"10.0.0.0/12", 1 << 12}, {"fd00::/64", 1 << 12}} {
			fs, filled := &countingFS{}, 0
			p := openWith(t, Config{Network: "net", DataDir: testDir(t), Strategy: strategy, Sets: [][]Range{{{Subnet: pfx(pool.prefix)}}}}, fs)
			for _, percent := range []int{0, 50, 90, 99} {
				filled = fillTo(t, p, filled, pool.fillOf*percent/100, pool.fillOf)
				allocate(t, p, "warm") // makes the index
				fs.calls, fs.bytes = 0, 0
				allocate(t, p, "b")
				if had, err := p.Release(ctx, "b", "eth0"); !had || err != nil {
					t.Fatal(had, err)
				}
				all = append(all, fmt.Sprintf("%s at %d %%: %d calls, %d bytes", pool.prefix, percent, fs.calls, fs.bytes))
				if fs.calls > 70 || fs.bytes > 8<<10 {
					t.Errorf("%s: %s", strategy, all[len(all)-1])
				}
				if had, err := p.Release(ctx, "warm", "eth0"); !had || err != nil {
					t.Fatal(had, err)
				}
			}
		}
		t.Logf("%s:\n%s", strategy, strings.Join(all, "\n"))
	}
}

// BenchmarkDisk measures what leases take on disk, folders and index included, where the test's temporary files are: by the
// kilobytes that the file system says, by the inodes, and by the text of a record. (host-local has a file for each address.)
func BenchmarkDisk(b *testing.B) {
	const leases = 1000
	for name, c := range map[string]Config{
		"single": {Sets: [][]Range{{{Subnet: pfx("10.0.0.0/16")}}}},
		"dual":   {Sets: [][]Range{{{Subnet: pfx("10.0.0.0/16")}}, {{Subnet: pfx("fd00::/64")}}}},
	} {
		b.Run("stack="+name, func(b *testing.B) {
			c.Network, c.DataDir = "net", b.TempDir()
			p := openWith(b, c, nil)
			var text int64
			for b.Loop() {
				for i := range leases {
					o := Owner{ContainerID: fmt.Sprintf("%064x", i), IfName: "eth0", PodNamespace: "default", PodName: fmt.Sprintf("web-7d4b9c6f5d-%05d", i)}
					if _, err := p.Allocate(context.Background(), o, nil); err != nil {
						b.Fatal(err)
					}
				}
				blocks := map[uint64]int64{} // by inode
				err := filepath.WalkDir(p.Dir(), func(path string, d os.DirEntry, err error) error {
					var st syscall.Stat_t
					if err == nil {
						err = syscall.Lstat(path, &st)
					}
					blocks[st.Ino] = st.Blocks * 512
					if filepath.Base(filepath.Dir(path)) == "leases" {
						text += st.Size
					}
					return err
				})
				sum := int64(0)
				for _, n := range blocks {
					sum += n
				}
				if err = errors.Join(err, os.RemoveAll(p.Dir())); err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(sum)/leases, "disk-B/lease")
				b.ReportMetric(float64(len(blocks))/leases, "inodes/lease")
			}
			b.ReportMetric(float64(text)/float64(b.N)/leases, "text-B/lease")
		})
	}
}

// BenchmarkContended has all of GOMAXPROCS goroutines allocate and release in one pool at once.
func BenchmarkContended(b *testing.B) {
	p := openWith(b, poolConfig(testDir(b), Sequential), nil)
	ctx := context.Background()
	var n atomic.Int64
	b.RunParallel(func(pb *testing.PB) {
		me := n.Add(1)
		for i := 0; pb.Next(); i++ {
			id := fmt.Sprintf("p%d-%d", me, i)
			if _, err := p.Allocate(ctx, Owner{ContainerID: id, IfName: "eth0"}, nil); err != nil {
				b.Error(err)
				return
			}
			if _, err := p.Release(ctx, id, "eth0"); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// BenchmarkPick is the decision alone, in a /16 that is 90 % full.
func BenchmarkPick(b *testing.B) {
	set := []Range{Range{Subnet: pfx("10.0.0.0/16")}.withDefaults()}
	s := newSpace(set)
	m := newMemory()
	for n := range 1 << 16 * 9 / 10 {
		m.set(b, numberOf(adr("10.0.0.0")).add(number{lo: uint64(n * 40503 % (1 << 16))}).addr(adr("10.0.0.0")), true)
	}
	for _, strategy := range strategies {
		b.Run(string(strategy), func(b *testing.B) {
			var last netip.Addr
			x := uint64(1)
			draw := func() uint64 { x = x*6364136223846793005 + 1442695040888963407; return x }
			for b.Loop() {
				c, err := pick(strategy, s, last, m, draw)
				if err != nil || c.rng == nil {
					b.Fatal(c, err)
				}
				last = c.addr
			}
		})
	}
}
