package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// machines are the architectures of images, by Go's names.
var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// libraryDirs is where Debian's loader looks (ld.so(8), /etc/ld.so.conf.d), by machine.
func libraryDirs(m elf.Machine) []string {
	triplet := map[elf.Machine]string{elf.EM_X86_64: "x86_64-linux-gnu", elf.EM_AARCH64: "aarch64-linux-gnu"}[m]
	return []string{"/lib/" + triplet, "/usr/lib/" + triplet, "/lib", "/usr/lib", "/lib64", "/usr/lib64"}
}

// tree is one or several folders, seen as one root file system.
type tree []string

// lstat finds a path of the image; the topmost folder that has it counts.
func (t tree) lstat(inside string) (file string, info fs.FileInfo, err error) {
	for i := len(t) - 1; i >= 0; i-- {
		file = within(t[i], inside)
		if info, err = os.Lstat(file); err == nil || !errors.Is(err, fs.ErrNotExist) {
			return file, info, err
		}
	}
	return "", nil, fmt.Errorf("%s: %w", inside, fs.ErrNotExist)
}

// maxLinks is how many symbolic links are followed, as in the kernel.
const maxLinks = 40

// resolve follows symbolic links inside the tree, also those of folders, and returns every link on the way and the file
// at the end, as paths of the image.
func (t tree) resolve(inside string) (links []string, end string, err error) {
	end = "/"
	todo := strings.Split(strings.Trim(path.Clean("/"+inside), "/"), "/")
	for len(todo) > 0 {
		next := path.Join(end, todo[0])
		todo = todo[1:]
		file, info, err := t.lstat(next)
		if err != nil {
			return nil, "", err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			end = next
			continue
		}
		if links = append(links, next); len(links) > maxLinks {
			return nil, "", fmt.Errorf("%s: too many symbolic links", inside)
		}
		target, err := os.Readlink(file)
		if err != nil {
			return nil, "", err
		}
		if path.IsAbs(target) {
			end = "/"
		}
		todo = append(strings.Split(strings.Trim(path.Clean(target), "/"), "/"), todo...)
	}
	return links, end, nil
}

// object is what the loader wants to know of a program or library.
type object struct {
	machine elf.Machine
	interp  string   // its loader, "" for libraries and static programs
	needed  []string // names of libraries
	runpath []string // where it wants them looked for first
}

// readObject returns nil for what is no ELF file.
func readObject(file string) (*object, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	magic := make([]byte, len(elf.ELFMAG))
	if _, err := io.ReadFull(f, magic); err != nil || string(magic) != elf.ELFMAG {
		return nil, nil
	}
	e, err := elf.NewFile(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	o := &object{machine: e.Machine}
	for _, p := range e.Progs {
		if p.Type == elf.PT_INTERP {
			b, err := io.ReadAll(p.Open())
			if err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			o.interp = strings.TrimRight(string(b), "\x00")
		}
	}
	if e.SectionByType(elf.SHT_DYNAMIC) == nil {
		return o, nil
	}
	if o.needed, err = e.ImportedLibraries(); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		paths, err := e.DynString(tag)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		for _, p := range paths {
			o.runpath = append(o.runpath, strings.Split(p, ":")...)
		}
	}
	return o, nil
}

// needs lists, as paths of the image, the files that the object at inside cannot run without.
func (t tree) needs(inside string, o *object) ([]string, error) {
	var found []string
	var errs []error
	if o.interp != "" {
		found = append(found, o.interp)
	}
	for _, lib := range o.needed {
		at := ""
		for _, dir := range append(slices.Clone(o.runpath), libraryDirs(o.machine)...) {
			dir = strings.NewReplacer("$ORIGIN", path.Dir(inside), "${ORIGIN}", path.Dir(inside)).Replace(dir)
			if _, _, err := t.resolve(path.Join(dir, lib)); err == nil {
				at = path.Join(dir, lib)
				break
			}
		}
		if at == "" {
			errs = append(errs, fmt.Errorf("%s needs %s, which is not there", inside, lib))
			continue
		}
		found = append(found, at)
	}
	return found, errors.Join(errs...)
}

// collect copies files out of unpacked packages, with whatever they need. Symbolic links stay links.
func collect(from, to string, files []string) error {
	t := tree{from}
	done := map[string]bool{}
	for todo := files; len(todo) > 0; todo = todo[1:] {
		links, end, err := t.resolve(todo[0])
		if err != nil {
			return fmt.Errorf("collect: %w", err)
		}
		for _, inside := range append(links, end) {
			if done[inside] {
				continue
			}
			done[inside] = true
			if err := copyInto(within(from, inside), within(to, inside)); err != nil {
				return fmt.Errorf("collect %s: %w", inside, err)
			}
		}
		o, err := readObject(within(from, end))
		if err != nil {
			return fmt.Errorf("collect: %w", err)
		}
		if o == nil {
			continue
		}
		more, err := t.needs(end, o)
		if err != nil {
			return fmt.Errorf("collect: %w", err)
		}
		for _, m := range more {
			if !done[m] {
				todo = append(todo, m)
			}
		}
	}
	return nil
}

// copyInto copies a file or a symbolic link and makes the folders above it.
func copyInto(from, to string) error {
	info, err := os.Lstat(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("not a file (%s)", info.Mode())
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, info.Mode().Perm())
}

// verify reports how many ELF files a tree has, or all that is wrong with them: the machine, or libraries that are
// missing.
func verify(t tree, arch string) (int, error) {
	machine, ok := machines[arch]
	if !ok {
		return 0, fmt.Errorf("--arch %s: want amd64 or arm64", arch)
	}
	var n int
	var errs []error
	err := t.eachFile(func(inside, file string) error {
		o, err := readObject(file)
		if err != nil || o == nil {
			return err
		}
		n++
		if o.machine != machine {
			errs = append(errs, fmt.Errorf("%s is for %s, not %s", inside, o.machine, machine))
			return nil
		}
		need, err := t.needs(inside, o)
		errs = append(errs, err)
		for _, at := range need {
			_, end, err := t.resolve(at)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s needs %w", inside, err))
				continue
			}
			lib, _, _ := t.lstat(end) // just resolved
			if other, err := readObject(lib); err != nil || other == nil || other.machine != machine {
				errs = append(errs, fmt.Errorf("%s needs %s, which is no %s library (%v)", inside, at, machine, err))
			}
		}
		return nil
	})
	if n == 0 && err == nil {
		err = errors.New("not one program: is it the right folder?")
	}
	return n, errors.Join(append(errs, err)...)
}

// eachFile visits the regular files of all folders in the order of names.
func (t tree) eachFile(visit func(inside, file string) error) error {
	for _, root := range t {
		err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			inside, err := filepath.Rel(root, file)
			if err != nil {
				return err
			}
			return visit("/"+filepath.ToSlash(inside), file)
		})
		if err != nil {
			return err
		}
	}
	return nil
}
