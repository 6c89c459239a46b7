// Package procfs reads and writes the short files by which the kernel speaks (proc(5)). Unlike package os it does not start
// the runtime's poller for them, which would cost a plugin more than the file.
package procfs

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// maxSize is the most that is read, in bytes: such a file holds a number, a word or a UUID.
const maxSize = 256

// Read returns a file's text without white space around it. Errors are as those of os.ReadFile.
func Read(path string) (string, error) {
	fd, err := open(path, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var b [maxSize]byte
	n, err := unix.Read(fd, b[:])
	if err != nil {
		return "", &os.PathError{Op: "read", Path: path, Err: err}
	}
	return strings.TrimSpace(string(b[:n])), nil
}

// Write sets a file that exists.
func Write(path, value string) error {
	fd, err := open(path, unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(value)); err != nil {
		return &os.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}

func open(path string, flags int) (fd int, err error) {
	for {
		fd, err = unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// HasIPv6 is false on a host that was started with ipv6.disable=1 or has no IPv6 in its kernel.
func HasIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}
