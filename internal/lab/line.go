package lab

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A line is a long wire: what goes in at one end comes out at the other some time later, whole and in order. It forwards
// frames between two links on the control host, since a kernel without netem delays nothing by itself.
type line struct {
	// delay is how long a frame is on its way, in either direction.
	delay time.Duration
	ends  [2]*os.File
	wg    sync.WaitGroup
}

const (
	// lineBuffer, in bytes, holds what comes while the forwarder waits for the processor.
	lineBuffer = 16 << 20
	// lineLength bounds the frames that are under way in one direction.
	lineLength = 1 << 14
	// frameMax is more than a frame is long that is yet to be cut into segments, with its virtio header.
	frameMax = 1<<16 + 256
)

// newLine joins two links of a machine by a line. Nothing else on the machine may take what arrives at them.
func (m *Machine) newLine(a, b string, delay time.Duration) (_ *line, err error) {
	l := &line{delay: delay}
	for i, name := range []string{a, b} {
		if err = m.quiet(name); err == nil {
			l.ends[i], err = m.rawSocket(name)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("make a line of %v: %w", delay, err), l.close())
		}
	}
	l.forward(l.ends[0], l.ends[1])
	l.forward(l.ends[1], l.ends[0])
	return l, nil
}

// quiet keeps the machine itself from answering what arrives at a link, and sets it up.
func (m *Machine) quiet(name string) error {
	link, err := m.Net.LinkByName(name)
	if err != nil {
		return err
	}
	if err := m.Net.LinkSetARPOff(link); err != nil {
		return err
	}
	err = m.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0)
	})
	return errors.Join(err, m.Net.LinkSetUp(link))
}

// rawSocket opens a socket that takes and gives whole frames of a link.
func (m *Machine) rawSocket(name string) (f *os.File, err error) {
	link, err := m.Net.LinkByName(name)
	if err != nil {
		return nil, err
	}
	err = m.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), name)
		// Beyond the limit where the caller may, else up to it.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, lineBuffer) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, lineBuffer)
		}
		// With the header (include/uapi/linux/virtio_net.h) checksums and segments that are still to be made stay so.
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			return err
		}
		// What is sent from here does not come back.
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: link.Attrs().Index})
	})
	if err != nil && f != nil {
		f.Close()
		f = nil
	}
	return f, err
}

// forward passes what arrives at one end on to the other.
func (l *line) forward(from, to *os.File) {
	type frame struct {
		due  time.Time
		data []byte
	}
	under := make(chan frame, lineLength)
	l.wg.Go(func() {
		defer close(under)
		buf := make([]byte, frameMax)
		for {
			n, err := from.Read(buf)
			if errors.Is(err, os.ErrClosed) {
				return
			}
			if err == nil { // else the link is down, and comes up again
				under <- frame{time.Now().Add(l.delay), append([]byte(nil), buf[:n]...)}
			}
		}
	})
	l.wg.Go(func() {
		for f := range under {
			time.Sleep(time.Until(f.due))
			_, _ = to.Write(f.data) // a wire does not tell either that nobody is at its end
		}
	})
}

// close cuts the line. What is under way is lost.
func (l *line) close() error {
	var errs []error
	for _, end := range l.ends {
		if end != nil {
			errs = append(errs, end.Close())
		}
	}
	l.wg.Wait()
	return errors.Join(errs...)
}
