// Package trusted tells whether somebody other than root could put another file of the machine in the place of one that root writes:
// by a symbolic link or a hard link in a folder that others can write, or by exchanging a folder on the way to it.
//
// What only root can change does not change between the look and the use, so callers may go on with the path.
package trusted

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrOthers marks every refusal.
var ErrOthers = errors.New("others than root could change it")

// maxLinks is how many symbolic links a path may have, as for the kernel.
const maxLinks = 40

// Folder makes sure that only root, or the caller's own user, can change where path leads and what is in the folder there. What is
// not there yet is fine.
func Folder(path string) error { return walk(path, true) }

// Way is Folder without the last part: others may be able to write in the folder itself, as in /tmp and some systems' /var/log. Then
// the caller must not follow a link there, and has to look at what it opens (see Plain).
func Way(path string) error { return walk(path, false) }

// MkdirAll makes a folder, with those above it, in which nobody else can exchange what root puts there. One with the sticky bit is
// that too.
func MkdirAll(path string, perm fs.FileMode) error {
	inIt := filepath.Join(path, "any")
	if err := Folder(inIt); err != nil {
		return err
	}
	if err := mkdir(path, perm); err != nil {
		return err
	}
	return Folder(inIt) // in a folder where others can write too, somebody may have been faster
}

func mkdir(path string, perm fs.FileMode) error {
	err := os.Mkdir(path, perm)
	if errors.Is(err, fs.ErrNotExist) && filepath.Dir(path) != path {
		if err := mkdir(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := Way(path); err != nil {
			return err
		}
		err = os.Mkdir(path, perm)
	}
	if info, there := os.Stat(path); errors.Is(err, fs.ErrExist) && there == nil && info.IsDir() {
		return nil
	}
	return err
}

// Plain makes sure that an open file is a regular one of root's, or the caller's, that has no other name: a hard link may be another
// program's file.
func Plain(fd int, path string) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("%w: %s is no regular file; remove it or choose another name", ErrOthers, path)
	case st.Nlink > 1:
		return fmt.Errorf("%w: %s has %d names (hard links); remove it or choose another folder", ErrOthers, path, st.Nlink)
	case !owners().has(st.Uid):
		return fmt.Errorf("%w: %s belongs to user %d; remove it or choose another folder", ErrOthers, path, st.Uid)
	}
	return nil
}

// users are those whose folders are as good as root's: root, the user that we run as, and who owns "/". In a user namespace that is
// nobody, as everybody outside it.
type users struct{ self, top uint32 }

func owners() users {
	u := users{self: uint32(os.Geteuid())}
	var st unix.Stat_t
	if unix.Stat("/", &st) == nil {
		u.top = st.Uid
	}
	return u
}

func (u users) has(uid uint32) bool { return uid == 0 || uid == u.self || uid == u.top }

// walk goes down from "/" by what each name is, so that each folder has been looked at before the next is looked up in it.
func walk(path string, inside bool) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q: want an absolute path", path)
	}
	trusted := owners()
	at, rest := "/", names(path)
	shared := false // others can make names in the folder at
	for links := 0; ; {
		var st unix.Stat_t
		if err := unix.Lstat(at, &st); err != nil {
			return missing(at, err)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			if shared && !trusted.has(st.Uid) {
				return fmt.Errorf("%w: %s is a symbolic link of user %d; remove it or choose another folder", ErrOthers, at, st.Uid)
			}
			if links++; links > maxLinks {
				return &os.PathError{Op: "open", Path: path, Err: unix.ELOOP}
			}
			to, err := os.Readlink(at)
			if err != nil {
				return missing(at, err)
			}
			if at = filepath.Dir(at); filepath.IsAbs(to) {
				at = "/"
			}
			rest, shared = append(names(to), rest...), false
			continue
		case unix.S_IFDIR:
		default:
			return nil // whoever opens it as a folder is told
		}
		last := len(rest) == 0
		if fault := trusted.folder(at, st, last && !inside, last && inside, shared); fault != nil {
			return fault
		}
		if last {
			return nil
		}
		shared = rest[0] != ".." && trusted.written(st)
		at, rest = filepath.Join(at, rest[0]), rest[1:] // no link is left in at, so that ".." is the folder above
	}
}

// folder says what is wrong with a folder on the way. Of the end of the way (open) it is all the same who can write in it. Where names
// belong to those who made them (the sticky bit), others cannot exchange what is root's, but they can make what is missing: at the
// end (strict) not even that is taken.
func (u users) folder(path string, st unix.Stat_t, open, strict, shared bool) error {
	if !u.has(st.Uid) && (!open || shared) {
		return fmt.Errorf("%w: %s belongs to user %d; chown root %s, or choose another folder", ErrOthers, path, st.Uid, path)
	}
	if open || !u.written(st) || st.Mode&unix.S_ISVTX != 0 && !strict {
		return nil
	}
	return fmt.Errorf("%w: %s can be written by others (mode %04o, group %d); chmod go-w %s, or choose another folder",
		ErrOthers, path, st.Mode&0o7777, st.Gid, path)
}

// written tells whether others can make and rename what is in a folder. Root's group is root, and a user's own is that user.
func (u users) written(st unix.Stat_t) bool {
	return st.Mode&0o002 != 0 || st.Mode&0o020 != 0 && st.Gid != 0 && st.Gid != uint32(os.Getegid())
}

// missing is no fault: what is not there cannot be another's.
func missing(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	return &os.PathError{Op: "look at", Path: path, Err: err}
}

// names takes a path apart. It leaves "..", which behind a link is not what it seems.
func names(path string) []string {
	return slices.DeleteFunc(strings.Split(path, "/"), func(name string) bool { return name == "" || name == "." })
}
