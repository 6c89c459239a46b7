package conformance

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

// TestNetnsDisappears ends a sandbox at many moments of ADD: an error of the right code, or a success that DEL clears away.
func TestNetnsDisappears(t *testing.T) {
	n := newNode(t)
	conf := n.conf("")
	rounds, failed := 60, 0
	span := n.timed(attach("ADD", "warm", nstest.New(t), conf))
	n.must(attach("DEL", "warm", nil, conf))
	for i := range rounds {
		path := fmt.Sprintf("/run/netns/gone%d", i)
		if err := nstest.Create(path); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			time.Sleep(rand.N(span))
			if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
			if err := os.Remove(path); err != nil {
				t.Error(err)
			}
		})
		c := attach("ADD", fmt.Sprintf("c%d", i), nil, conf)
		c.netns = path
		if _, f := n.run(c); f != nil {
			failed++
			if f.Code != 8 {
				t.Errorf("round %d: %v, want code 8", i, f)
			}
		}
		wg.Wait()
		c.verb = "DEL"
		n.must(c)
		n.empty()
	}
	t.Logf("%d of %d failed", failed, rounds)
	if failed == 0 || failed == rounds {
		t.Errorf("the test ends namespaces too late or too early: %d of %d failed", failed, rounds)
	}
}

// timed is how long a call takes.
func (n *node) timed(c call) time.Duration {
	n.t.Helper()
	began := time.Now()
	n.must(c)
	return time.Since(began)
}

// TestSignals: a system call that a signal interrupts is made again.
func TestSignals(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	sent := 0
	n.during = func(plugin *os.Process, ended <-chan struct{}) {
		for {
			select {
			case <-ended:
				return
			default:
			}
			for _, s := range []unix.Signal{unix.SIGURG, unix.SIGWINCH, unix.SIGCHLD, unix.SIGCONT} {
				if plugin.Signal(s) == nil { // which it may not live to see
					sent++
				}
			}
		}
	}
	conf := n.conf("")
	for range 10 {
		out := n.must(attach("ADD", "c1", pod, conf))
		n.must(attach("CHECK", "c1", pod, n.previous(conf, out)))
		n.must(attach("GC", "c1", pod, n.with(conf, `{"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}]}`)))
		n.must(attach("DEL", "c1", pod, conf))
	}
	n.empty()
	t.Logf("%d signals", sent)
	if sent < 1000 {
		t.Errorf("only %d signals", sent)
	}
}

// TestRacingAddAndDel: a runtime must not do it, and gets no mess if it does.
func TestRacingAddAndDel(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	conf := n.conf("")
	for i := range 40 {
		id := fmt.Sprintf("c%d", i%3)
		var wg sync.WaitGroup
		for _, verb := range []string{"ADD", "DEL", "ADD"} {
			wg.Go(func() {
				if _, f := n.run(attach(verb, id, pod, conf)); f != nil && verb == "DEL" {
					t.Errorf("round %d: DEL: %v", i, f)
				}
			})
		}
		wg.Wait()
		n.must(attach("DEL", id, pod, conf))
		n.empty()
		if out := pod.Run(t, "ip", "-o", "link"); strings.Contains(out, "eth0") {
			t.Fatalf("round %d: the pod keeps %s", i, out)
		}
	}
}

// TestTwoAddsAtOnce: a runtime must not do that either. One wins, the other fails with the words of an interface that exists, and the
// pod of the one that won works.
func TestTwoAddsAtOnce(t *testing.T) {
	n := newNode(t)
	n.reference("host-local")
	hostLocal := fmt.Sprintf(`{"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.244.1.0/24"}],[{"subnet":"fd00:244:1::/64"}]]}}`, t.TempDir())
	for name, conf := range map[string]string{"headcni-ipam": n.conf(""), "host-local": n.conf(hostLocal)} {
		t.Run(name, func(t *testing.T) {
			pod := nstest.New(t)
			for i := range 40 {
				outs, faults := make([]string, 3), make([]*fault, 3)
				var wg sync.WaitGroup
				for j := range outs {
					wg.Go(func() { outs[j], faults[j] = n.run(attach("ADD", "c1", pod, conf)) })
				}
				wg.Wait()
				won := -1
				for j, f := range faults {
					switch {
					case f == nil && won >= 0:
						t.Errorf("round %d: two ADDs say success: %s, %s", i, outs[won], outs[j])
					case f == nil:
						won = j
					case f.Code != 104:
						t.Errorf("round %d: %v, want code 104", i, f)
					}
				}
				if won < 0 {
					t.Fatalf("round %d: none won: %v", i, faults)
				}
				ping(t, n.host, parse(t, outs[won]).addrs()...)
				n.must(attach("CHECK", "c1", pod, n.previous(conf, outs[won])))
				n.must(attach("DEL", "c1", pod, conf))
				n.empty()
			}
		})
	}
}

// TestManyAtOnce adds 300 pods at once on a node with thousands of other links, checks and deletes them.
func TestManyAtOnce(t *testing.T) {
	n := newNode(t)
	var batch strings.Builder
	const others = 1000 // pairs
	for i := range others {
		fmt.Fprintf(&batch, "link add x%d type veth peer name y%d\n", i, i)
	}
	cmd := n.host.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(batch.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	conf := n.conf(`{"ipam":` + n.pool("10.244.0.0/22", "fd00:244:1::/64") + `}`)
	const pods = 300
	paths, outs := make([]string, pods), make([]string, pods)
	for i := range paths {
		paths[i] = fmt.Sprintf("/run/netns/many%d", i)
		if err := nstest.Create(paths[i]); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = unix.Unmount(paths[i], unix.MNT_DETACH) // whatever happens, it ends with the test process
			_ = os.Remove(paths[i])
		})
	}
	all := func(verb string) {
		t.Helper()
		var wg sync.WaitGroup
		for i := range pods {
			wg.Go(func() {
				c := call{program: "headcni", verb: verb, id: fmt.Sprintf("c%d", i), ifName: "eth0", netns: paths[i], conf: conf}
				if outs[i] != "" {
					c.conf = n.previous(conf, outs[i])
				}
				out, f := n.run(c)
				if f != nil {
					t.Errorf("%s c%d: %v", verb, i, f)
				}
				if verb == "ADD" {
					outs[i] = out
				}
			})
		}
		wg.Wait()
	}
	all("ADD")
	given := map[netip.Addr]bool{}
	for _, out := range outs {
		for _, a := range parse(t, out).addrs() {
			given[a] = true
		}
	}
	if len(given) != 2*pods || len(n.leases()) != pods || len(n.links()) != pods {
		t.Errorf("%d addresses, %d leases, %d links", len(given), len(n.leases()), len(n.links()))
	}
	all("CHECK")
	n.must(attach("STATUS", "", nil, conf))
	all("DEL")
	n.empty()
	if got := strings.Count(n.host.Run(t, "ip", "-br", "link"), "x"); got < others {
		t.Errorf("%d of %d foreign links are left", got, others)
	}
}

// TestKilled ends each command at many moments. What comes next finds its way: the same again, CHECK, DEL, GC.
func TestKilled(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	conf := n.conf(`{"cni.dev/valid-attachments":[]}`)
	rounds, killed := 25, 0
	for _, verb := range []string{"CHECK", "GC", "STATUS"} { // ADD and DEL: cmd/headcni
		out := n.must(attach("ADD", "c1", pod, conf))
		span := n.timed(attach(verb, "c1", pod, n.previous(conf, out)))
		n.must(attach("DEL", "c1", pod, conf))
		for i := range rounds {
			out := n.must(attach("ADD", "c1", pod, conf))
			c := attach(verb, "c1", pod, n.previous(conf, out))
			ctx, cancel := context.WithTimeout(t.Context(), rand.N(span))
			if n.start(ctx, c).exit < 0 {
				killed++
			}
			cancel()
			if verb != "GC" {
				n.must(attach("CHECK", "c1", pod, c.conf))
			}
			if i%2 == 0 {
				n.must(attach("GC", "", nil, conf))
			}
			n.must(attach("DEL", "c1", pod, conf))
			n.empty()
		}
	}
	t.Logf("%d of %d killed", killed, 3*rounds)
	if killed < rounds {
		t.Errorf("only %d of %d were killed before they had ended", killed, 3*rounds)
	}
}

// TestSysctls: IPv6 that is switched off, in each way, and /proc/sys that cannot be written.
func TestSysctls(t *testing.T) {
	set := func(ns *nstest.NS, which string) {
		ns.Do(t, func() error {
			return os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("1"), 0o600)
		})
	}
	for name, tt := range map[string]struct {
		prepare func(n *node, pod *nstest.NS)
		dual    bool // does ADD with both families work?
	}{
		"pod all":      {func(_ *node, pod *nstest.NS) { set(pod, "all") }, true}, // undone for the pod's own interface
		"pod default":  {func(_ *node, pod *nstest.NS) { set(pod, "default") }, true},
		"host all":     {func(n *node, _ *nstest.NS) { set(n.host, "all") }, false},
		"host default": {func(n *node, _ *nstest.NS) { set(n.host, "default") }, true},
	} {
		t.Run("IPv6 off: "+name, func(t *testing.T) {
			n, pod := newNode(t), nstest.New(t)
			tt.prepare(n, pod)
			n.life(pod, n.conf(`{"ipam":`+n.pool("10.244.1.0/24")+`}`))
			if tt.dual {
				n.life(pod, n.conf(""))
				return
			}
			n.fails(attach("ADD", "c1", pod, n.conf("")), 105, "disable_ipv6", "on this node")
			n.empty()
		})
	}
	t.Run("read-only /proc/sys", func(t *testing.T) {
		n, pod := newNode(t), nstest.New(t)
		n.wrap = []string{"unshare", "--mount", "sh", "-c", `mount -o bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$0"`}
		n.fails(attach("ADD", "c1", pod, n.conf("")), 101, "forward", "read-only") // no daemon, and the node forwards nothing
		n.empty()
		n.host.Do(t, func() error {
			for _, key := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
				if err := os.WriteFile("/proc/sys/net/"+key, []byte("1"), 0o600); err != nil {
					return err
				}
			}
			return nil
		})
		out := n.life(pod, n.conf(""))
		if !strings.Contains(out, "router advertisements") {
			t.Errorf("not said that they stay on: %q", out)
		}
	})
}

// life is ADD, a packet, CHECK and DEL of c1. It returns what ADD writes to standard error.
func (n *node) life(pod *nstest.NS, conf string) string {
	n.t.Helper()
	c := n.start(n.t.Context(), attach("ADD", "c1", pod, conf))
	out, f := c.answer(n.t)
	if f != nil {
		n.t.Fatal(f)
	}
	ping(n.t, n.host, parse(n.t, out).addrs()...)
	n.must(attach("CHECK", "c1", pod, n.previous(conf, out)))
	n.must(attach("DEL", "c1", pod, conf))
	n.empty()
	return c.stderr
}

// TestCollisions: what has our link's name or a pod's address already stays. Another address is given, unless this one is asked
// for; then the error names it.
func TestCollisions(t *testing.T) {
	host := podlink.Name("c1", "eth0")
	for name, tt := range map[string]struct {
		taken, look string // with ip
		keys        string
		code        uint // 0: none
		words       []string
	}{
		"name":          {"link add " + host + " type bridge", "link show dev " + host, "", 101, []string{host, "another's", "bridge"}},
		"route":         {"route add 10.244.1.2 dev lo", "route show 10.244.1.2 dev lo", "", 0, nil},
		"host's own":    {"addr add 10.244.1.2/32 dev lo", "addr show dev lo to 10.244.1.2", "", 0, nil},
		"asked address": {"route add 10.244.1.2 dev lo", "route show 10.244.1.2 dev lo", `{"runtimeConfig":{"ips":["10.244.1.2"]}}`, 101, []string{"10.244.1.2", "ip route get"}},
	} {
		t.Run(name, func(t *testing.T) {
			n, pod := newNode(t), nstest.New(t)
			n.host.Run(t, "ip", strings.Fields(tt.taken)...)
			conf := n.with(n.conf(`{"ipam":`+n.pool("10.244.1.0/24")+`}`), tt.keys)
			if tt.code != 0 {
				n.fails(attach("ADD", "c1", pod, conf), tt.code, tt.words...)
				if l := n.leases(); len(l) > 0 {
					t.Errorf("ADD failed and keeps %v", l)
				}
			} else if out := n.must(attach("ADD", "c1", pod, conf)); parse(t, out).addrs()[0].String() != "10.244.1.3" {
				t.Errorf("got %s", out)
			}
			n.must(attach("DEL", "c1", pod, conf))
			if out := n.host.Run(t, "ip", strings.Fields(tt.look)...); strings.TrimSpace(out) == "" {
				t.Error("what was there has gone")
			}
			if l := n.leases(); len(l) > 0 {
				t.Errorf("leases left: %v", l)
			}
		})
	}
}

// TestBusyProgram: an IPAM plugin that is being replaced is tried again for a moment.
func TestBusyProgram(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	dir := t.TempDir()
	program, err := os.ReadFile(filepath.Join(n.path[0], "headcni-ipam"))
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "busy-ipam"), os.O_CREATE|os.O_WRONLY|unix.O_CLOEXEC, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(program); err != nil {
		t.Fatal(err)
	}
	closed := time.AfterFunc(50*time.Millisecond, func() { f.Close() })
	defer closed.Stop()
	n.path = append(n.path, dir)
	conf := n.conf(`{"ipam":` + strings.Replace(n.pool("10.244.1.0/24"), "headcni-ipam", "busy-ipam", 1) + `}`)
	n.must(attach("ADD", "c1", pod, conf))
	n.must(attach("DEL", "c1", pod, conf))
	n.empty()
}
