// Package install puts the CNI plugins into the folder where the container runtime looks for them, and takes them out again.
package install

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/internal/filelock"
	"github.com/headcni/headcni/internal/trusted"
	"github.com/headcni/headcni/pkg/config/paths"
)

// borrowed plugins are not ours: where the node has its own, those stay. Ours come last, so that what they may call is
// there before them. loopback is what containerd itself runs in every pod; on K3s without its flannel nobody else brings it.
var (
	borrowedPlugins = []string{"host-local", "loopback", "portmap"}
	ownPlugins      = []string{"headcni-ipam", "headcni"}
)

// installWait is how long another installation into the same folder may take.
const installWait = 30 * time.Second

// installed is what we put where: path -> checksums that the file may have by our doing. There are two while it is being
// replaced, for whoever comes after a kill in between.
type installed map[string][]string

// installedPath is where it is noted what is ours.
func installedPath() string { return filepath.Join(paths.StateDir, "plugins.json") }

func loadInstalled() (installed, error) {
	b, err := os.ReadFile(installedPath())
	if errors.Is(err, fs.ErrNotExist) {
		return installed{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read which plugins are ours: %w", err)
	}
	var in installed
	if err := json.Unmarshal(b, &in); err != nil {
		return nil, fmt.Errorf("read which plugins are ours: %s: %w; remove the file to start afresh (a host-local, loopback or portmap that "+
			"came with us then stays at uninstall)", installedPath(), err)
	}
	if in == nil {
		in = installed{}
	}
	return in, nil
}

func (in installed) save() error {
	b, err := json.MarshalIndent(in, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(installedPath(), append(b, '\n'), 0o600)
}

// Plugins puts the plugins of folder from into folder to, each whole or not at all, and returns a line for each that it
// looked at. A host-local, loopback or portmap that somebody else put there stays.
func Plugins(ctx context.Context, from, to string) ([]string, error) {
	unlock, err := lockFolder(ctx, to)
	if err != nil {
		return nil, fmt.Errorf("install plugins: %w", err)
	}
	defer unlock()
	if err := checkSource(from, to); err != nil {
		return nil, fmt.Errorf("install plugins: %w", err)
	}
	if err := trusted.MkdirAll(paths.StateDir, 0o755); err != nil {
		return nil, fmt.Errorf("install plugins: %w", err)
	}
	in, err := loadInstalled()
	if err != nil {
		return nil, fmt.Errorf("install plugins: %w", err)
	}
	if err := sweepTemps(to); err != nil {
		return nil, fmt.Errorf("install plugins: %w", explain(err, to))
	}
	var lines []string
	for _, name := range slices.Concat(borrowedPlugins, ownPlugins) {
		line, err := in.plugin(filepath.Join(from, name), filepath.Join(to, name), slices.Contains(ownPlugins, name))
		if err != nil {
			return lines, fmt.Errorf("install %s: %w", filepath.Join(to, name), explain(err, to))
		}
		lines = append(lines, line)
	}
	return lines, nil
}

// checkSource makes sure that nothing is begun that cannot be ended.
func checkSource(from, to string) error {
	for _, name := range ownPlugins {
		if info, err := os.Stat(filepath.Join(from, name)); err != nil || !info.Mode().IsRegular() {
			return fmt.Errorf("%s has no plugin %s: give --from the folder with the plugins (bin after `make build`, %s in the image)",
				from, name, paths.ImageCNIDir)
		}
	}
	a, err := os.Stat(from)
	if err != nil {
		return err
	}
	if b, err := os.Stat(to); err == nil && os.SameFile(a, b) {
		return fmt.Errorf("%s is where the plugins go: give --from another folder to take them from", to)
	}
	return nil
}

// plugin makes file to what file from is.
func (in installed) plugin(from, to string, own bool) (string, error) {
	content, err := os.ReadFile(from)
	if errors.Is(err, fs.ErrNotExist) && !own {
		return to + ": not among the plugins to install", nil
	}
	if err != nil {
		return "", err
	}
	want := checksum(content)
	have, mode, err := fileChecksum(to)
	if err != nil {
		return "", err
	}
	// have is "" for what is not there and for what is no regular file, such as K3s' links to its own.
	if mode != 0 && !own && !slices.Contains(in[to], have) {
		return to + ": left as it is, because somebody else put it there", nil
	}
	if have == want && mode == pluginMode {
		return to + ": up to date", in.settle(to, want)
	}
	if !slices.Contains(in[to], want) {
		in[to] = append(in[to], want)
		if err := in.save(); err != nil {
			return "", err
		}
	}
	// It is not synced: what a power cut takes is put back at the next start of the pod or unit.
	if err := atomicfile.WriteUnsynced(to, content, pluginMode); err != nil {
		return "", err
	}
	return to + ": installed", in.settle(to, want)
}

// settle notes that the file at path is whole, with this checksum.
func (in installed) settle(path, sum string) error {
	if slices.Equal(in[path], []string{sum}) {
		return nil
	}
	in[path] = []string{sum}
	return in.save()
}

const pluginMode = fs.FileMode(0o755)

func checksum(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// fileChecksum returns a file's checksum and mode, mode 0 where there is none and no checksum for anything but a file.
func fileChecksum(path string) (sum string, mode fs.FileMode, err error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", 0, nil
	case err != nil:
		return "", 0, err
	case info.IsDir():
		return "", 0, fmt.Errorf("%s is a folder: remove it", path)
	case !info.Mode().IsRegular():
		return "", info.Mode(), nil
	}
	b, err := os.ReadFile(path)
	return checksum(b), info.Mode(), err
}

// lockFolder keeps other installations out of a folder. The kernel drops the lock with the process.
func lockFolder(ctx context.Context, dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, explain(err, dir)
	}
	if err := filelock.Lock(ctx, f, installWait); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s, which another installation seems to use: %w", dir, err)
	}
	return func() { f.Close() }, nil
}

// sweepTemps removes what killed installations into a folder left. The caller holds the folder's lock.
func sweepTemps(dir string) error {
	errs := []error{atomicfile.Sweep(installedPath())}
	for _, name := range slices.Concat(borrowedPlugins, ownPlugins) {
		errs = append(errs, atomicfile.Sweep(filepath.Join(dir, name)))
	}
	return errors.Join(errs...)
}

// explain says what to do about a folder for plugins that cannot be used, or about that of our own notes.
func explain(err error, dir string) error {
	if p := (*fs.PathError)(nil); errors.As(err, &p) && strings.HasPrefix(p.Path, paths.StateDir+"/") && !strings.HasPrefix(p.Path, dir+"/") {
		return fmt.Errorf("%w; make room in %s, which must be writable: what we put on the host is noted there first", err, paths.StateDir)
	}
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: make room on the file system of %s; what was there before is still there", err, dir)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%w: set cni.binDir to the folder where the container runtime looks for plugins (%s), make that folder if it is not "+
			"there yet, and in a pod mount the host's at the same path", err, knownFolders())
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: set cni.binDir to a folder that can be written and where the container runtime looks for plugins (%s), or tell "+
			"the runtime of another (bin_dir in containerd's configuration); in a pod mount the host's folder writable", err, knownFolders())
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: run it as root", err)
	}
	return err
}

// knownFolders tells who has plugins where, for messages.
func knownFolders() string {
	known := []string{"usually " + paths.CNIBinDir}
	for _, d := range paths.Distributions {
		if d.BinDir != paths.CNIBinDir {
			known = append(known, d.Name+": "+d.BinDir)
		}
	}
	return strings.Join(known, "; ")
}

// Remove takes away what Plugins put anywhere, but not a host-local, loopback or portmap that somebody has replaced
// since. Where a container runtime will still ask for plugins of ours, to delete pods, it leaves all of them, with the note of
// what is ours, and says so: without them those pods could never be deleted (docs/adr/0018-plugins-that-stay.md). runtime is awaited's.
func Remove(ctx context.Context, log *slog.Logger, runtime string) error {
	in, err := loadInstalled()
	if err != nil {
		return err
	}
	if waiting := awaited(runtime); len(in) > 0 && len(waiting) > 0 {
		log.Warn("the CNI plugins stay for now: the container runtime needs them to delete the pods that it still has from before; "+
			"end these pods, then run the same command again, or delete the files", "attachments", waiting, "files", slices.Sorted(maps.Keys(in)))
		return nil
	}
	var errs []error
	for path, sums := range in {
		if err := removePlugin(ctx, path, sums); err != nil {
			errs = append(errs, fmt.Errorf("remove %s: %w", path, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return atomicfile.Remove(installedPath())
}

func removePlugin(ctx context.Context, path string, sums []string) error {
	dir := filepath.Dir(path)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	unlock, err := lockFolder(ctx, dir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := sweepTemps(dir); err != nil {
		return err
	}
	sum, mode, err := fileChecksum(path)
	if err != nil || mode == 0 {
		return err
	}
	if slices.Contains(ownPlugins, filepath.Base(path)) || slices.Contains(sums, sum) {
		return atomicfile.Remove(path)
	}
	return nil
}

// Source is where plugins are taken from if nothing else is said: the image's, else the folder of our program.
func Source() (string, error) {
	if _, err := os.Stat(paths.ImageCNIDir); err == nil {
		return paths.ImageCNIDir, nil
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	return filepath.Dir(self), nil
}

// Sweep removes a note that was being written when an installation was killed.
func Sweep() error { return atomicfile.Sweep(installedPath()) }
