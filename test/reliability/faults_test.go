package reliability

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/nstest"
)

func TestFaults(t *testing.T) {
	nstest.Require(t)
	if !*all {
		inWorld(t, kind{cache: true, relay: true}, testFew)
		return
	}
	var rows []row
	add := func(r ...row) { rows = append(rows, r...) }
	inWorld(t, kind{}, func(t *testing.T, w *world) {
		add(headscaleDead(t, w)...)
		for _, f := range slices.Concat(daemonFaults(), tailscaledFaults(""), underlayFaults()) {
			add(measure(t, w, f)...)
		}
		add(measure(t, w, cutOff("no cached maps"))...)
		for _, n := range w.Nodes {
			add(reboot(t, w, n, 10*time.Second))
		}
	})
	inWorld(t, kind{cache: true}, func(t *testing.T, w *world) {
		add(measure(t, w, cutOff("cached maps, relay dead too"))...)
	})
	inWorld(t, kind{cache: true, relay: true}, func(t *testing.T, w *world) {
		for _, f := range tailscaledFaults(", cached maps") {
			add(measure(t, w, f)...)
		}
		for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
			add(measure(t, w, alone(sig))...)
		}
		add(leak(t, w))
	})
	printTable(rows)
}

// testFew are the faults for which no other test is there, without a wait for Headscale's return.
func testFew(t *testing.T, w *world) {
	w.strike(t, []row{{name: "UDP blocked"}}, fault{strike: blockUDP}, 0, both)
	n := w.Nodes[1]
	reboot(t, w, n, time.Second)
	inClear := w.capture(t)
	m := w.watch(t, 1, both)
	must(t, w.Control.Headscale.Kill())
	must(t, n.Tailscaled.Kill())
	must(t, n.StartTailscaled())
	m.end(t, &row{name: "tailscaled restarted without Headscale"}, false)
	inClear()
	leak(t, w)
}

// headscaleDead kills Headscale, its relay with it, for a long time and twice for a short one.
func headscaleDead(t *testing.T, w *world) []row {
	f := fault{
		name: fmt.Sprintf("Headscale and its relay: kill -9, dead for %v and twice for %v", *outage, *cutFor), harmless: true,
		after: headscaleBack, afterName: "Headscale and its relay return from that",
	}
	rows := f.rows("")
	t.Run("Headscale", func(t *testing.T) {
		for _, dead := range []time.Duration{*outage, *cutFor, *cutFor} {
			f.strike = func(t *testing.T, w *world, _ *lab.Node, _ labtest.Flows) {
				must(t, w.Control.Headscale.Kill())
				time.Sleep(dead)
			}
			w.strike(t, rows, f, 0, both)
		}
	})
	return rows
}

func daemonFaults() []fault {
	end := func(sig syscall.Signal) func(*testing.T, *world, *lab.Node, labtest.Flows) {
		return func(t *testing.T, _ *world, n *lab.Node, _ labtest.Flows) {
			must(t, n.Daemon.Signal(sig))
			time.Sleep(settled)
			must(t, n.StartDaemon())
			must(t, n.WaitReady(labtest.Within(t)))
		}
	}
	return []fault{
		{name: "daemon: kill -9", harmless: true, strike: end(syscall.SIGKILL)},
		{name: "daemon: SIGTERM", harmless: true, strike: end(syscall.SIGTERM)},
		{name: "daemon: upgrade", harmless: true, strike: upgrade},
	}
}

// upgrade puts another version in the daemon's place under the living one, as a package manager does, and restarts it.
func upgrade(t *testing.T, w *world, n *lab.Node, _ labtest.Flows) {
	program := filepath.Join(w.bin, "headcni-daemon")
	const version = "v9.9.9-upgraded"
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program+".new",
		"-ldflags", "-X github.com/headcni/headcni/internal/version.Version="+version, "../../cmd/headcni-daemon")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build headcni-daemon: %v\n%s", err, out)
	}
	_, err := n.Run(labtest.Within(t), "mv", program+".new", program)
	must(t, err)
	must(t, n.Daemon.Signal(syscall.SIGTERM))
	must(t, n.StartDaemon())
	must(t, n.WaitReady(labtest.Within(t)))
	if got, err := n.Run(labtest.Within(t), program, "version"); err != nil || strings.TrimSpace(got) != version {
		t.Errorf("after the upgrade: version %q, %v", got, err)
	}
}

func tailscaledFaults(also string) []fault {
	var faults []fault
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		faults = append(faults, fault{
			name: "tailscaled: " + name(sig) + also, oneWay: true, repeats: *repeats,
			strike: func(t *testing.T, _ *world, n *lab.Node, _ labtest.Flows) {
				must(t, n.Tailscaled.Signal(sig))
				must(t, n.StartTailscaled())
			},
		})
	}
	return faults
}

// alone is a tailscaled that restarts while Headscale is dead, and talks all the same.
func alone(sig syscall.Signal) fault {
	return fault{
		name: "tailscaled: " + name(sig) + " while Headscale is dead, cached maps, relay apart", oneWay: true, repeats: *repeats,
		strike: func(t *testing.T, w *world, n *lab.Node, _ labtest.Flows) {
			must(t, w.Control.Headscale.Kill())
			must(t, n.Tailscaled.Signal(sig))
			must(t, n.StartTailscaled())
		},
		after: headscaleBack, afterName: "Headscale returns after that",
	}
}

// cutOff is a tailscaled that restarts while Headscale is dead and has no cached maps, or no relay. It may have to wait
// for Headscale, which returns after a while.
func cutOff(also string) fault {
	const wait = 15 * time.Second
	return fault{
		name: fmt.Sprintf("tailscaled: kill -9 while Headscale is dead for %v more, %s", wait, also),
		strike: func(t *testing.T, w *world, n *lab.Node, streams labtest.Flows) {
			must(t, w.Control.Headscale.Kill())
			must(t, n.Tailscaled.Kill())
			must(t, n.StartTailscaled())
			began := time.Now()
			time.Sleep(wait)
			for _, s := range streams {
				back, ok := s.Back(began)
				t.Logf("%s was back without Headscale: %v, after %v", s.Name, ok, back.Round(time.Millisecond))
			}
			headscaleBack(t, w)
		},
	}
}

// headscaleBack starts Headscale and waits until the nodes are connected again: what they hear then can break things too.
func headscaleBack(t *testing.T, w *world) {
	t.Helper()
	must(t, w.Control.StartHeadscale(labtest.Within(t)))
	must(t, w.Control.WaitConnected(labtest.Within(t), len(w.Nodes)))
}

func name(sig syscall.Signal) string {
	if sig == syscall.SIGKILL {
		return "kill -9"
	}
	return "SIGTERM"
}

func underlayFaults() []fault {
	return []fault{
		{name: fmt.Sprintf("cable pulled for %v", *cutFor), oneWay: true, strike: func(t *testing.T, w *world, n *lab.Node, _ labtest.Flows) {
			port(t, w, n, "down")
			time.Sleep(*cutFor)
			port(t, w, n, "up")
		}},
		{name: fmt.Sprintf("underlay silent for %v", *cutFor), oneWay: true, strike: func(t *testing.T, w *world, n *lab.Node, _ labtest.Flows) {
			port(t, w, n, "nomaster")
			time.Sleep(*cutFor)
			port(t, w, n, "master", "underlay")
		}},
		{name: "UDP between the nodes blocked", oneWay: true, strike: blockUDP},
	}
}

// port changes the node's port of the underlay's switch.
func port(t *testing.T, w *world, n *lab.Node, how ...string) {
	t.Helper()
	_, err := w.Control.Run(labtest.Within(t), "ip", append([]string{"link", "set", n.Port}, how...)...)
	must(t, err)
}

// blockUDP lets no UDP pass between the nodes until their pods talk through the relay, and then waits until they are
// back to a direct path. The drop is where packets arrive: the sender is not told, as with a firewall on the way.
func blockUDP(t *testing.T, w *world, _ *lab.Node, streams labtest.Flows) {
	for i, at := range w.Nodes {
		other := w.Nodes[1-i].Underlay
		_, err := at.Run(labtest.Within(t), "nft", fmt.Sprintf(`table inet firewall {
	chain in {
		type filter hook input priority -300;
		ip saddr %s meta l4proto udp drop
		ip6 saddr %s meta l4proto udp drop
	}
}`, other[0], other[1]))
		must(t, err)
	}
	w.waitPath(t, false)
	streams.WaitBack(t, time.Now())
	time.Sleep(settled)
	for _, at := range w.Nodes {
		_, err := at.Run(labtest.Within(t), "nft", "delete", "table", "inet", "firewall")
		must(t, err)
	}
	w.waitPath(t, true)
}

// reboot cuts a node's power, waits, and lets it return: with another boot ID, an empty /run and a bare kernel, but with
// a conflist that is still on the disk. No pod may start before the node is safe. Gaps are from the return of power to
// the first datagram of a new pod, which a runtime tries to start all the time.
func reboot(t *testing.T, w *world, n *lab.Node, off time.Duration) row {
	t.Helper()
	i := slices.Index(w.Nodes, n)
	r := row{name: fmt.Sprintf("power cut for %v, from its return, %s mode", off, n.Mode)}
	w.calm(t)
	before := w.state(t)
	inClear := w.capture(t)
	old := w.flows(t, i, both) // they go on: to a node that is dead, then to one that has no rules
	boot := bootID(t, n)
	must(t, n.Crash())
	time.Sleep(off)
	must(t, n.Boot(labtest.Within(t)))
	began := time.Now()
	if again := bootID(t, n); again == boot {
		t.Errorf("the boot ID %s is that of the boot before", again)
	}
	refused(t, n)
	must(t, n.StartTailscaled())
	must(t, n.WaitSocket(labtest.Within(t)))
	refused(t, n)
	must(t, n.StartDaemon())
	w.pods[i] = firstPod(t, n)
	t.Logf("%s: the first pod has started %v after the return of power", r.name, time.Since(began).Round(time.Millisecond))
	flows := w.flows(t, i, both)
	for d := range flows {
		var worst time.Duration
		for _, s := range flows[d] {
			back, err := s.WaitBack(labtest.Within(t), began)
			must(t, err)
			worst = max(worst, back)
		}
		r.gaps[d] = append(r.gaps[d], worst)
	}
	slices.Concat(flows[from], flows[to], old[from], old[to]).Stop()
	r.clear = inClear()
	w.calm(t)
	w.unchanged(t, r.name, before)
	return r
}

func bootID(t *testing.T, n *lab.Node) string {
	t.Helper()
	id, err := n.Run(labtest.Within(t), "cat", "/proc/sys/kernel/random/boot_id")
	must(t, err)
	return id
}

// refused holds that no pod starts on a node that is not programmed: "try again later", CNI specification 1.1.0,
// section 5.
func refused(t *testing.T, n *lab.Node) {
	t.Helper()
	_, err := n.AddPod(labtest.Within(t), "early", lab.PodOptions{Idle: true})
	if !tryAgainLater(err) {
		t.Errorf("ADD before the node is safe: %v, want code %d", err, types.ErrTryAgainLater)
	}
}

func tryAgainLater(err error) bool {
	var e *types.Error
	return errors.As(err, &e) && e.Code == types.ErrTryAgainLater
}

// firstPod tries to start a pod until it succeeds. Until then there is one answer only.
func firstPod(t *testing.T, n *lab.Node) (p *lab.Pod) {
	t.Helper()
	labtest.Eventually(t, "the first pod after a reboot", func() (err error) {
		p, err = n.AddPod(labtest.Within(t), "probe", lab.PodOptions{Idle: true})
		if err != nil && !tryAgainLater(err) {
			t.Fatalf("ADD on a node that has returned: %v", err)
		}
		return err
	})
	return p
}

// leak is the negative control: with the daemon and tailscaled dead and all that we put in the kernel taken away,
// packets do leave in clear, and the capture sees them.
func leak(t *testing.T, w *world) row {
	t.Helper()
	r := row{name: "negative control: daemon and tailscaled dead, our rules and tables removed"}
	n := w.Nodes[0]
	flows := w.flows(t, 0, from)
	must(t, n.Daemon.Kill())
	must(t, n.Tailscaled.Kill())
	stop := labtest.Capture(t, w.Lab)
	labtest.Flush(t, n)
	time.Sleep(settled / 2)
	got := stop()
	if r.clear = got.Clear; r.clear == 0 {
		t.Errorf("none of %d packets is in clear", got.Total)
	}
	flows[from].Stop()
	return r
}
