package ipam

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/ipam/store"
)

const workerEnv = "HEADCNI_IPAM_TEST_WORKER"

// job is what a worker process is to do.
type job struct {
	Dir      string
	Name     string // prefix of its owners
	Strategy Strategy
	Rounds   int
	Hold     int  // leases that it holds at most
	Keep     bool // leave them at the end
	DieAt    int  // kill itself before this change of the store; 0 = never
	Seed     uint64
}

// work runs in the worker: it allocates and releases at random and writes down what it does: "? owner" before, "+ owner
// address..." or "- owner" after.
func work(text string) int {
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		fmt.Println("! ", err)
		return 2
	}
	p, err := open(poolConfig(j.Dir, j.Strategy), store.Options{BootID: testBoot, FS: &suicide{n: j.DieAt}})
	if err != nil {
		fmt.Println("! ", err)
		return 2
	}
	fmt.Println("ready")
	ctx, r := context.Background(), rand.New(rand.NewPCG(j.Seed, 0))
	var held []string
	for i := 0; i < j.Rounds || j.Keep && len(held) < j.Hold; i++ {
		if len(held) == j.Hold || len(held) > 0 && r.IntN(3) == 0 && !(j.Keep && i >= j.Rounds) {
			at := r.IntN(len(held))
			id := held[at]
			held = append(held[:at], held[at+1:]...)
			fmt.Println("?", id)
			if had, err := p.Release(ctx, id, "eth0"); !had || err != nil {
				fmt.Println("! release", id, had, err)
				return 1
			}
			fmt.Println("-", id)
			continue
		}
		id := fmt.Sprintf("%s-%d", j.Name, i)
		fmt.Println("?", id)
		l, err := p.Allocate(ctx, Owner{ContainerID: id, IfName: "eth0"}, nil)
		if err != nil {
			fmt.Println("! allocate", id, err)
			return 1
		}
		fmt.Println("+", id, l.Addrs[0].Addr.Addr(), l.Addrs[1].Addr.Addr())
		held = append(held, id)
	}
	return 0
}

func poolConfig(dir string, s Strategy) Config {
	return Config{
		Network: "net", DataDir: dir, Strategy: s, Writer: "test",
		Sets: [][]Range{{{Subnet: netip.MustParsePrefix("10.0.0.0/20")}}, {{Subnet: netip.MustParsePrefix("fd00::/64")}}},
	}
}

// suicide kills its own process, for good and without a word, before the n-th call that changes the store.
type suicide struct {
	store.System
	n, calls int
}

func (s *suicide) step() {
	if s.calls++; s.calls == s.n {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

func (s *suicide) Open(dir int, name string, flags int, mode uint32) (int, error) {
	if flags&(unix.O_CREAT|unix.O_TRUNC) != 0 {
		s.step()
	}
	return s.System.Open(dir, name, flags, mode)
}

func (s *suicide) Write(fd int, b []byte, off int64) (int, error) {
	s.step()
	return s.System.Write(fd, b, off)
}

func (s *suicide) Link(dir int, from, to string) error {
	s.step()
	return s.System.Link(dir, from, to)
}

func (s *suicide) Unlink(dir int, name string) error {
	s.step()
	return s.System.Unlink(dir, name)
}

func (s *suicide) Rmdir(dir int, name string) error {
	s.step()
	return s.System.Rmdir(dir, name)
}

func (s *suicide) Mkdir(dir int, name string, mode uint32) error {
	s.step()
	return s.System.Mkdir(dir, name, mode)
}

func (s *suicide) Rename(dir int, from, to string) error {
	s.step()
	return s.System.Rename(dir, from, to)
}

// worker is a running worker process.
type worker struct {
	cmd   *exec.Cmd
	ready chan struct{}
	out   bytes.Buffer
	done  chan error
}

func start(t *testing.T, j job) *worker {
	t.Helper()
	text, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w := &worker{cmd: exec.Command(self), ready: make(chan struct{}), done: make(chan error, 1)}
	// A process with the race detector sleeps for a second before it exits, unless told not to.
	w.cmd.Env = append(os.Environ(), workerEnv+"="+string(text), "GORACE=atexit_sleep_ms=0")
	pipe, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		in := bufio.NewReader(pipe)
		if first, _ := in.ReadString('\n'); first == "ready\n" {
			close(w.ready)
		}
		_, err := io.Copy(&w.out, in)
		w.done <- errors.Join(err, w.cmd.Wait())
	}()
	return w
}

// ledger adds up what workers wrote down.
type ledger struct {
	held   map[string][]string // owner -> addresses
	unsure map[string]bool
}

func (l *ledger) read(t *testing.T, out string) {
	t.Helper()
	for _, line := range strings.Split(out, "\n") {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue // the last line of a killed process may be cut
		}
		switch f[0] {
		case "?":
			l.unsure[f[1]] = true
		case "+":
			if len(f) != 4 {
				continue
			}
			delete(l.unsure, f[1])
			l.held[f[1]] = f[2:]
		case "-":
			delete(l.unsure, f[1])
			delete(l.held, f[1])
		case "!":
			t.Error(line)
		}
	}
	for id := range l.unsure {
		delete(l.held, id)
	}
}

// compare checks that the store has what the ledger has, each address once.
func (l *ledger) compare(t *testing.T, p *Pool) {
	t.Helper()
	leases, err := p.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	seen, owner := map[string]bool{}, map[netip.Addr]string{}
	for _, lease := range leases {
		id := lease.ContainerID
		seen[id] = true
		for i, a := range lease.Addrs {
			if other, ok := owner[a.Addr.Addr()]; ok {
				t.Errorf("%s belongs to %s and %s", a.Addr, other, id)
			}
			owner[a.Addr.Addr()] = id
			if want, ok := l.held[id]; ok && want[i] != a.Addr.Addr().String() {
				t.Errorf("%s was given %v and has %v", id, want, lease.Addrs)
			}
		}
		if _, ok := l.held[id]; !ok && !l.unsure[id] {
			t.Errorf("%s has %v, which nobody was given", id, lease.Addrs)
		}
	}
	for id, addrs := range l.held {
		if !seen[id] {
			t.Errorf("%s was given %v, which are gone", id, addrs)
		}
	}
	for _, problem := range checked(t, p) {
		if problem.Kind != "leftover" {
			t.Errorf("%+v", problem)
		}
	}
}

// Many processes at once get different addresses and none waits too long.
func TestManyProcesses(t *testing.T) {
	const processes = 100
	for _, strategy := range strategies {
		dir := testDir(t)
		var workers []*worker
		for i := range processes {
			workers = append(workers, start(t, job{Dir: dir, Name: fmt.Sprint("w", i), Strategy: strategy, Rounds: 12, Hold: 6, Keep: true, Seed: uint64(i)}))
		}
		l := &ledger{map[string][]string{}, map[string]bool{}}
		for _, w := range workers {
			if err := <-w.done; err != nil {
				t.Errorf("%v: %s", err, w.out.String())
			}
			l.read(t, w.out.String())
		}
		if want := processes * 6; len(l.held) != want {
			t.Errorf("%d leases held, want %d", len(l.held), want)
		}
		p := openWith(t, poolConfig(dir, strategy), nil)
		l.compare(t, p)
		if got := checked(t, p); len(got) > 0 {
			t.Errorf("%s: %+v", strategy, got)
		}
	}
}

// crashRounds is how often a process is killed; HEADCNI_CRASH_ROUNDS=1000 asks for more.
func crashRounds(t *testing.T) int {
	text := os.Getenv("HEADCNI_CRASH_ROUNDS")
	if text == "" {
		if testing.Short() {
			return 20
		}
		return 60
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("HEADCNI_CRASH_ROUNDS: %v", err)
	}
	return n
}

// One process after the other is killed with SIGKILL, at a random moment from outside or exactly before one of its
// system calls, while another goes on working. After each the store holds what was given, and nothing is given twice.
func TestKill9(t *testing.T) {
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	dir := testDir(t)
	rounds := crashRounds(t)
	killed, inside := 0, 0
	for round := range rounds {
		strategy := strategies[round%len(strategies)]
		p := openWith(t, poolConfig(dir, strategy), nil)
		victim := job{Dir: dir, Name: fmt.Sprint("v", round), Strategy: strategy, Rounds: 1 << 30, Hold: 4, Seed: r.Uint64()}
		if round%2 == 0 {
			victim.DieAt = 1 + r.IntN(60)
		}
		other := start(t, job{Dir: dir, Name: fmt.Sprint("o", round), Strategy: strategy, Rounds: 20, Hold: 8, Keep: true, Seed: r.Uint64()})
		w := start(t, victim)
		if victim.DieAt == 0 {
			<-w.ready
			time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond)
			if err := w.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
		<-w.done
		if status, ok := w.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signal() == syscall.SIGKILL {
			killed++
		}
		l := &ledger{map[string][]string{}, map[string]bool{}}
		l.read(t, w.out.String())
		inside += len(l.unsure)
		if err := <-other.done; err != nil {
			t.Errorf("the other process: %v: %s", err, other.out.String())
		}
		l.read(t, other.out.String())
		l.compare(t, p)
		empty(t, p, l)
		if t.Failed() {
			t.Fatalf("round %d: %+v", round, victim)
		}
	}
	t.Logf("%d of %d processes killed, %d of them in the middle of a change", killed, rounds, inside)
	if killed != rounds || rounds >= 20 && inside < rounds/3 {
		t.Error("the kills do not hit what they are for")
	}
}

// empty releases everything the way a runtime does, and wants nothing to be left.
func empty(t *testing.T, p *Pool, l *ledger) {
	t.Helper()
	ctx := context.Background()
	for id := range l.held {
		if had, err := p.Release(ctx, id, "eth0"); !had || err != nil {
			t.Errorf("release %s: %v, %v", id, had, err)
		}
	}
	for id := range l.unsure {
		if _, err := p.Release(ctx, id, "eth0"); err != nil {
			t.Errorf("release %s: %v", id, err)
		}
	}
	for _, dir := range []string{"leases", "addresses"} {
		left, err := os.ReadDir(filepath.Join(p.Dir(), testBoot, dir))
		if err != nil || len(left) > 0 {
			t.Errorf("%d left in %s: %v, %v", len(left), dir, left, err)
		}
	}
	if problems := checked(t, p); len(problems) > 0 {
		t.Errorf("at the end: %+v", problems)
	}
}

// Garbage collection at full speed beside ADD and DEL never takes a lease of a live owner, also where the owner had
// another lease, now dead, when the collection began.
func TestGCRacesAllocate(t *testing.T) {
	ctx := context.Background()
	dir := testDir(t)
	var live sync.Map
	var stop atomic.Bool
	var wg sync.WaitGroup
	for n := range 4 {
		wg.Go(func() {
			p := openWith(t, poolConfig(dir, Sequential), nil)
			id := fmt.Sprint("c", n)
			for !stop.Load() {
				live.Store(id, true)
				l, err := p.Allocate(ctx, Owner{ContainerID: id, IfName: "eth0"}, nil)
				if errors.Is(err, ErrOwnerHasLease) {
					_, err = p.Release(ctx, id, "eth0")
				} else if err == nil {
					var got Lease
					got, err = p.Lookup(ctx, id, "eth0")
					if err == nil && got.Addrs[0] != l.Addrs[0] {
						t.Errorf("live lease %v of %s became %v", l.Addrs, id, got.Addrs)
					}
					live.Delete(id) // from here on it is garbage
					if rand.IntN(2) == 0 {
						time.Sleep(time.Millisecond) // let the collector have it
					}
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	collector := openWith(t, poolConfig(dir, Sequential), nil)
	collected, calls := 0, 0
	for end := time.Now().Add(700 * time.Millisecond); time.Now().Before(end); {
		released, err := collector.GC(ctx, func(l Lease) bool { _, ok := live.Load(l.ContainerID); return ok })
		if err != nil {
			t.Error(err)
		}
		collected += len(released)
		calls++
	}
	stop.Store(true)
	wg.Wait()
	if collected < 10 {
		t.Errorf("only %d leases were collected: no race took place", collected)
	}
	t.Logf("%d collected in %d calls", collected, calls)
}
