package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/atomicfile"
)

// stateFile is in the folder of a world that was kept.
const stateFile = "world.json"

// World is a lab that outlives the process that built it.
type World struct {
	Dir  string
	Made time.Time
	// Kind says what the world is for, so that each program lists and ends its own only.
	Kind string
	// Name tells the world from the others of its kind and user.
	Name string
	// Path is the PATH on its machines.
	Path     string
	Machines []Inhabitant
	Pods     []Inhabitant
}

// Inhabitant is a machine or a pod, by the process that holds it.
type Inhabitant struct {
	Name string
	PID  int
	// Started is the process's start time in clock ticks since boot (proc_pid_stat(5), field 22): a PID can be reused.
	Started uint64
}

// Keep lets the world go on without us, until Down. pods are those to be found again by Enter. Where no name is given, or another
// has it, the world gets one. The Lab must not be used any more.
func (l *Lab) Keep(kind, name string, pods []*Pod) (World, error) {
	for _, m := range l.machines() {
		if m.line != nil {
			return World{}, fmt.Errorf("keep the lab: the wire of %s has a delay, which ends with this process", m.Name)
		}
	}
	w := World{Dir: l.Dir, Made: time.Now(), Kind: kind, Path: l.opt.path()}
	for _, m := range l.machines() {
		in, err := inhabitant(m.Name, m.holder.Process.Pid)
		if err != nil {
			return w, err
		}
		w.Machines = append(w.Machines, in)
	}
	for _, p := range pods {
		if p.Server == nil {
			continue
		}
		in, err := inhabitant(p.Name, p.Server.PID())
		if err != nil {
			return w, err
		}
		w.Pods = append(w.Pods, in)
	}
	if err := w.enlist(name); err != nil {
		return w, fmt.Errorf("write down that the lab is kept: %w", err)
	}
	for _, m := range l.machines() {
		if _, err := m.stdin.Write([]byte("keep\n")); err != nil {
			return w, fmt.Errorf("keep %s: %w", m.Name, err)
		}
	}
	return w, nil
}

// enlist gives the world a name that no other of its kind has, and writes it down. Another may be at the same.
func (w *World) enlist(name string) error {
	base := filepath.Dir(w.Dir)
	lock, err := lockFile(filepath.Join(base, "lock"), unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer lock.Close()
	others, err := kept(base, w.Kind)
	if err != nil {
		return err
	}
	taken := func(name string) bool {
		return slices.ContainsFunc(others, func(w World) bool { return w.Name == name })
	}
	w.Name = name
	for i := 1; w.Name == "" || taken(w.Name); i++ {
		w.Name = fmt.Sprintf("%s-%d", w.Kind, i)
	}
	b, err := json.MarshalIndent(w, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.WriteUnsynced(filepath.Join(w.Dir, stateFile), b, 0o600)
}

func inhabitant(name string, pid int) (Inhabitant, error) {
	started, err := startTime(pid)
	return Inhabitant{Name: name, PID: pid, Started: started}, err
}

// startTime is field 22 of /proc/PID/stat. The second field, the command's name in parentheses, may hold anything.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	s := string(b)
	fields := strings.Fields(s[strings.LastIndex(s, ")")+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("read the start time of process %d: %q", pid, s)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// Kept lists the worlds of this user and of one kind that were kept and have not ended, the newest last.
func Kept(kind string) ([]World, error) {
	// Who ends a world ends the processes that are named there.
	if err := checkBase(BaseDir()); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	return kept(BaseDir(), kind)
}

func kept(base, kind string) ([]World, error) {
	var worlds []World
	for _, dir := range worldDirs(base) {
		b, err := readPlain(filepath.Join(dir, stateFile))
		if errors.Is(err, fs.ErrNotExist) {
			continue // a lab that somebody is using
		}
		var w World
		if err == nil {
			err = json.Unmarshal(b, &w)
		}
		if err != nil {
			return nil, fmt.Errorf("read a kept world: %w", err)
		}
		if w.Kind == kind && inUse(dir) {
			worlds = append(worlds, w)
		}
	}
	slices.SortFunc(worlds, func(a, b World) int { return a.Made.Compare(b.Made) })
	return worlds, nil
}

// inUse tells whether a machine of a world lives: all hold its lock. It makes nothing: the world may be another user's.
func inUse(dir string) bool {
	lock, err := openPlain(filepath.Join(dir, "lock"))
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	defer lock.Close()
	return unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil
}

// readPlain reads a file that another user may have put there.
func readPlain(path string) ([]byte, error) {
	f, err := openPlain(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const most = 1 << 20
	return io.ReadAll(io.LimitReader(f, most))
}

func openPlain(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0) // a FIFO would block
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("open %s: not a regular file (%w)", path, errors.Join(err, fs.ErrInvalid))
	}
	return f, nil
}

// KeptByOthers says which users keep worlds of one kind, where this one may look into their folders.
func KeptByOthers(kind string) (users []string) {
	dirs, _ := filepath.Glob(baseDir("*")) // the pattern is well-formed
	for _, dir := range dirs {
		worlds, err := kept(dir, kind)
		if dir == BaseDir() || err != nil || len(worlds) == 0 {
			continue
		}
		name := strings.TrimPrefix(dir, baseDir(""))
		if u, err := user.LookupId(name); err == nil {
			name = u.Username
		}
		users = append(users, name)
	}
	return users
}

// Down ends every process of the world and removes its folder.
func (w World) Down(ctx context.Context) error {
	var errs []error
	for _, m := range w.Machines {
		errs = append(errs, m.kill(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// The machines hold the lock for as long as they live.
	return until(ctx, 10*time.Millisecond, nil, func() error {
		lock, err := lockFile(filepath.Join(w.Dir, "lock"), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // another lab, which began just now, has swept it away
		}
		if err != nil {
			return err
		}
		defer lock.Close()
		return removeWorld(w.Dir)
	})
}

// kill ends the process, if it is still the one that was meant, and waits until it has ended.
func (in Inhabitant) kill(ctx context.Context) error {
	fd, err := unix.PidfdOpen(in.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the process of %s: %w", in.Name, err)
	}
	defer unix.Close(fd)
	// Looked at after the descriptor is ours, which stays with this process whatever becomes of its number.
	if started, err := startTime(in.PID); err != nil || started != in.Started {
		return nil // it ended long ago
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end %s: %w", in.Name, err)
	}
	return until(ctx, 5*time.Millisecond, nil, func() error {
		// A pidfd can be read when its process has ended (pidfd_open(2)).
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if err == nil && n == 0 {
			err = fmt.Errorf("%s has not ended yet", in.Name)
		}
		return err
	})
}

// Names are those that Enter takes.
func (w World) Names() []string {
	var names []string
	for _, in := range append(w.Pods[:len(w.Pods):len(w.Pods)], w.Machines...) {
		names = append(names, in.Name)
	}
	return names
}

// Enter becomes a program in a pod or on a machine, a shell if there is none. It does not return where it succeeds.
func (w World) Enter(name string, argv []string) error {
	var at *Inhabitant
	for _, in := range append(w.Pods[:len(w.Pods):len(w.Pods)], w.Machines...) {
		if in.Name == name {
			at = &in
		}
	}
	if at == nil {
		return fmt.Errorf("no pod or machine named %q: there are %s", name, strings.Join(w.Names(), ", "))
	}
	if started, err := startTime(at.PID); err != nil || started != at.Started {
		return fmt.Errorf("%s of %s has ended; `headcnictl demo down %s` removes what is left", name, w.Name, w.Name)
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return fmt.Errorf("enter %s: %w; install util-linux", name, err)
	}
	if len(argv) == 0 {
		argv = []string{"bash", "--norc"}
	}
	args := []string{nsenter, "--target=" + strconv.Itoa(at.PID)}
	if os.Geteuid() != 0 { // the world lives in a user namespace
		args = append(args, "--user", "--preserve-credentials")
	}
	args = append(args, "--mount", "--uts", "--ipc", "--net", "--pid", "--wd", "--")
	args = append(args, argv...)
	env := append(cleanEnv(), "PATH="+w.Path, "HOME="+w.Dir, "PS1="+name+"# ")
	return fmt.Errorf("start nsenter: %w", unix.Exec(nsenter, args, env))
}
