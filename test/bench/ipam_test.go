package bench

import (
	"context"
	"encoding/binary"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/headcni/headcni/pkg/ipam"
)

// poolSubnet is what IPAM plugins are filled and measured in.
var poolSubnet = netip.MustParsePrefix("10.7.0.0/16")

const poolSize = 1 << 16

// ipamContender is an IPAM plugin alone, as a process; dir is its dataDir.
func ipamContender(name, program, dir, more string) contender {
	members := fmt.Sprintf(`"ipam":{"type":%q,"dataDir":%q,"subnet":%q%s}`, program, dir, poolSubnet, more)
	return contender{name, "pool", []link{{program, members}}}
}

// A filler takes addresses of the pool for attachments that are not there, scattered evenly as after long use, and always the
// same ones.
type filler struct {
	dir  string
	take func(n int, a netip.Addr) error
	have int // the number of addresses gone through
}

// to fills up to a share of the pool, in percent.
func (f *filler) to(b *testing.B, percent int) {
	b.Helper()
	f.toCount(b, poolSize*percent/100)
}

func (f *filler) toCount(b *testing.B, want int) {
	b.Helper()
	first := binary.BigEndian.Uint32(poolSubnet.Addr().AsSlice())
	for ; f.have < want; f.have++ {
		at := uint32(f.have * 40503 % poolSize) // odd, so every address comes once
		if at < 2 || at == poolSize-1 {
			continue // the network's, the gateway's, the broadcast address
		}
		a := [4]byte(binary.BigEndian.AppendUint32(nil, first+at))
		if err := f.take(f.have, netip.AddrFrom4(a)); err != nil {
			b.Fatal(err)
		}
	}
}

func fillID(n int) string { return fmt.Sprintf("f%063x", n) }

// fillOurs goes through the package that the plugin itself uses.
func fillOurs(b *testing.B, dir string) *filler {
	b.Helper()
	p, err := ipam.Open(ipam.Config{Network: "pool", DataDir: dir, Sets: [][]ipam.Range{{{Subnet: poolSubnet}}}})
	if err != nil {
		b.Fatal(err)
	}
	return &filler{dir: dir, take: func(n int, a netip.Addr) error {
		o := ipam.Owner{ContainerID: fillID(n), IfName: "eth0", PodNamespace: "default", PodName: "web-0"}
		_, err := p.Allocate(context.Background(), o, []netip.Addr{a})
		return err
	}}
}

// fillHostLocal writes what host-local does: a file for each address, with the container and its interface.
func fillHostLocal(b *testing.B, dir string) *filler {
	b.Helper()
	if err := os.MkdirAll(filepath.Join(dir, "pool"), 0o755); err != nil {
		b.Fatal(err)
	}
	return &filler{dir: dir, take: func(n int, a netip.Addr) error {
		return os.WriteFile(filepath.Join(dir, "pool", a.String()), []byte(fillID(n)+"\r\neth0"), 0o600)
	}}
}

// poolDir is a folder on the tmpfs that holds the leases of all.
func poolDir(b *testing.B, name string) string {
	b.Helper()
	dir := filepath.Join("/var/lib/headcni/bench", name)
	b.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			b.Error(err)
		}
	})
	return dir
}

const (
	oursFull, oursEmpty = "headcni-ipam", "headcni-ipam, empty pool"
	hostLocalFull       = "host-local"
)

// BenchmarkIPAMFill compares IPAM plugins as processes, in a /16 that fills.
func BenchmarkIPAMFill(b *testing.B) {
	p := newPrograms(b)
	all := newSandboxes(b, 1)
	ours, theirs := fillOurs(b, poolDir(b, "ours")), fillHostLocal(b, poolDir(b, "host-local"))
	empty := ipamContender(oursEmpty, "headcni-ipam", poolDir(b, "empty"), "")
	names := []string{oursFull}
	contenders := []contender{
		empty, ipamContender(hostLocalFull, "host-local", theirs.dir, ""), ipamContender(oursFull, "headcni-ipam", ours.dir, ""),
	}
	for _, s := range []ipam.Strategy{ipam.Random, ipam.DensePack} {
		name := fmt.Sprintf("%s, %s", oursFull, s)
		names = append(names, name)
		contenders = append(contenders, ipamContender(name, "headcni-ipam", ours.dir, fmt.Sprintf(`,"strategy":%q`, s)))
	}
	r := newComparison(b, "Address management as a process, in a /16:")
	for _, percent := range []int{0, 10, 50, 90, 99} {
		b.Run(fmt.Sprintf("fill=%d", percent), func(b *testing.B) {
			ours.to(b, percent)
			theirs.to(b, percent)
			var ways []way
			for _, c := range contenders {
				ways = append(ways, p.lives(c, all, "ADD", "DEL"))
			}
			got := interleave(b, 20, ways...)
			detail := fmt.Sprintf("%d %% taken, ms", percent)
			goal := ""
			if percent == 90 {
				goal = "at most 0.01: 100 times the rate"
			}
			r.compare(got, row{"ADD", detail, oursFull, hostLocalFull, ratio, goal})
			r.compare(got, row{"DEL", detail, oursFull, hostLocalFull, ratio, ""})
			for _, name := range names {
				r.compare(got, row{"ADD", detail, name, oursEmpty, ratio, "at most 1.2"})
			}
		})
	}
}

// BenchmarkIPAMCrowd has many processes ask one pool at once, until the last is done.
func BenchmarkIPAMCrowd(b *testing.B) {
	p := newPrograms(b)
	ours, theirs := fillOurs(b, poolDir(b, "ours")), fillHostLocal(b, poolDir(b, "host-local"))
	ways := func(all []*sandbox) []way {
		return []way{
			p.lives(ipamContender(oursFull, "headcni-ipam", ours.dir, ""), all, "ADD", "DEL"),
			p.lives(ipamContender(hostLocalFull, "host-local", theirs.dir, ""), all, "ADD", "DEL"),
		}
	}
	r := newComparison(b, "Address management, many processes at once in a /16, until the last is done:")
	for _, load := range []struct {
		atOnce, percent, rounds int
		goal                    string
	}{{100, 0, 20, ""}, {4, 90, 6, "at most 0.01: 100 times the rate"}} {
		b.Run(fmt.Sprintf("at-once=%d/fill=%d", load.atOnce, load.percent), func(b *testing.B) {
			ours.to(b, load.percent)
			theirs.to(b, load.percent)
			got := interleave(b, load.rounds, ways(newSandboxes(b, load.atOnce))...)
			detail := fmt.Sprintf("%d at once, %d %% taken, ms", load.atOnce, load.percent)
			r.compare(got, row{"ADD", detail, oursFull, hostLocalFull, ratio, load.goal})
			r.compare(got, row{"DEL", detail, oursFull, hostLocalFull, ratio, ""})
		})
	}
}

// onDisk adds up what a folder takes: blocks as du counts them, and lengths. A file of several names counts once.
func onDisk(dir string) (blocks, apparent float64, err error) {
	seen := map[uint64]bool{}
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil || seen[st.Ino] {
			return err
		}
		seen[st.Ino] = true
		blocks += 512 * float64(st.Blocks)
		apparent += float64(st.Size)
		return nil
	})
	return blocks, apparent, err
}

// BenchmarkIPAMDisk counts the bytes of a lease, on the tmpfs and on the disk that temporary files are on.
func BenchmarkIPAMDisk(b *testing.B) {
	newPrograms(b)
	const leases = 1000
	r := newComparison(b, fmt.Sprintf("Bytes for each of %d leases, folders and all:", leases))
	for _, place := range []struct{ name, ours, theirs string }{
		{"tmpfs", poolDir(b, "ours"), poolDir(b, "host-local")}, {"disk", b.TempDir(), b.TempDir()},
	} {
		got := samples{}
		for name, f := range map[string]*filler{oursFull: fillOurs(b, place.ours), hostLocalFull: fillHostLocal(b, place.theirs)} {
			f.toCount(b, leases)
			blocks, apparent, err := onDisk(f.dir)
			if err != nil {
				b.Fatal(err)
			}
			got["blocks "+name] = []float64{blocks / leases}
			got["lengths "+name] = []float64{apparent / leases}
		}
		r.compare(got, row{"blocks", place.name, oursFull, hostLocalFull, ratio, ""})
		r.compare(got, row{"lengths", place.name, oursFull, hostLocalFull, ratio, ""})
	}
	b.ReportMetric(0, "ns/op")
}
