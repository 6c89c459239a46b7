package conflist

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/pkg/config/netconf"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/ipam"
)

// ErrFlat means that a .conflist file holds a single plugin's configuration, which runtimes refuse under that name.
var ErrFlat = errors.New("a flat configuration under the name .conflist, which container runtimes refuse: run " +
	"`headcni-daemon config convert FILE`, or rename it to .conf")

// Check says what is wrong with a conflist on disk: its form, and what the plugin would refuse. It is nil where
// there is none.
func Check(path string) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = wrap(b)
	switch {
	case errors.Is(err, errList):
		err = checkPlugins(b)
	case err == nil:
		err = ErrFlat
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// checkPlugins reads our plugins' configurations as the plugin itself will, with what the runtime adds to them (CNI
// specification 1.1.0, section 3).
func checkPlugins(list []byte) error {
	var keys struct {
		CNIVersion json.RawMessage              `json:"cniVersion"`
		Name       string                       `json:"name"`
		Plugins    []map[string]json.RawMessage `json:"plugins"`
	}
	if err := json.Unmarshal(list, &keys); err != nil {
		return fmt.Errorf("not a list of plugins with a name: %w", err)
	}
	if keys.Name == "" {
		return errors.New("name: missing; every network has one")
	}
	name, err := json.Marshal(keys.Name)
	if err != nil {
		return err
	}
	for _, p := range keys.Plugins {
		if string(p["type"]) != strconv.Quote(pluginType) {
			continue
		}
		p["name"] = name
		if keys.CNIVersion != nil {
			p["cniVersion"] = keys.CNIVersion
		}
		conf, err := json.Marshal(p)
		if err != nil {
			return err
		}
		c, err := netconf.Parse(conf)
		if err == nil && c.IPAM.Type == netconf.IPAMType {
			if c.IPAM.Raw == nil {
				c.IPAM.Raw = json.RawMessage("{}")
			}
			_, err = ipam.ParseConfig(c.Name, c.IPAM.Raw)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Convert makes a conflist of a flat configuration, in place. It reports whether there was something to do.
func Convert(path string) (bool, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	list, err := wrap(b)
	if errors.Is(err, errList) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("convert %s: %w", path, err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return false, err
	}
	return true, atomicfile.Write(path, list, info.Mode().Perm())
}

var errList = errors.New("a list already")

// wrap turns a single plugin's configuration into a list. The two keys of the list move up (CNI specification 1.1.0,
// section 1); all others stay with the plugin as they are.
func wrap(flat []byte) ([]byte, error) {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(flat, &keys); err != nil {
		return nil, fmt.Errorf("not a JSON object: %w", err)
	}
	if _, ok := keys["plugins"]; ok {
		return nil, errList
	}
	if _, ok := keys["type"]; !ok {
		return nil, errors.New("neither a list with plugins nor a plugin with a type")
	}
	list := struct {
		CNIVersion json.RawMessage              `json:"cniVersion,omitempty"`
		Name       json.RawMessage              `json:"name,omitempty"`
		Plugins    []map[string]json.RawMessage `json:"plugins"`
	}{keys["cniVersion"], keys["name"], []map[string]json.RawMessage{keys}}
	delete(keys, "cniVersion")
	delete(keys, "name")
	b, err := json.MarshalIndent(list, "", "  ")
	return append(b, '\n'), err
}

// Plugin says whether the program that the configuration names is in a folder, and can be run.
func Plugin(binDir string) error {
	info, err := os.Stat(filepath.Join(binDir, "headcni"))
	if err == nil && (info.IsDir() || info.Mode().Perm()&0o111 == 0) {
		err = fmt.Errorf("%s cannot be run (mode %04o)", filepath.Join(binDir, "headcni"), info.Mode().Perm())
	}
	if fs := (unix.Statfs_t{}); err == nil && unix.Statfs(filepath.Join(binDir, "headcni"), &fs) == nil && fs.Flags&unix.ST_NOEXEC != 0 {
		err = fmt.Errorf("%s cannot be run: its file system is mounted noexec (mount -o remount,exec)", filepath.Join(binDir, "headcni"))
	}
	if err != nil {
		return findings.Errorf(findings.PluginMissing, "the CNI plugin is missing: %w; run `headcni-daemon install`, or set cni.binDir to where it is", err)
	}
	return nil
}

// Others says which programs of others the configuration on disk needs that are not in a folder. A mesh that was taken off leaves its
// entry, and an IPAM plugin of the distribution's may be where the runtime does not look. It is nil where there is no configuration.
func Others(confDir, binDir string) error {
	b, err := os.ReadFile(Path(confDir))
	if err != nil {
		return nil // the part conflist says it
	}
	var l struct {
		Plugins []struct {
			Type string `json:"type"`
			IPAM struct {
				Type string `json:"type"`
			} `json:"ipam"`
		} `json:"plugins"`
	}
	if err := json.Unmarshal(b, &l); err != nil {
		return nil // the same
	}
	var lacking []string
	for _, p := range l.Plugins {
		for _, name := range []string{p.Type, p.IPAM.Type} {
			if name == "" || name == pluginType || name == netconf.IPAMType || slices.Contains(lacking, name) {
				continue
			}
			if _, err := os.Stat(filepath.Join(binDir, name)); errors.Is(err, fs.ErrNotExist) {
				lacking = append(lacking, name)
			}
		}
	}
	if len(lacking) == 0 {
		return nil
	}
	return findings.Errorf(findings.PluginMissing, "%s names %s, not in %s: where the runtime has no other folder with it, no pod starts or ends here; put it there, "+
		"take the entry of what was uninstalled out of the file, or set ipam.type to %s", Path(confDir), strings.Join(lacking, ", "), binDir, netconf.IPAMType)
}
