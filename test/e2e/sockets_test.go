package e2e

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/headcni/headcni/internal/cluster"
	"github.com/headcni/headcni/internal/nstest"
)

// talkPort is where pods are talked to.
const talkPort = 7777

// sandbox is containerd's ID of what a pod's containers share, and its network namespace.
func (w *world) sandbox(t *testing.T, p *corev1.Pod) (id string, ns *nstest.NS) {
	t.Helper()
	n, err := w.Node(p.Spec.NodeName)
	if err != nil {
		t.Fatal(err)
	}
	ctr := func(args ...string) string {
		out, err := n.Run(within(t, time.Minute), "ctr", append([]string{"--namespace=k8s.io"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	ids := strings.Fields(ctr("containers", "ls", "-q", fmt.Sprintf(`labels."io.kubernetes.pod.uid"==%s,labels."io.cri-containerd.kind"==sandbox`, p.UID)))
	if len(ids) != 1 {
		t.Fatalf("%s has sandboxes %v, want one", p.Name, ids)
	}
	var info struct {
		Spec struct {
			Linux struct{ Namespaces []struct{ Type, Path string } }
		}
	}
	if err := json.Unmarshal([]byte(ctr("containers", "info", ids[0])), &info); err != nil {
		t.Fatal(err)
	}
	for _, has := range info.Spec.Linux.Namespaces {
		if has.Type == "network" {
			// /var/run is a link to the caller's /run, seen from here.
			return ids[0], &nstest.NS{Name: p.Name, Path: n.Path(strings.Replace(has.Path, "/var/run/", "/run/", 1))}
		}
	}
	t.Fatalf("%s has no network namespace", p.Name)
	return "", nil
}

// packet is one that arrived at talkPort.
type packet struct {
	at   time.Time
	from netip.Addr
	to   netip.Addr
	text string // "SYN" and the like of TCP have none
}

// ear hears what arrives in a pod for talkPort: every packet as it comes, of which one may hold several datagrams that the kernel
// has put together (GRO), and every datagram.
type ear struct {
	mu     sync.Mutex
	heard  []packet
	texts  map[string]bool
	voices map[string]voice
}

// voice is what was heard of a talker: the least number, how many packets, and when the talker began, as it says itself.
type voice struct {
	first, packets int
	began          time.Time
}

// listen begins to hear, until the test ends.
func listen(t *testing.T, in *nstest.NS) *ear {
	t.Helper()
	e := &ear{texts: map[string]bool{}, voices: map[string]voice{}}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait) // behind what ends them
	for _, protocol := range []uint16{unix.ETH_P_IP, unix.ETH_P_IPV6} {
		var file *os.File
		in.Do(t, func() error {
			// SOCK_DGRAM: without the frame's header. A socket of one protocol sees nothing that leaves.
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				return err
			}
			file = os.NewFile(uintptr(fd), "ear")
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20) // the usual size does as well on a quiet machine
			return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol<<8 | protocol>>8})
		})
		wg.Go(func() { e.read(file) })
		t.Cleanup(func() { file.Close() })
	}
	var open net.PacketConn
	in.Do(t, func() (err error) {
		open, err = net.ListenPacket("udp", ":"+strconv.Itoa(talkPort))
		return err
	})
	t.Cleanup(func() { open.Close() })
	if err := open.(*net.UDPConn).SetReadBuffer(4 << 20); err != nil {
		t.Fatal(err)
	}
	wg.Go(func() {
		buf := make([]byte, 2048)
		for {
			n, _, err := open.ReadFrom(buf)
			if err != nil {
				return // closed
			}
			e.note(string(buf[:n]))
		}
	})
	return e
}

// read ends when the file is closed.
func (e *ear) read(file *os.File) {
	buf := make([]byte, 2048)
	for {
		n, err := file.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if p, ok := parse(buf[:max(n, 0)]); err == nil && ok {
			p.at = time.Now()
			e.mu.Lock()
			e.heard = append(e.heard, p)
			e.mu.Unlock()
		}
	}
}

// note takes a datagram in: those of talkers are "NAME NUMBER SECONDS.MICROSECONDS".
func (e *ear) note(text string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.texts[text] = true
	f := strings.Fields(text)
	if len(f) != 3 {
		return
	}
	v, known := e.voices[f[0]]
	v.packets++
	if n, err := strconv.Atoi(f[1]); err == nil && (!known || n < v.first) {
		v.first = n
	}
	if began, err := strconv.ParseInt(strings.Replace(f[2], ".", "", 1), 10, 64); err == nil {
		v.began = time.UnixMicro(began)
	}
	e.voices[f[0]] = v
}

// of is what was heard of a talker.
func (e *ear) of(name string) voice {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.voices[name]
}

// parse reads an IP packet for talkPort.
func parse(b []byte) (p packet, ok bool) {
	var protocol byte
	var rest []byte
	switch {
	case len(b) >= 20 && b[0]>>4 == 4 && len(b) > int(b[0]&15)*4:
		protocol, rest = b[9], b[int(b[0]&15)*4:]
		p.from, _ = netip.AddrFromSlice(b[12:16])
		p.to, _ = netip.AddrFromSlice(b[16:20])
	case len(b) >= 40 && b[0]>>4 == 6:
		protocol, rest = b[6], b[40:]
		p.from, _ = netip.AddrFromSlice(b[8:24])
		p.to, _ = netip.AddrFromSlice(b[24:40])
	}
	if len(rest) < 8 || binary.BigEndian.Uint16(rest[2:]) != talkPort {
		return p, false
	}
	if protocol == unix.IPPROTO_UDP {
		p.text = string(rest[8:])
	}
	return p, protocol == unix.IPPROTO_UDP || protocol == unix.IPPROTO_TCP
}

// since returns what was heard after the first n packets.
func (e *ear) since(n int) []packet {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.heard[n:])
}

func (e *ear) count() int { return len(e.since(0)) }

// wantSilence fails the test if anything was heard after the first n packets.
func (e *ear) wantSilence(t *testing.T, what string, n int) {
	t.Helper()
	heard := e.since(n)
	for _, p := range heard[:min(3, len(heard))] {
		t.Errorf("%s: forbidden packet from %v to %v at %s: %q", what, p.from, p.to, p.at.Format("15:04:05.000"), p.text)
	}
	if len(heard) > 3 {
		t.Errorf("%s: %d forbidden packets", what, len(heard))
	}
}

// speech is a flow of numbered datagrams.
type speech struct {
	name string
	sent int
	stop chan struct{}
	done chan struct{}
}

// speak sends datagrams from a pod to talkPort of addr, one every 20 ms, until end is called.
func speak(t *testing.T, from *nstest.NS, name string, addr netip.Addr) *speech {
	t.Helper()
	var c net.Conn
	from.Do(t, func() (err error) {
		d := net.Dialer{FallbackDelay: -1}
		c, err = d.DialContext(t.Context(), "udp", netip.AddrPortFrom(addr, talkPort).String())
		return err
	})
	s := &speech{name: name, stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		defer c.Close()
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-s.stop:
				return
			case <-tick.C:
				// What fails is lost: the receiver will not have heard it.
				_, _ = fmt.Fprintf(c, "%s %d", name, s.sent)
				s.sent++
			}
		}
	}()
	t.Cleanup(s.end)
	return s
}

// end may be called again.
func (s *speech) end() {
	select {
	case <-s.stop:
	default:
		close(s.stop)
	}
	<-s.done
}

// lost ends a speech and returns how many of its datagrams an ear has not heard, and the first of them.
func (s *speech) lost(e *ear) (lost []int) {
	s.end()
	time.Sleep(300 * time.Millisecond) // what is on its way
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range s.sent {
		if !e.texts[fmt.Sprintf("%s %d", s.name, i)] {
			lost = append(lost, i)
		}
	}
	return lost
}

// wantWhole ends speeches, of which an ear must have heard every word.
func (s *speech) wantWhole(t *testing.T, e *ear) {
	t.Helper()
	switch lost := s.lost(e); {
	case s.sent == 0:
		t.Errorf("%s: nothing was sent", s.name)
	case len(lost) > 0:
		t.Errorf("%s: %d of %d allowed packets were lost: %s", s.name, len(lost), s.sent, ranges(lost))
	}
}

// ranges writes numbers in order, such as 1-3, 7-7.
func ranges(numbers []int) string {
	var out []string
	for i := 0; i < len(numbers); {
		first := i
		for i++; i < len(numbers) && numbers[i] == numbers[i-1]+1; i++ {
		}
		out = append(out, fmt.Sprintf("%d-%d", numbers[first], numbers[i-1]))
	}
	return strings.Join(out, ", ")
}

// daemonPID finds the daemon on a node, by its number there.
func daemonPID(n *cluster.Node) (string, error) {
	entries, err := os.ReadDir(n.Path("/proc"))
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		// A process may be gone by now.
		if b, err := os.ReadFile(n.Path("/proc/" + e.Name() + "/cmdline")); err == nil && string(b) == "/usr/local/bin/headcni-daemon\x00run\x00" {
			return e.Name(), nil
		}
	}
	return "", fmt.Errorf("no daemon runs on %s", n.Name)
}

// writeJSON writes a file that kubelet reads.
func writeJSON(file string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	// In one step: kubelet looks whenever something in the folder changes, but not at hidden files.
	hidden := filepath.Join(filepath.Dir(file), "."+filepath.Base(file))
	if err := os.WriteFile(hidden, b, 0o600); err != nil {
		return err
	}
	return os.Rename(hidden, file)
}
