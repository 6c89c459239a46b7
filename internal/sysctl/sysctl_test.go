package sysctl

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
	"golang.org/x/sys/unix"
)

// TestSysctlsInAContainer does what a runtime and the chart do: /proc/sys is read-only, the host's net is mounted elsewhere.
func TestSysctlsInAContainer(t *testing.T) {
	nstest.Require(t)
	other := t.TempDir()
	if err := os.Mkdir(filepath.Join(other, "net"), 0o755); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with its namespaces
		done <- errors.Join(container(filepath.Join(other, "net")), checkSysctls(other))
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// container gives the thread a network of its own and mounts as a container has them, with /proc/sys/net also at net.
func container(net string) error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS | unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	for _, m := range []struct {
		source, target string
		flags          uintptr
	}{
		{"", "/", unix.MS_REC | unix.MS_PRIVATE},
		{"/proc/sys/net", net, unix.MS_BIND},
		{"/proc/sys", "/proc/sys", unix.MS_BIND},
		{"", "/proc/sys", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY},
	} {
		if err := unix.Mount(m.source, m.target, "", m.flags, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

func checkSysctls(other string) error {
	const key = IPv4Forwarding
	for _, value := range []string{"1", "0"} {
		if err := writeIn(Root, other, key, value); err != nil {
			return err
		}
		if got, err := Read(key); err != nil || got != value {
			return fmt.Errorf("%s is %q, want %s; %v", key, got, value, err)
		}
	}
	err := writeIn(Root, "/nowhere", key, "1")
	if !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), "mount the host's /proc/sys/net") {
		return fmt.Errorf("without the mount: %v", err)
	}
	// A sysctl that is not there is no reason to look elsewhere.
	if err := writeIn(Root, other, "net/ipv4/none", "1"); errors.Is(err, unix.EROFS) || !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("a sysctl that is not there: %v", err)
	}
	return nil
}
