package hosts

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/nstest"
)

var hostile = flag.Duration("hostile", 3*time.Second, "how long the hostile pod of TestHostilePodsVolume sends, on each node")

// What one pod sends, as much as it can, of every shape and to everybody, fills neither the spool of records nor the leases nor the daemon's
// log, and other pods go on being added and deleted. How much tailscaled logs is said: `go test -v -run TestHostilePodsVolume ./test/hosts
// -args -hostile 60s` prints the figures of docs/security.md.
func TestHostilePodsVolume(t *testing.T) {
	w := surroundings.Enter(t)
	for _, p := range []*lab.Pod{w.a1, w.b1} {
		t.Run(p.Node.Mode, func(t *testing.T) { hostilePodsVolume(t, p) })
	}
}

func hostilePodsVolume(t *testing.T, p *lab.Pod) {
	n := p.Node
	labtest.Ready(t, n)
	leases := func() string { return labtest.Sh(t, n.Machine, "headcnictl ipam list --local -o json") }
	spool := func() string { return labtest.Sh(t, n.Machine, "ls /run/headcni/hints") }
	labtest.Eventually(t, "the records of this node's pods are counted", func() error {
		if left := spool(); left != "" {
			return fmt.Errorf("left: %s", left)
		}
		return nil
	})
	quiet := logged(t, n, *hostile, func() {})
	before, began := leases(), time.Now()
	var sent uint64
	var pods, most int
	loud := logged(t, n, *hostile, func() {
		stop := beHostile(p)
		defer func() { sent = stop() }()
		for time.Since(began) < *hostile {
			other, err := n.AddPod(labtest.Within(t), fmt.Sprintf("beside-%d", pods), lab.PodOptions{Idle: true})
			if err != nil {
				t.Fatalf("no other pod starts: %v", err)
			}
			most = max(most, len(strings.Fields(spool())))
			if err := other.Remove(labtest.Within(t)); err != nil {
				t.Fatalf("no other pod ends: %v", err)
			}
			pods++
			time.Sleep(200 * time.Millisecond)
		}
	})
	labtest.Eventually(t, "the records of the pods that came and went are counted", func() error {
		if left := spool(); left != "" {
			return fmt.Errorf("left: %s", left)
		}
		return nil
	})
	t.Logf("%d packets in %v; %d pods started and ended beside it; at most %d records in the spool; daemon's log %d lines, without it %d; "+
		"tailscaled's %d lines of %d bytes, without it %d of %d", sent, *hostile, pods, most, loud.daemon.lines, quiet.daemon.lines,
		loud.tailscaled.lines, loud.tailscaled.bytes, quiet.tailscaled.lines, quiet.tailscaled.bytes)
	if now := leases(); now != before {
		t.Errorf("the leases were\n%s\nand are\n%s", before, now)
	}
	if most > 2*pods { // a record for each ADD and each DEL
		t.Errorf("%d records in the spool of %d pods", most, pods)
	}
	if loud.daemon.lines > quiet.daemon.lines+20 {
		t.Errorf("the pod makes the daemon log:\n%s", loud.daemon.text)
	}
	if sent < 1000 {
		t.Errorf("only %d packets were sent: this test cannot fail", sent)
	}
}

// beHostile sends everything to everybody, until it is stopped. It tells how much it was.
func beHostile(p *lab.Pod) (stop func() uint64) {
	var sent atomic.Uint64
	var over atomic.Bool
	ended := make(chan error)
	for _, v6 := range []bool{false, true} {
		to := slices.Concat(labtest.OfNobody(v6), labtest.OfTailnet(v6), []netip.Addr{p.Node.Underlay[labtest.Index(v6)]})
		go func() {
			ended <- p.Do(func() error {
				for !over.Load() {
					for _, packet := range nstest.Shapes(p.Addr(v6), to[rand.N(len(to))], uint16(1024+rand.N(60000))) {
						if nstest.Send(packet) == nil { // what is refused is of no interest
							sent.Add(1)
						}
					}
				}
				return nil
			})
		}()
	}
	return func() uint64 {
		over.Store(true)
		<-ended
		<-ended
		return sent.Load()
	}
}

// logs are what a node's programs wrote.
type logs struct{ daemon, tailscaled volume }

type volume struct {
	lines, bytes int
	text         string
}

func (v *volume) add(line string) {
	v.lines++
	v.bytes += len(line)
	v.text += line
}

// logged is what was logged while do was at work, for at least a while.
func logged(t *testing.T, n *lab.Node, atLeast time.Duration, do func()) (l logs) {
	t.Helper()
	files := []string{n.Daemon.Log}
	if n.Tailscaled.Log != n.Daemon.Log {
		files = append(files, n.Tailscaled.Log)
	}
	read := func() (all []string) {
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, string(b))
		}
		return all
	}
	before, began := read(), time.Now()
	do()
	time.Sleep(time.Until(began.Add(atLeast)))
	for i, now := range read() {
		for line := range strings.Lines(now[len(before[i]):]) {
			if strings.Contains(line, " level=") {
				l.daemon.add(line)
			} else {
				l.tailscaled.add(line)
			}
		}
	}
	return l
}
