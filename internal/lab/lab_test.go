package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// victimEnv makes the test binary build a lab and wait to be killed.
const victimEnv = "HEADCNI_LAB_TEST_VICTIM"

// victimNameEnv is the name under which it keeps the lab.
const victimNameEnv = "HEADCNI_LAB_TEST_NAME"

func TestMain(m *testing.M) {
	if os.Getenv(victimEnv) != "" {
		victim()
	}
	nstest.Main(m)
}

func victim() {
	l, err := newMachines(context.Background(), Options{})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(l.Dir)
	for _, m := range l.machines() {
		fmt.Println(m.holder.Process.Pid)
	}
	if os.Getenv(victimEnv) == "keep" {
		if _, err := l.Keep("test", os.Getenv(victimNameEnv), nil); err != nil {
			fmt.Println(err)
		}
		os.Exit(0)
	}
	select {}
}

// startVictim returns the lab's folder and the PIDs of its machines.
func startVictim(t *testing.T, how string) (cmd *exec.Cmd, dir string, pids []string) {
	t.Helper()
	cmd = exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), victimEnv+"="+how)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	scan := bufio.NewScanner(out)
	var lines []string
	for len(lines) < 4 && scan.Scan() {
		lines = append(lines, scan.Text())
	}
	if len(lines) != 4 {
		t.Fatalf("the victim said %q", lines)
	}
	return cmd, lines[0], lines[1:]
}

// newMachines makes machines on an underlay: a lab without Headscale, tailscaled and daemons.
func newMachines(ctx context.Context, opt Options) (*Lab, error) {
	l := &Lab{opt: opt.withDefaults()}
	var err error
	if l.Dir, l.lock, err = newWorldDir(); err != nil {
		return nil, err
	}
	if err := l.makeMachines(ctx); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func bare(t *testing.T) *Lab {
	t.Helper()
	nstest.Require(t)
	l, err := newMachines(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func TestUnderlay(t *testing.T) {
	t.Setenv(DirEnv, t.TempDir())
	l := bare(t)
	a, b := l.Nodes[0], l.Nodes[1]
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for _, addr := range b.Underlay {
		s, err := StartStream(t.Context(), "a to b", a, b, addr)
		if err != nil {
			t.Fatal(err)
		}
		for range 10 {
			if _, err := s.WaitBack(ctx, time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		if r := s.Stop(); r.Sent < 10 || r.Lost > 0 {
			t.Errorf("%s: %+v", addr, r)
		}
		if rate, err := Throughput(t.Context(), a, b, addr, 200*time.Millisecond); err != nil || rate < 1e6 {
			t.Errorf("%s: %.0f bit/s, %v", addr, rate, err)
		}
	}
	if out, err := a.Run(t.Context(), "hostname"); err != nil || out != "node-1\n" {
		t.Errorf("host name %q, %v", out, err)
	}
	for _, dir := range []string{"/etc/cni/net.d", "/opt/cni/bin", "/var/lib/headcni"} {
		if files, err := os.ReadDir(a.Path(dir)); err != nil || len(files) > 0 {
			t.Errorf("%s on a new node: %v, %v", dir, files, err)
		}
	}
}

// A stream over a path that is cut must show it.
func TestStreamSeesCut(t *testing.T) {
	t.Setenv(DirEnv, t.TempDir())
	l := bare(t)
	a, b := l.Nodes[0], l.Nodes[1]
	s, err := StartStream(t.Context(), "a to b", a, b, b.Underlay[0])
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	// Until the neighbour is known the kernel queues datagrams instead of losing them.
	if _, err := s.WaitBack(ctx, time.Time{}); err != nil {
		t.Fatal(err)
	}
	link, err := l.Control.Net.LinkByName(a.Port)
	if err != nil {
		t.Fatal(err)
	}
	// Off the bridge: with the link down the kernel would keep the datagrams for later.
	if err := l.Control.Net.LinkSetNoMaster(link); err != nil {
		t.Fatal(err)
	}
	// On a busy machine the sender does not get its turn each time.
	sent := func() int { s.mu.Lock(); defer s.mu.Unlock(); return len(s.sentAt) }
	for cut, before := time.Now(), sent(); time.Since(cut) < 300*time.Millisecond || sent() < before+30; {
		time.Sleep(Beat)
	}
	bridge, err := l.Control.Net.LinkByName(bridgeName)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Control.Net.LinkSetMaster(link, bridge); err != nil {
		t.Fatal(err)
	}
	if _, err := s.WaitBack(ctx, time.Now()); err != nil {
		t.Error(err)
	}
	if r := s.Stop(); r.Lost < 20 || r.Longest < 200*time.Millisecond {
		t.Errorf("300 ms and more off the bridge: %+v", r)
	}
}

func TestCaptureSeesClear(t *testing.T) {
	t.Setenv(DirEnv, t.TempDir())
	l := bare(t)
	a, b := l.Nodes[0], l.Nodes[1]
	c, err := l.CaptureUnderlay()
	if err != nil {
		t.Fatal(err)
	}
	// Traffic of the nodes themselves is not in clear.
	for _, addr := range b.Underlay {
		if _, err := Throughput(t.Context(), a, b, addr, 100*time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	if n := c.Clear(); n != 0 {
		t.Errorf("%d packets in clear before there was one", n)
	}
	inClear := []string{
		"10.244.1.1 > 10.244.2.1", "10.244.255.255 > 192.0.2.1", "192.0.2.1 > 10.244.0.0",
		"fd00:244:1::1 > fd00:244:2::1", "fd00:244:ffff::1 > 2001:db8::1", "2001:db8::1 > fd00:244::",
	}
	not := []string{"10.245.0.1 > 10.243.255.255", "fd00:245::1 > fd00:243:ffff::1", "fd01:244::1 > 2001:db8:fd00:244::1"}
	for _, p := range append(not, inClear...) {
		from, to, _ := strings.Cut(p, " > ")
		if err := l.SendClear(a, netip.MustParseAddr(from), netip.MustParseAddr(to)); err != nil {
			t.Fatal(err)
		}
	}
	got, err := c.Stop()
	if err != nil {
		t.Fatal(err)
	}
	for i := range inClear {
		inClear[i] += " protocol 17, ports 9 > 9"
	}
	if got.Clear != len(inClear) || got.Total < 10 || !slices.Equal(got.Examples, inClear[:maxExamples]) {
		t.Errorf("captured %+v", got)
	}
}

func TestKilledLabVanishes(t *testing.T) {
	nstest.Require(t)
	t.Setenv(DirEnv, t.TempDir())
	cmd, dir, pids := startVictim(t, "wait")
	second := bare(t) // beside the first
	if _, err := os.Stat(dir); err != nil {
		t.Fatalf("a second lab took the folder of a living one: %v", err)
	}
	if second.Dir == dir {
		t.Fatal("two labs in one folder")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for _, pid := range pids {
		if err := until(ctx, 10*time.Millisecond, nil, func() error { return gone(pid) }); err != nil {
			t.Error(err)
		}
	}
	bare(t)
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the folder of the killed lab: %v", err)
	}
	if _, err := os.Stat(second.Dir); err != nil {
		t.Errorf("the folder of the living lab: %v", err)
	}
}

// What a killed lab leaves of cgroups goes with its folder, and only that.
func TestSweepRemovesCgroups(t *testing.T) {
	nstest.Require(t)
	t.Setenv(DirEnv, t.TempDir())
	root := "/sys/fs/cgroup"
	if _, err := os.Stat(root + "/pids"); err == nil { // v1
		root += "/pids"
	}
	var left []string
	for i := range 2 {
		dir, lock, err := newWorldDir()
		if err != nil {
			t.Fatal(err)
		}
		m := Machine{Name: "node-1", Dir: filepath.Join(dir, "node-1")}
		left = append(left, filepath.Join(root, m.Cgroup()))
		if err := os.Mkdir(left[i], 0o755); err != nil {
			nstest.Skip(t, fmt.Sprintf("cannot make cgroups: %v", err))
		}
		if err := os.Mkdir(filepath.Join(left[i], "pod"), 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := m.RemoveCgroup(); err != nil {
				t.Error(err)
			}
			lock.Close()
		})
		if i == 0 {
			lock.Close() // as if its processes had ended; the other's lives
		}
	}
	if err := Sweep(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left[0]); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the cgroup of the dead lab: %v", err)
	}
	if _, err := os.Stat(left[1]); err != nil {
		t.Errorf("the cgroup of the living lab: %v", err)
	}
}

func TestKeptLabStaysUntilDown(t *testing.T) {
	nstest.Require(t)
	t.Setenv(DirEnv, t.TempDir())
	cmd, dir, pids := startVictim(t, "keep")
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	bare(t) // sweeps
	if others, err := Kept("another"); err != nil || len(others) > 0 {
		t.Errorf("of another kind: %+v, %v", others, err)
	}
	worlds, err := Kept("test")
	if err != nil || len(worlds) != 1 || worlds[0].Dir != dir {
		t.Fatalf("kept: %+v, %v; want the one in %s", worlds, err, dir)
	}
	w := worlds[0]
	if got := strings.Join(w.Names(), " "); got != "control node-1 node-2" {
		t.Errorf("names: %s", got)
	}
	for _, pid := range pids {
		if gone(pid) == nil {
			t.Errorf("machine %s has ended", pid)
		}
	}
	out, err := exec.Command("nsenter", "--target="+pids[1], "--net", "--uts", "hostname").CombinedOutput()
	if err != nil || string(out) != "node-1\n" {
		t.Errorf("host name %q, %v", out, err)
	}
	if err := w.Enter("nobody", nil); err == nil || !strings.Contains(err.Error(), "there are control, node-1, node-2") {
		t.Errorf("enter what is not there: %v", err)
	}
	// A number that belongs to somebody else now.
	stranger := w
	stranger.Machines = []Inhabitant{{Name: "node-1", PID: os.Getpid(), Started: 1}}
	if err := stranger.Machines[0].kill(t.Context()); err != nil {
		t.Errorf("end a process that is not there any more: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := w.Down(ctx); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		if err := gone(pid); err != nil {
			t.Error(err)
		}
	}
	if worlds, err := Kept("test"); err != nil || len(worlds) > 0 {
		t.Errorf("after down: %+v, %v", worlds, err)
	}
}

// TestSeveralKept: each has a name of its own, also where two are kept at the same moment, and one that is ended leaves the others.
func TestSeveralKept(t *testing.T) {
	nstest.Require(t)
	t.Setenv(DirEnv, t.TempDir())
	running := bare(t) // in use, but not kept
	keep := func(names ...string) {
		t.Helper()
		var cmds []*exec.Cmd
		for _, name := range names {
			t.Setenv(victimNameEnv, name)
			cmd, _, _ := startVictim(t, "keep")
			cmds = append(cmds, cmd)
		}
		for _, cmd := range cmds {
			if err := cmd.Wait(); err != nil {
				t.Fatal(err)
			}
		}
	}
	names := func() (list []string) {
		t.Helper()
		worlds, err := Kept("test")
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range worlds {
			list = append(list, w.Name)
		}
		slices.Sort(list)
		return list
	}
	keep("", "mine", "")
	if got := names(); !slices.Equal(got, []string{"mine", "test-1", "test-2"}) {
		t.Errorf("kept: %s", got)
	}
	down := func(name string) {
		t.Helper()
		worlds, err := Kept("test")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		for _, w := range worlds {
			if w.Name == name {
				if err := w.Down(ctx); err != nil {
					t.Error(err)
				}
			}
		}
	}
	down("test-1")
	if got := names(); !slices.Equal(got, []string{"mine", "test-2"}) {
		t.Errorf("after one ended: %s", got)
	}
	keep("mine")
	if got := names(); len(got) != 3 || slices.Index(got, "test-1") < 0 { // the name was taken
		t.Errorf("a name twice: %s", got)
	}
	for _, name := range names() {
		down(name)
	}
	if got := names(); len(got) > 0 {
		t.Errorf("left: %s", got)
	}
	if _, err := os.Stat(running.Dir); err != nil || gone(strconv.Itoa(running.machines()[0].holder.Process.Pid)) == nil {
		t.Errorf("a lab that was in use has suffered: %v", err)
	}
}

// gone tells whether a process has ended; an orphan that nobody reaps (the test may be PID 1) has.
func gone(pid string) error {
	b, err := os.ReadFile("/proc/" + pid + "/stat")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || strings.Contains(string(b), ") Z ") {
		return nil
	}
	return fmt.Errorf("process %s: %.60s, %w", pid, b, errors.Join(err, errors.New("still there")))
}

// The real parts alone, without a line of ours on the nodes: what fails here is the lab's fault.
func TestRealParts(t *testing.T) {
	if err := (Options{}).withDefaults().checkTools(); err != nil {
		nstest.Skip(t, err.Error())
	}
	t.Setenv(DirEnv, t.TempDir())
	l := bare(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := l.startControl(ctx); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(l.Control.APIKey, "hskey-api-") {
		t.Errorf("API key %.12q...", l.Control.APIKey)
	}
	out, err := l.Control.Run(ctx, "headscale", "preauthkeys", "create", "--tags", Tag, "--reusable")
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(out)
	key := fields[len(fields)-1]
	for _, n := range l.Nodes {
		n.Mode, n.Tun = "host", hostTun // daemon mode needs our daemon
		if err := n.StartTailscaled(); err != nil {
			t.Fatal(err)
		}
		if err := n.WaitSocket(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := n.Run(ctx, "tailscale", "up", "--login-server="+l.Control.URL, "--auth-key="+key, "--accept-dns=false"); err != nil {
			t.Fatal(err)
		}
	}
	a, b := l.Nodes[0], l.Nodes[1]
	addrs, err := b.TailnetAddrs()
	if err != nil || len(addrs) != 2 {
		t.Fatalf("tailnet addresses %v, %v", addrs, err)
	}
	for _, addr := range addrs {
		if err := a.WaitRoute(ctx, addr); err != nil {
			t.Fatal(err)
		}
		if rate, err := Throughput(ctx, a, b, addr, 300*time.Millisecond); err != nil || rate < 1e6 {
			t.Errorf("%s: %.0f bit/s, %v", addr, rate, err)
		}
	}
	got, err := Lookup(ctx, a, b.Name+"."+BaseDomain)
	if err != nil || !slices.Contains(got, addrs[0]) {
		t.Errorf("MagicDNS: %v, %v; want %v", got, err, addrs)
	}
}
