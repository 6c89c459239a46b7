package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/netset"
)

const (
	snapLength  = 128 // headers are enough
	maxExamples = 5
	// captureBuffer in bytes has room for some ten thousand packets.
	captureBuffer = 16 << 20
)

// Capture counts packets in clear: those on the underlay whose outermost IP header has a pod's, a service's or a tailnet address in it.
type Capture struct {
	lab    *Lab
	ranges []netip.Prefix // whose packets are nowhere but in the tunnel and on their node
	before uint64         // frames on the underlay
	file   *os.File
	wg     sync.WaitGroup

	mu       sync.Mutex
	clear    int
	asked    int
	between  map[[2]netip.Addr]int
	examples []string
	err      error
}

// CaptureUnderlay begins to look at all frames, in and out, on the bridge and its ports. What a node sends is seen there
// before anybody else can drop it; what crosses the bridge is seen more than once. More are ranges of pods and services beside the lab's.
func (l *Lab) CaptureUnderlay(more ...netip.Prefix) (*Capture, error) {
	c := &Capture{lab: l, between: map[[2]netip.Addr]int{}}
	c.ranges = slices.Concat(ClusterCIDRs, ServiceCIDRs, []netip.Prefix{netset.TailnetIPv4, netset.TailnetIPv6}, more)
	err := l.Control.Do(func() error {
		// Protocol 0: nothing arrives before bind, and by then there is a filter (packet(7)).
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		c.file = os.NewFile(uintptr(fd), "capture on the underlay")
		// A burst in clear is to be counted whole. Who may not have a larger buffer goes on with the usual one.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer)
		// Without it, a fast transfer inside the tunnel would fill the buffer.
		filter := clearFilter(c.ranges)
		prog := &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, prog); err != nil {
			return fmt.Errorf("attach the filter: %w", err)
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL)})
	})
	if err == nil {
		c.before, err = l.Frames()
	}
	if err != nil {
		if c.file != nil {
			c.file.Close()
		}
		return nil, fmt.Errorf("capture on the underlay: %w", err)
	}
	c.wg.Go(c.read)
	return c, nil
}

// Frames is how many have been on the nodes' wires so far.
func (l *Lab) Frames() (uint64, error) {
	n := l.gone.Load()
	for _, node := range l.Nodes {
		on, err := l.framesOn(node)
		if err != nil {
			return 0, err
		}
		n += on
	}
	return n, nil
}

// framesOn is how many one wire has carried.
func (l *Lab) framesOn(n *Node) (uint64, error) {
	link, err := l.Control.Net.LinkByName(n.Port)
	if err != nil || link.Attrs().Statistics == nil {
		return 0, err
	}
	return link.Attrs().Statistics.RxPackets + link.Attrs().Statistics.TxPackets, nil
}

// Offsets in an Ethernet frame.
const (
	offEtherType = 12
	offIP        = 14
	offSource4   = offIP + 12
	offDest4     = offIP + 16
	offSource6   = offIP + 8
	offDest6     = offIP + 24
)

// clearFilter is a classic BPF program (Documentation/networking/filter.rst) that passes what count would count.
func clearFilter(ranges []netip.Prefix) []unix.SockFilter {
	const all = 1 << 18
	ret := func(n uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: n} }
	var prog []unix.SockFilter
	for _, f := range []struct {
		etherType uint32
		v6        bool
		offsets   []uint32
	}{
		{unix.ETH_P_IP, false, []uint32{offSource4, offDest4}},
		{unix.ETH_P_IPV6, true, []uint32{offSource6, offDest6}},
	} {
		var body []unix.SockFilter
		for _, c := range ranges {
			for _, off := range f.offsets {
				if c.Addr().Is6() == f.v6 {
					body = append(append(body, inPrefix(off, c)...), ret(all))
				}
			}
		}
		body = append(body, ret(0))
		prog = append(prog,
			unix.SockFilter{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: offEtherType},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: f.etherType, Jf: uint8(len(body))})
		prog = append(prog, body...)
	}
	return append(prog, ret(0))
}

// inPrefix goes on where the address at an offset is in p, and else jumps over the one instruction behind it.
func inPrefix(off uint32, p netip.Prefix) []unix.SockFilter {
	const step = 3 // instructions for 32 bits
	addr := p.Masked().Addr().AsSlice()
	words := (p.Bits() + 31) / 32
	var prog []unix.SockFilter
	for i := range words {
		mask := ^uint32(0) << (32 - min(32, p.Bits()-32*i))
		prog = append(prog,
			unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: off + uint32(4*i)},
			unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: mask},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: binary.BigEndian.Uint32(addr[4*i:]), Jf: uint8(step*(words-1-i) + 1)})
	}
	return prog
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func (c *Capture) read() {
	buf := make([]byte, snapLength)
	for {
		n, err := c.file.Read(buf)
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				c.mu.Lock()
				c.err = err
				c.mu.Unlock()
			}
			return
		}
		c.count(buf[:n])
	}
}

func (c *Capture) count(frame []byte) {
	src, dst, ok := outermost(frame)
	c.mu.Lock()
	defer c.mu.Unlock()
	if dst == netset.ResolverIPv4 {
		c.asked++
	}
	if !ok || !c.belongsInTunnel(src) && !c.belongsInTunnel(dst) {
		return
	}
	c.clear++
	c.between[[2]netip.Addr{src, dst}]++
	if len(c.examples) < maxExamples {
		c.examples = append(c.examples, fmt.Sprintf("%s > %s%s", src, dst, carried(frame[offIP:])))
	}
}

// carried says what an IP packet carries: the protocol's number, and the ports or an ICMP's type and code.
func carried(ip []byte) string {
	protocol, header := int(ip[9]), int(ip[0]&15)*4
	if ip[0]>>4 == 6 {
		protocol, header = int(ip[6]), 40
	}
	if len(ip) < header+4 {
		return fmt.Sprintf(" protocol %d", protocol)
	}
	b := ip[header:]
	switch protocol {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP:
		return fmt.Sprintf(" protocol %d, ports %d > %d", protocol, binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:]))
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		return fmt.Sprintf(" ICMP %d.%d", b[0], b[1])
	}
	return fmt.Sprintf(" protocol %d", protocol)
}

// outermost are the addresses of the first IP header of an Ethernet frame.
func outermost(frame []byte) (src, dst netip.Addr, ok bool) {
	if len(frame) < offIP {
		return src, dst, false
	}
	ip := frame[offIP:]
	switch etherType := binary.BigEndian.Uint16(frame[offEtherType:]); {
	case etherType == unix.ETH_P_IP && len(ip) >= 20:
		return netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20])), true
	case etherType == unix.ETH_P_IPV6 && len(ip) >= 40:
		return netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40])), true
	}
	return src, dst, false
}

// A stock tailscaled that has just begun asks its own resolver by the default route: that is counted apart.
func (c *Capture) belongsInTunnel(a netip.Addr) bool {
	return a != netset.ResolverIPv4 && slices.ContainsFunc(c.ranges, func(p netip.Prefix) bool { return p.Contains(a) })
}

// Clear is the number of packets in clear so far.
func (c *Capture) Clear() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.clear
}

// Captured is the outcome of a capture.
type Captured struct {
	// Total are all frames, Clear those in clear.
	Total, Clear int
	// Asked are those to tailscaled's resolver, which no node with our rules sends. They are not in Clear.
	Asked    int
	Between  map[[2]netip.Addr]int // how many in clear, by source and destination
	Examples []string              // "source > destination", and what is carried, of the first packets in clear
}

// Stop ends the capture. It fails where the kernel had to drop frames: then nobody knows what was in them.
func (c *Capture) Stop() (Captured, error) {
	time.Sleep(50 * time.Millisecond) // what is still in the buffer
	var stats *unix.TpacketStats
	raw, err := c.file.SyscallConn()
	if err == nil {
		ctlErr := raw.Control(func(fd uintptr) {
			stats, err = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS)
		})
		err = errors.Join(err, ctlErr)
	}
	err = errors.Join(err, c.file.Close())
	c.wg.Wait()
	if err = errors.Join(err, c.err); err != nil {
		return Captured{}, fmt.Errorf("end the capture: %w", err)
	}
	if stats.Drops > 0 {
		return Captured{}, fmt.Errorf("the capture lost %d of %d packets in clear", stats.Drops, stats.Packets)
	}
	total, err := c.lab.Frames()
	if err != nil {
		return Captured{}, err
	}
	return Captured{Total: int(total - c.before), Clear: c.clear, Asked: c.asked, Between: c.between, Examples: c.examples}, nil
}

// SendClear puts one packet with pods' addresses on a node's wire, as a leak would: the proof that a capture there sees
// one. It goes from the bridge to the node.
func (l *Lab) SendClear(n *Node, src, dst netip.Addr) error {
	link, err := l.Control.Net.LinkByName(n.Port)
	if err != nil {
		return err
	}
	return l.Control.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		to := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: link.Attrs().Index}
		return unix.Sendto(fd, clearFrame(src, dst), 0, to)
	})
}

// clearFrame is an Ethernet frame to a locally administered address that nobody has, with an empty UDP packet of either
// family in it. It has no checksums: nobody is meant to take it.
func clearFrame(src, dst netip.Addr) []byte {
	frame := []byte{0x02, 0, 0, 0, 0, 0xfe, 0x02, 0, 0, 0, 0, 0xfd}
	if src.Is4() {
		frame = append(frame, 0x08, 0x00, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0)
	} else {
		frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, unix.IPPROTO_UDP, 64)
	}
	frame = append(append(frame, src.AsSlice()...), dst.AsSlice()...)
	return append(frame, 0, 9, 0, 9, 0, 8, 0, 0)
}
