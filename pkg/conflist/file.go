package conflist

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/pkg/config/paths"
)

// Path is the conflist's in the runtime's configuration folder.
func Path(confDir string) string { return filepath.Join(confDir, paths.ConflistName) }

// Stands reports whether there is one, whatever it says: pods may have been started.
func Stands(confDir string) bool {
	_, err := os.Lstat(Path(confDir))
	return err == nil
}

// Outdated reports whether a conflist of ours stands that gives pods addresses of other ranges than the node's, or whose gate does not wait for
// NetworkPolicies where policy says that these are enforced.
func Outdated(confDir string, own []netip.Prefix, policy bool) (bool, error) {
	b, err := os.ReadFile(Path(confDir))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read the conflist: %w", err)
	}
	var p plugin
	if json.Unmarshal(ownPlugin(b), &p) != nil || p.Gate == nil {
		return false, nil
	}
	waits := p.NetworkPolicy != nil && *p.NetworkPolicy
	return !slices.Equal(p.Gate.PodCIDRs, texts(own)) || policy && !waits, nil
}

// Sweep removes what a daemon that was killed left half-written.
func Sweep(confDir string) error {
	return errors.Join(atomicfile.Sweep(Path(confDir)), atomicfile.Sweep(originalPath()))
}

// originalPath is where a conflist that a person had put in our place is kept for uninstall.
func originalPath() string { return filepath.Join(paths.StateDir, "conflist.orig") }

// Write puts want in place, if it is not there already, and leaves what other programs have added to ours. A conflist of that name
// that is not ours is kept for Restore, after remember has stored its mode.
func Write(dir string, want []byte, remember func(os.FileMode) error) (changed bool, err error) {
	path := Path(dir)
	have, err := os.ReadFile(path)
	switch {
	case err == nil && isOurs(have):
		if want, err = keepOthers(have, want); err != nil {
			return false, fmt.Errorf("keep what others have added to %s: %w", path, err)
		}
		if sameJSON(have, want) {
			return false, nil
		}
	case err == nil:
		if err := keepOriginal(path, have, remember); err != nil {
			return false, err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return false, fmt.Errorf("read the conflist: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return false, fmt.Errorf("make the CNI configuration folder: %w; set cni.confDir to one that can be written", err)
	}
	err = atomicfile.Write(path, want, 0o644)
	if errors.Is(err, unix.EROFS) {
		err = fmt.Errorf("%w; set cni.confDir to one that can be written, and tell the runtime of it (conf_dir in containerd's configuration)", err)
	}
	return err == nil, err
}

func keepOriginal(path string, content []byte, remember func(os.FileMode) error) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if err := remember(info.Mode().Perm()); err != nil {
		return err
	}
	return atomicfile.Write(originalPath(), content, 0o600) // it may hold a key
}

// Restore takes ours away and puts the original back, with its mode. What somebody has put there since is theirs.
func Restore(dir string, mode os.FileMode) error {
	path := Path(dir)
	have, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil && !isOurs(have) {
		return atomicfile.Remove(originalPath()) // also where we were killed after it was put back
	}
	orig, err := os.ReadFile(originalPath())
	if errors.Is(err, fs.ErrNotExist) {
		return atomicfile.Remove(path)
	}
	if err != nil {
		return err
	}
	if mode == 0 {
		mode = 0o600 // the state that knew it was moved away; there may be a key in it
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := atomicfile.Write(path, orig, mode); err != nil {
		return err
	}
	return atomicfile.Remove(originalPath())
}
