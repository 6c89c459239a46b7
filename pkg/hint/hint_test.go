package hint

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func spoolFor(t *testing.T) (socket, dir string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "daemon.sock")
	dir = Spool(socket)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return socket, dir
}

func TestDeadDaemonsSocketCostsNothing(t *testing.T) {
	socket, dir := spoolFor(t)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	began := time.Now()
	if err := Send(t.Context(), socket, Hint{Command: "ADD"}); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("sent to nobody: %v", err)
	}
	if took := time.Since(began); took > Wait/2 {
		t.Errorf("took %s", took)
	}
	if found, err := ReadSpool(dir, 9); err != nil || len(found) != 1 || found[0].Hint.Command != "ADD" {
		t.Errorf("spool: %v, %v", found, err)
	}
}

func TestSleepingDaemonIsNotWaitedForLong(t *testing.T) {
	socket, dir := spoolFor(t)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"}) // and takes nothing
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	began := time.Now()
	if err := Send(t.Context(), socket, Hint{Command: "ADD"}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("sent: %v", err)
	}
	if took := time.Since(began); took > 3*Wait {
		t.Errorf("took %s", took)
	}
	if found, err := ReadSpool(dir, 9); err != nil || len(found) != 1 {
		t.Errorf("spool: %v, %v", found, err)
	}
}

func TestServeTakes(t *testing.T) {
	socket, _ := spoolFor(t)
	ctx, cancel := context.WithCancel(t.Context())
	taken, ended := make(chan Hint, 1), make(chan error, 1)
	go func() { ended <- Serve(ctx, socket, func(h Hint) { taken <- h }) }()
	for {
		if err := Send(t.Context(), socket, Hint{Command: "DEL", ContainerID: "c"}); err == nil {
			break
		}
		time.Sleep(time.Millisecond) // until it listens
	}
	if h := <-taken; h.ContainerID != "c" {
		t.Errorf("took %+v", h)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestSpoolIsBounded(t *testing.T) {
	_, dir := spoolFor(t)
	if err := os.WriteFile(filepath.Join(dir, ".left"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	long := time.Now().Add(-2 * leftoverAge)
	if err := os.Chtimes(filepath.Join(dir, ".left"), long, long); err != nil {
		t.Fatal(err)
	}
	const tooMany = 20000
	var full error
	for range tooMany {
		if full = spool(dir, []byte("{}")); full != nil {
			break
		}
	}
	if !errors.Is(full, errFull) {
		t.Fatalf("after %d hints: %v", tooMany, full)
	}
	if _, err := ReadSpool(dir, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, ".left")); err == nil {
		t.Error("an unfinished hint stays for good")
	}
}
