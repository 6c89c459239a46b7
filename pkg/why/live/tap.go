package live

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// snapLen is as much of a packet as headers, and those that an ICMP error quotes, need.
const snapLen = 256

// Count is how often a packet passed a link.
type Count struct {
	Link string `json:"link"`
	// Out: it left the machine by the link, else it came in by it.
	Out  bool `json:"out"`
	Kind Kind `json:"kind"`
	N    int  `json:"n"`
}

// tap sees packets of a probe on all links of the machine. What comes in it sees before any rule, what goes out behind the last one.
type tap struct {
	file *os.File
	done chan struct{}

	mu   sync.Mutex
	seen map[passage]int
}

// passage is a packet that passes a link, by its index.
type passage struct {
	link int
	out  bool
	kind Kind
}

// open begins to look.
func open(p Probe) (*tap, error) {
	prog, err := filter(p.Dst)
	if err != nil {
		return nil, err
	}
	// With protocol 0 nothing comes before the filter is there.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open a socket that sees packets: %w; it needs root", err)
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]})
	if err = errors.Join(err, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all})); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("see packets: %w", err)
	}
	t := &tap{file: os.NewFile(uintptr(fd), "packets"), done: make(chan struct{}), seen: map[passage]int{}}
	go t.read(p)
	return t, nil
}

// filter lets in what is from or to an address, and ICMP, whose errors others send. All else the kernel does not even copy.
func filter(dst netip.Addr) ([]unix.SockFilter, error) {
	version, src, to, proto, icmp := uint32(0x40), uint32(12), uint32(16), uint32(9), uint32(unix.IPPROTO_ICMP)
	last := dst.AsSlice()
	if dst.Is6() {
		version, src, to, proto, icmp = 0x60, 20, 36, 6, unix.IPPROTO_ICMPV6
	}
	word := binary.BigEndian.Uint32(last[len(last)-4:])
	raw, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 0, Size: 1},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0xf0},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: version, SkipFalse: 6},
		bpf.LoadAbsolute{Off: to, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: word, SkipTrue: 5},
		bpf.LoadAbsolute{Off: src, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: word, SkipTrue: 3},
		bpf.LoadAbsolute{Off: proto, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: icmp, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
		bpf.RetConstant{Val: snapLen},
	})
	var out []unix.SockFilter
	for _, r := range raw {
		out = append(out, unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K})
	}
	return out, err
}

// read counts until the socket is closed.
func (t *tap) read(p Probe) {
	defer close(t.done)
	raw, err := t.file.SyscallConn()
	if err != nil {
		return // closed
	}
	buf := make([]byte, snapLen)
	for {
		var n int
		var from unix.Sockaddr
		var got error
		if err := raw.Read(func(fd uintptr) bool {
			n, from, got = unix.Recvfrom(int(fd), buf, 0)
			return !errors.Is(got, unix.EAGAIN)
		}); err != nil {
			return // closed
		}
		link, ok := from.(*unix.SockaddrLinklayer)
		if got != nil || !ok {
			continue // such as ENETDOWN of one link
		}
		if k := p.kind(buf[:n]); k != "" {
			t.mu.Lock()
			t.seen[passage{link.Ifindex, link.Pkttype == unix.PACKET_OUTGOING, k}]++
			t.mu.Unlock()
		}
	}
}

func linkName(index int) string {
	if l, err := net.InterfaceByIndex(index); err == nil {
		return l.Name
	}
	return fmt.Sprintf("link %d", index)
}

// answered tells whether an answer, or a refusal, came by.
func (t *tap) answered() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for p := range t.seen {
		if p.kind != Request {
			return true
		}
	}
	return false
}

// end stops looking. missed is how many packets could not be read in time.
func (t *tap) end() (seen []Count, missed uint32) {
	if raw, err := t.file.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			if s, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
				missed = s.Drops
			}
		})
	}
	_ = t.file.SetReadDeadline(time.Now()) // the read ends
	t.file.Close()
	<-t.done
	for p, n := range t.seen {
		seen = append(seen, Count{Link: linkName(p.link), Out: p.out, Kind: p.kind, N: n})
	}
	slices.SortFunc(seen, func(a, b Count) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
	return seen, missed
}
