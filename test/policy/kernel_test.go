package policy

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/enforce"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// world is a node with the local pods of policytest's clusters, and one namespace that plays everybody else.
type world struct {
	t      *testing.T
	node   *nstest.NS
	places []*nstest.NS // of the local pods, and of everybody else at the end
	at     map[netip.Addr]int
	table  *enforce.Table
	file   string

	mu    sync.Mutex
	heard map[uint16]bool
	next  uint16
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, node: nstest.New(t), at: map[netip.Addr]int{}, file: filepath.Join(t.TempDir(), "chains"), heard: map[uint16]bool{}, next: firstID}
	w.table = enforce.New(w.file)
	w.node.Run(t, "sh", "-ec", "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
	for i := range policytest.LocalPods {
		w.link(fmt.Sprint(names.PodLinkPrefix, i), policytest.Local(i))
	}
	var rest []netip.Addr
	for i := range policytest.RemotePods {
		rest = append(rest, policytest.Remote(i)...)
	}
	for i := range policytest.Outside {
		rest = append(rest, policytest.External(i)...)
	}
	for _, n := range policytest.Nodes()[1:] {
		rest = append(rest, n.Addrs...)
	}
	w.link("wan", rest)
	return w
}

// link makes a namespace with addresses behind a link of the node, and listens there. No neighbour is ever asked for.
func (w *world) link(name string, addrs []netip.Addr) {
	w.t.Helper()
	ns := nstest.New(w.t)
	w.node.Run(w.t, "sh", "-ec", fmt.Sprintf(`ip link add %[1]s address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02 netns /run/netns/%[2]s
		ip link set %[1]s group %[3]d up`, name, ns.Name, names.PolicyLinkGroup))
	ns.Run(w.t, "sh", "-ec", `ip link set eth0 up; for g in 169.254.1.1 fe80::1; do ip neigh add $g lladdr 02:00:00:00:00:01 nud permanent dev eth0; done
		ip route add 169.254.1.1 dev eth0; ip route add default via 169.254.1.1; ip route add default via fe80::1 dev eth0`)
	script := ""
	for _, a := range addrs {
		script += fmt.Sprintf("ip neigh add %[1]s lladdr 02:00:00:00:00:02 nud permanent dev %[2]s; ip route add %[1]s dev %[2]s\n", a, name)
		w.at[a] = len(w.places)
	}
	w.node.Run(w.t, "sh", "-ec", script)
	script = ""
	for _, a := range addrs {
		script += fmt.Sprintf("ip addr add %s/%d dev lo nodad\n", a, a.BitLen())
	}
	ns.Run(w.t, "sh", "-ec", script)
	w.places = append(w.places, ns)
	w.listen(ns)
}

// Probes have an identifier each, as source port or as that of an echo, so that no two are of one connection.
const firstID, lastID = 20000, 60000

// listen notes the identifiers of all probes that come in.
func (w *world) listen(ns *nstest.NS) {
	w.t.Helper()
	var fd int
	ns.Do(w.t, func() (err error) {
		all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(all)); err != nil {
			return err
		}
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})
	})
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 2048)
		for {
			select {
			case <-done:
				return
			default:
			}
			n, from, err := unix.Recvfrom(fd, b, 0)
			if ll, ok := from.(*unix.SockaddrLinklayer); err == nil && ok && ll.Pkttype != unix.PACKET_OUTGOING {
				w.note(b[:n])
			}
		}
	})
	w.t.Cleanup(func() { close(done); wg.Wait(); _ = unix.Close(fd) })
}

func (w *world) note(packet []byte) {
	protocol, payload := packet[9], 20
	if packet[0]>>4 == 6 {
		protocol, payload = packet[6], 40
	}
	at := payload
	switch protocol {
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		if packet[payload] != 8 && packet[payload] != 128 {
			return
		}
		at += 4
	}
	if id := binary.BigEndian.Uint16(packet[at:]); id >= firstID {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.heard[id] = true
	}
}

func (w *world) has(id uint16) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.heard[id]
}

// waitFor waits until a probe has come in: who listens may have to wait for a processor.
func (w *world) waitFor(id uint16, what string) {
	w.t.Helper()
	for until := time.Now().Add(patience); !w.has(id); time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			w.t.Fatalf("%s was dropped", what)
		}
	}
}

// send sends a flow's first packet and returns its identifier.
func (w *world) send(f policy.Flow) uint16 {
	w.t.Helper()
	if w.next++; w.next >= lastID {
		w.t.Fatal("no identifiers are left")
	}
	w.sendAs(w.next, f)
	return w.next
}

// sendAs sends a flow's packet again where its identifier was sent before.
func (w *world) sendAs(id uint16, f policy.Flow) {
	w.t.Helper()
	var payload []byte
	switch f.Protocol {
	case policy.TCP:
		payload = nstest.SYN(f.Src, f.Dst, id, f.Port)
	case policy.UDP:
		payload = nstest.UDP(f.Src, f.Dst, id, f.Port, "probe")
	case policy.SCTP:
		payload = nstest.SCTPInit(id, f.Port)
	default:
		payload = nstest.Echo(f.Src, f.Dst, id)
	}
	w.places[w.at[f.Src]].Do(w.t, func() error { return nstest.Send(nstest.Packet(f.Src, f.Dst, uint8(f.Protocol), payload)) })
}

// forget makes has say no until a probe comes in again.
func (w *world) forget(id uint16) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.heard, id)
}

func (w *world) apply(rules *policy.Ruleset) {
	w.t.Helper()
	opt := policy.Options{Strict: true}
	w.node.Do(w.t, func() error {
		if _, err := w.table.Apply(w.t.Context(), rules, opt); err != nil {
			return err
		}
		// Who looks at all that the kernel holds finds what was wanted.
		c, err := enforce.New(w.file).Apply(w.t.Context(), rules, opt)
		if err == nil && (len(c.Repaired) > 0 || c.Programs+c.Added+c.Removed+c.Deleted > 0) {
			err = fmt.Errorf("the kernel holds something else than was applied: %+v", c)
		}
		return err
	})
}

// probe sends flows, those that must not pass first, and holds what was heard against the API's words.
func (w *world) probe(s *policy.Snapshot, flows []policy.Flow) {
	w.t.Helper()
	sent := map[uint16]policy.Flow{}
	var pass, drop []uint16
	for _, f := range flows {
		if f.Src == f.Dst {
			continue // it never leaves its pod
		}
		id := w.send(f)
		sent[id] = f
		if policy.Evaluate(s, f).AllowedHere() {
			pass = append(pass, id)
		} else {
			drop = append(drop, id)
		}
	}
	for _, id := range pass {
		if !w.has(id) {
			w.waitFor(id, fmt.Sprintf("%+v, of which the API says %+v\n%s", sent[id], policy.Evaluate(s, sent[id]), describe(s)))
		}
	}
	for _, id := range drop {
		if w.has(id) {
			w.t.Fatalf("%+v passed: the API says %+v\n%s", sent[id], policy.Evaluate(s, sent[id]), describe(s))
		}
	}
}

func describe(s *policy.Snapshot) string {
	var b strings.Builder
	for _, p := range s.Pods {
		fmt.Fprintf(&b, "%+v\n", *p)
	}
	for _, p := range s.Policies {
		fmt.Fprintf(&b, "%s/%s %+v\n", p.Namespace, p.Name, p.Spec)
	}
	return b.String()
}

// TestKernelRandom: the kernel does to real packets of random clusters what the API says, most of them as changes of the one before.
func TestKernelRandom(t *testing.T) {
	w := newWorld(t)
	r := rand.New(rand.NewPCG(3, 15))
	compiler := policy.NewCompiler()
	var s *policy.Snapshot
	flows := 0
	rounds := 120
	if testing.Short() { // in a virtual machine without the processor's help, see test/kernel
		rounds = 12
	}
	for i := range rounds {
		if i%12 == 0 {
			s = policytest.Cluster(r)
		} else {
			s = policytest.Change(r, s)
		}
		w.apply(compiler.Compile(s))
		probes := policytest.Probes(r, s, 100)
		w.probe(s, probes)
		flows += len(probes)
	}
	t.Logf("%d flows", flows)
}
