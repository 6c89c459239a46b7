package sockdiag

import (
	"errors"
	"math"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// Only marked connections are listed, with what the kernel knows of them, and one that is ended fails for its owner and for nobody else.
func TestMarked(t *testing.T) {
	nstest.Require(t)
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		dial := func(mark int) (own, far net.Conn) {
			t.Helper()
			d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
				var failed error
				err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark) })
				return errors.Join(err, failed)
			}}
			own, err := d.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			if far, err = l.Accept(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { own.Close(); far.Close() })
			if _, err := own.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			return own, far
		}
		marked, _ := dial(0x90000)
		plain, far := dial(0x40000)
		family := byte(unix.AF_INET)
		if netip.MustParseAddrPort(l.Addr().String()).Addr().Is6() {
			family = unix.AF_INET6
		}
		list, err := Marked(family, 0x80000, 0x80000)
		if err != nil {
			t.Fatal(err)
		}
		if len(list) != 1 || list[0].Local.String() != marked.LocalAddr().String() || list[0].Remote.String() != l.Addr().String() ||
			list[0].Info.State != established || list[0].Info.Bytes_acked < 5 {
			t.Fatalf("%s: %+v", at, list)
		}
		for mark, want := range map[uint32]int{0x90000: 1, 0x80000: 0} { // no more bits than these
			if exact, err := Marked(family, mark, math.MaxUint32); err != nil || len(exact) != want {
				t.Errorf("%s: %d have the mark %#x alone, want %d, %v", at, len(exact), mark, want, err)
			}
		}
		if err := list[0].Destroy(); err != nil {
			t.Fatal(err)
		}
		if _, err := marked.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
			t.Errorf("%s: its owner reads: %v", at, err)
		}
		if err := list[0].Destroy(); !errors.Is(err, unix.ENOENT) {
			t.Errorf("%s: once more: %v", at, err)
		}
		if _, err := far.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		if n, err := plain.Read(make([]byte, 1)); n != 1 || err != nil {
			t.Errorf("%s: the other one reads: %v", at, err)
		}
	}
}
