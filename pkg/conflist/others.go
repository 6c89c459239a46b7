package conflist

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/findings"
)

// disabledSuffix hides a configuration from runtimes: they read .conf, .conflist and .json.
const disabledSuffix = ".headcni-disabled"

// before lists the configurations in dir that a runtime reads before ours: it takes the first by name. Multus is meant to
// be first, and hands on to us.
func before(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir) // in the order of names
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the CNI configuration folder: %w", err)
	}
	var out []string
	for _, e := range entries {
		name := e.Name()
		if name >= paths.ConflistName {
			break
		}
		if ext := filepath.Ext(name); e.IsDir() || !slices.Contains([]string{".conf", ".conflist", ".json"}, ext) {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) || err == nil && isMultus(b) {
			continue
		}
		out = append(out, name)
	}
	return out, nil
}

// Before is what a runtime reads before ours in dir, for whoever looks before there is one of ours.
func Before(dir string) ([]string, error) { return before(dir) }

func isMultus(b []byte) bool {
	var c struct {
		Type    string
		Plugins []struct{ Type string }
	}
	if json.Unmarshal(b, &c) != nil {
		return false
	}
	multus := func(t string) bool { return strings.HasPrefix(t, "multus") }
	return multus(c.Type) || slices.ContainsFunc(c.Plugins, func(p struct{ Type string }) bool { return multus(p.Type) })
}

// StandFirst sees to it that the runtime uses our conflist: by hiding what comes before it where that was asked for, else by
// saying what to do. remember stores the names that are hidden before they are.
func StandFirst(dir string, exclusive bool, remember func(names []string) error) ([]string, error) {
	others, err := before(dir)
	if err != nil || len(others) == 0 {
		return nil, err
	}
	if !exclusive {
		return nil, findings.Errorf(findings.OtherCNI, "another CNI's configuration comes before ours in %s, so the runtime uses that: %s; uninstall the other CNI and "+
			"remove the file, or set cni.exclusive: true to have it hidden until uninstall", dir, strings.Join(others, ", "))
	}
	if err := remember(others); err != nil {
		return nil, err
	}
	var done []string
	for _, name := range others {
		path := filepath.Join(dir, name)
		if err := os.Rename(path, path+disabledSuffix); err != nil {
			return done, fmt.Errorf("hide another CNI's configuration: %w", err)
		}
		done = append(done, "hid "+path)
	}
	return done, atomicfile.SyncDir(dir)
}

// ShowHidden shows the hidden configurations again, but for those that have come back by themselves.
func ShowHidden(dir string, hidden []string) error {
	var errs []error
	for _, name := range hidden {
		path := filepath.Join(dir, name)
		_, err := os.Lstat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			if err := os.Rename(path+disabledSuffix, path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		case err == nil:
			errs = append(errs, atomicfile.Remove(path+disabledSuffix))
		default:
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
