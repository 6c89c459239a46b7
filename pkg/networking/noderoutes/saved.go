package noderoutes

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/headcni/headcni/internal/procfs"
	"github.com/headcni/headcni/internal/sysctl"
	"github.com/headcni/headcni/pkg/config/paths"
)

// Saved is what the host had before Sync changed it, for Remove. It marshals to JSON; its zero value means that
// nothing was changed.
type Saved struct {
	// BootID is the boot in which it was saved. A boot starts with the host's own values.
	BootID string `json:"bootID,omitempty"`
	// Sysctls are values by path below /proc/sys.
	Sysctls map[string]string `json:"sysctls,omitempty"`
	// Set are the sysctls that Sync changed, and to what. The rest of Sysctls follow from these in the kernel.
	Set map[string]string `json:"set,omitempty"`
}

func (s Saved) clone() Saved {
	s.Sysctls, s.Set = maps.Clone(s.Sysctls), maps.Clone(s.Set)
	return s
}

// forgetEarlierBoot forgets what was saved in an earlier boot.
func (n *Routes) forgetEarlierBoot() error {
	id, err := procfs.Read(paths.BootID)
	if err != nil {
		return fmt.Errorf("read the boot ID: %w", err)
	}
	if n.saved.BootID != id {
		n.saved = Saved{BootID: id}
	}
	return nil
}

// setSysctl changes a value after what it was is saved.
func (n *Routes) setSysctl(key, value string) error {
	if _, known := n.saved.Set[key]; !known {
		next := n.saved.clone()
		if next.Sysctls == nil {
			next.Sysctls, next.Set = map[string]string{}, map[string]string{}
		}
		for _, k := range append(dependentSysctls(key), key) {
			v, err := sysctl.Read(k)
			if err != nil {
				if k == key {
					return err
				}
				continue // its link has just been deleted
			}
			if _, known := next.Sysctls[k]; !known {
				next.Sysctls[k] = v
			}
		}
		next.Set[key] = value
		if err := n.save(next.clone()); err != nil {
			return fmt.Errorf("save the host's own value first: %w", err)
		}
		n.saved = next
	}
	return sysctl.Write(key, value)
}

// dependentSysctls are the sysctls that the kernel changes along with a switch for forwarding: each link's own switch, the one
// for links to come, and in IPv4 whether redirects are accepted (ip-sysctl.rst, ip_forward).
func dependentSysctls(key string) []string {
	var out []string
	for _, f := range families {
		if key != f.forwarding {
			continue
		}
		found, _ := filepath.Glob(filepath.Join(sysctl.Root, f.conf, "*", "forwarding")) // the pattern is well-formed
		for _, path := range found {
			if k := strings.TrimPrefix(path, sysctl.Root+"/"); k != key {
				out = append(out, k)
			}
		}
		if f.conf == "net/ipv4/conf" {
			out = append(out, "net/ipv4/conf/all/accept_redirects")
		}
	}
	return out
}

// restore puts the sysctls back. What somebody else has changed since stays.
func (n *Routes) restore() error {
	var errs []error
	kept := map[string]bool{}
	// Switches for forwarding first: writing them changes the sysctls that depend on them.
	for _, key := range slices.SortedFunc(maps.Keys(n.saved.Set), forwardingFirst) {
		now, err := sysctl.Read(key)
		switch {
		case errors.Is(err, os.ErrNotExist): // its link is gone
		case err != nil:
			errs = append(errs, fmt.Errorf("read sysctl: %w", err))
		case now != n.saved.Set[key]:
			for _, k := range dependentSysctls(key) {
				kept[k] = true
			}
		case now != n.saved.Sysctls[key]:
			if err := sysctl.Write(key, n.saved.Sysctls[key]); err != nil {
				errs = append(errs, fmt.Errorf("put sysctl back: %w", explain(err)))
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(n.saved.Sysctls)) {
		if _, done := n.saved.Set[key]; done || kept[key] {
			continue
		}
		now, err := sysctl.Read(key)
		if err == nil && now != n.saved.Sysctls[key] {
			err = sysctl.Write(key, n.saved.Sysctls[key])
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("put sysctl back: %w", explain(err)))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if len(n.saved.Set) == 0 {
		return nil
	}
	n.saved = Saved{BootID: n.saved.BootID}
	return n.save(n.saved.clone())
}

func forwardingFirst(a, b string) int {
	isSwitch := func(k string) int {
		for _, f := range families {
			if k == f.forwarding {
				return 0
			}
		}
		return 1
	}
	if d := isSwitch(a) - isSwitch(b); d != 0 {
		return d
	}
	return strings.Compare(a, b)
}
