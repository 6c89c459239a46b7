package daemon

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestTellSystemd(t *testing.T) {
	for _, name := range []string{filepath.Join(t.TempDir(), "notify"), fmt.Sprintf("@headcni-test-%d", os.Getpid())} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := tellSystemd(name, "READY=1"); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 64)
		if err := l.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if n, err := l.Read(buf); err != nil || string(buf[:n]) != "READY=1" {
			t.Errorf("%s: %q, %v", name, buf[:n], err)
		}
	}
	if err := tellSystemd("", "READY=1"); err != nil {
		t.Errorf("without a service manager: %v", err)
	}
	if err := tellSystemd(filepath.Join(t.TempDir(), "nobody"), "READY=1"); err == nil {
		t.Error("no error where nobody listens")
	}
}
