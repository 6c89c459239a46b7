package cmdlog

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
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
	if err := Send(socket, Record{Command: "ADD"}); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("sent to nobody: %v", err)
	}
	if found, err := ReadSpool(dir, 9); err != nil || len(found) != 1 || found[0].Record.Command != "ADD" {
		t.Errorf("spool: %v, %v", found, err)
	}
}

func TestSleepingDaemonIsNotWaitedFor(t *testing.T) {
	socket, dir := spoolFor(t)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"}) // and takes nothing
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const sent = 10000 // more than the kernel queues
	var refused error
	for range sent {
		refused = errors.Join(refused, wake(socket))
	}
	if !errors.Is(refused, syscall.EAGAIN) {
		t.Errorf("nobody accepts, but got %v", refused)
	}
	if err := Send(socket, Record{Command: "ADD"}); !errors.Is(err, syscall.EAGAIN) {
		t.Errorf("sent: %v", err)
	}
	if found, err := ReadSpool(dir, 9); err != nil || len(found) != 1 {
		t.Errorf("spool: %v, %v", found, err)
	}
}

// The daemon that is woken finds the record in the spool.
func TestServeIsWoken(t *testing.T) {
	socket, dir := spoolFor(t)
	ctx, cancel := context.WithCancel(t.Context())
	woken, ended := make(chan struct{}, 1), make(chan error, 1)
	go func() { ended <- Serve(ctx, socket, func() { woken <- struct{}{} }, func(err error) { t.Error(err) }) }()
	for {
		if err := wake(socket); err == nil {
			break
		}
		time.Sleep(time.Millisecond) // until it listens
	}
	<-woken
	if err := Send(socket, Record{Command: "DEL", ContainerID: "c"}); err != nil {
		t.Error(err)
	}
	<-woken
	if found, err := ReadSpool(dir, 9); err != nil || len(found) != 1 || found[0].Record.ContainerID != "c" {
		t.Errorf("woken, and the spool holds %v, %v", found, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestEncode(t *testing.T) {
	for _, r := range []Record{{}, {
		Command: "ADD", ContainerID: "c", IfName: "eth0", PodNamespace: "ns", PodName: "web", HostIfName: "hc0",
		Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}, Duration: 12345, ErrorCode: 11, Stage: "gate",
	}} {
		want, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.encode(); string(got) != string(want) {
			t.Errorf("got %s, want %s", got, want)
		}
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
	if err := spool(dir, make([]byte, maxRecord+1)); !errors.Is(err, errLong) {
		t.Errorf("a record of any length: %v", err)
	}
	const tooMany = 20000
	var full error
	for range tooMany {
		if full = spool(dir, []byte("{}")); full != nil {
			break
		}
	}
	if !errors.Is(full, errFull) {
		t.Fatalf("after %d records: %v", tooMany, full)
	}
	if _, err := ReadSpool(dir, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, ".left")); err == nil {
		t.Error("an unfinished record stays for good")
	}
}
