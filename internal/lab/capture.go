package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// captureBuffer holds what arrives between two reads, in bytes.
	captureBuffer = 8 << 20
	snapLength    = 128 // headers are enough
	maxExamples   = 5
)

// Capture counts packets in clear: those on the underlay whose outermost IP header has a pod's address in it.
type Capture struct {
	file *os.File
	wg   sync.WaitGroup

	mu       sync.Mutex
	total    int
	clear    int
	examples []string
	err      error
}

// CaptureUnderlay begins to look at all frames, in and out, on the bridge and its ports. What a node sends is seen there
// before anybody else can drop it; what crosses the bridge is seen more than once.
func (l *Lab) CaptureUnderlay() (*Capture, error) {
	c := &Capture{}
	err := l.Control.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		c.file = os.NewFile(uintptr(fd), "capture on the underlay")
		// Beyond the limit only with CAP_NET_ADMIN in the first user namespace; the counter of drops tells if it was needed.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, captureBuffer)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("capture on the underlay: %w", err)
	}
	c.wg.Go(c.read)
	return c, nil
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
	c.total++
	if !ok || !isPod(src) && !isPod(dst) {
		return
	}
	c.clear++
	if len(c.examples) < maxExamples {
		c.examples = append(c.examples, fmt.Sprintf("%s > %s", src, dst))
	}
}

// outermost are the addresses of the first IP header of an Ethernet frame.
func outermost(frame []byte) (src, dst netip.Addr, ok bool) {
	const header = 14
	if len(frame) < header {
		return src, dst, false
	}
	ip := frame[header:]
	switch etherType := uint16(frame[12])<<8 | uint16(frame[13]); {
	case etherType == unix.ETH_P_IP && len(ip) >= 20:
		return netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20])), true
	case etherType == unix.ETH_P_IPV6 && len(ip) >= 40:
		return netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40])), true
	}
	return src, dst, false
}

func isPod(a netip.Addr) bool {
	for _, c := range ClusterCIDRs {
		if c.Contains(a) {
			return true
		}
	}
	return false
}

// Clear is the number of packets in clear so far.
func (c *Capture) Clear() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.clear
}

// Captured is the outcome of a capture.
type Captured struct {
	Total, Clear int
	Examples     []string // "source > destination" of the first packets in clear
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
		return Captured{}, fmt.Errorf("the capture lost %d of %d frames", stats.Drops, stats.Packets)
	}
	return Captured{Total: c.total, Clear: c.clear, Examples: c.examples}, nil
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
