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

// TestKilled kills the program with SIGKILL in the middle of ADD, DEL or GC, while another ADD runs. Nothing is given twice,
// the runtime's DEL leaves nothing, and what lives is kept.
func TestKilled(t *testing.T) {
	folder, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	// Few addresses, so that what is free by mistake is given at once.
	cfg := conf("1.1.0", dir, `"ranges": [[{"subnet": "10.0.0.0/29"}], [{"subnet": "fd00::/125"}]], "strategy": "dense-pack"`,
		`, "cni.dev/valid-attachments": [{"containerID": "live", "ifname": "eth0"}]`)
	prepare := func(command, id string) (*exec.Cmd, *strings.Builder) {
		cmd, out := exec.Command(filepath.Join(folder, "headcni-ipam")), &strings.Builder{}
		cmd.Env = []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + id, "CNI_NETNS=/run/netns/x", "CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin"}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(cfg), out, out
		return cmd, out
	}
	must := func(command, id string) string {
		t.Helper()
		cmd, out := prepare(command, id)
		if err := cmd.Run(); err != nil {
			t.Fatalf("%s %s: %v: %s", command, id, err, out)
		}
		return out.String()
	}
	live := must("ADD", "live")
	began := time.Now()
	must("ADD", "victim")
	span := time.Since(began)
	pool, err := ipam.Open(ipam.Config{Network: "net", DataDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	rounds, killed, half := crashRounds(t), 0, 0
	for round := range rounds {
		command := []string{"ADD", "DEL", "GC"}[round%3]
		must("DEL", "victim")
		if command != "ADD" {
			must("ADD", "victim")
		}
		victim, _ := prepare(command, "victim")
		other, otherOut := prepare("ADD", "other")
		if err := errors.Join(victim.Start(), other.Start()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(rand.N(span))
		_ = victim.Process.Kill() // it may have ended
		_ = victim.Wait()
		if status, ok := victim.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signal() == syscall.SIGKILL {
			killed++
		}
		if err := other.Wait(); err != nil {
			t.Fatalf("round %d: %s was killed; ADD other: %v: %s", round, command, err, otherOut)
		}
		problems, err := pool.Check(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range problems {
			if half++; p.Kind != "leftover" {
				t.Errorf("round %d: %s was killed: %+v", round, command, p)
			}
		}
		seen := map[string]string{}
		leases, err := pool.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range leases {
			for _, a := range l.Addrs {
				if with := seen[a.Addr.String()]; with != "" {
					t.Errorf("%s belongs to %s and %s", a.Addr, with, l.ContainerID)
				}
				seen[a.Addr.String()] = l.ContainerID
				if l.ContainerID == "live" != strings.Contains(live, `"`+a.Addr.String()+`"`) {
					t.Errorf("round %d: live was given %s, and %s has %s", round, live, l.ContainerID, a.Addr)
				}
			}
		}
		must("DEL", "other")
		must("CHECK", "live")
		if t.Failed() {
			return
		}
	}
	must("DEL", "victim")
	must("DEL", "live")
	if problems, err := pool.Check(t.Context(), false); err != nil || len(problems) > 0 {
		t.Errorf("at the end: %+v, %v", problems, err)
	}
	if leases, err := pool.List(t.Context()); err != nil || len(leases) > 0 {
		t.Errorf("left: %+v, %v", leases, err)
	}
	t.Logf("%d of %d processes killed, %d leftovers seen", killed, rounds, half)
	if killed < rounds/4 {
		t.Error("the kills come too late")
	}
}
