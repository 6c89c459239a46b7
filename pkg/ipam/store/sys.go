package store

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// FS is every system call that the store makes on its files: names are relative to the open folder dir, offsets are
// absolute, errors are errnos. System is the real one; tests put faults and crashes in front of it.
type FS interface {
	Open(dir int, name string, flags int, mode uint32) (fd int, err error)
	Close(fd int)
	Read(fd int, b []byte, off int64) (int, error)
	Write(fd int, b []byte, off int64) (int, error)
	// Names lists a folder in no order.
	Names(dir int, name string) ([]string, error)
	// Stat does not follow links. An empty name means dir itself, which may be any descriptor.
	Stat(dir int, name string) (Stat, error)
	// Link makes to another name of the file from.
	Link(dir int, from, to string) error
	Unlink(dir int, name string) error
	Mkdir(dir int, name string, mode uint32) error
	Rmdir(dir int, name string) error
	Rename(dir int, from, to string) error
}

// Stat is the part of stat(2) that the store looks at.
type Stat struct {
	Dev, Ino, Nlink uint64
	Mode            uint32
}

func (s Stat) regular() bool        { return s.Mode&unix.S_IFMT == unix.S_IFREG }
func (s Stat) folder() bool         { return s.Mode&unix.S_IFMT == unix.S_IFDIR }
func (s Stat) sameFile(o Stat) bool { return s.Dev == o.Dev && s.Ino == o.Ino }

// System makes the real system calls.
type System struct{}

// again repeats a call that a signal cut short: Go's own preemption signals reach system calls on slow file systems.
func again[T any](call func() (T, error)) (T, error) {
	for {
		v, err := call()
		if err != unix.EINTR {
			return v, err
		}
	}
}

func again0(call func() error) error {
	_, err := again(func() (struct{}, error) { return struct{}{}, call() })
	return err
}

// Open is openat(2). It never follows a link in the last place, never leaks the descriptor to a child, and never waits for the other end of
// a FIFO that is in a file's place, which would hold the lock meanwhile.
func (System) Open(dir int, name string, flags int, mode uint32) (int, error) {
	return again(func() (int, error) {
		return unix.Openat(dir, name, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, mode)
	})
}

// Close is close(2). Its error tells nothing here: nothing is synced, and the descriptor is gone in any case.
func (System) Close(fd int) { _ = unix.Close(fd) }

// Read is pread(2).
func (System) Read(fd int, b []byte, off int64) (int, error) {
	return again(func() (int, error) { return unix.Pread(fd, b, off) })
}

// Write is pwrite(2).
func (System) Write(fd int, b []byte, off int64) (int, error) {
	return again(func() (int, error) { return unix.Pwrite(fd, b, off) })
}

// Names reads a whole folder.
func (s System) Names(dir int, name string) ([]string, error) {
	fd, err := s.Open(dir, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	names, err := f.Readdirnames(-1)
	f.Close()
	return names, err
}

// Stat is fstatat(2).
func (System) Stat(dir int, name string) (Stat, error) {
	flags := unix.AT_SYMLINK_NOFOLLOW
	if name == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	var st unix.Stat_t
	if err := again0(func() error { return unix.Fstatat(dir, name, &st, flags) }); err != nil {
		return Stat{}, err
	}
	return Stat{Dev: uint64(st.Dev), Ino: st.Ino, Nlink: uint64(st.Nlink), Mode: st.Mode}, nil
}

// Link is linkat(2).
func (System) Link(dir int, from, to string) error {
	return again0(func() error { return unix.Linkat(dir, from, dir, to, 0) })
}

// Unlink is unlinkat(2).
func (System) Unlink(dir int, name string) error {
	return again0(func() error { return unix.Unlinkat(dir, name, 0) })
}

// Mkdir is mkdirat(2).
func (System) Mkdir(dir int, name string, mode uint32) error {
	return again0(func() error { return unix.Mkdirat(dir, name, mode) })
}

// Rmdir is unlinkat(2) with AT_REMOVEDIR.
func (System) Rmdir(dir int, name string) error {
	return again0(func() error { return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR) })
}

// Rename is renameat(2).
func (System) Rename(dir int, from, to string) error {
	return again0(func() error { return unix.Renameat(dir, from, dir, to) })
}

// noFile reports what the kernel says where something else is in a file's place: a folder, a link, a FIFO or a socket.
func noFile(err error) bool {
	return errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ESPIPE) || errors.Is(err, unix.ENXIO)
}

// readFile reads a small file: at most limit bytes, more is an error.
func readFile(fs FS, fd int, limit int) ([]byte, error) {
	b := make([]byte, limit+1)
	n := 0
	for n < len(b) {
		got, err := fs.Read(fd, b[n:], int64(n))
		if err != nil {
			return nil, err
		}
		if got == 0 {
			return b[:n], nil
		}
		n += got
	}
	return nil, fmt.Errorf("%w: more than %d bytes", unix.EFBIG, limit)
}

// writeAll goes on after a short write until the disk says why.
func writeAll(fs FS, fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, err := fs.Write(fd, b, off)
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrShortWrite
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// removeAll removes a folder of the store and what is in it.
func removeAll(fs FS, dir int, name string) error {
	st, err := fs.Stat(dir, name)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", name, err)
	}
	if !st.folder() {
		return wrap("remove", name, fs.Unlink(dir, name))
	}
	names, err := fs.Names(dir, name)
	if err != nil {
		return fmt.Errorf("list %s: %w", name, err)
	}
	for _, n := range names {
		if err := removeAll(fs, dir, name+"/"+n); err != nil {
			return err
		}
	}
	return wrap("remove", name, fs.Rmdir(dir, name))
}

// wrap names the step and the file in an errno.
func wrap(step, name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", step, name, err)
}
