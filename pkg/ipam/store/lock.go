package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrLocked means that the lock could not be had in time.
var ErrLocked = errors.New("lock is held")

const lockName = "lock"

// lock takes the network's lock and returns its descriptor; closing it gives the lock back. Each call has a descriptor
// of its own, so goroutines of one process exclude each other too.
func (s *Store) lock(ctx context.Context, dir int) (int, error) {
	path := filepath.Join(s.dir, lockName)
	for {
		fd, err := s.fs.Open(dir, lockName, unix.O_RDWR|unix.O_CREAT, 0o600)
		if errors.Is(err, unix.EROFS) {
			fd, err = s.fs.Open(dir, lockName, unix.O_RDONLY, 0) // to look is allowed
		}
		if err != nil {
			return 0, wrap("open", path, err)
		}
		if err := s.flock(ctx, fd, path); err != nil {
			return 0, err
		}
		// Somebody may have removed the file while we waited: then its lock protects nothing.
		mine, err1 := s.fs.Stat(fd, "")
		now, err2 := s.fs.Stat(dir, lockName)
		if err1 == nil && err2 == nil && mine.sameFile(now) {
			return fd, nil
		}
		s.fs.Close(fd)
		if err := errors.Join(err1, err2); err != nil && !errors.Is(err2, unix.ENOENT) {
			return 0, wrap("look at", path, err)
		}
		if dirStat, err := s.fs.Stat(dir, ""); err != nil || dirStat.Nlink == 0 {
			return 0, fmt.Errorf("lock %s: the folder was removed meanwhile; try again", path)
		}
	}
}

// flock waits in the kernel's queue, which is fair and wakes one waiter at a time, instead of polling. It closes fd
// unless it succeeds.
func (s *Store) flock(ctx context.Context, fd int, path string) error {
	err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return nil
	}
	if err != unix.EWOULDBLOCK {
		s.fs.Close(fd)
		return wrap("lock", path, err)
	}
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	start := time.Now()
	got := make(chan error)
	// No signal can be aimed at a goroutine, so one whose caller has given up lives until the lock comes to it, and gives
	// it back at once. That is the one goroutine here that nobody waits for.
	go func() {
		err := again0(func() error { return unix.Flock(fd, unix.LOCK_EX) })
		select {
		case got <- err:
		case <-ctx.Done():
			s.fs.Close(fd)
		}
	}()
	select {
	case err := <-got:
		if err != nil {
			s.fs.Close(fd)
		}
		return wrap("lock", path, err)
	case <-ctx.Done():
		return fmt.Errorf("lock %s: gave up after %s: %w by %s", path, time.Since(start).Round(time.Millisecond), ErrLocked, s.holder())
	}
}

// holder names the process that has the lock. The kernel knows it (proc_locks(5)), so that nobody has to write it down,
// and what it says is never stale.
func (s *Store) holder() string {
	const unknown = "a process that is not visible from here; `lslocks` on the node names it"
	st, err := s.fs.Stat(unix.AT_FDCWD, filepath.Join(s.dir, lockName))
	if err != nil {
		return unknown
	}
	f, err := os.Open("/proc/locks")
	if err != nil {
		return unknown
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		pid, ok := flockHolder(lines.Text(), st.Ino)
		if !ok || pid <= 0 {
			continue
		}
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err != nil {
			return fmt.Sprintf("pid %d", pid)
		}
		return fmt.Sprintf("pid %d (%s)", pid, strings.TrimSpace(string(comm)))
	}
	return unknown
}

// flockHolder reads a line such as "5: FLOCK  ADVISORY  WRITE 4711 fe:00:131090 0 EOF". Lines of waiters have an arrow
// after the number. The device is not compared: stat(2) and /proc/locks disagree about it on btrfs and overlayfs.
func flockHolder(line string, ino uint64) (pid int, ok bool) {
	f := strings.Fields(line)
	if len(f) < 6 || f[1] != "FLOCK" {
		return 0, false
	}
	id := strings.Split(f[5], ":")
	if got, err := strconv.ParseUint(id[len(id)-1], 10, 64); err != nil || got != ino {
		return 0, false
	}
	pid, err := strconv.Atoi(f[4])
	return pid, err == nil
}
