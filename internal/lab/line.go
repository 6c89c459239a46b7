package lab

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Wire is how a machine is connected to the underlay; the zero value is a short one.
type Wire struct {
	// Delay is how long a frame is on its way, in either direction.
	Delay time.Duration
	// Loss is the share of frames that are lost, 0 to 1, in either direction. Several segments may be one frame, of up to 64 kB.
	Loss float64
	// Rate bounds each direction, in bit/s; 0 does not.
	Rate float64
}

// A line is a long wire: what goes in at one end comes out at the other some time later, in order, and whole where nothing is to be lost. It
// forwards frames between two links on the control host, since a kernel without netem delays nothing by itself.
type line struct {
	wire Wire
	ends [2]*os.File
	wg   sync.WaitGroup
}

const (
	// lineBuffer, in bytes, holds what comes while the forwarder waits for the processor.
	lineBuffer = 16 << 20
	// lineLength bounds the frames that are under way in one direction.
	lineLength = 1 << 14
	// frameMax is more than a frame is long that is yet to be cut into segments, with its virtio header.
	frameMax = 1<<16 + 256
)

// plugBy connects the machine to a port of the underlay by a wire. A line ends with the machine.
func (m *Machine) plugBy(w Wire, control *Machine, port string, mtu int) (err error) {
	if w == (Wire{}) {
		return m.plug(control, port, true, mtu)
	}
	near, far := port+"near", port+"far"
	if err := m.plug(control, near, false, mtu); err != nil {
		return err
	}
	if err := control.addPort(port, far, mtu); err != nil {
		return err
	}
	m.line, err = control.newLine(near, far, w)
	return err
}

// newLine joins two links of a machine by a line. Nothing else on the machine may take what arrives at them.
func (m *Machine) newLine(a, b string, w Wire) (_ *line, err error) {
	l := &line{wire: w}
	for i, name := range []string{a, b} {
		if err = m.quiet(name); err == nil {
			l.ends[i], err = m.rawSocket(name)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("make a line of %+v: %w", w, err), l.close())
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
		var free time.Time // when the last frame is on its way as a whole
		for {
			n, err := from.Read(buf)
			if errors.Is(err, os.ErrClosed) {
				return
			}
			if err != nil || l.wire.Loss > 0 && rand.Float64() < l.wire.Loss {
				continue // the link is down, and comes up again; or the frame is lost
			}
			if now := time.Now(); free.Before(now) {
				free = now
			}
			if l.wire.Rate > 0 {
				free = free.Add(time.Duration(float64(n*8) / l.wire.Rate * float64(time.Second)))
			}
			under <- frame{free.Add(l.wire.Delay), append([]byte(nil), buf[:n]...)}
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
