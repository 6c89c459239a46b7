package main

import (
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/ipam"
)

// crashRounds is how often a process is killed; HEADCNI_CRASH_ROUNDS=1000 asks for more.
func crashRounds(t *testing.T) int {
	text := os.Getenv("HEADCNI_CRASH_ROUNDS")
	if text == "" {
		if testing.Short() {
			return 30
		}
		return 150
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("HEADCNI_CRASH_ROUNDS: %v", err)
	}
	return n
}

// killer runs the program as it ships, beside a container called live that keeps its lease throughout.
type killer struct {
	program, conf string
	pool          *ipam.Pool
	live          string // its result
}

func newKiller(t *testing.T) *killer {
	t.Helper()
	nstest.Require(t)
	folder, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	// Few addresses, so that what is free by mistake is given at once.
	k := &killer{program: filepath.Join(folder, "headcni-ipam"), conf: conf("1.1.0", dir,
		`"ranges": [[{"subnet": "10.0.0.0/29"}], [{"subnet": "fd00::/125"}]], "strategy": "dense-pack"`,
		`, "cni.dev/valid-attachments": [{"containerID": "live", "ifname": "eth0"}]`)}
	if k.pool, err = ipam.Open(ipam.Config{Network: "net", DataDir: dir}); err != nil {
		t.Fatal(err)
	}
	k.live = k.must(t, "ADD", "live")
	return k
}

func (k *killer) prepare(command, id string) (*exec.Cmd, *strings.Builder) {
	cmd, out := exec.Command(k.program), &strings.Builder{}
	cmd.Env = []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + id, "CNI_NETNS=/run/netns/x", "CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin"}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(k.conf), out, out
	return cmd, out
}

func (k *killer) must(t *testing.T, command, id string) string {
	t.Helper()
	cmd, out := k.prepare(command, id)
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v: %s", command, id, err, out)
	}
	return out.String()
}

// kill kills a command after d, while an ADD runs, and reports whether it had not ended.
func (k *killer) kill(t *testing.T, command string, d time.Duration) bool {
	t.Helper()
	victim, _ := k.prepare(command, "victim")
	other, out := k.prepare("ADD", "other")
	if err := errors.Join(victim.Start(), other.Start()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(d)
	_ = victim.Process.Kill() // it may have ended
	_ = victim.Wait()
	if err := other.Wait(); err != nil {
		t.Fatalf("%s was killed; ADD other: %v: %s", command, err, out)
	}
	status, ok := victim.ProcessState.Sys().(syscall.WaitStatus)
	return ok && status.Signal() == syscall.SIGKILL
}

// inspect wants each address to have one owner, live to have its own, and nothing on disk but leftovers, which it counts.
func (k *killer) inspect(t *testing.T) (leftovers int) {
	t.Helper()
	problems, err1 := k.pool.Check(t.Context(), false)
	leases, err2 := k.pool.List(t.Context())
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if p.Kind != "leftover" {
			t.Errorf("%+v", p)
		}
	}
	owner := map[string]string{}
	for _, l := range leases {
		for _, a := range l.Addrs {
			if with := owner[a.Addr.String()]; with != "" {
				t.Errorf("%s belongs to %s and %s", a.Addr, with, l.ContainerID)
			}
			owner[a.Addr.String()] = l.ContainerID
			if (l.ContainerID == "live") != strings.Contains(k.live, `"`+a.Addr.String()+`"`) {
				t.Errorf("live was given %s, and %s has %s", k.live, l.ContainerID, a.Addr)
			}
		}
	}
	return len(problems)
}

// TestKilled kills the program with SIGKILL in the middle of ADD, DEL or GC, while another ADD runs. Nothing is given twice,
// the runtime's DEL leaves nothing, and what lives is kept.
func TestKilled(t *testing.T) {
	k := newKiller(t)
	began := time.Now()
	k.must(t, "ADD", "victim")
	span := time.Since(began)
	rounds, killed, leftovers := crashRounds(t), 0, 0
	for round := range rounds {
		command := []string{"ADD", "DEL", "GC"}[round%3]
		k.must(t, "DEL", "victim")
		if command != "ADD" {
			k.must(t, "ADD", "victim")
		}
		if k.kill(t, command, rand.N(span)) {
			killed++
			span += span / 8
		} else {
			span -= span / 8 // how long a command takes is up to what else the machine does
		}
		leftovers += k.inspect(t)
		k.must(t, "DEL", "other")
		k.must(t, "CHECK", "live")
		if t.Failed() {
			t.Fatalf("round %d: %s was killed", round, command)
		}
	}
	k.must(t, "DEL", "victim")
	if leftovers := k.inspect(t); leftovers > 0 {
		t.Errorf("%d leftovers at the end", leftovers)
	}
	if leases, err := k.pool.List(t.Context()); err != nil || len(leases) != 1 {
		t.Errorf("left: %+v, %v", leases, err)
	}
	t.Logf("%d of %d processes killed, %d leftovers seen", killed, rounds, leftovers)
	if killed < rounds/10 {
		t.Error("the kills come too late")
	}
}
